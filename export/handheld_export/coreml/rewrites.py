"""Transformers as the Neural Engine likes them: channels first, in four dimensions.

Inside a block tokens are ``[N, C, 1, S]``, linear layers are 1x1 convolutions with the same codes,
and attention is one pair of einsums for each head, none of which moves an axis. Between blocks they
are ``[N, S, C]`` as in every segment; Core ML removes transpositions that undo each other. Values
agree with those of the plain rewrites to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from handheld_export.quantization import QuantizedWeight
from handheld_export.rewrites import (
    REPLACEMENTS,
    ExplicitAttention,
    GatedGELU,
    SpatialTransformer,
    TokenLayerNorm,
    quantized_of,
    source_of,
)
from handheld_export.segments import TransformerIn, TransformerOut


def pointwise(layer: nn.Linear | nn.Conv2d) -> nn.Conv2d:
    """Return a linear layer as a 1x1 convolution, codes and scales included."""
    if isinstance(layer, nn.Conv2d):
        return layer
    with torch.device("meta"):
        conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
    conv.weight = nn.Parameter(layer.weight.detach()[:, :, None, None], requires_grad=False)
    if layer.bias is not None:
        conv.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    if (q := quantized_of(layer)) is not None:
        conv.quantized = QuantizedWeight(  # type: ignore[assignment]
            q.grid, q.codes[:, :, None, None], q.scales, q.group_size, q.codebook
        )
    conv.source_name = source_of(layer)  # type: ignore[assignment]
    return conv.eval()


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of ``[N, C, 1, S]``."""

    def __init__(self, norm: TokenLayerNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        for name, value in (("weight", norm.weight), ("bias", norm.bias)):
            kept = None if value is None else value.detach().reshape(1, -1, 1, 1)
            self.register_buffer(name, kept)

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        y = centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + self.eps)
        weight, bias = self.weight, self.bias
        if isinstance(weight, Tensor):
            y = y * weight
        return y + bias if isinstance(bias, Tensor) else y


class SplitAttention(nn.Module):
    """Attention, head by head."""

    def __init__(self, attention: ExplicitAttention) -> None:
        super().__init__()
        self.heads, self.scale = attention.heads, attention.scale
        self.to_q, self.to_k = pointwise(attention.to_q), pointwise(attention.to_k)
        self.to_v, self.to_out = pointwise(attention.to_v), pointwise(attention.to_out)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.to_q(x) * self.scale
        # [N, S, 1, C]: the one axis that moves, for all heads at once.
        k = self.to_k(context).permute(0, 3, 2, 1)
        v = self.to_v(context)
        depth = q.shape[1] // self.heads
        heads = []
        for i in range(self.heads):
            own = slice(i * depth, (i + 1) * depth)
            # [N, S of context, 1, S]
            weights = torch.einsum("bchq,bkhc->bkhq", q[:, own], k[:, :, :, own])
            weights = torch.softmax(weights, dim=1)
            heads.append(torch.einsum("bkhq,bchk->bchq", weights, v[:, own]))
        y: Tensor = self.to_out(torch.cat(heads, dim=1))
        return y


class ChannelsFirstBlock(nn.Module):
    """BasicTransformerBlock with LayerNorm."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn1 = ChannelLayerNorm(block.norm1), SplitAttention(block.attn1)
        self.norm2 = self.attn2 = None
        if block.attn2 is not None:
            self.norm2, self.attn2 = ChannelLayerNorm(block.norm2), SplitAttention(block.attn2)
        gated, _, last = block.ff.net[:3]
        self.norm3 = ChannelLayerNorm(block.norm3)
        self.value, self.gate = pointwise(gated.value), pointwise(gated.gate)
        self.last = pointwise(last)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        x = _channels_first(hidden_states)
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        if self.attn2 is not None and self.norm2 is not None:
            y = self.norm2(x)
            text = encoder_hidden_states
            x = x + self.attn2(y, y if text is None else _channels_first(text))
        y = self.norm3(x)
        x = x + self.last(self.value(y) * F.gelu(self.gate(y)))
        tokens: Tensor = x[:, :, 0].permute(0, 2, 1)
        return tokens


def _channels_first(tokens: Tensor) -> Tensor:
    return tokens.permute(0, 2, 1)[:, :, None]


class TokensIn(nn.Module):
    """A transformer's beginning: normalisation and projection of the picture."""

    def __init__(self, norm: nn.Module, projection: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.norm, self.proj_in = norm, pointwise(projection)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj_in(self.norm(x))
        return y.flatten(2).permute(0, 2, 1)


class TokensOut(nn.Module):
    """A transformer's end: projection, and the sum with the picture before."""

    def __init__(self, projection: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.proj_out = pointwise(projection)

    def forward(self, tokens: Tensor, residual: Tensor) -> Tensor:
        n, _, h, w = residual.shape
        y: Tensor = self.proj_out(tokens.permute(0, 2, 1).reshape(n, -1, h, w))
        return y + residual


class ChannelsFirstTransformer(nn.Module):
    """Transformer2DModel on pictures, whose blocks are rewritten already."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.first = TokensIn(model.norm, model.proj_in)
        self.blocks, self.last = model.transformer_blocks, TokensOut(model.proj_out)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *_: Any,
        return_dict: bool = True,
        **__: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        x = self.first(hidden_states)
        for block in self.blocks:
            x = block(x, encoder_hidden_states=encoder_hidden_states)
        x = self.last(x, hidden_states)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def _replace_block(block: Any) -> nn.Module:
    fits = (
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and not block.only_cross_attention
        and isinstance(block.ff.net[0], GatedGELU)
        and all(
            isinstance(a, ExplicitAttention) and a.rescale == 1 and not a.residual
            for a in (block.attn1, block.attn2)
            if a is not None
        )
    )
    result: nn.Module = ChannelsFirstBlock(block) if fits else block
    return result


def _replace_transformer(model: Any) -> nn.Module:
    plain = REPLACEMENTS[Transformer2DModel](model)
    return ChannelsFirstTransformer(model) if isinstance(plain, SpatialTransformer) else plain


ANE_REPLACEMENTS: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = {
    **REPLACEMENTS,
    nn.Conv2d: lambda conv: conv,
    BasicTransformerBlock: _replace_block,
    TransformerIn: lambda unit: TokensIn(unit.norm, unit.proj_in),
    TransformerOut: lambda unit: TokensOut(unit.proj_out),
    Transformer2DModel: _replace_transformer,
}
