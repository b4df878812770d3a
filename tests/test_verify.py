"""Verification passes what is good and names what is not."""

from __future__ import annotations

import hashlib
import json

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny
from handheld.bundle import Bundle
from handheld.errors import GateError, UsageError
from handheld.numerics_gates import gate, level
from handheld_export.checkpoint import Checkpoint
from handheld_export.export import Options, export
from handheld_export.verify import verify

TARGET = "executorch-xnnpack"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A good bundle, its checkpoint and another one."""
    folder = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        good = tiny.write_checkpoint(
            folder / "good", tiny.SMALLEST, tiny.SMALLEST_KL, text=False, steps=1
        )
        options = Options(target=TARGET, precision="fp32", references=True)
        export(Checkpoint(good), options, folder / "bundle", jobs=1)
    bad = tiny.copied(good, folder / "bad")
    tiny.unet(seed=9, **tiny.SMALLEST).save_pretrained(bad / "unet")
    return folder


@pytest.fixture
def bundle(made, tmp_path):
    return tiny.copied(made / "bundle", tmp_path / "bundle")


def change(bundle, edit):
    """Edit a manifest, then make files' hashes fit again."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    edit({a["id"]: a for a in manifest["artifacts"]}, manifest)
    for artifact in manifest["artifacts"]:
        data = (bundle / artifact["file"]["path"]).read_bytes()
        artifact["file"]["sha256"] = hashlib.sha256(data).hexdigest()
        artifact["file"]["bytes"] = len(data)
    path.write_text(json.dumps(manifest))
    return Bundle.open(bundle)


def failed(report):
    return {r.artifact for r in report.rows if not r.passed}


def test_good_bundle_passes(bundle):
    report = verify(Bundle.open(bundle))
    assert report.passed
    assert report.reference == "bundle"
    assert not report.problems
    assert len(report.rows) == 6
    assert min(r.snr_db for r in report.rows) >= 90
    assert report.end_to_end.snr_db >= 70
    stored = Bundle.open(bundle).manifest
    assert report.end_to_end.snr_db == pytest.approx(stored.verification.snr_db, abs=3)
    json.dumps(report.as_dict(), allow_nan=False)


def test_against_the_checkpoint(bundle, made):
    report = verify(Bundle.open(bundle), made / "good")
    assert report.passed
    assert report.reference == "checkpoint"
    with pytest.raises(UsageError, match="not the checkpoint"):
        verify(Bundle.open(bundle), made / "bad")


def test_several_noises(bundle, made):
    one = verify(Bundle.open(bundle), made / "good")
    report = verify(Bundle.open(bundle), made / "good", noises=3)
    assert report.passed
    assert report.draws[0] == one.end_to_end
    figures = [d.snr_db for d in report.draws]
    assert len(set(figures)) == 3
    assert report.end_to_end.snr_db == pytest.approx(sum(figures) / 3)
    assert report.end_to_end.max_abs_error == max(d.max_abs_error for d in report.draws)
    assert report.worst_db == min(figures)
    told = json.loads(run(bundle, "--checkpoint", str(made / "good"), "--json").stdout)
    assert [n["snr_db"] for n in told["noises"]] == pytest.approx(figures)


def test_one_noise_without_the_checkpoint(bundle):
    report = verify(Bundle.open(bundle), noises=2)
    assert len(report.draws) == 1
    assert any(n.startswith("one noise only") for n in report.notes)


def test_swapped_artifacts(bundle):
    def swap(artifacts, _):
        a, b = artifacts["unet.01.mid_block"], artifacts["decoder.00.mid_block"]
        a["file"]["path"], b["file"]["path"] = b["file"]["path"], a["file"]["path"]

    report = verify(change(bundle, swap))
    assert not report.passed
    assert failed(report) == {"unet.01.mid_block", "decoder.00.mid_block"}
    json.dumps(report.as_dict(), allow_nan=False)


