"""Graph rewrites that leave only operators an engine's delegate takes.

Each rewrite replaces one kind of module by one that computes the same function from
elementwise arithmetic, means over the last axis or the picture, convolutions, linear
layers, batched matrix products, softmax over the last axis, permutations, views and
concatenations. Values agree to float32 rounding.

Layers that hold weights stay ``nn.Linear`` and ``nn.Conv2d`` and keep their ``quantized``
and ``activation_range``; where a rewrite splits a layer, its codes are split with it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU, GELU, ApproximateGELU, FP32SiLU
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DecoderTiny
from diffusers.models.downsampling import Downsample2D
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from handheld_export.quantization import ActivationRange, QuantizedWeight


def rewrite(
    module: nn.Module,
    replacements: Mapping[type[nn.Module], Callable[[Any], nn.Module]] | None = None,
) -> nn.Module:
    """Return a rewritten copy of a module; parameters are shared with the original.

    Parameters
    ----------
    module : torch.nn.Module
        In eval mode. It is not changed.
    replacements : mapping of module type to function, optional
        What replaces modules of which type, children first; by default this module's.

    Returns
    -------
    torch.nn.Module
        Takes and returns the same as ``module``. Linear and convolution layers carry
        ``source_name``, the path of the layer in ``module`` they come from.
    """
    copied = _copy(module)
    for name, layer in copied.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.source_name = name
    return _rewrite(copied, REPLACEMENTS if replacements is None else replacements, {})


def _copy(module: nn.Module) -> nn.Module:
    shared: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    for layer in module.modules():
        for name in ("quantized", "activation_range"):
            value = getattr(layer, name, None)
            shared[id(value)] = value
    return copy.deepcopy(module, shared)


def _rewrite(
    module: nn.Module,
    replacements: Mapping[type[nn.Module], Callable[[Any], nn.Module]],
    done: dict[nn.Module, nn.Module],
) -> nn.Module:
    if module not in done:
        for name, child in list(module._modules.items()):
            if child is not None:
                setattr(module, name, _rewrite(child, replacements, done))
        replace = replacements.get(type(module))
        done[module] = module if replace is None else replace(module)
    return done[module]


class Identity(nn.Module):
    """Dropout in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class SiLU(nn.Module):
    """``x * sigmoid(x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class SteadySiLU(nn.Module):
    """``x * sigmoid(x)`` without a sigmoid, whose error ``x`` would multiply.

    ``relu(x) - |x| e^-|x| / (1 + e^-|x|)``: what is small comes out of something small.
    """

    def forward(self, x: Tensor) -> Tensor:
        size = torch.abs(x)
        small = torch.exp(-size)
        return torch.relu(x) - size * small / (1.0 + small)


class TanhGELU(nn.Module):
    """The tanh approximation of GELU, which delegates would take for the exact one."""

    def forward(self, x: Tensor) -> Tensor:
        inner = 0.7978845608028654 * (x + 0.044715 * (x * x * x))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class PictureGroupNorm(nn.Module):
    """GroupNorm of ``[N, C, H, W]``, or of ``[N, C, tokens]`` as attention has it.

    The mean is subtracted before squaring, so large offsets cost no precision. Only the
    ``[N, C, 1, 1]`` statistics are regrouped; the picture keeps its layout.
    """

    factor = 1.0
    """What the picture is multiplied with first, where its squares leave a type's range."""
    levels: Tensor | None
    """What each channel is multiplied with first, where groups spread too differently."""
    eps: float | Tensor
    spread: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.channels, self.eps = norm.num_groups, norm.num_channels, norm.eps
        ones, zeros = torch.ones(self.channels), torch.zeros(self.channels)
        weight = ones if norm.weight is None else norm.weight.detach()
        bias = zeros if norm.bias is None else norm.bias.detach()
        self.register_buffer("weight", weight.reshape(1, -1, 1, 1))
        self.register_buffer("bias", bias.reshape(1, -1, 1, 1))
        self.register_buffer("spread", torch.zeros(1, self.groups, self.channels // self.groups, 1))
        self.register_buffer("levels", None)

    def level(self, factors: Tensor) -> None:
        """Multiply each of the ``[groups]`` first; what comes out stays the same.

        Raises
        ------
        ValueError
            If it was done before.
        """
        if self.levels is not None:
            raise ValueError("groups are levelled already")
        eps = self.eps * factors**2
        del self.eps
        self.register_buffer("eps", self._like_variance(eps))
        self.register_buffer("levels", self._by_channel(factors))

    def _by_channel(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.channels // self.groups).reshape(1, -1, 1, 1)

    _like_variance = _by_channel

    def scale(self, factor: float) -> None:
        """Square values at another size; what comes out stays the same."""
        self.factor *= factor
        self.eps *= factor**2

    def forward(self, x: Tensor) -> Tensor:
        return self._normed(x.unsqueeze(3)).squeeze(3) if x.dim() == 3 else self._normed(x)

    def _normed(self, x: Tensor) -> Tensor:
        centred = self._centred(x)
        variance = self._group_mean(centred * centred)
        return centred * (torch.rsqrt(variance + self.eps) * self.weight) + self.bias

    def _centred(self, x: Tensor) -> Tensor:
        if self.factor != 1:
            x = x * self.factor
        if self.levels is not None:
            x = x * self.levels
        return x - self._group_mean(x)

    def _group_mean(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        mean = x.mean((2, 3), keepdim=True)
        mean = mean.reshape(n, self.groups, self.channels // self.groups, 1)
        mean = mean.mean((2, 3), keepdim=True) + self.spread
        return mean.reshape(n, self.channels, 1, 1)


class TokenLayerNorm(nn.Module):
    """LayerNorm over the last axis."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        if len(norm.normalized_shape) != 1:
            raise ValueError("only LayerNorm over the last axis is rewritten")
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self._mean(x)
        y = centred * torch.rsqrt(self._mean(centred * centred) + self.eps)
        if self.weight is not None:
            y = y * self.weight
        return y if self.bias is None else y + self.bias

    @staticmethod
    def _mean(x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)


class GatedGELU(nn.Module):
    """GEGLU with one linear layer for the value and one for the gate."""

    def __init__(self, geglu: GEGLU) -> None:
        super().__init__()
        self.value, self.gate = split_rows(geglu.proj, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.value(x) * F.gelu(self.gate(x))
        return y


class LinearGELU(nn.Module):
    """A linear layer and GELU."""

    def __init__(self, gelu: GELU) -> None:
        super().__init__()
        self.proj = gelu.proj
        self.activation = TanhGELU() if gelu.approximate == "tanh" else nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.proj(x))
        return y


class ExplicitAttention(nn.Module):
    """Self or cross attention as two batched products around a softmax."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads, self.scale = attention.heads, float(attention.scale)
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out[0]
        self.group_norm = attention.group_norm
        self.residual = attention.residual_connection
        self.rescale = float(attention.rescale_output_factor)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError("attention masks are not supported")
        shape = hidden_states.shape
        x = hidden_states if self.group_norm is None else self.group_norm(hidden_states)
        if len(shape) == 4:
            x = x.permute(0, 2, 3, 1).reshape(shape[0], -1, shape[1])
        context = x if encoder_hidden_states is None else encoder_hidden_states
        y: Tensor = self.to_out(self._attend(self.to_q(x), self.to_k(context), self.to_v(context)))
        if len(shape) == 4:
            y = y.reshape(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
        if self.residual:
            y = y + hidden_states
        return y if self.rescale == 1 else y * (1 / self.rescale)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, tokens, width = q.shape
        heads, depth = self.heads, width // self.heads
        q = (q * self.scale).reshape(n, tokens, heads, depth).permute(0, 2, 1, 3)
        k = k.reshape(n, -1, heads, depth).permute(0, 2, 3, 1)
        v = v.reshape(n, -1, heads, depth).permute(0, 2, 1, 3)
        q = q.reshape(n * heads, tokens, depth)
        k = k.reshape(n * heads, depth, -1)
        v = v.reshape(n * heads, -1, depth)
        y = torch.bmm(torch.softmax(torch.bmm(q, k), dim=-1), v)
        y = y.reshape(n, heads, tokens, depth).permute(0, 2, 1, 3)
        return y.reshape(n, tokens, width)


class SpatialTransformer(nn.Module):
    """Transformer2DModel on pictures; projections by 1x1 convolution become linear."""

    def __init__(self, model: Transformer2DModel) -> None:
        super().__init__()
        self.norm, self.blocks = model.norm, model.transformer_blocks
        self.proj_in, self.proj_out = _linear(model.proj_in), _linear(model.proj_out)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *_: Any,
        return_dict: bool = True,
        **__: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        n, c, h, w = hidden_states.shape
        x = self.norm(hidden_states).permute(0, 2, 3, 1).reshape(n, h * w, c)
        x = self.proj_in(x)
        for block in self.blocks:
            x = block(x, encoder_hidden_states=encoder_hidden_states)
        x = self.proj_out(x).reshape(n, h, w, -1).permute(0, 3, 1, 2)
        x = x + hidden_states
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


class Resnet(nn.Module):
    """ResnetBlock2D with additive time embedding and no resampling."""

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.time_emb_proj, self.conv_shortcut = block.time_emb_proj, block.conv_shortcut
        self.nonlinearity = block.nonlinearity
        self.skip_time_act, self.rescale = block.skip_time_act, float(block.output_scale_factor)

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *_: Any) -> Tensor:
        x: Tensor = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        if self.time_emb_proj is not None and temb is not None:
            t = temb if self.skip_time_act else self.nonlinearity(temb)
            t = self.time_emb_proj(t)
            x = x + t.reshape(*t.shape, 1, 1)
        x = self.conv2(self.nonlinearity(self.norm2(x)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        x = input_tensor + x
        return x if self.rescale == 1 else x * (1 / self.rescale)


class Pointwise(nn.Module):
    """A 1x1 convolution as a linear layer over pixels."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.linear = _linear(conv)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y: Tensor = self.linear(x.permute(0, 2, 3, 1).reshape(n, h * w, c))
        return y.reshape(n, h, w, -1).permute(0, 3, 1, 2)


class NearestUpsample(nn.Module):
    """Nearest-neighbour upsampling by an integer, from concatenations and views."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        f = self.factor
        rows = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
        rows = torch.cat([rows] * f, dim=2).reshape(n, h, f * w * c)
        rows = torch.cat([rows] * f, dim=2).reshape(n, f * h, f * w, c)
        return rows.permute(0, 3, 1, 2)


class Upsample(nn.Module):
    """Upsample2D: nearest by two, then a convolution."""

    def __init__(self, block: Upsample2D) -> None:
        super().__init__()
        self.nearest = NearestUpsample(2)
        self.conv = (
            (block.conv if block.name == "conv" else block.Conv2d_0) if block.use_conv else None
        )

    def forward(self, hidden_states: Tensor, output_size: Any = None, *_: Any) -> Tensor:
        h, w = hidden_states.shape[2:]
        if output_size is not None and tuple(output_size) != (2 * h, 2 * w):
            raise ValueError("upsampling by other than two is not supported")
        x: Tensor = self.nearest(hidden_states)
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Downsample2D by convolution, padding at the far edges where it asks for that."""

    def __init__(self, block: Downsample2D) -> None:
        super().__init__()
        self.conv, self.pad = block.conv, block.use_conv and block.padding == 0

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        x = F.pad(hidden_states, (0, 1, 0, 1)) if self.pad else hidden_states
        y: Tensor = self.conv(x)
        return y


class TinyBlock(nn.Module):
    """AutoencoderTinyBlock."""

    def __init__(self, block: AutoencoderTinyBlock) -> None:
        super().__init__()
        self.conv, self.fuse = block.conv, block.fuse
        self.skip = None if isinstance(block.skip, nn.Identity) else block.skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fuse(self.conv(x) + (x if self.skip is None else self.skip(x)))
        return y


class TinyDecoder(nn.Module):
    """The decoder of AutoencoderTiny."""

    def __init__(self, decoder: DecoderTiny) -> None:
        super().__init__()
        self.layers = decoder.layers

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(torch.tanh(x * (1 / 3)) * 3) * 2 - 1
        return y


def split_rows(layer: nn.Linear, parts: int) -> tuple[nn.Linear, ...]:
    """Split a linear layer into equal parts of its outputs, codes and scales included."""
    step = layer.out_features // parts
    result = []
    for i in range(parts):
        start, stop = i * step, (i + 1) * step
        bias = None if layer.bias is None else layer.bias.detach()[start:stop]
        part = _make_linear(layer.weight.detach()[start:stop], bias)
        if quantized := quantized_of(layer):
            part.quantized = quantized.rows(start, stop)  # type: ignore[assignment]
        part.float_input = float_input_of(layer)  # type: ignore[assignment]
        part.source_name = source_of(layer)  # type: ignore[assignment]
        result.append(part)
    return tuple(result)


def kernel_places(conv: nn.Conv2d) -> tuple[nn.Linear, ...]:
    """Return a linear layer for each place of a kernel, codes and scales included.

    They add up to the convolution; the first has its bias.
    """
    result: list[nn.Linear] = []
    height, width = conv.kernel_size
    for i, j in itertools.product(range(height), range(width)):
        bias = conv.bias.detach() if conv.bias is not None and not result else None
        part = _make_linear(conv.weight.detach()[:, :, i, j], bias)
        if q := quantized_of(conv):
            codes = np.ascontiguousarray(q.codes[:, :, i, j])
            part.quantized = replace(q, codes=codes)  # type: ignore[assignment]
        part.source_name = source_of(conv)  # type: ignore[assignment]
        result.append(part)
    return tuple(result)


def quantized_of(layer: nn.Module) -> QuantizedWeight | None:
    """Return the codes a layer carries."""
    return getattr(layer, "quantized", None)


def source_of(layer: object) -> str:
    """Return the path of the layer in the module that was rewritten."""
    name: str = getattr(layer, "source_name", "")
    return name


def float_input_of(layer: nn.Module) -> bool:
    """Return whether a layer's input is not to be rounded."""
    return getattr(layer, "float_input", False)


def range_of(layer: nn.Module) -> ActivationRange | None:
    """Return the calibrated activation range a layer carries."""
    return getattr(layer, "activation_range", None)


def _make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer.eval()


def _linear(layer: nn.Module) -> nn.Linear:
    if isinstance(layer, Pointwise):
        return layer.linear
    if isinstance(layer, nn.Linear):
        return layer
    assert isinstance(layer, nn.Conv2d)
    result = _make_linear(
        layer.weight.detach().reshape(layer.out_channels, layer.in_channels),
        None if layer.bias is None else layer.bias.detach(),
    )
    if q := quantized_of(layer):
        codes = np.ascontiguousarray(q.codes.reshape(layer.out_channels, layer.in_channels))
        result.quantized = QuantizedWeight(  # type: ignore[assignment]
            q.grid, codes, q.scales, q.group_size, q.codebook
        )
    result.float_input = float_input_of(layer)  # type: ignore[assignment]
    result.source_name = source_of(layer)  # type: ignore[assignment]
    return result


def _replace_conv(conv: nn.Conv2d) -> nn.Module:
    plain = conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1
    if plain and conv.padding == (0, 0) and quantized_of(conv):
        return Pointwise(conv)
    return conv


def _replace_attention(attention: Any) -> Any:
    special = ("norm_q", "norm_k", "norm_cross", "spatial_norm", "added_kv_proj_dim")
    if any(getattr(attention, name, None) is not None for name in special):
        return attention
    return ExplicitAttention(attention)


def _replace_transformer(model: Any) -> Any:
    if not model.is_input_continuous or model.config.norm_type != "layer_norm":
        return model
    return SpatialTransformer(model)


def _replace_resnet(block: Any) -> Any:
    if block.time_embedding_norm != "default" or block.up or block.down:
        return block
    return Resnet(block)


def replace_upsample2d(block: Any) -> Any:
    if block.norm is not None or block.use_conv_transpose or not block.interpolate:
        return block
    return Upsample(block)


def replace_upsample(layer: nn.Upsample) -> nn.Module:
    scale = layer.scale_factor
    if layer.mode != "nearest" or not isinstance(scale, int | float) or scale != int(scale):
        return layer
    return NearestUpsample(int(scale))


def _replace_downsample2d(block: Downsample2D) -> nn.Module:
    return block if block.norm is not None else Downsample(block)


def _replace_gelu(layer: nn.GELU) -> nn.Module:
    return TanhGELU() if layer.approximate == "tanh" else layer


REPLACEMENTS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Dropout: lambda _: Identity(),
    nn.SiLU: lambda _: SiLU(),
    FP32SiLU: lambda _: SiLU(),
    nn.GELU: _replace_gelu,
    nn.GroupNorm: PictureGroupNorm,
    nn.LayerNorm: TokenLayerNorm,
    nn.Conv2d: _replace_conv,
    nn.Upsample: replace_upsample,
    GEGLU: GatedGELU,
    GELU: LinearGELU,
    ApproximateGELU: lambda layer: layer,
    Attention: _replace_attention,
    Transformer2DModel: _replace_transformer,
    ResnetBlock2D: _replace_resnet,
    Upsample2D: replace_upsample2d,
    Downsample2D: _replace_downsample2d,
    AutoencoderTinyBlock: TinyBlock,
    DecoderTiny: TinyDecoder,
}
