from __future__ import annotations

import pytest

from handheld.errors import UsageError
from handheld.precision import PRECISIONS, Choice, find

LINEAR, ODD = (8, 64), (8, 40)
CONV, POINT = (8, 8, 3, 3), (8, 64, 1, 1)
INT8 = Choice("int8")
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("layer", "shape"),
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
def test_ends_stay_in_float(precision, layer, shape):
    assert find(precision).choose("unet", layer, shape) is None


@pytest.mark.parametrize(
    ("precision", "linear", "other"),
    [
        ("fp32", None, None),
        ("int8", INT8, INT8),
        ("int4", Choice("int4"), INT8),
        ("int4g32", Choice("int4", 32), INT8),
        ("int2", Choice("int2"), INT8),
        ("16a8w", INT8, INT8),
        ("16a4w", Choice("int4"), INT8),
        ("16a2w", Choice("int2"), INT8),
    ],
)
def test_rules(precision, linear, other):
    rule = find(precision)
    for layer in (f"{BLOCK}.attn1.to_q", f"{BLOCK}.ff.net.2", "mid_block.attentions.0.proj_in"):
        assert rule.choose("unet", layer, LINEAR) == linear
    for layer, shape in (
        ("mid_block.resnets.0.conv1", CONV),
        ("mid_block.resnets.0.conv_shortcut", POINT),
        ("mid_block.resnets.0.time_emb_proj", LINEAR),
        ("mid_block.attentions.0.proj_in", POINT),  # SD 1.5 projects by convolution
        ("up_blocks.0.upsamplers.0.conv", CONV),
    ):
        assert rule.choose("unet", layer, shape) == other
    assert rule.choose("decoder", "decoder.mid_block.attentions.0.to_q", LINEAR) == other


def test_groups_that_do_not_divide_become_channels():
    assert find("int4g32").choose("unet", f"{BLOCK}.attn2.to_k", ODD) == Choice("int4")


def test_unknown():
    with pytest.raises(UsageError) as e:
        find("int3")
    assert "fp32, fp16, int8, int4, int4g32, int2" in e.value.remedy
