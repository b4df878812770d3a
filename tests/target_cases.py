"""Small segments of every kind, that tests of targets lower."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers.models.autoencoders.vae import DecoderTiny
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from handheld.program import Ports, TensorSpec
from handheld_export.measure import snr_db
from handheld_export.quantization import ActivationRange, round_to_nearest
from handheld_export.targets.base import SegmentInput


class Line(nn.Module):
    """Modules one after the other; inputs by rank: picture, time embedding, context."""

    def __init__(self, *steps):
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.kinds = [type(s).__name__ for s in steps]

    def forward(self, x, *rest):
        more = {r.dim(): r for r in rest}
        x = x.permute(0, 3, 1, 2)
        for kind, step in zip(self.kinds, self.steps, strict=True):
            if kind == "ResnetBlock2D":
                x = step(x, more.get(2))
            elif kind == "Transformer2DModel":
                (x,) = step(x, encoder_hidden_states=more[3], return_dict=False)
            else:
                x = step(x)
        return (x.permute(0, 2, 3, 1),)


def randomize(module):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(1 + 0.2 * noise if "weight" in name else 0.1 * noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
    return module.eval()


def resnet(inputs, outputs):
    return ResnetBlock2D(in_channels=inputs, out_channels=outputs, temb_channels=64, groups=32)


def transformer(channels, *, linear=True):
    return Transformer2DModel(
        2,
        channels // 2,
        channels,
        cross_attention_dim=96,
        use_linear_projection=linear,
    )


TIME, CONTEXT = (1, 64), (1, 77, 96)
CASES = {
    "convolution": lambda: (Line(nn.Conv2d(4, 64, 3, padding=1)), [(1, 16, 16, 4)]),
    "resnet": lambda: (Line(resnet(64, 64)), [(1, 8, 12, 64), TIME]),
    "resnet with shortcut": lambda: (Line(resnet(64, 128)), [(1, 8, 8, 64), TIME]),
    "transformer": lambda: (Line(transformer(64)), [(1, 8, 8, 64), CONTEXT]),
    "transformer, convolutions": lambda: (
        Line(transformer(64, linear=False)),
        [(1, 8, 8, 64), CONTEXT],
    ),
    "upsampler": lambda: (Line(Upsample2D(64, True)), [(1, 8, 6, 64)]),
    "downsampler": lambda: (Line(Downsample2D(64, True)), [(1, 8, 8, 64)]),
    "downsampler, asymmetric": lambda: (
        Line(Downsample2D(64, True, padding=0)),
        [(1, 8, 8, 64)],
    ),
    "mid block": lambda: (
        Line(UNetMidBlock2D(64, temb_channels=None, attention_head_dim=64, resnet_groups=32)),
        [(1, 8, 8, 64)],
    ),
    "tiny decoder": lambda: (
        Line(DecoderTiny(4, 3, (1, 1), (32, 32), 2, "relu", "nearest")),
        [(1, 8, 8, 4)],
    ),
    "resnet and transformer": lambda: (
        Line(resnet(96, 64), transformer(64)),
        [(1, 8, 8, 96), TIME, CONTEXT],
    ),
}


def segment(module, shapes):
    generator = torch.Generator().manual_seed(2)
    examples = [torch.randn(s, generator=generator) for s in shapes]
    with torch.no_grad():
        outputs = module(*examples)
    ports = Ports(
        inputs={f"in{i}": TensorSpec(shape=tuple(x.shape)) for i, x in enumerate(examples)},
        outputs={f"out{i}": TensorSpec(shape=tuple(x.shape)) for i, x in enumerate(outputs)},
    )
    return SegmentInput("unet.00", module, ports, examples)


def layers_of(module):
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def attach(layer, quantized):
    layer.quantized = quantized
    layer.weight = nn.Parameter(torch.from_numpy(quantized.dequantize()), requires_grad=False)


def quantize(item, choose):
    """Round layers to what ``choose(name, layer)`` says, then calibrate."""
    layers = layers_of(item.module)
    for name, layer in layers.items():
        if choice := choose(name, layer):
            attach(layer, round_to_nearest(layer.weight.detach().numpy(), *choice))

    def observe(layer, arguments, output):
        low, high = float(arguments[0].min()), float(arguments[0].max())
        layer.activation_range = ActivationRange(
            low, high, float(output.min()), float(output.max())
        )

    handles = [m.register_forward_hook(observe) for m in layers.values()]
    with torch.no_grad():
        item.module(*item.examples)
    for handle in handles:
        handle.remove()


class Tuple(nn.Module):
    def forward(self, x):
        return (x,)


class Product(nn.Module):
    """A product of two computed matrices, as attention has them."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Linear(32, 32, bias=False) for _ in range(2))

    def forward(self, x, context):
        return (torch.bmm(self.left(x), self.right(context).transpose(1, 2)),)


def product():
    """Return one on calibrated grids, with int8 weights."""
    item = segment(randomize(Product()), [(1, 64, 32), (1, 48, 32)])
    quantize(item, lambda *_: ("int8",))
    return replace(item, samples=[item.examples])


def narrow(layer, shape):
    """Return a layer of 2-bit codes on calibrated grids."""
    item = segment(randomize(Line(layer)), [shape])
    quantize(item, lambda *_: ("int2",))
    return replace(item, samples=[item.examples])


def unlike_groups():
    """Return a group normalisation on calibrated grids, one of whose groups is 100 times larger."""
    norm = nn.GroupNorm(4, 16)
    item = segment(randomize(Line(norm, nn.Conv2d(16, 16, 3, padding=1))), [(1, 16, 16, 16)])
    item.examples[0][..., :4] *= 100
    quantize(item, lambda *_: ("int8",))
    return replace(item, samples=[item.examples])


def drowning(outlier):
    """Return a linear layer of 2-bit codes, one of whose inputs is far larger than the others."""
    item = segment(randomize(nn.Sequential(nn.Linear(128, 64), Tuple())), [(1, 64, 128)])
    item.examples[0][0, 0, 0] = outlier
    quantize(item, lambda *_: ("int2",))
    return replace(item, samples=[item.examples])


def run(target, item, path):
    """Lower, load and run a segment: what was lowered, and dB of the worst output."""
    lowered = target.lower(item, path)
    results = target.load(lowered.path, item.ports)(*(x.numpy() for x in item.examples))
    with torch.no_grad():
        expected = [y.numpy() for y in item.module(*item.examples)]
    for result, y in zip(results, expected, strict=True):
        assert result.shape == y.shape
        assert result.flags.c_contiguous
    return lowered, min(snr_db(y, r) for y, r in zip(expected, results, strict=True))


def beyond_calibration(factor):
    """A normalisation, a convolution, and a calibration that sees ``factor`` times what comes."""
    norm, convolution = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
    item = segment(randomize(Line(norm, convolution)), [(1, 16, 16, 16)])
    quantize(item, lambda *_: ("int8",))
    return replace(item, samples=[[factor * x for x in item.examples]])


def far_below_zero():
    """An embedding's layers: nearly all that the second one reads comes from inputs of -20 to 0."""
    torch.manual_seed(0)
    first, second = nn.Linear(64, 512), nn.Linear(512, 64)
    with torch.no_grad():
        first.weight.mul_(4)
        first.bias.sub_(9)
    return segment(nn.Sequential(first, nn.SiLU(), second, Tuple()).eval(), [(1, 64)])
