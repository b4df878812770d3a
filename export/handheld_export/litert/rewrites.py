"""Rewrites for LiteRT, fewer than :mod:`handheld_export.rewrites`.

LiteRT's converter and XNNPACK take plain diffusers code as one partition, but for nearest
upsampling. What they do not do well are steps written for ``[N, C, H, W]``, which come out
between transpositions of the whole picture, and the halves of GEGLU, which are copied out of
one wide tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from handheld import banding
from handheld.planning import Stored, sliced
from handheld_export import rewrites
from handheld_export.rewrites import (
    ExplicitAttention,
    GatedGELU,
    PictureGroupNorm,
    Resnet,
    float_input_of,
    kernel_places,
    quantized_of,
    replace_upsample,
    replace_upsample2d,
)

JOINED: Final = 5
"""Tensors that XNNPACK joins at once. With more, LiteRT does it outside of XNNPACK, which then has
two partitions, and the second finds the workspace of the first too small."""


class ChannelGroupNorm(nn.Module):
    """GroupNorm of ``[N, C, H, W]`` that never regroups the picture itself.

    Mean and squared deviation are taken per channel and combined per group (Chan, Golub and
    LeVeque), so large offsets cost no precision, and what is left is one multiplication and
    one addition per value.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        shape = (1, norm.num_groups, norm.num_channels // norm.num_groups)
        weight = torch.ones(shape) if norm.weight is None else norm.weight.detach().reshape(shape)
        bias = torch.zeros(shape) if norm.bias is None else norm.bias.detach().reshape(shape)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            n, c, length = x.shape
            return self.forward(x.reshape(n, c, 1, length)).reshape(n, c, length)
        n, c = x.shape[:2]
        x = x.permute(0, 2, 3, 1)
        mean = x.mean((1, 2), keepdim=True)
        deviation = torch.square(x - mean).mean((1, 2), keepdim=True)
        means = mean.reshape(n, self.groups, -1)
        group_mean = means.mean(2, keepdim=True)
        spread = deviation.reshape(n, self.groups, -1) + torch.square(means - group_mean)
        variance = spread.mean(2, keepdim=True)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        offset = self.bias - group_mean * scale
        y = x * scale.reshape(n, 1, 1, c) + offset.reshape(n, 1, 1, c)
        return y.permute(0, 3, 1, 2)


class HalfGroupNorm(PictureGroupNorm):
    """GroupNorm for half precision, without BROADCAST_TO, which GPUs do not take.

    The converter makes one of any broadcast whose other side it knows to change nothing.
    """

    def _like_variance(self, values: Tensor) -> Tensor:
        return values.reshape(1, -1, 1, 1)

    def _normed(self, x: Tensor) -> Tensor:
        n, shape = x.shape[0], (x.shape[0], self.groups, self.channels // self.groups, 1)
        centred = self._centred(x)
        variance = (centred * centred).mean((2, 3), keepdim=True).reshape(shape)
        inverse = torch.rsqrt(variance.mean((2, 3), keepdim=True) + self.eps)
        scale = inverse * self.weight.reshape(1, *shape[1:])
        return centred * scale.reshape(n, self.channels, 1, 1) + self.bias

    def _group_mean(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        grouped = mean.reshape(x.shape[0], self.groups, self.channels // self.groups, 1)
        off = grouped - grouped.mean((2, 3), keepdim=True)
        return mean - off.reshape(mean.shape)


class LastAxisResnet(Resnet):
    """ResnetBlock2D that adds the time embedding along the last axis."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *_: Any) -> Tensor:
        x: Tensor = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        if self.time_emb_proj is not None and temb is not None:
            t = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            x = x.permute(0, 2, 3, 1) + t.reshape(t.shape[0], 1, 1, -1)
            x = x.permute(0, 3, 1, 2)
        x = self.conv2(self.nonlinearity(self.norm2(x)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        x = input_tensor + x
        return x if self.rescale == 1 else x * (1 / self.rescale)


class SlicedConv(nn.Module):
    """A 3x3 convolution as nine linear layers, one for each place of its kernel.

    LiteRT's convolutions read no codes of less than 8 bits, its linear layers do.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stride = conv.stride
        self.places = nn.ModuleList(kernel_places(conv))

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        down, right = self.stride
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        rows, columns = -(-h // down), -(-w // right)
        y: Tensor | None = None
        for k, linear in enumerate(self.places):
            i, j = divmod(k, 3)
            part = padded[:, i : i + h : down, j : j + w : right].reshape(n, rows * columns, -1)
            y = linear(part) if y is None else y + linear(part)
        assert y is not None
        return y.reshape(n, rows, columns, -1).permute(0, 3, 1, 2)


def _replace_conv(conv: Any) -> nn.Module:
    weight = quantized_of(conv)
    plain = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.groups == 1
    plain = plain and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    if weight is None or not plain:
        return conv  # type: ignore[no-any-return]
    stored = Stored(weight.grid, weight.group_size, float_input_of(conv))
    slices = weight.grid != "palette" and sliced("litert-cpu", "conv3x3", stored, weight.codes.size)
    return SlicedConv(conv) if slices else conv


def _replace_resnet(block: Any) -> nn.Module:
    if block.time_embedding_norm != "default" or block.up or block.down:
        return block  # type: ignore[no-any-return]
    return LastAxisResnet(block)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    """Join tensors along a negative dimension, at most `JOINED` at once."""
    rank = parts[0].dim()
    while len(parts) > 1:
        starts = range(0, len(parts), JOINED)
        parts = [torch.cat(parts[i : i + JOINED], dim=dim) for i in starts]
        # Of another rank each time, else the converter makes one operator of two that follow.
        parts = [x.unsqueeze(0) if x.dim() == rank else x.squeeze(0) for x in parts]
    return parts[0] if parts[0].dim() == rank else parts[0].squeeze(0)


class PartialAttention(ExplicitAttention):
    """Attention of some heads and queries after the others, where the table of all is large.

    The softmax is one of rows, so nothing changes but memory.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, tokens, width = q.shape
        q, k, v = (
            t.reshape(n, -1, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v)
        )
        heads, rows = banding.attention(self.heads, tokens, n * k.shape[2])
        groups = []
        for i in range(0, self.heads, heads):
            own, keys, values = (t[:, i : i + heads] for t in (q, k, v))
            parts = [own[:, :, j : j + rows] for j in range(0, tokens, rows)]
            parts = [
                F.scaled_dot_product_attention(x, keys, values, scale=self.scale) for x in parts
            ]
            groups.append(_join(parts, -2).transpose(1, 2).reshape(n, tokens, -1))
        return _join(groups, -1)


def _replace_attention(attention: Any) -> nn.Module:
    special = ("norm_q", "norm_k", "norm_cross", "spatial_norm", "added_kv_proj_dim")
    if any(getattr(attention, name, None) is not None for name in special):
        return attention  # type: ignore[no-any-return]
    # Where a picture comes in it is normalized first.
    return (PartialAttention if attention.group_norm is None else ExplicitAttention)(attention)


REPLACEMENTS: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.GroupNorm: ChannelGroupNorm,
    nn.Conv2d: _replace_conv,
    GEGLU: GatedGELU,
    ResnetBlock2D: _replace_resnet,
    Attention: _replace_attention,
    Upsample2D: replace_upsample2d,
    nn.Upsample: replace_upsample,
}

GPU_REPLACEMENTS: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = {
    **rewrites.REPLACEMENTS,
    nn.GroupNorm: HalfGroupNorm,
}
"""What the GPU delegate takes whole, in half precision."""
