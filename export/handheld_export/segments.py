"""Cutting a U-Net or a decoder into segments.

The module tree is walked once and written down as a straight line of :class:`Unit` s, the
finest cut points there are: a resnet, the entry of a transformer, one transformer block, an
up- or downsampler. Tensors between units have names, skip connections included. A target's
grouping policy joins neighbouring units into segments; a segment is lowered alone.

Models are built on the meta device, without weights; :func:`materialize` fills in those of
one segment.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from handheld.errors import CheckpointError, UsageError
from handheld.precision import Precision
from handheld.program import Ports, TensorSpec
from handheld_export.checkpoint import Component
from handheld_export.quantization import BITS, QuantizedWeight, round_to_nearest


@dataclass(frozen=True, eq=False)
class Unit:
    """The smallest piece that can be lowered alone.

    Parameters
    ----------
    name : str
        Module path; also the name of the unit's (first) output tensor.
    module : torch.nn.Module
        Takes the tensors of ``inputs``, gives one tensor. NCHW inside.
    inputs : tuple of str
    prefixes : tuple of str
        Module paths whose parameters the unit uses.
    block : str
        Units are never joined across blocks.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    prefixes: tuple[str, ...]
    block: str


@dataclass(frozen=True, eq=False)
class Graph:
    """A component as a straight line of units.

    Parameters
    ----------
    component : str
        ``unet`` or ``decoder``.
    model : torch.nn.Module
        The diffusers model that the units share modules with.
    units : tuple of Unit
    inputs : dict of name to shape
        Shapes of the graph's inputs, pictures as ``[N, C, H, W]``.
    output : str
        Name of the result.
    shapes : dict of name to shape
        Shapes of all tensors, pictures as ``[N, C, H, W]``.
    """

    component: str
    model: nn.Module
    units: tuple[Unit, ...]
    inputs: dict[str, tuple[int, ...]]
    output: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def weights(self, unit: Unit) -> int:
        """Return the number of parameters of a unit."""
        return sum(p.numel() for path in unit.prefixes for p in _parameters(self.model, path))


