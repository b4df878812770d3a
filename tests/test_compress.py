"""Running recipes: whole ones, stopped ones, ones in two processes, ones that cannot work."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import recipes
import tiny
import train_worker
from handheld.errors import CheckpointError, HandheldError, OutputError, UsageError
from handheld_export.checkpoint import Checkpoint
from handheld_export.compress import recipe, run
from handheld_export.compress.data import Folder
from handheld_export.compress.engine import Machine, TrainingError, Watch, read_log
from handheld_export.compress.painter import Painter, weights
from handheld_export.compress.steps import distill


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return recipes.pictures(tmp_path_factory.mktemp("pictures") / "data")


@pytest.fixture(scope="module")
def machine():
    return Machine(precision="no", cpu=True)


@pytest.fixture
def compress(tmp_path, sdxl, pictures, machine):
    def compress(*steps, output="student", checkpoint=None, data=None, **more):
        path = recipes.write(tmp_path / "recipe.toml", *steps)
        return run.compress(
            checkpoint or Checkpoint(sdxl),
            recipe.read(path),
            tmp_path / output,
            dataset=Folder(data or pictures),
            machine=machine,
            work=tmp_path / "work",
            **more,
        )

    return compress


def losses(work: Path, kind: str) -> list[dict[str, float]]:
    """Entries of a step's log, the last one of each training step."""
    (folder,) = (p for p in work.glob(f"*{kind}-*") if (p / "log.jsonl").exists())
    found = {int(e["step"]): e for e in read_log(folder)}
    return [{k: v for k, v in found[i].items() if k != "seconds_per_step"} for i in sorted(found)]


# --- whole recipes ---------------------------------------------------------------------------


def test_a_student_records_its_history_and_draws_what_was_trained(compress, tmp_path, sdxl):
    student = compress(recipes.warmup(), recipes.dmd(), recipes.quantize(), recipes.distill())
    assert student.steps == ["warmup", "dmd", "quantize", "distill"]
    written = Checkpoint(tmp_path / "student")
    assert [e["step"] for e in written.settings["history"]] == student.steps
    assert written.settings["recipe"] == "test"
    assert written.settings["sampler"] == "dmd"
    assert written.settings["timesteps"] == [399]
    for entry in written.settings["history"]:
        assert entry["settings"]
        assert entry["seconds"] >= 0
        assert entry["machine"]["torch"]
    assert written.unet.quantized == set(student.quantized)
    for layer, codes in student.quantized.items():
        assert np.array_equal(written.unet.quantized_weight(layer).codes, codes.codes)
    painter = Painter(written)
    noise = torch.randn(2, painter.channels, painter.side, painter.side)
    drawn = painter.draw(["a red robot", "a blue robot"], noise)
    assert drawn.shape == (2, 3, 16, 16)
    assert drawn.dtype == torch.uint8
    assert Checkpoint(sdxl).unet.quantized == frozenset()


def test_the_regression_beside_dmd_weighs_colors_as_the_warm_up_or_as_told(compress):
    def regression(*lines):
        told = recipes.dmd(1, "[399]", "regression = 2.0", *lines)
        return compress(recipes.warmup(1), told).history[-1]["losses"]["regression"]

    plain = regression()
    assert regression("color = 0.0") == plain  # the warm-up has none
    assert regression("color = 5.0") > plain


def test_trimmed_students_keep_the_weights_that_stay(compress, tmp_path, sdxl):
    student = compress(recipes.trim())
    teacher = weights(Checkpoint(sdxl).unet)
    assert student.unet_config["mid_block_type"] is None
    entry = student.history[-1]
    assert entry["params"][1] < 0.8 * entry["params"][0]
    assert entry["macs"][1] < entry["macs"][0]
    for name, value in student.unet.items():
        if name.startswith(("down_blocks.0", "conv_in", "time_embedding")):
            assert torch.equal(value, teacher[name])


def test_importance_meets_a_budget(compress):
    student = compress(recipes.step("trim", "remove = 0.25", "calibration = 2"))
    before, after = student.history[-1]["params"]
    assert after <= 0.75 * before


def test_importance_meets_a_budget_of_macs(compress):
    student = compress(recipes.step("trim", "remove = 0.2", 'of = "macs"', "calibration = 2"))
    before, after = student.history[-1]["macs"]
    assert after <= 0.8 * before


