"""Parameters and multiply-accumulates of every layer, from configs alone.

Needs neither weights nor torch: a diffusers ``config.json`` and a latent size are enough.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from handheld.errors import CheckpointError

Kind = Literal["linear", "conv3x3", "conv1x1", "norm", "attention"]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """One layer.

    Parameters
    ----------
    name : str
        Module path, as in the state dict without ``.weight``.
    kind : Kind
        ``attention`` is the two products inside attention, which hold no weights.
    shape : tuple of int
        Of the weight.
    bias : bool
    macs : int
        Multiply-accumulates of one run at batch 1.
    outputs : int
        Elements that it gives.
    table : (int, int, int) or None
        Of an attention, what its softmax gives: heads, queries and keys.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    bias: bool
    macs: int
    outputs: int
    table: tuple[int, int, int] | None = None

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape) if self.shape else 0

    @property
    def params(self) -> int:
        """Elements of weight and bias."""
        return self.weights + (self.shape[0] if self.bias else 0)

    def nbytes(self, bits: float = 32, other_bits: float = 32) -> int:
        """Return the bytes of weight (at ``bits`` each) and bias (at ``other_bits``)."""
        return math.ceil((self.weights * bits + (self.params - self.weights) * other_bits) / 8)


def count_unet(
    config: Config, latent: tuple[int, int], *, tokens: int = 77, batch: int = 1
) -> list[Layer]:
    """Count the layers of a UNet2DConditionModel.

    Parameters
    ----------
    config : mapping
        Its ``config.json``. SDXL, trimmed SDXL (fewer transformer layers, no mid block) and
        SD 1.5.
    latent : (int, int)
        Height and width of the latent.
    tokens : int
        Of the prompt embedding.
    batch : int
        MACs and outputs are for this many latents.

    Returns
    -------
    list of Layer
        In the order of the forward pass.

    Raises
    ------
    CheckpointError
        If the config has something that is not supported.
    """
    return _UNet(config, tokens).count(latent, batch)


def count_decoder(config: Config, latent: tuple[int, int]) -> list[Layer]:
    """Count the layers of the decoder of an AutoencoderKL or AutoencoderTiny.

    Parameters
    ----------
    config : mapping
        Its ``config.json``; ``_class_name`` tells which of the two it is.
    latent : (int, int)
        Height and width of the latent.

    Raises
    ------
    CheckpointError
        If it is another class, or has something that is not supported.
    """
    name = config.get("_class_name", "AutoencoderKL")
    if name == "AutoencoderKL":
        return _kl_decoder(config, latent)
    if name == "AutoencoderTiny":
        return _tiny_decoder(config, latent)
    raise _unsupported("_class_name", name)


def summary(layers: Iterable[Layer]) -> dict[str, Any]:
    """Add up layers: ``params``, ``macs`` and both by kind."""
    params: dict[str, int] = defaultdict(int)
    macs: dict[str, int] = defaultdict(int)
    for layer in layers:
        params[layer.kind] += layer.params
        macs[layer.kind] += layer.macs
    return {
        "params": sum(params.values()),
        "macs": sum(macs.values()),
        "params_by_kind": {k: v for k, v in params.items() if v},
        "macs_by_kind": {k: v for k, v in macs.items() if v},
    }


def _unsupported(field: str, value: Any) -> CheckpointError:
    return CheckpointError(f"'{value}' is not supported", path="config.json", field=field)


