"""Decoders that leave fp16 are brought back, and give the same picture."""

from __future__ import annotations

import copy

import pytest
import torch

import tiny
from handheld.errors import TargetError
from handheld.precision import find as find_precision
from handheld_export import half
from handheld_export.coreml.rewrites import ANE_REPLACEMENTS
from handheld_export.measure import snr_db
from handheld_export.rewrites import SiLU, rewrite
from handheld_export.segments import SegmentModule, decoder_graph, group, materialize


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A whole decoder in int8, rewritten, with an input."""
    component = tiny.component(tiny.vae(**tiny.KL), tmp_path_factory.mktemp("half"))
    (segment,) = group(decoder_graph(component, (4, 4)), 10**9, across_blocks=True)
    materialize(segment, component, find_precision("int8"))
    module = rewrite(SegmentModule(segment).eval(), ANE_REPLACEMENTS)
    x = torch.randn(
        segment.ports.inputs["latent"].shape, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        return module, x, module(x)[0].numpy()


def largest(module, x):
    return half._examine(module, [x])[0]


def test_small_values_are_left_alone(decoder):
    module, x, _ = decoder
    module = copy.deepcopy(module)
    assert half.fit(module, [x]) == ()


def test_large_values_are_scaled(decoder):
    module, x, wanted = decoder
    module = copy.deepcopy(module)
    half.scale_stream(module, 2.0**17)
    assert largest(module, x) > half.LARGEST
    with torch.no_grad():
        assert snr_db(wanted, module(x)[0].numpy()) > 100
    notes = half.fit(module, [x])
    assert "sums between blocks reach" in notes[0]
    assert largest(module, x) * 8 <= half.LARGEST
    assert all(v * 8 <= 256 or module.get_submodule(n).factor < 1
               for n, v in half._examine(module, [x])[1].items())  # fmt: skip
    with torch.no_grad():
        assert snr_db(wanted, module(x)[0].numpy()) > 100
    for layer in module.modules():
        if (q := getattr(layer, "quantized", None)) is not None:
            assert torch.equal(layer.weight, torch.from_numpy(q.dequantize()))


def test_part_of_a_decoder_is_refused(decoder):
    module, x, _ = decoder
    module = copy.deepcopy(module)
    half.scale_stream(module, 2.0**17)
    module.units[-1] = torch.nn.Sequential(*module.units[-1].modules_)
    with pytest.raises(TargetError, match="more than fp16 holds"):
        half.fit(module, [x])


def test_package_in_half_precision(decoder, tmp_path):
    """The package overflows as it is, and is right when it was scaled."""
    pytest.importorskip("coremltools")
    from handheld_export.coreml import packages
    from handheld_export.coreml.mil import Package

    module, x, wanted = decoder
    module = copy.deepcopy(module)
    half.scale_stream(module, 2.0**17)
    found = {}
    for name in ("plain", "scaled"):
        if name == "scaled":
            half.fit(module, [x])
        path = tmp_path / f"{name}.mlpackage"
        packages.convert(module, [x], 1, path)
        found[name] = Package(path).run({"in0": x.numpy()})["out0"]
    assert snr_db(wanted, found["plain"]) < 0
    assert snr_db(wanted, found["scaled"]) > 40


class Activated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.SiLU())

    def forward(self, x):
        return self.inner(x)


def test_silus_that_read_values_far_below_zero_go_without_sigmoid():
    x = torch.linspace(-80, 20, 1001)
    module = rewrite(Activated())
    assert half.steady(module, [x]) == ("1 SiLUs read values down to -80: without sigmoid",)
    assert not any(isinstance(m, SiLU) for m in module.modules())
    assert torch.allclose(module(x), torch.nn.functional.silu(x), rtol=1e-5, atol=1e-30)
    wide = torch.tensor([-60000.0, -100, -12, 0, 12, 60000], dtype=torch.float16)
    assert torch.allclose(module(wide), torch.nn.functional.silu(wide), atol=1e-5)


def test_silus_of_normalised_values_keep_their_sigmoid():
    module = rewrite(Activated())
    assert half.steady(module, [torch.linspace(-7, 60, 10)]) == ()
    assert any(isinstance(m, SiLU) for m in module.modules())