def test_distilling_brings_a_trimmed_student_closer_to_its_reference(compress, tmp_path):
    compress(recipes.trim(), recipes.distill(40))
    first, *_, last = losses(tmp_path / "work", "distill")
    assert last["output"] < 0.8 * first["output"]


def test_a_tiny_decoder_replaces_the_vae(compress, tmp_path):
    student = compress(recipes.decoder(30))
    assert student.vae_config["_class_name"] == "AutoencoderTiny"
    assert all(k.startswith("decoder.") for k in student.vae)
    whole, own = student.history[-1]["macs"]
    assert own < whole
    first, *_, last = losses(tmp_path / "work", "decoder")
    assert last["loss"] < first["loss"]
    painter = Painter(Checkpoint(tmp_path / "student"))
    assert painter.decode(torch.randn(1, 4, 8, 8)).shape == (1, 3, 16, 16)


def test_bits_follow_a_budget(compress, tmp_path):
    student = compress(
        recipes.quantize(
            'linear = ["int2", "int4"]', 'convolution = ["int4", "int8"]', "bits = 6.0"
        )
    )
    entry = student.history[-1]
    assert entry["bits_per_weight"] <= 6.0
    assert len(entry["layers"]) > 1


def test_bytes_follow_a_budget(compress, tmp_path):
    grids = 'linear = ["int2", "int4"]', 'convolution = ["int4", "int8"]'
    whole = compress(recipes.quantize(*grids, "bits = 8.0"))
    weights = sum(q.codes.size for q in whole.quantized.values())
    budget = 0.7 * weights / 1e6
    student = compress(recipes.quantize(*grids, f"megabytes = {budget:.6f}"), output="less")
    entry = student.history[-1]
    assert entry["bits_per_weight"] / 8 * weights <= budget * 1e6 * 1.000001
    assert len(entry["layers"]) > 1


def test_a_student_of_several_steps_says_when_it_is_evaluated_and_is_drawn_so(compress, tmp_path):
    student = compress(recipes.dmd(timesteps="[999, 499]"))
    assert student.settings["timesteps"] == [999, 499]
    assert student.settings["steps"] == 2
    assert [s.timestep for s in Painter(Checkpoint(tmp_path / "student")).plan] == [999, 499]


def test_a_multi_step_student_is_trained_where_its_error_is(compress, monkeypatch):
    trained = []
    found = distill.by_error

    def watched(*given, **more):
        trained.append(found(*given, **more))
        return trained[-1]

    monkeypatch.setattr(distill, "by_error", watched)
    student = compress(recipes.quantize(), recipes.distill(2, "error_aware = true"))
    assert student.steps == ["quantize", "distill"]
    (levels,) = trained
    often = torch.bincount(levels, minlength=1000).reshape(10, 100).sum(dim=1)
    assert int(often.sum()) == 1000
    assert int(often.min()) >= 45  # half of the draws stay uniform
    assert int(often.max()) > 105


def test_finished_steps_are_not_run_again_and_recipes_share_them(compress, tmp_path):
    said: list[str] = []
    watch = Watch(stage=said.append)
    compress(recipes.warmup(), recipes.trim(), watch=watch)
    compress(recipes.warmup(), recipes.quantize(), watch=watch, output="other")
    assert "warmup: done before" in said
    one, other = (Checkpoint(tmp_path / n) for n in ("student", "other"))
    assert one.settings["history"][0] == other.settings["history"][0]


def test_grids_of_pictures_are_drawn_on_the_way(compress, tmp_path):
    compress(recipes.warmup(4), sample_every=2)
    drawn = sorted(p.name for p in (tmp_path / "work").glob("1-warmup-*/samples/*"))
    assert drawn == ["000002.png", "000004.png"]
    compress(recipes.decoder(2), sample_every=2, output="tiny")
    assert len(list((tmp_path / "work").glob("decoder-*/samples/000002.png"))) == 1


def test_logs_are_written_for_tensorboard_too(compress, tmp_path):
    pytest.importorskip("tensorboard")
    compress(recipes.warmup(2))
    assert list((tmp_path / "work").glob("1-warmup-*/tensorboard/events*"))


# --- what cannot work ------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(compress, tmp_path):
    with pytest.raises(TrainingError, match=r"of 'generator' is (nan|inf)") as error:
        compress(recipes.warmup(400, lr=1e30))
    assert error.value.exit_code == 1
    (kept,) = (tmp_path / "work").glob("1-warmup-*/checkpoint.pt")
    state = torch.load(kept, weights_only=True)
    assert state["step"] >= 1
    assert all(torch.isfinite(v).all() for v in state["models"]["generator"].values())
    assert not (tmp_path / "student").exists()


