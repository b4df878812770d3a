from __future__ import annotations

import pytest
from torch import nn

from handheld.errors import UsageError
from handheld_export.precision import PRECISIONS, Choice, find

LINEAR, ODD = nn.Linear(64, 8), nn.Linear(40, 8)
CONV, POINT = nn.Conv2d(8, 8, 3), nn.Conv2d(64, 8, 1)
INT8 = Choice("int8")
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("layer", "module"),
    [
        ("conv_in", CONV),
        ("conv_out", CONV),
        ("decoder.conv_in", CONV),
        ("decoder.conv_out", CONV),
        ("post_quant_conv", POINT),
        ("add_embedding.linear_1", LINEAR),
        ("time_embedding.linear_2", LINEAR),
    ],
)
def test_ends_stay_in_float(precision, layer, module):
    assert find(precision).choose("unet", layer, module) is None


@pytest.mark.parametrize(
    ("precision", "linear", "other"),
    [
        ("fp32", None, None),
        ("int8", INT8, INT8),
        ("int4", Choice("int4"), INT8),
        ("int4g32", Choice("int4", 32), INT8),
        ("int2", Choice("int2"), INT8),
    ],
)
def test_rules(precision, linear, other):
    rule = find(precision)
    for layer in (f"{BLOCK}.attn1.to_q", f"{BLOCK}.ff.net.2", "mid_block.attentions.0.proj_in"):
        assert rule.choose("unet", layer, LINEAR) == linear
    for layer, module in (
        ("mid_block.resnets.0.conv1", CONV),
        ("mid_block.resnets.0.conv_shortcut", POINT),
        ("mid_block.resnets.0.time_emb_proj", LINEAR),
        ("mid_block.attentions.0.proj_in", POINT),  # SD 1.5 projects by convolution
        ("up_blocks.0.upsamplers.0.conv", CONV),
    ):
        assert rule.choose("unet", layer, module) == other
    assert rule.choose("decoder", "decoder.mid_block.attentions.0.to_q", LINEAR) == other


def test_groups_that_do_not_divide_become_channels():
    assert find("int4g32").choose("unet", f"{BLOCK}.attn2.to_k", ODD) == Choice("int4")


def test_unknown():
    with pytest.raises(UsageError) as e:
        find("int3")
    assert "fp32, fp16, int8, int4, int4g32, int2" in e.value.remedy