@dataclass(frozen=True, eq=False)
class Segment:
    """Neighbouring units that form one artifact."""

    id: str
    graph: Graph
    units: tuple[Unit, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def ports(self) -> Ports:
        """What the artifact takes and gives; pictures as ``[N, H, W, C]``."""
        return Ports(
            inputs={n: TensorSpec(shape=_nhwc(self.graph.shapes[n])) for n in self.inputs},
            outputs={n: TensorSpec(shape=_nhwc(self.graph.shapes[n])) for n in self.outputs},
        )

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Module paths whose parameters the segment uses."""
        return tuple(p for u in self.units for p in u.prefixes)

    @property
    def weights(self) -> int:
        """Number of parameters."""
        return sum(self.graph.weights(u) for u in self.units)

    @property
    def structure(self) -> tuple[object, ...]:
        """Equal for segments that look alike: kinds of units, and shapes of all tensors."""
        units = tuple(
            (
                type(u.module).__name__,
                tuple((n, tuple(t.shape)) for n, t in u.module.state_dict().items()),
            )
            for u in self.units
        )
        tensors = (*self.inputs, *self.outputs)
        return (units, tuple(self.graph.shapes[n] for n in tensors))


def _nhwc(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[2], shape[3], shape[1]) if len(shape) == 4 else shape


def _parameters(model: nn.Module, path: str) -> Iterator[nn.Parameter]:
    if path in dict(model.named_parameters(recurse=False)):
        yield model.get_parameter(path)
    else:
        yield from model.get_submodule(path).parameters()


class SegmentModule(nn.Module):
    """A segment as one module, with ``[N, H, W, C]`` pictures at its boundary."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.units = nn.ModuleList(u.module for u in segment.units)
        self._names = [(u.name, u.inputs) for u in segment.units]
        self._inputs = segment.inputs
        self._outputs = segment.outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the units in order."""
        values = {
            name: x.permute(0, 3, 1, 2) if x.dim() == 4 else x
            for name, x in zip(self._inputs, inputs, strict=True)
        }
        for (name, arguments), unit in zip(self._names, self.units, strict=True):
            values[name] = unit(*(values[a] for a in arguments))
        return tuple(
            values[n].permute(0, 2, 3, 1) if values[n].dim() == 4 else values[n]
            for n in self._outputs
        )


# --- units -------------------------------------------------------------------------------


class _Resnet(nn.Module):
    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.resnet = resnet

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        return self.resnet(x, emb)  # type: ignore[no-any-return]


class _UpResnet(nn.Module):
    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.resnet = resnet

    def forward(self, x: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
        return self.resnet(torch.cat([x, skip], dim=1), emb)  # type: ignore[no-any-return]


class TransformerIn(nn.Module):
    """From a picture to tokens."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.norm = transformer.norm
        self.proj_in = transformer.proj_in
        self.linear = transformer.use_linear_projection

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if not self.linear:
            x = self.proj_in(x)
        n, c, h, w = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
        return self.proj_in(tokens) if self.linear else tokens


class _TransformerBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        return self.block(tokens, encoder_hidden_states=context)  # type: ignore[no-any-return]


class TransformerOut(nn.Module):
    """From tokens to a picture, added to the one before."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.proj_out = transformer.proj_out
        self.linear = transformer.use_linear_projection

    def forward(self, tokens: Tensor, residual: Tensor) -> Tensor:
        if self.linear:
            tokens = self.proj_out(tokens)
        n, _, h, w = residual.shape
        x = tokens.reshape(n, h, w, tokens.shape[-1]).permute(0, 3, 1, 2)
        if not self.linear:
            x = self.proj_out(x)
        return x + residual


class Plain(nn.Module):
    """Modules one after the other."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.modules_ = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.modules_:
            x = module(x)
        return x


class _AddEmbedding(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, pooled: Tensor, time_ids: Tensor) -> Tensor:
        return self.embedding(torch.cat([pooled, time_ids], dim=-1))  # type: ignore[no-any-return]


class _TinyIn(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(x / 3) * 3)  # type: ignore[no-any-return]


class _TinyOut(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 2 - 1  # type: ignore[no-any-return]


# --- walking the module tree -------------------------------------------------------------


class _Line:
    def __init__(self) -> None:
        self.units: list[Unit] = []
        self.block = ""

    def add(self, name: str, module: nn.Module, *inputs: str, prefixes: Sequence[str] = ()) -> str:
        self.units.append(Unit(name, module, inputs, tuple(prefixes) or (name,), self.block))
        return name

    def transformer(self, path: str, module: Any, x: str) -> str:
        tokens = self.add(
            f"{path}.proj_in",
            TransformerIn(module),
            x,
            prefixes=(f"{path}.norm", f"{path}.proj_in"),
        )
        for i, block in enumerate(module.transformer_blocks):
            tokens = self.add(
                f"{path}.transformer_blocks.{i}", _TransformerBlock(block), tokens, "context"
            )
        return self.add(f"{path}.proj_out", TransformerOut(module), tokens, x)

    def samplers(self, path: str, modules: Any, x: str) -> str:
        for i, module in enumerate(modules or ()):
            x = self.add(f"{path}.{i}", Plain(module), x)
        return x


def build_model(component: Component) -> nn.Module:
    """Build the diffusers model of a component on the meta device.

    Raises
    ------
    CheckpointError
        If diffusers refuses the configuration.
    """
    import diffusers

    cls = getattr(diffusers, component.config["_class_name"])
    try:
        with torch.device("meta"):
            model = cls.from_config(dict(component.config))
    except Exception as e:  # diffusers raises whatever its constructors run into
        raise CheckpointError(
            f"describes no {cls.__name__}: {e}",
            path=component.origin,
            remedy="compare with the original",
        ) from None
    return model.eval()  # type: ignore[no-any-return]


def unet_graph(
    component: Component, latent: tuple[int, int], tokens: int = 77
) -> tuple[Graph, Graph | None]:
    """Write a U-Net as a line of units.

    Parameters
    ----------
    component : Component
    latent : (int, int)
        Height and width of the latent.
    tokens : int
        Length of the text context.

    Returns
    -------
    graph : Graph
        Inputs ``sample`` [1, C, h, w], ``emb`` [1, E] and ``context`` [1, tokens, D].
    embedding : Graph or None
        SDXL's added embedding: ``pooled`` [1, P] and ``time_ids`` [1, 6 * d] to [1, E].

    Raises
    ------
    CheckpointError
        If weights do not fit the configuration.
    UsageError
        If the latent does not divide by the U-Net's downsampling.
    """
    model: Any = build_model(component)
    factor = 2 ** sum(1 for b in model.down_blocks if b.downsamplers)
    if latent[0] % factor or latent[1] % factor:
        raise UsageError(
            f"a latent of {latent[1]}x{latent[0]} does not divide by {factor}",
            remedy=f"choose a picture size that divides by {8 * factor}",
        )
    line = _Line()
    line.block = "down_blocks.0"
    x = line.add("conv_in", Plain(model.conv_in), "sample")
    skips = [x]
    for i, block in enumerate(model.down_blocks):
        path = line.block = f"down_blocks.{i}"
        attentions = getattr(block, "attentions", None)
        for j, resnet in enumerate(block.resnets):
            x = line.add(f"{path}.resnets.{j}", _Resnet(resnet), x, "emb")
            if attentions is not None:
                x = line.transformer(f"{path}.attentions.{j}", attentions[j], x)
            skips.append(x)
        if block.downsamplers:
            x = line.samplers(f"{path}.downsamplers", block.downsamplers, x)
            skips.append(x)
    if model.mid_block is not None:
        path = line.block = "mid_block"
        mid = model.mid_block
        x = line.add(f"{path}.resnets.0", _Resnet(mid.resnets[0]), x, "emb")
        for j, resnet in enumerate(mid.resnets[1:]):
            attentions = list(getattr(mid, "attentions", None) or ())
            if j < len(attentions) and attentions[j] is not None:
                x = line.transformer(f"{path}.attentions.{j}", attentions[j], x)
            x = line.add(f"{path}.resnets.{j + 1}", _Resnet(resnet), x, "emb")
    for i, block in enumerate(model.up_blocks):
        path = line.block = f"up_blocks.{i}"
        attentions = getattr(block, "attentions", None)
        for j, resnet in enumerate(block.resnets):
            x = line.add(f"{path}.resnets.{j}", _UpResnet(resnet), x, skips.pop(), "emb")
            if attentions is not None:
                x = line.transformer(f"{path}.attentions.{j}", attentions[j], x)
        x = line.samplers(f"{path}.upsamplers", block.upsamplers, x)
    x = line.add(
        "conv_out",
        Plain(*(m for m in (model.conv_norm_out, model.conv_act, model.conv_out) if m is not None)),
        x,
        prefixes=[p for p in ("conv_norm_out", "conv_out") if getattr(model, p) is not None],
    )
    width = model.time_embedding.linear_2.out_features
    context = component.config.get("cross_attention_dim", 1280)
    if isinstance(context, list):
        context = context[0]
    graph = finish(
        "unet",
        model,
        line.units,
        {
            "sample": (1, model.config.in_channels, *latent),
            "emb": (1, width),
            "context": (1, tokens, context),
        },
        x,
    )
    embedding = None
    if component.config.get("addition_embed_type") == "text_time":
        line = _Line()
        line.block = "add_embedding"
        line.add("add_embedding", _AddEmbedding(model.add_embedding), "pooled", "time_ids")
        time_ids = 6 * component.config["addition_time_embed_dim"]
        pooled = component.config["projection_class_embeddings_input_dim"] - time_ids
        embedding = finish(
            "unet",
            model,
            line.units,
            {"pooled": (1, pooled), "time_ids": (1, time_ids)},
            "add_embedding",
        )
    check_weights(component, model, set(model.state_dict()))
    return graph, embedding


def decoder_graph(component: Component, latent: tuple[int, int]) -> Graph:
    """Write a VAE decoder as a line of units.

    Parameters
    ----------
    component : Component
        AutoencoderKL or AutoencoderTiny.
    latent : (int, int)
        Height and width of the latent.

    Returns
    -------
    Graph
        Input ``latent`` [1, C, h, w]; result [1, 3, H, W] in -1..1.
    """
    model: Any = build_model(component)
    walk: Callable[[Any, _Line], str] = (
        _tiny_decoder if component.config["_class_name"] == "AutoencoderTiny" else _kl_decoder
    )
    line = _Line()
    output = walk(model, line)
    channels = model.config.latent_channels
    graph = finish("decoder", model, line.units, {"latent": (1, channels, *latent)}, output)
    used = tuple(p for u in graph.units for p in u.prefixes)
    check_weights(
        component,
        model,
        {k for k in model.state_dict() if k.startswith(tuple(f"{p}." for p in used))},
    )
    return graph


def _kl_decoder(model: Any, line: _Line) -> str:
    decoder = model.decoder
    line.block = "decoder.mid_block"
    prefixes = ["decoder.conv_in"]
    modules = [decoder.conv_in]
    if getattr(model, "post_quant_conv", None) is not None:
        prefixes.insert(0, "post_quant_conv")
        modules.insert(0, model.post_quant_conv)
    x = line.add("decoder.conv_in", Plain(*modules), "latent", prefixes=prefixes)
    mid = decoder.mid_block
    x = line.add("decoder.mid_block.resnets.0", _Resnet(mid.resnets[0]), x)
    for j, resnet in enumerate(mid.resnets[1:]):
        if mid.attentions[j] is not None:
            x = line.add(f"decoder.mid_block.attentions.{j}", Plain(mid.attentions[j]), x)
        x = line.add(f"decoder.mid_block.resnets.{j + 1}", _Resnet(resnet), x)
    for i, block in enumerate(decoder.up_blocks):
        path = line.block = f"decoder.up_blocks.{i}"
        for j, resnet in enumerate(block.resnets):
            x = line.add(f"{path}.resnets.{j}", _Resnet(resnet), x)
        x = line.samplers(f"{path}.upsamplers", block.upsamplers, x)
    return line.add(
        "decoder.conv_out",
        Plain(decoder.conv_norm_out, decoder.conv_act, decoder.conv_out),
        x,
        prefixes=["decoder.conv_norm_out", "decoder.conv_out"],
    )


def _tiny_decoder(model: Any, line: _Line) -> str:
    layers = list(model.decoder.layers)
    x = "latent"
    level = 0
    for i, layer in enumerate(layers):
        line.block = f"decoder.layers.level{level}"
        path = f"decoder.layers.{i}"
        wrap = _TinyIn if i == 0 else _TinyOut if i == len(layers) - 1 else Plain
        x = line.add(path, wrap(layer), x)
        level += isinstance(layer, nn.Upsample)
    return x


def finish(
    component: str,
    model: nn.Module,
    units: list[Unit],
    inputs: dict[str, tuple[int, ...]],
    output: str,
) -> Graph:
    """Write units down as a graph, with the shapes of all tensors."""
    values = {n: torch.empty(s, device="meta") for n, s in inputs.items()}
    with torch.no_grad():
        for unit in units:
            values[unit.name] = unit.module(*(values[n] for n in unit.inputs))
    shapes = {n: tuple(v.shape) for n, v in values.items()}
    return Graph(component, model, tuple(units), inputs, output, shapes)


def check_weights(component: Component, model: nn.Module, wanted: set[str]) -> None:
    """Check names and shapes of a component's tensors against its model.

    Raises
    ------
    CheckpointError
        Naming the first tensor that is missing, unexpected or of another shape.
    """
    state = model.state_dict()
    codes = {f"{layer}.weight" for layer in component.quantized}
    if unknown := sorted(codes - set(state)):
        raise CheckpointError(
            "there is no such layer",
            path=component.origin.parent / "quantization.json",
            field=f"layers.{unknown[0].removesuffix('.weight')}",
            remedy="compress the checkpoint again",
        )
    modules = dict(model.named_modules())
    for name in sorted(component.float_inputs):
        if not isinstance(modules.get(name), nn.Linear | nn.Conv2d):
            raise CheckpointError(
                f"'{name}' is no linear layer and no convolution",
                path=component.origin.parent / "quantization.json",
                field="float_inputs",
                remedy="compress the checkpoint again",
            )
    for name in sorted(wanted):
        stored, packed = name, None
        if name in codes:
            stored, packed = component.codes(name.removesuffix(".weight"))
        if stored not in component.store:
            raise CheckpointError(
                f"tensor '{stored}' is missing",
                path=component.origin.parent,
                remedy="the configuration asks for it; is a shard absent?",
            )
        shape = packed or component.store.shape(stored)
        if shape != tuple(state[name].shape):
            raise CheckpointError(
                f"tensor '{stored}' has shape {shape}, "
                f"the configuration asks for {tuple(state[name].shape)}",
                path=component.store.file(stored),
            )
    suffixes = (".codes", ".packed", ".scales", ".codebook")
    for name in component.store:
        base = next((name.removesuffix(s) for s in suffixes if name.endswith(s)), name)
        if base not in state or (base != name and base not in codes):
            raise CheckpointError(
                f"tensor '{name}' has no place in the configuration",
                path=component.store.file(name),
                remedy="is config.json that of another model?",
            )


# --- segments ----------------------------------------------------------------------------


def group(
    graph: Graph,
    most: int,
    prefix: str = "",
    *,
    across_blocks: bool = False,
    size: Callable[[Unit], int] | None = None,
) -> list[Segment]:
    """Join neighbouring units into segments.

    Parameters
    ----------
    graph : Graph
    most : int
        A segment grows while its weights stay below this; a unit larger than it stands
        alone.
    prefix : str
        Before the segments' ids.
    across_blocks : bool
        Join units of different blocks too, into as few segments as there can be, of about the
        same size.
    size : callable, optional
        What a unit counts; by default the number of its weights.

    Returns
    -------
    list of Segment
        In order; ids such as ``unet.00.down_blocks.0``.
    """
    groups: list[list[Unit]] = []
    size = size or graph.weights
    total = sum(map(size, graph.units))
    enough = total / max(1, -(-total // most)) if across_blocks and most else total
    filled = 0
    for unit in graph.units:
        own = size(unit)
        ends = filled >= enough if across_blocks else groups and unit.block != groups[-1][0].block
        if not groups or ends or filled + own > most:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += own
    segments = []
    for i, units in enumerate(groups):
        made = {u.name for u in units}
        inputs = dict.fromkeys(n for u in units for n in u.inputs if n not in made)
        later = {n for g in groups[i + 1 :] for u in g for n in u.inputs} | {graph.output}
        outputs = [u.name for u in units if u.name in later]
        name = f"{prefix or graph.component}.{i:02d}.{units[0].block.removeprefix('decoder.')}"
        segments.append(Segment(name, graph, tuple(units), tuple(inputs), tuple(outputs)))
    return segments


def layers(segment: Segment) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Linear and convolution layers of a segment with their module paths."""
    return _layers(segment.graph.model, segment.prefixes)


def _layers(
    model: nn.Module, prefixes: Iterable[str]
) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for path in dict.fromkeys(prefixes):
        for name, module in model.get_submodule(path).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield (f"{path}.{name}" if name else path), module


def stored_bytes(graph: Graph, unit: Unit, component: Component, precision: Precision) -> int:
    """Return the bytes of a unit in a file that keeps codes as they are and all else in fp16."""
    total = 2.0 * graph.weights(unit)
    for name, layer in _layers(graph.model, unit.prefixes):
        count, channels = layer.weight.numel(), layer.weight.shape[0]
        if name in component.quantized:
            bits, grouped = component.bits(name)
        elif component.quantized or not (
            choice := precision.choose(graph.component, name, layer.weight.shape)
        ):
            continue
        else:
            bits, grouped = BITS[choice.grid], choice.group_size
        scales = count // grouped if grouped else channels
        total += count * bits / 8 + 2 * scales - 2 * count
    return round(total)


def materialize(
    segment: Segment, component: Component, precision: Precision | None
) -> dict[str, QuantizedWeight]:
    """Fill in the weights of one segment.

    Parameters
    ----------
    segment : Segment
    component : Component
        Where the weights are.
    precision : Precision or None
        How layers are quantized where the component has no codes of its own: a student says
        itself what stays in float. None dequantizes all codes.

    Returns
    -------
    dict of layer to QuantizedWeight
        What was attached to layers as ``layer.quantized``.

    Raises
    ------
    CheckpointError
        If a tensor is missing, has another shape or is not finite.
    """
    model = segment.graph.model
    quantized: dict[str, QuantizedWeight] = {}
    for path in dict.fromkeys(segment.prefixes):
        module = model.get_submodule(path)
        names = [f"{path}.{n}" for n in module.state_dict()]
        coded = {n for n in names if n.removesuffix(".weight") in component.quantized}
        values = component.tensors([n for n in names if n not in coded])
        for name in coded:
            layer = name.removesuffix(".weight")
            quantized[layer] = component.quantized_weight(layer)
            values[name] = torch.from_numpy(quantized[layer].dequantize())
        module.load_state_dict(
            {n.removeprefix(f"{path}."): v for n, v in values.items()}, assign=True
        )
    if precision is None:
        return quantized
    for name, layer_module in layers(segment):
        weight = quantized.get(name)
        if weight is None:
            shape = tuple(layer_module.weight.shape)
            choice = precision.choose(segment.graph.component, name, shape)
            if choice is None or component.quantized:
                continue
            weight = round_to_nearest(
                layer_module.weight.detach().numpy(), choice.grid, choice.group_size
            )
            quantized[name] = weight
            layer_module.weight = nn.Parameter(
                torch.from_numpy(weight.dequantize()), requires_grad=False
            )
        layer_module.quantized = weight  # type: ignore[assignment]
        if name in component.activation_ranges:
            layer_module.activation_range = component.activation_ranges[name]  # type: ignore[assignment]
        layer_module.float_input = name in component.float_inputs  # type: ignore[assignment]
    return quantized


def forget_floats(segment: Segment) -> None:
    """Drop the float weights of layers that carry codes; empty ones of their shape stay."""
    for _, layer in layers(segment):
        if getattr(layer, "quantized", None) is not None:
            layer.weight = nn.Parameter(_untouched(layer.weight.shape), requires_grad=False)


def _untouched(shape: torch.Size) -> Tensor:
    """Return zeros that take no memory until somebody writes; malloc may recycle used pages."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, 4 * shape.numel(), private), dtype=torch.float32).view(
        shape
    )


def release(segment: Segment) -> None:
    """Drop the weights of a segment again."""
    for path in dict.fromkeys(segment.prefixes):
        module = segment.graph.model.get_submodule(path)
        module.to(device="meta")
        for part in module.modules():
            for name in ("quantized", "activation_range", "float_input"):
                part.__dict__.pop(name, None)