def test_budgets_that_cannot_be_met_name_what_would_do(compress):
    with pytest.raises(UsageError, match=r"cannot be met.*bits per weight") as error:
        compress(recipes.quantize("bits = 1.0"))
    assert error.value.field == "steps[0]: quantize.bits"
    with pytest.raises(UsageError, match="nothing is left to trim"):
        compress(recipes.step("trim", "remove = 0.99", "calibration = 1"))


def test_layers_that_are_kept_stay_in_float(compress):
    kept = 'keep = ["up_blocks.*.conv_shortcut"]'
    student = compress(recipes.quantize('linear = ["int4"]', 'convolution = ["int8"]', kept))
    layers = [n for n in student.unet if n.endswith("conv_shortcut.weight")]
    assert {n for n in layers if n.startswith("up_blocks")}
    for name in layers:
        coded = name.removesuffix(".weight") in student.quantized
        assert coded == name.startswith("down_blocks"), name
    with pytest.raises(UsageError, match="matches no layer") as error:
        compress(recipes.quantize('keep = ["up_blocks.9.*"]'))
    assert error.value.field == "steps[0]: quantize.keep"


def test_trims_that_do_not_fit_are_refused(compress):
    with pytest.raises(UsageError, match="does not fit") as error:
        compress(recipes.step("trim", "pairs = [9, 1]"))
    assert error.value.field == "steps[0]: trim.pairs"


def test_a_picture_without_a_caption_is_named(compress, tmp_path):
    data = recipes.pictures(tmp_path / "data")
    (data / "03.txt").unlink()
    with pytest.raises(UsageError, match=r"03\.png.*no caption"):
        compress(recipes.warmup(), data=data)


@pytest.mark.parametrize("raw", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_a_picture_that_does_not_decode_is_named(compress, tmp_path, raw):
    data = recipes.pictures(tmp_path / "data")
    (data / "05.png").write_bytes(raw)
    with pytest.raises(UsageError, match=r"05\.png.*decoded"):
        compress(recipes.warmup(), data=data)


def test_shards_are_read_like_folders(compress, tmp_path, pictures):
    import tarfile

    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "0000.tar", "w") as tar:
        for path in sorted(pictures.iterdir()):
            tar.add(path, path.name)
    plain = list(Folder(pictures).items(12, 16))
    packed = list(Folder(shards).items(12, 16))
    assert [c for _, c in plain] == [c for _, c in packed]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(plain, packed, strict=True))
    with tarfile.open(shards / "0001.tar", "w") as tar:
        tar.add(pictures / "03.png", "03.png")
    with pytest.raises(UsageError, match=r"0001\.tar.*no caption"):
        list(Folder(shards).items(20, 16))
    (shards / "0001.tar").write_bytes(b"no tar")
    with pytest.raises(UsageError, match=r"0001\.tar"):
        list(Folder(shards).items(20, 16))


def test_quantized_checkpoints_are_refused(compress, tmp_path):
    compress(recipes.quantize())
    with pytest.raises(CheckpointError, match="quantized already"):
        compress(recipes.warmup(), checkpoint=Checkpoint(tmp_path / "student"), output="again")


def test_what_is_in_the_way_is_not_overwritten(compress, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="in the way"):
        compress(recipes.trim())
    assert (tmp_path / "student" / "thesis.txt").exists()
    assert not (tmp_path / "work").exists()


def test_other_checkpoints_are_not_overwritten_the_teacher_least(compress, tmp_path, sdxl):
    import shutil

    teacher = shutil.copytree(sdxl, tmp_path / "teacher")
    with pytest.raises(OutputError, match="the checkpoint to compress"):
        compress(recipes.trim(), checkpoint=Checkpoint(teacher), output="teacher")
    shutil.copytree(sdxl, tmp_path / "other")
    with pytest.raises(OutputError, match="no student"):
        compress(recipes.trim(), output="other")
    compress(recipes.trim())
    compress(recipes.trim())


def test_a_checkpoint_without_settings_gives_a_student(compress, tmp_path, sdxl):
    import shutil

    plain = shutil.copytree(sdxl, tmp_path / "plain")
    (plain / "handheld.json").unlink()
    compress(recipes.trim(), checkpoint=Checkpoint(plain))
    assert "what `handheld export` is told" in (tmp_path / "student" / "README.md").read_text()