class _Counter:
    """Collects layers; keeps the size of the feature map it is at."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.layers: list[Layer] = []

    @property
    def positions(self) -> int:
        return self.size[0] * self.size[1]

    def conv(self, name: str, inputs: int, outputs: int, kernel: int = 3, *, bias: bool = True,
             stride: int = 1) -> None:  # fmt: skip
        pad = kernel // 2
        self.size = (
            (self.size[0] + 2 * pad - kernel) // stride + 1,
            (self.size[1] + 2 * pad - kernel) // stride + 1,
        )
        shape = (outputs, inputs, kernel, kernel)
        kind: Kind = "conv1x1" if kernel == 1 else "conv3x3"
        macs = math.prod(shape) * self.positions
        self.layers.append(Layer(name, kind, shape, bias, macs, outputs * self.positions))

    def linear(self, name: str, inputs: int, outputs: int, rows: int, *, bias: bool = True) -> None:
        shape = (outputs, inputs)
        macs = inputs * outputs * rows
        self.layers.append(Layer(name, "linear", shape, bias, macs, outputs * rows))

    def norm(self, name: str, channels: int, rows: int | None = None) -> None:
        rows = self.positions if rows is None else rows
        self.layers.append(Layer(name, "norm", (channels,), True, 0, channels * rows))

    def attention(self, name: str, channels: int, heads: int, queries: int, keys: int) -> None:
        macs, outputs, table = (
            2 * channels * queries * keys,
            channels * queries,
            (heads, queries, keys),
        )
        self.layers.append(Layer(name, "attention", (), False, macs, outputs, table))

    def resnet(self, name: str, inputs: int, outputs: int, embedding: int | None) -> None:
        self.norm(f"{name}.norm1", inputs)
        self.conv(f"{name}.conv1", inputs, outputs)
        if embedding is not None:
            self.linear(f"{name}.time_emb_proj", embedding, outputs, 1)
        self.norm(f"{name}.norm2", outputs)
        self.conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            self.conv(f"{name}.conv_shortcut", inputs, outputs, 1)

    def double(self) -> None:
        self.size = (2 * self.size[0], 2 * self.size[1])


class _UNet:
    def __init__(self, config: Config, tokens: int) -> None:
        self.config = config
        self.tokens = tokens
        self.channels: list[int] = list(config["block_out_channels"])
        for field, plain in (
            ("class_embed_type", None),
            ("encoder_hid_dim_type", None),
            ("time_embedding_type", "positional"),
            ("resnet_time_scale_shift", "default"),
            ("dual_cross_attention", False),
            ("num_class_embeds", None),
            ("resnet_skip_time_act", False),
        ):
            if config.get(field, plain) != plain:
                raise _unsupported(field, config[field])
        only = config.get("only_cross_attention", False)
        if only is True or (isinstance(only, Sequence) and any(only)):
            raise _unsupported("only_cross_attention", only)
        n = len(self.channels)
        self.per_block = _per_block(config.get("layers_per_block", 2), n)
        self.cross = _per_block(config.get("cross_attention_dim", 1280), n)
        # diffusers' own confusion: what is called a width is a number of heads.
        heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
        self.heads = _per_block(heads, n)
        self.depth = _per_block(config.get("transformer_layers_per_block", 1), n)
        reverse = config.get("reverse_transformer_layers_per_block")
        self.reverse_depth = self.depth[::-1] if reverse is None else _per_block(reverse, n)
        self.linear_projection = bool(config.get("use_linear_projection", False))
        self.embedding = config.get("time_embedding_dim") or self.channels[0] * 4
        self.sizes: list[tuple[int, int]] = []

    def count(self, latent: tuple[int, int], batch: int) -> list[Layer]:
        c = _Counter(latent)
        config = self.config
        c.linear("time_embedding.linear_1", self.channels[0], self.embedding, 1)
        c.linear("time_embedding.linear_2", self.embedding, self.embedding, 1)
        added = config.get("addition_embed_type")
        if added == "text_time":
            inputs = config["projection_class_embeddings_input_dim"]
            c.linear("add_embedding.linear_1", inputs, self.embedding, 1)
            c.linear("add_embedding.linear_2", self.embedding, self.embedding, 1)
        elif added is not None:
            raise _unsupported("addition_embed_type", added)
        c.conv(
            "conv_in", config.get("in_channels", 4), self.channels[0],
            config.get("conv_in_kernel", 3),
        )  # fmt: skip
        skips = self._down(c)
        self._mid(c)
        self._up(c, skips)
        c.norm("conv_norm_out", self.channels[0])
        c.conv(
            "conv_out", self.channels[0], config.get("out_channels", 4),
            config.get("conv_out_kernel", 3),
        )  # fmt: skip
        if batch == 1:
            return c.layers
        return [replace(x, macs=x.macs * batch, outputs=x.outputs * batch) for x in c.layers]

    def _down(self, c: _Counter) -> list[int]:
        skips = [self.channels[0]]
        inputs = self.channels[0]
        types = self.config["down_block_types"]
        for i, (kind, outputs) in enumerate(zip(types, self.channels, strict=True)):
            attends = _attends(f"down_block_types[{i}]", kind, "Down")
            depth = _per_block(self.depth[i], self.per_block[i])
            for j in range(self.per_block[i]):
                c.resnet(f"down_blocks.{i}.resnets.{j}", inputs, outputs, self.embedding)
                inputs = outputs
                if attends:
                    name = f"down_blocks.{i}.attentions.{j}"
                    self._transformer(c, name, outputs, depth[j], i)
                skips.append(outputs)
            self.sizes.append(c.size)
            if i < len(self.channels) - 1:
                c.conv(f"down_blocks.{i}.downsamplers.0.conv", outputs, outputs, stride=2)
                skips.append(outputs)
        return skips

    def _mid(self, c: _Counter) -> None:
        kind = self.config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
        if kind is None:
            return
        if kind not in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"):
            raise _unsupported("mid_block_type", kind)
        channels = self.channels[-1]
        c.resnet("mid_block.resnets.0", channels, channels, self.embedding)
        if kind == "UNetMidBlock2D":
            # diffusers builds it with no layers but the first, and without attention.
            return
        depth = _per_block(self.depth[-1], 1)[0]
        self._transformer(c, "mid_block.attentions.0", channels, depth, -1)
        c.resnet("mid_block.resnets.1", channels, channels, self.embedding)

    def _up(self, c: _Counter, skips: list[int]) -> None:
        inputs = self.channels[-1]
        channels, per_block = self.channels[::-1], self.per_block[::-1]
        types = self.config["up_block_types"]
        for i, (kind, outputs) in enumerate(zip(types, channels, strict=True)):
            attends = _attends(f"up_block_types[{i}]", kind, "Up")
            layers = per_block[i] + 1
            depth = _per_block(self.reverse_depth[i], layers)
            for j in range(layers):
                name = f"up_blocks.{i}.resnets.{j}"
                c.resnet(name, inputs + skips.pop(), outputs, self.embedding)
                inputs = outputs
                if attends:
                    name = f"up_blocks.{i}.attentions.{j}"
                    self._transformer(c, name, outputs, depth[j], -1 - i)
            if i < len(channels) - 1:
                # An odd size is not the double of the next: the U-Net upsamples to the skip's.
                c.size = self.sizes[-2 - i]
                c.conv(f"up_blocks.{i}.upsamplers.0.conv", outputs, outputs)

    def _transformer(self, c: _Counter, name: str, channels: int, depth: int, level: int) -> None:
        rows, cross, heads = c.positions, self.cross[level], self.heads[level]
        c.norm(f"{name}.norm", channels)
        if self.linear_projection:
            c.linear(f"{name}.proj_in", channels, channels, rows)
        else:
            c.conv(f"{name}.proj_in", channels, channels, 1)
        for k in range(depth):
            block = f"{name}.transformer_blocks.{k}"
            for i, (source, width, keys) in enumerate(
                ((channels, channels, rows), (cross, channels, self.tokens)), 1
            ):
                attention = f"{block}.attn{i}"
                c.norm(f"{block}.norm{i}", channels, rows)
                c.linear(f"{attention}.to_q", channels, width, rows, bias=False)
                c.linear(f"{attention}.to_k", source, width, keys, bias=False)
                c.linear(f"{attention}.to_v", source, width, keys, bias=False)
                c.attention(attention, width, heads, rows, keys)
                c.linear(f"{attention}.to_out.0", width, channels, rows)
            c.norm(f"{block}.norm3", channels, rows)
            c.linear(f"{block}.ff.net.0.proj", channels, 8 * channels, rows)
            c.linear(f"{block}.ff.net.2", 4 * channels, channels, rows)
        if self.linear_projection:
            c.linear(f"{name}.proj_out", channels, channels, rows)
        else:
            c.conv(f"{name}.proj_out", channels, channels, 1)


def _per_block(value: Any, count: int) -> list[Any]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return [value] * count


def _attends(field: str, kind: str, direction: str) -> bool:
    if kind == f"CrossAttn{direction}Block2D":
        return True
    if kind != f"{direction}Block2D":
        raise _unsupported(field, kind)
    return False


def _kl_decoder(config: Config, latent: tuple[int, int]) -> list[Layer]:
    for i, kind in enumerate(config.get("up_block_types", ())):
        if kind != "UpDecoderBlock2D":
            raise _unsupported(f"up_block_types[{i}]", kind)
    c = _Counter(latent)
    channels = list(config["block_out_channels"])[::-1]
    inputs = config.get("latent_channels", 4)
    if config.get("use_post_quant_conv", True):
        c.conv("post_quant_conv", inputs, inputs, 1)
    top = channels[0]
    c.conv("decoder.conv_in", inputs, top)
    c.resnet("decoder.mid_block.resnets.0", top, top, None)
    if config.get("mid_block_add_attention", True):
        name, rows = "decoder.mid_block.attentions.0", c.positions
        c.norm(f"{name}.group_norm", top)
        for part in ("to_q", "to_k", "to_v"):
            c.linear(f"{name}.{part}", top, top, rows)
        c.attention(name, top, 1, rows, rows)
        c.linear(f"{name}.to_out.0", top, top, rows)
    c.resnet("decoder.mid_block.resnets.1", top, top, None)
    previous = top
    for i, outputs in enumerate(channels):
        for j in range(config.get("layers_per_block", 1) + 1):
            c.resnet(f"decoder.up_blocks.{i}.resnets.{j}", previous, outputs, None)
            previous = outputs
        if i < len(channels) - 1:
            c.double()
            c.conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", outputs, outputs)
    c.norm("decoder.conv_norm_out", previous)
    c.conv("decoder.conv_out", previous, config.get("out_channels", 3))
    return c.layers


def _tiny_decoder(config: Config, latent: tuple[int, int]) -> list[Layer]:
    if config.get("upsampling_scaling_factor", 2) != 2:
        raise _unsupported("upsampling_scaling_factor", config["upsampling_scaling_factor"])
    c = _Counter(latent)
    channels = config.get("decoder_block_out_channels", (64, 64, 64, 64))
    blocks = config.get("num_decoder_blocks", (3, 3, 3, 1))
    c.conv("decoder.layers.0", config.get("latent_channels", 4), channels[0])
    index = 2
    for i, (width, count) in enumerate(zip(channels, blocks, strict=True)):
        is_last = i == len(channels) - 1
        for _ in range(count):
            for part in (0, 2, 4):
                c.conv(f"decoder.layers.{index}.conv.{part}", width, width)
            index += 1
        if not is_last:
            c.double()
            index += 1
        outputs = config.get("out_channels", 3) if is_last else width
        c.conv(f"decoder.layers.{index}", width, outputs, bias=is_last)
        index += 1
    return c.layers
