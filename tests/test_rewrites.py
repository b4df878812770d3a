"""Every rewrite computes what the module it replaces computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.activations import GEGLU, GELU, FP32SiLU
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DecoderTiny
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock, UNetMidBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from handheld import banding, planning
from handheld_export.litert import rewrites as litert_rewrites
from handheld_export.quantization import ActivationRange, round_to_nearest
from handheld_export.rewrites import GatedGELU, Pointwise, rewrite


def randomize(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(1 + 0.2 * noise if "weight" in name else 0.1 * noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
    return module.eval()


def picture(c, h, w=None, n=1, offset=0.0):
    return torch.randn(n, c, h, w or h) + offset


def resnet(inputs, outputs):
    return ResnetBlock2D(in_channels=inputs, out_channels=outputs, temb_channels=48, groups=8)


def transformer(channels, layers, *, linear):
    return Transformer2DModel(
        2,
        channels // 2,
        channels,
        num_layers=layers,
        cross_attention_dim=40,
        norm_num_groups=8,
        use_linear_projection=linear,
    )


def mid_block(channels, heads):
    return UNetMidBlock2D(
        channels, temb_channels=None, attention_head_dim=channels // heads, resnet_groups=8
    )


CASES = {
    "group norm": lambda: (nn.GroupNorm(8, 64), [picture(64, 8)]),
    "group norm of tokens": lambda: (nn.GroupNorm(8, 64), [picture(64, 8).flatten(2)]),
    "group norm with an offset": lambda: (nn.GroupNorm(4, 32), [picture(32, 6, 10, 2, 30.0)]),
    "group norm without weights": lambda: (nn.GroupNorm(4, 16, affine=False), [picture(16, 4)]),
    "layer norm": lambda: (nn.LayerNorm(64), [torch.randn(2, 5, 64)]),
    "layer norm without weights": lambda: (
        nn.LayerNorm(64, elementwise_affine=False),
        [torch.randn(1, 7, 64)],
    ),
    "silu": lambda: (nn.SiLU(), [picture(8, 4)]),
    "silu of diffusers": lambda: (FP32SiLU(), [picture(8, 4)]),
    "gelu, tanh": lambda: (nn.GELU(approximate="tanh"), [picture(8, 4)]),
    "linear gelu": lambda: (GELU(32, 64), [torch.randn(1, 9, 32)]),
    "linear gelu, tanh": lambda: (GELU(32, 64, approximate="tanh"), [torch.randn(1, 9, 32)]),
    "geglu": lambda: (GEGLU(32, 64), [torch.randn(2, 9, 32)]),
    "geglu without bias": lambda: (GEGLU(32, 64, bias=False), [torch.randn(1, 9, 32)]),
    "self attention": lambda: (Attention(64, heads=4, dim_head=16), [torch.randn(2, 16, 64)]),
    "cross attention": lambda: (
        Attention(64, cross_attention_dim=40, heads=4, dim_head=16),
        [torch.randn(1, 16, 64), torch.randn(1, 7, 40)],
    ),
    "attention over pictures": lambda: (
        Attention(64, heads=1, dim_head=64, norm_num_groups=8, residual_connection=True, bias=True),
        [picture(64, 4, 6)],
    ),
    "resnet": lambda: (resnet(64, 64), [picture(64, 8), torch.randn(1, 48)]),
    "resnet with a shortcut": lambda: (resnet(96, 64), [picture(96, 4, 6), torch.randn(1, 48)]),
    "upsampler": lambda: (Upsample2D(32, use_conv=True), [picture(32, 5, 3)]),
    "upsampler alone": lambda: (Upsample2D(32), [picture(32, 4, n=2)]),
    "nearest by 2": lambda: (nn.Upsample(scale_factor=2), [picture(16, 3, 5)]),
    "nearest by 3": lambda: (nn.Upsample(scale_factor=3.0), [picture(16, 4)]),
    "downsampler": lambda: (Downsample2D(32, use_conv=True), [picture(32, 8)]),
    "downsampler, asymmetric": lambda: (
        Downsample2D(32, use_conv=True, padding=0),
        [picture(32, 8)],
    ),
    "downsampler by averages": lambda: (Downsample2D(32), [picture(32, 8)]),
    "mid block": lambda: (mid_block(64, 1), [picture(64, 8)]),
    "mid block with heads": lambda: (mid_block(64, 4), [picture(64, 4, 6)]),
    "tiny block": lambda: (AutoencoderTinyBlock(16, 16, "relu"), [picture(16, 8)]),
    "tiny block with a skip": lambda: (AutoencoderTinyBlock(16, 32, "relu"), [picture(16, 8)]),
    "tiny decoder": lambda: (
        DecoderTiny(4, 3, (1, 2, 1), (32, 32, 32), 2, "relu", "nearest"),
        [picture(4, 8, 6)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rewrite_computes_the_same(case):
    module, inputs = CASES[case]()
    randomize(module)
    before = {n: p.clone() for n, p in module.named_parameters()}
    with torch.no_grad():
        expected = module(*inputs)
        actual = rewrite(module)(*inputs)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("table", [1, 300, 10**9])
@pytest.mark.parametrize("case", ["self attention", "cross attention", "attention over pictures"])
def test_attention_in_parts_computes_the_same(case, table, monkeypatch):
    monkeypatch.setattr(banding, "TABLE_BYTES", table)
    module, inputs = CASES[case]()
    randomize(module)
    with torch.no_grad():
        expected = module(*inputs)
        actual = rewrite(module, litert_rewrites.REPLACEMENTS)(*inputs)
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_a_convolution_is_the_sum_of_its_kernels_places(size, stride, monkeypatch):
    monkeypatch.setitem(planning.SLICED, "litert-cpu", 0)
    conv = randomize(nn.Conv2d(12, 20, 3, padding=1, stride=stride))
    conv.quantized = round_to_nearest(conv.weight.detach().numpy(), "int4")
    x = picture(12, *size)
    with torch.no_grad():
        expected = conv(x)
        sliced = rewrite(conv, litert_rewrites.REPLACEMENTS)
        assert isinstance(sliced, litert_rewrites.SlicedConv)
        assert (sliced(x) - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_convolutions_in_int8_stay():
    conv = randomize(nn.Conv2d(12, 20, 3, padding=1))
    conv.quantized = round_to_nearest(conv.weight.detach().numpy(), "int8")
    assert isinstance(rewrite(conv, litert_rewrites.REPLACEMENTS), nn.Conv2d)


def test_parts_of_an_attention_are_the_fewest_that_fit():
    assert banding.attention(10, 1024, 1024) == (5, 1024)  # SDXL at 512 x 512: 21 MB of 42
    assert banding.attention(20, 256, 256) == (20, 256)
    assert banding.attention(10, 2304, 2304) == (2, 1152)
    assert banding.attention(10, 4096, 4096) == (2, 820)
    assert banding.attention(10, 4087, 4087) == (2, 818)
    assert banding.attention(1, 4096, 4096) == (1, 1366)
    assert banding.attention(9, 4096, 4096) == (3, 586)
    assert banding.attention(10, 9, 10**9) == (2, 1)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(("channels", "layers", "size"), [(64, 1, (8, 8)), (32, 2, (6, 4))])
def test_transformer(channels, layers, size, linear):
    module = randomize(transformer(channels, layers, linear=linear))
    x, context = picture(channels, *size), torch.randn(1, 11, 40)
    with torch.no_grad():
        expected = module(x, encoder_hidden_states=context).sample
        actual = rewrite(module)(x, encoder_hidden_states=context).sample
        (again,) = rewrite(module)(x, encoder_hidden_states=context, return_dict=False)
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert torch.equal(actual, again)


def test_original_is_not_changed_and_parameters_are_shared():
    module = randomize(resnet(64, 64))
    kinds = [type(m) for m in module.modules()]
    rewritten = rewrite(module)
    assert [type(m) for m in module.modules()] == kinds
    assert rewritten.conv1.weight.data_ptr() == module.conv1.weight.data_ptr()


def test_geglu_splits_codes_by_rows():
    module = randomize(GEGLU(32, 48))
    quantized = round_to_nearest(module.proj.weight.detach().numpy(), "int4", 16)
    module.proj.weight.data = torch.from_numpy(quantized.dequantize())
    module.proj.quantized = quantized
    rewritten = rewrite(nn.Sequential(module))[0]
    assert isinstance(rewritten, GatedGELU)
    value, gate = rewritten.value, rewritten.gate
    assert np.array_equal(np.vstack([value.quantized.codes, gate.quantized.codes]), quantized.codes)
    assert np.array_equal(
        np.vstack([value.quantized.scales, gate.quantized.scales]), quantized.scales
    )
    for part in (value, gate):
        assert np.array_equal(part.quantized.dequantize(), part.weight.detach().numpy())
        assert part.quantized.group_size == 16
        assert part.source_name == "0.proj"
    x = torch.randn(1, 5, 32)
    assert torch.allclose(rewritten(x), module(x), atol=1e-6)


def test_layers_keep_their_names_codes_and_ranges():
    module = randomize(resnet(96, 64))
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.quantized = round_to_nearest(layer.weight.detach().numpy(), "int8")
            layer.activation_range = ActivationRange(-1, 1, -2, 2)
            layer.name = name
    found = {}
    for layer in rewrite(module).modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            found[layer.source_name] = layer
    assert set(found) == {"conv1", "conv2", "time_emb_proj", "conv_shortcut"}
    assert found["conv1"].quantized is module.conv1.quantized
    assert found["conv1"].activation_range is module.conv1.activation_range
    shortcut = found["conv_shortcut"]
    assert isinstance(shortcut, nn.Linear)
    assert np.array_equal(
        shortcut.quantized.codes, module.conv_shortcut.quantized.codes[:, :, 0, 0]
    )


def test_pointwise_convolution_becomes_linear_only_with_codes():
    conv = randomize(nn.Conv2d(16, 24, 1))
    assert isinstance(rewrite(conv), nn.Conv2d)
    conv.quantized = round_to_nearest(conv.weight.detach().numpy(), "int4")
    rewritten, x = rewrite(conv), picture(16, 4, 6, 2)
    assert isinstance(rewritten, Pointwise)
    assert torch.allclose(rewritten(x), conv(x), atol=1e-6)


def test_masked_attention_is_refused():
    rewritten = rewrite(randomize(Attention(32, heads=2, dim_head=16)))
    with pytest.raises(ValueError, match="mask"):
        rewritten(torch.randn(1, 4, 32), attention_mask=torch.zeros(1, 4))