def test_what_configurations_tell_is_told_before_training(compress, tmp_path):
    with pytest.raises(UsageError, match="cannot be met"):
        compress(recipes.warmup(), recipes.quantize("bits = 1.0"))
    assert not (tmp_path / "work").exists()


def test_one_run_trains_in_a_folder(compress, tmp_path):
    from handheld.files import locked

    compress(recipes.warmup(2))
    (folder,) = (tmp_path / "work").glob("1-warmup-*")
    (folder / "student.pt").unlink()
    with locked(folder), pytest.raises(UsageError, match="another run"):
        compress(recipes.warmup(2))
    compress(recipes.warmup(2))


def test_fewer_pictures_than_asked_for_are_counted_as_they_are(compress, tmp_path):
    data = recipes.pictures(tmp_path / "few", count=5)
    said: list[str] = []
    compress(recipes.warmup(2), data=data, watch=Watch(stage=said.append))
    assert any("5 pictures, fewer than the recipe's 12" in s for s in said)
    with pytest.raises(UsageError, match="leave none"):
        compress(recipes.decoder().replace("held_out = 4", "held_out = 5"), data=data)


def test_a_shard_without_pictures_is_refused(compress, tmp_path):
    import tarfile

    folder = tmp_path / "empty"
    folder.mkdir()
    tarfile.open(folder / "0000.TAR", "w").close()
    with pytest.raises(UsageError, match="no captioned picture"):
        compress(recipes.warmup(2), data=folder)


def test_matching_and_error_aware_need_a_student_that_has_them(compress):
    with pytest.raises(UsageError, match="only a student of DMD"):
        compress(recipes.trim(), recipes.distill(2, matching=1.0))
    with pytest.raises(UsageError, match="one timestep"):
        compress(recipes.warmup(1), recipes.trim(), recipes.distill(2, "error_aware = true"))


def test_a_broken_training_checkpoint_is_named(compress, tmp_path):
    with pytest.raises(TrainingError):
        compress(recipes.warmup(400, lr=1e30))
    (kept,) = (tmp_path / "work").glob("1-warmup-*/checkpoint.pt")
    kept.write_bytes(b"half")
    with pytest.raises(HandheldError, match=r"checkpoint\.pt.*remove it"):
        compress(recipes.warmup(400, lr=1e30))


# --- stopping and going on -------------------------------------------------------------------

RECIPE = (
    recipes.warmup(8),
    recipes.dmd(6),
    recipes.trim(),
    recipes.quantize(),
    recipes.distill(6, matching=1.0),
    recipes.decoder(8),
)
TRAINED = ("warmup", "dmd", "distill", "decoder")


# Its children have torch already; a new Python would take ten seconds to import it.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["handheld_export.lowering", "handheld_export.compress.run"])


def spawn(*given):
    """Run a recipe in a process that a test may kill."""
    recipe_path, *_, work = given
    log = recipe_path.with_name(f"{work.name}.log")
    process = FORKED.Process(target=train_worker.logged, args=(log, *given))
    process.start()
    return process


def side_by_side(*given):
    """Run a recipe in two processes that train together, started as torchrun starts them."""
    config = LaunchConfig(
        1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver",
        max_restarts=0,
    )  # fmt: skip
    taken = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
    handlers = {number: signal.getsignal(number) for number in taken}
    try:
        elastic_launch(config, train_worker.main)(*given)
    finally:  # it leaves its own
        for number, handler in handlers.items():
            signal.signal(number, handler)


def seldom_saved(*steps):
    return tuple(s.replace("save_seconds = 0.001", "save_seconds = 1000") for s in steps)


