"""Channels-first transformers compute what the plain ones do."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel

import tiny
from handheld_export.coreml.rewrites import (
    ANE_REPLACEMENTS,
    ChannelsFirstBlock,
    ChannelsFirstTransformer,
    pointwise,
)
from handheld_export.measure import snr_db
from handheld_export.quantization import round_to_nearest
from handheld_export.rewrites import rewrite
from handheld_export.segments import SegmentModule, group, materialize, unet_graph


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("context", [40, None])
def test_parity(linear, context):
    model = tiny.randomize(
        Transformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=2,
            norm_num_groups=8, cross_attention_dim=context, use_linear_projection=linear,
        )
    )  # fmt: skip
    new = rewrite(model, ANE_REPLACEMENTS)
    assert isinstance(new, ChannelsFirstTransformer)
    assert not any(isinstance(m, torch.nn.Linear) for m in new.modules())
    x = torch.randn(1, 32, 4, 6)
    text = None if context is None else torch.randn(1, 5, context)
    with torch.no_grad():
        wanted = model(x, encoder_hidden_states=text).sample
        found = new(x, encoder_hidden_states=text).sample
    assert snr_db(wanted.numpy(), found.numpy()) > 110


@pytest.mark.parametrize("group", [None, 32])
def test_codes_go_along(group):
    layer = torch.nn.Linear(64, 32)
    weight = round_to_nearest(layer.weight.detach().numpy(), "int4", group)
    layer.quantized, layer.source_name = weight, "a.b"
    conv = pointwise(layer)
    assert (conv.quantized.codes[:, :, 0, 0] == weight.codes).all()
    assert conv.quantized.scales is weight.scales
    assert conv.source_name == "a.b"


def test_what_does_not_fit_stays_plain():
    model = Transformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=32, norm_num_groups=8,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    new = rewrite(model.eval(), ANE_REPLACEMENTS)
    assert not isinstance(new.blocks[0], ChannelsFirstBlock)


def test_segments_are_rewritten(tmp_path):
    component = tiny.component(tiny.unet(**tiny.SMALLEST), tmp_path)
    graph, _ = unet_graph(component, (8, 8), 8)
    (segment,) = group(graph, 10**9, across_blocks=True)
    materialize(segment, component, None)
    module = SegmentModule(segment).eval()
    new = rewrite(module, ANE_REPLACEMENTS)
    assert sum(isinstance(m, ChannelsFirstBlock) for m in new.modules()) == 2
    inputs = [torch.randn(p.shape) for p in segment.ports.inputs.values()]
    with torch.no_grad():
        for wanted, found in zip(module(*inputs), new(*inputs), strict=True):
            assert snr_db(wanted.numpy(), found.numpy()) > 105