def test_one_scale_doubled(bundle, made):
    weights = load_file(made / "good" / "unet" / "diffusion_pytorch_model.safetensors")
    row = weights["mid_block.attentions.0.proj_in.weight"][3].numpy()

    def double(artifacts, _):
        path = bundle / artifacts["unet.01.mid_block"]["file"]["path"]
        data = path.read_bytes()
        assert data.count(row.tobytes()) == 1
        path.write_bytes(data.replace(row.tobytes(), (2 * row).tobytes()))

    report = verify(change(bundle, double))
    assert failed(report) == {"unet.01.mid_block"}
    # Every artifact gets the reference's tensors, so others do not suffer.
    assert min(r.snr_db for r in report.rows if r.passed) >= 90
    assert not report.passed


def test_garbled_artifact(bundle):
    def garble(artifacts, _):
        path = bundle / artifacts["unet.01.mid_block"]["file"]["path"]
        path.write_bytes(b"\0" * 100)

    report = verify(change(bundle, garble))
    assert failed(report) == {"unet.01.mid_block"}
    assert "does not run" in report.problems[0]


def run(bundle, *more):
    import typer

    from handheld_export import cli

    app = typer.Typer()
    app.command()(cli.verify)
    return CliRunner().invoke(app, [str(bundle), *more])


def test_wrong_engine_version(bundle):
    def age(artifacts, _):
        artifacts["unet.01.mid_block"]["engine_version"] = "0.0.1"

    report = verify(change(bundle, age))
    assert not failed(report)
    assert report.problems[0].startswith("unet.01.mid_block: made for engine version 0.0.1")
    result = run(bundle, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["passed"] is False
    assert "unet.01.mid_block" in told["problems"][0]
    result = run(bundle)
    assert isinstance(result.exception, GateError)
    assert result.exception.exit_code == 1
    assert "unet.01.mid_block" in str(result.exception)


def test_command_prints(bundle):
    result = run(bundle)
    assert result.exit_code == 0, result.output
    assert "end to end" in result.output
    assert json.loads(run(bundle, "--json").stdout)["passed"]


def test_text_is_measured_against_the_checkpoint(bundle, made):
    assert verify(Bundle.open(bundle)).text is None
    report = verify(Bundle.open(bundle), made / "good")
    assert report.text == pytest.approx(1, abs=1e-3)
    takes_text = {r.artifact for r in report.rows if r.text is not None}
    assert takes_text == {
        "embedding.00.add_embedding",
        "unet.00.down_blocks.0",
        "unet.01.mid_block",
    }


def test_page(bundle, tmp_path):
    result = run(bundle, "--html", str(tmp_path / "page.html"))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.html").read_text()
    assert "unet.01.mid_block" in page
    assert page.count('src="data:image/png;base64,') == 2
    assert "http" not in page


def test_folder_of_bundles(bundle, tmp_path):
    tiny.copied(bundle, tmp_path / "all" / "one")
    tiny.copied(bundle, tmp_path / "all" / "two")
    told = json.loads(run(tmp_path / "all", "--json").stdout)
    assert [b["passed"] for b in told["bundles"]] == [True, True]
    assert run(tmp_path / "all").output.count("fp32") == 2


def test_level():
    assert level({}, "fp16") == "fp16"
    assert level({}, "int4g32") == "int4"
    assert level({"int4": 10, "float32": 5}, "int8") == "int4"
    assert level({"int2": 0, "int8": 5}, "fp32") == "int8"


def test_gates(tmp_path, bundle):
    assert gate({}, "fp32", TARGET).artifact_db == 90
    coded = gate({"int4": 1}, "int8", "litert-cpu")
    assert (coded.against, coded.end_to_end_db) == ("student", 35)
    assert gate({"int4": 1}, "int8", "coreml").end_to_end_db == 30
    path = tmp_path / "gates.toml"
    path.write_text("[fp32]\nartifact_db = 500\nend_to_end_db = 70\n")
    report = verify(Bundle.open(bundle), gate=path)
    assert failed(report) == {r.artifact for r in report.rows}
    for text in (
        "",
        "[fp32]\nartifact_db = 1\n",
        "[fp32",
        "[fp32]\nartifact_db = 'x'\n",
        "[fp32]\nagainst = 'none'\nartifact_db = 1\nend_to_end_db = 1\n",
    ):
        path.write_text(text)
        with pytest.raises(UsageError) as e:
            gate({}, "fp32", TARGET, path)
        assert e.value.path == str(path)
    with pytest.raises(UsageError, match="cannot be read"):
        gate({}, "fp32", TARGET, tmp_path / "none.toml")
