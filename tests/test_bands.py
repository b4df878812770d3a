"""A decoder in bands gives what diffusers' decoder gives."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from handheld.banding import choose, windows
from handheld.bundle import Bundle
from handheld.counting import count_decoder
from handheld.errors import UsageError
from handheld.execute import activation_bytes, execute
from handheld.native import Session
from handheld.program import Call, Program, TensorSpec, check
from handheld.protocol import Job
from handheld_export import bands
from handheld_export.assemble import Draft
from handheld_export.bands import passes, write
from handheld_export.checkpoint import Checkpoint
from handheld_export.export import Options, export
from handheld_export.measure import psnr_db, snr_db
from handheld_export.segments import decoder_graph, group
from handheld_export.torch_artifacts import TorchArtifacts, decode
from handheld_export.verify import verify

LATENT = (6, 4)
VAES = {
    "attention": tiny.KL,
    "no attention": tiny.KL | {"mid_block_add_attention": False},
    "no post_quant_conv": tiny.KL | {"use_post_quant_conv": False, "use_quant_conv": False},
    "more of all": tiny.KL
    | {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "norm_num_groups": 8,
    },
    "one resolution": tiny.SMALLEST_KL,
}
TINIES = {
    "tiny": tiny.TINY,
    "no blocks": tiny.TINY | {"num_decoder_blocks": (0, 0)},
    "three resolutions": tiny.TINY
    | {
        "encoder_block_out_channels": (16,) * 3,
        "decoder_block_out_channels": (16,) * 3,
        "num_encoder_blocks": (1,) * 3,
        "num_decoder_blocks": (2, 1, 1),
    },
}


class Decoder:
    def __init__(self, folder, config, megabytes, storage="float16", latent=LATENT):
        self.model = tiny.vae(**config)
        component = tiny.component(self.model, folder)
        self.passes = passes(decoder_graph(component, latent), megabytes)
        draft = Draft()
        z = draft.input("latent", (1, *latent, 4), role="latent")
        result = write(draft, self.passes, z, storage)
        self.program = Program(
            inputs=tuple(draft.inputs),
            tensors=draft.tensors,
            ops=tuple(draft.ops),
            outputs={"decoded": result},
        )
        self.constants = draft.constants
        self.pairs = [(p.segment, component) for p in self.passes]
        ports = {s.id: s.ports for s, _ in self.pairs}
        check(
            self.program, ports, {n: TensorSpec(shape=v.shape) for n, v in self.constants.items()}
        )

    def run(self, latent):
        artifacts = TorchArtifacts(self.pairs)
        outputs = execute(self.program, self.constants, {"latent": latent}, artifacts)
        artifacts.close()
        return outputs["decoded"]

    def whole(self, latent):
        with torch.no_grad():
            z = torch.from_numpy(latent).permute(0, 3, 1, 2)
            return self.model.decode(z).sample.permute(0, 2, 3, 1).numpy()


def latent(size=LATENT, scale=1.0, seed=0):
    values = np.random.default_rng(seed).standard_normal((1, *size, 4), dtype=np.float32)
    return values * np.float32(scale)


@pytest.mark.parametrize("megabytes", [1e-9, 0.01, 1e9])
@pytest.mark.parametrize("name", VAES)
def test_bands_of_any_height_equal_the_whole_picture(name, megabytes, tmp_path):
    decoder = Decoder(tmp_path, VAES[name], megabytes, "float32")
    z = latent()
    assert snr_db(decoder.whole(z), decoder.run(z)) > 100


@pytest.mark.parametrize("size", [(48, 4), (37, 5), (13, 3)])
@pytest.mark.parametrize("megabytes", [1e-9, 0.04, 1e9])
@pytest.mark.parametrize("name", TINIES)
def test_a_tiny_decoder_in_windows_equals_the_whole_picture(name, megabytes, size, tmp_path):
    decoder = Decoder(tmp_path, TINIES[name], megabytes, latent=size)
    assert megabytes == 1e9 or size[0] < 20 or any(p.bands > 2 for p in decoder.passes)
    z = latent(size)
    whole, drawn = decoder.whole(z), decoder.run(z)
    assert snr_db(whole, drawn) > 110
    # At the picture's edges and where windows meet, too.
    rows = np.abs(whole - drawn).max(axis=(0, 2, 3))
    assert rows.max() < 1e-5 * np.abs(whole).max()


def test_windows_that_overlap_too_little_are_wrong(tmp_path, monkeypatch):
    less = bands.windows
    monkeypatch.setattr(
        bands, "windows", lambda height, overlap, *more: less(height, overlap - 1, *more)
    )
    decoder = Decoder(tmp_path, tiny.TINY, 0.02, latent=(32, 4))
    z = latent((32, 4))
    assert snr_db(decoder.whole(z), decoder.run(z)) < 80


def test_windows_keep_every_row_once_and_read_what_it_depends_on():
    for height, overlap, limit in itertools.product(range(1, 80), range(8), (1, 7, 20, 40, 99)):
        cut = windows(height, overlap, 1, limit)
        at = 0
        for i, start in enumerate(cut.starts):
            first, end = cut.kept(i)
            assert first == at < end
            assert 0 <= start <= first - (overlap if start else 0)
            assert end + (overlap if end < height else 0) <= start + cut.rows <= height
            at = end
        assert at == height
        assert len(cut.starts) == 1 or cut.rows >= 4 * overlap
        assert len(cut.starts) * cut.rows <= max(2 * height, height + cut.rows)
        more = len(cut.starts) + 1
        smaller = -(-(height + 2 * overlap * (more - 1)) // more)
        assert cut.rows <= limit or smaller < max(1, 4 * overlap) or cut.rows <= 4 * overlap


@pytest.mark.parametrize(
    ("megabytes", "chosen"), [(16.8, None), (32, None), (67.1, 8), (268.4, 8), (1073.7, 16.8)]
)
def test_bands_are_chosen_where_they_save_memory(megabytes, chosen):
    found = choose(round(megabytes * 1e6))
    assert found == chosen if chosen is None else found == pytest.approx(chosen, rel=0.01)


@pytest.mark.parametrize("name", VAES)
def test_storage_in_half_precision_costs_little(name, tmp_path):
    decoder = Decoder(tmp_path, VAES[name], 1e-9)
    z = latent()
    assert snr_db(decoder.whole(z), decoder.run(z)) > 55


def test_sums_beyond_half_precision_are_kept(tmp_path):
    decoder = Decoder(tmp_path, tiny.KL, 0.01)
    z = latent(scale=5e5)
    whole = decoder.whole(z)
    with torch.no_grad():
        first = decoder.model.decoder.conv_in(torch.from_numpy(z).permute(0, 3, 1, 2))
    assert first.abs().max() > 65504
    assert snr_db(whole, decoder.run(z)) > 50


def test_bands_of_one_resolution_are_alike_and_divide_those_before(tmp_path):
    decoder = Decoder(tmp_path, VAES["more of all"], 0.02, latent=(6, 8))
    convolutions = [p for p in decoder.passes if p.halo]
    assert [p.bands for p in convolutions] == sorted(p.bands for p in convolutions)
    for before, after in itertools.pairwise(convolutions):
        assert after.bands % before.bands == 0
    for step in decoder.passes:
        rows = step.segment.ports.inputs["x"]
        assert step.shape[0] == step.bands * rows.shape[1]
        assert rows.nbytes <= 20_000


def test_every_artifact_is_called_once_per_band(tmp_path):
    decoder = Decoder(tmp_path, tiny.KL, 0.01)
    calls = Counter(op.artifact for op in decoder.program.ops if isinstance(op, Call))
    assert calls == {p.segment.id: p.bands for p in decoder.passes}
    assert max(calls.values()) > 1


def test_memory_is_that_of_two_tensors_in_half_precision(tmp_path):
    decoder = Decoder(tmp_path, VAES["no attention"], 0.05, latent=(64, 64))
    channels, pixels = 32, 128 * 128
    assert activation_bytes(decoder.program) < 2 * (2 * channels * pixels) + 400_000


def test_what_is_no_such_decoder_is_refused_by_name(tmp_path):
    graph = decoder_graph(tiny.component(tiny.vae(**tiny.TINY), tmp_path / "tiny"), LATENT)
    graph.model.decoder.layers[2].conv[0].dilation = (2, 2)
    with pytest.raises(UsageError, match=r"'decoder\.layers\.2'"):
        passes(graph, 1)
    graph = decoder_graph(tiny.component(tiny.vae(**tiny.KL), tmp_path / "kl"), LATENT)
    graph.model.decoder.up_blocks[0].resnets[0].conv1.padding_mode = "reflect"
    with pytest.raises(UsageError, match=r"'decoder\.up_blocks\.0\.resnets\.0'"):
        passes(graph, 1)


def test_a_target_that_does_not_draw_bands_is_refused(tmp_path):
    source = Checkpoint(tiny.write_checkpoint(tmp_path / "c", tiny.SMALLEST, tiny.KL, text=False))
    options = Options(target="executorch-xnnpack", precision="fp32", decoder_bands=1.0)
    with pytest.raises(UsageError, match="'executorch-xnnpack' does not decode in bands"):
        export(source, options, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bands")
    unet = tiny.SMALLEST | {"down_block_types": ("DownBlock2D",)}
    tiny.write_checkpoint(folder / "tiny", unet, tiny.KL, text=False)
    options = Options(
        target="litert-cpu",
        precision="fp32",
        sizes=((16, 12),),
        steps=1,
        guidance=1.0,
        decoder_bands=0.02,
    )
    export(Checkpoint(folder / "tiny"), options, folder / "bundle")
    return Bundle.open(folder / "bundle"), folder / "tiny"


@pytest.mark.slow
def test_an_export_is_compared_with_the_whole_picture(bundle):
    opened, source = bundle
    manifest = opened.manifest
    assert manifest.schema_version == 2
    assert 55 < manifest.verification.snr_db < 100
    report = verify(opened, source)
    assert report.passed
    assert report.end_to_end.snr_db == pytest.approx(manifest.verification.snr_db, abs=1)


@pytest.mark.slow
def test_the_harness_draws_bands_resident_streamed_and_within_a_budget(bundle, tmp_path):
    opened, _ = bundle
    size = next(iter(opened.manifest.sizes))
    stored = opened.reference()
    inputs = {n.removeprefix("input."): v for n, v in stored.items() if n.startswith("input.")}
    pictures = set()
    for options in ({}, {"residency": "stream"}, {"memory_budget": 40_000_000}):
        job = Job(bundle=str(opened.path), size=size, cache=str(tmp_path), **options)
        with Session(job) as session:
            for name, value in inputs.items():
                session.set_input(name, value)
            session.run()
            picture = session.output("picture", (1, 12, 16, 3), np.uint8)
        pictures.add(picture.tobytes())
        assert psnr_db(stored["picture"], picture) > 45
    assert len(pictures) == 1


@pytest.mark.slow
def test_macs_of_bands_add_up_to_those_of_the_picture(bundle):
    opened, source = bundle
    program = next(iter(opened.manifest.sizes.values())).program
    calls = Counter(op.artifact for op in program.ops if isinstance(op, Call))
    found = {a.id: a.macs * calls[a.id] for a in opened.manifest.artifacts}
    whole = count_decoder(Checkpoint(source).vae.config, (6, 8))
    want = sum(layer.macs for layer in whole)
    decoder = sum(n for name, n in found.items() if name.startswith("decoder"))
    assert decoder == pytest.approx(want, rel=1e-3)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import decoder

    return decoder


def test_a_planted_seam_is_seen(benchmark):
    rows = [8 * i for i in range(1, 64)]
    values = np.cumsum(np.full((512, 4, 3), 0.01, np.float32), axis=0)
    assert benchmark.seams(values, rows) == pytest.approx(1, abs=0.01)
    for row in rows[::2]:
        values[row : row + 8] += 0.02
    assert benchmark.seams(values, rows) > 1.5


@pytest.mark.slow
def test_the_decoder_alone_gives_what_diffusers_gives(bundle, benchmark, tmp_path):
    opened, source = bundle
    alone = benchmark.alone(opened, tmp_path / "alone")
    assert {a.component for a in alone.manifest.artifacts} == {"decoder"}
    assert [i.role for i in next(iter(alone.manifest.sizes.values())).program.inputs] == ["latent"]
    z = latent((6, 8))
    vae = Checkpoint(source).vae
    whole = decode(group(decoder_graph(vae, (6, 8)), 10**9), vae, z)
    values, picture = benchmark.draw(alone, z, tmp_path)
    assert snr_db(whole[1][0], values) > 55
    assert psnr_db(whole[0][0], picture) > 45