def once(process, happened):
    """Wait until something has happened while a process runs."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.is_alive() and not happened():
        time.sleep(0.005)


@pytest.mark.slow
def test_a_run_that_was_killed_in_each_of_its_steps_goes_on_to_the_bit(tmp_path, sdxl, pictures):
    given = recipes.write(tmp_path / "recipe.toml", *RECIPE), sdxl, pictures
    train_worker.main(*given, tmp_path / "whole")
    for name in TRAINED:

        def trains(name=name):
            logs = list((tmp_path / "cut").glob(f"*{name}-*/log.jsonl"))
            return logs and len(logs[0].read_text().splitlines()) >= 3

        process = spawn(*given, tmp_path / "cut")
        once(process, trains)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "cut.log").read_text()[-3000:]
        assert not (tmp_path / "cut-student").exists()
    train_worker.main(*given, tmp_path / "cut")
    for name in TRAINED:
        assert losses(tmp_path / "cut", name) == losses(tmp_path / "whole", name)
    one, other = (Checkpoint(tmp_path / f"{w}-student") for w in ("whole", "cut"))
    assert one.unet_sha256 == other.unet_sha256
    assert one.vae_sha256 == other.vae_sha256


@pytest.mark.slow
def test_an_interrupted_run_ends_its_step_and_goes_on_to_the_bit(tmp_path, sdxl, pictures):
    steps = seldom_saved(recipes.dmd(12))
    given = recipes.write(tmp_path / "recipe.toml", *steps), sdxl, pictures
    train_worker.main(*given, tmp_path / "whole")
    reached = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = spawn(*given, tmp_path / "cut")

        def goes_on(reached=reached):
            logs = list((tmp_path / "cut").glob("*dmd-*/log.jsonl"))
            return logs and len(logs[0].read_text().splitlines()) > reached

        once(process, goes_on)
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode not in (0, -signal.SIGTERM)
        (kept,) = (tmp_path / "cut").glob("*dmd-*/checkpoint.pt")
        before, reached = reached, torch.load(kept, weights_only=True)["step"]
        assert before < reached < 12
    train_worker.main(*given, tmp_path / "cut")
    assert losses(tmp_path / "cut", "dmd") == losses(tmp_path / "whole", "dmd")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dmd", "quantized"])
def test_two_processes_train_as_one_does(tmp_path, sdxl, pictures, kind):
    steps = {
        "dmd": seldom_saved(recipes.dmd(20)),
        # At rates that train well: at higher ones a rounding error flips a code and grows.
        "quantized": seldom_saved(recipes.trim(), recipes.quantize(), recipes.distill(20, lr=2e-5)),
    }[kind]
    name = "distill" if kind == "quantized" else kind
    given = recipes.write(tmp_path / "recipe.toml", *steps), sdxl, pictures
    train_worker.main(*given, tmp_path / "one")
    one = losses(tmp_path / "one", name)
    assert len(one) == 20
    for fsdp in (False, True):
        work = tmp_path / f"two-{fsdp}"
        side_by_side(*given, work, fsdp)
        two = losses(work, name)
        assert len(two) == 20
        worst = max(
            abs(a[k] - b[k]) / max(1.0, abs(a[k])) for a, b in zip(one, two, strict=True) for k in a
        )
        assert worst <= 1e-4, fsdp


# --- dry runs --------------------------------------------------------------------------------


def dry(*arguments):
    from handheld.cli import run as cli

    return cli(["compress", *arguments, "--dry-run"])


@pytest.mark.parametrize("stack", recipe.STACKS)
def test_sdxl_is_planned_without_weights(stack, capsys):
    code = dry("sdxl", "--stack", stack, "--devices", "8", "--fsdp", "--json")
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report["estimate"] is True
    assert report["before"]["unet_params"] == 2_567_463_684
    last = report["steps"][-1]
    if stack == "stack2":
        assert 0.5 <= last["unet_params"] / 2_567_463_684 <= 0.6
        assert 0.5 <= last["unet_macs"] / report["before"]["unet_macs"] <= 0.6
    if stack == "stack3":
        assert last["times_smaller_than_fp16"] >= 7.5
    assert set(last["target_bytes"]) == {"litert-cpu", "executorch-xnnpack"}
    assert all(r["device_bytes"] > 0 for r in report["steps"])


def test_what_does_not_fit_is_refused_with_what_would(capsys):
    assert dry("sdxl", "--stack", "stack1") == 2
    assert "--devices 4 --fsdp" in capsys.readouterr().err
    assert dry("sdxl", "--stack", "stack1", "--devices", "7") == 2
    assert "does not divide" in capsys.readouterr().err
    assert dry("nowhere", "--stack", "stack1") == 2
    assert "no configurations" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--stack", "stack1", "--recipe", "r.toml"),
        ("--stack", "stack7"),
        ("--stack", "stack1", "--devices", "0"),
        ("--stack", "stack1", "--tflops", "nan"),
        ("--stack", "stack1", "--precision", "fp8"),
        ("--stack", "stack1", "--size", "511"),
        ("--recipe", "missing.toml"),
    ],
)
def test_bad_arguments_exit_with_two(arguments, capsys):
    assert dry("sdxl", *arguments) == 2
    assert "error:" in capsys.readouterr().err


def test_the_command_makes_a_student(tmp_path, sdxl, pictures, capsys):
    from handheld.cli import run as cli

    path = recipes.write(tmp_path / "r.toml", recipes.warmup(2), recipes.quantize())
    code = cli(
        ["compress", str(sdxl), "--recipe", str(path), "-o", str(tmp_path / "out"), "--data",
         str(pictures), "--work", str(tmp_path / "work"), "--cpu", "--precision", "no", "--json"]
    )  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert code == 0, report
    assert [e["step"] for e in report["history"]] == ["warmup", "quantize"]
    assert Checkpoint(tmp_path / "out").unet.quantized


# --- what ships ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["litert-cpu", "executorch-xnnpack"])
def test_what_was_trained_is_what_ships(compress, tmp_path, target):
    """Low-bit convolutions and a tiny decoder included."""
    from handheld_export.export import Options, export

    grids = ('linear = ["int2"]', 'convolution = ["int2"]', 'embedding = ["int8"]')
    source = tiny.write_checkpoint(
        tmp_path / "source", tiny.SMALLEST, tiny.KL, steps=1, prompts=["a small red robot"]
    )
    steps = recipes.dmd(2), recipes.quantize(*grids), recipes.decoder(4)
    compress(*steps, checkpoint=Checkpoint(source))
    student = Checkpoint(tmp_path / "student")
    manifest = export(student, Options(target=target, precision="int8"), tmp_path / "bundle")
    assert manifest.verification.student_snr_db >= 35
    assert {a.component for a in manifest.artifacts} == {"unet", "decoder"}
    held = [a.held for a in manifest.artifacts if a.held]
    assert held
    assert all(name.startswith("int2 as int") for h in held for name in h)


def test_layers_that_eight_bits_harm_most_compute_in_float(compress, tmp_path):
    from handheld_export.export import Options, export

    source = tiny.write_checkpoint(
        tmp_path / "source", tiny.SMALLEST, tiny.KL, steps=1, prompts=["a small red robot"]
    )
    steps = recipes.dmd(2), recipes.quantize(), recipes.decoder(4)
    last = recipes.step(
        "activations", "unet_db = 90", "decoder_db = 90", "most = 0.9", "calibration = 2"
    )
    db = {}
    for name, more in (("plain", ()), ("mixed", (last,))):
        student = compress(*steps, *more, checkpoint=Checkpoint(source), output=name)
        written = Checkpoint(tmp_path / name)
        found = student.float_inputs
        for kind, component in (("unet", written.unet), ("vae", written.vae)):
            assert component.float_inputs == set(found.get(kind, ()))
        options = Options(target="litert-cpu", precision="int8")
        db[name] = export(written, options, tmp_path / f"{name}.bundle").verification.student_snr_db
    entry = student.history[-1]
    assert len(found["unet"]) == entry["unet"]["layers_in_float"] > 0
    assert len(found["vae"]) == entry["vae"]["layers_in_float"] > 0
    for figures in (entry["unet"], entry["vae"]):
        assert figures["macs_in_float"] <= 0.9
        before, after = figures["snr_db"]
        assert after > before
    assert db["mixed"] > db["plain"] + 1
    with pytest.raises(UsageError, match="cannot come after 'activations'"):
        compress(*steps, last, recipes.distill(), checkpoint=Checkpoint(source))


def test_what_a_finished_step_left_is_named_when_it_is_broken(compress, tmp_path):
    compress(recipes.quantize())
    (left,) = (tmp_path / "work").glob("1-quantize-*/student.pt")
    for raw in (b"", left.read_bytes()[:-1000], b"no student"):
        left.write_bytes(raw)
        with pytest.raises(CheckpointError, match="a finished step gives") as error:
            compress(recipes.quantize(), output="again")
        assert error.value.path == str(left)
    left.unlink()
    compress(recipes.quantize(), output="again")


def test_a_finished_step_needs_nothing_of_those_before_it(compress, tmp_path):
    compress(recipes.warmup(), recipes.quantize())
    (first,) = (tmp_path / "work").glob("1-warmup-*")
    shutil.rmtree(first)
    compress(recipes.warmup(), recipes.quantize(), output="again")
    assert not first.exists(), "what it gave is in the last step's result"
    for name in ("unet/diffusion_pytorch_model.safetensors", "unet/quantization.json"):
        assert (tmp_path / "student" / name).read_bytes() == (
            tmp_path / "again" / name
        ).read_bytes()
