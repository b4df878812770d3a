"""Decoders in horizontal bands that give what the whole decoder gives.

A decoder's tensors grow with the picture: 512 x 512 pixels of 256 channels are 268 MB in float32.
So it is cut into passes, and a pass is called once per band of rows.

In a full decoder only attention and the statistics of GroupNorm need the whole picture at once. A
pass holds one convolution and starts with a normalisation, whose mean and deviation it takes as
inputs. What it gives is kept in float16 until the next pass has read it; moments are taken of each
band and combined for the picture. A convolution reads one row of the neighbouring bands on each
side, so nothing is computed twice.

A tiny decoder has no normalisation. A pass is all that it does at one resolution, and its bands
are windows that overlap by what a row depends on: rows that miss their neighbours are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from handheld.banding import Windows, windows
from handheld.errors import UsageError
from handheld.program import Call, Concat, Moments, Normalizer, Slice, TensorSpec
from handheld_export.assemble import Draft
from handheld_export.segments import Graph, Plain, Segment, Unit, finish

Storage = Literal["float16", "float32"]
SCALE: Final = 64.0
"""What float16 holds is this much smaller, so that sums of SDXL's decoder, which leave it, fit."""
_INSIDE, _OUTSIDE = "bands.inside", "bands.outside"
_HALO = ("above", "below", "top", "bottom")


@dataclass(frozen=True, eq=False)
class Pass:
    """One artifact that is called for every band.

    Parameters
    ----------
    segment : Segment
        Its ports are those of one band.
    source : str
        The tensor that it reads in bands, as ``x``.
    shape : (int, int, int)
        Height, width and channels of the source.
    bands : int
        Number of calls.
    halo : bool
        Whether it reads a row above and one below the band, too.
    norm : (int, float) or None
        Groups and epsilon of the normalisation that it starts with.
    residual : str or None
        A tensor that it reads in bands of its results' size, without more rows.
    whole : mapping of port to tensor
        What it reads whole.
    pieces : int
        How many tensors each result is kept in, at most as many as there are calls.
    stored : bool
        Whether results are kept in float16 or as they are.
    windows : Windows or None
        Bands that overlap; without them they divide the source's rows.
    """

    segment: Segment
    source: str
    shape: tuple[int, int, int]
    bands: int
    halo: bool
    norm: tuple[int, float] | None
    residual: str | None
    whole: Mapping[str, str]
    pieces: int
    stored: bool
    windows: Windows | None = None

    def rows(self, index: int) -> tuple[int, int]:
        """Return the first row that a call reads of the source, and how many."""
        if self.windows is not None:
            return self.windows.starts[index], self.windows.rows
        count = self.shape[0] // self.bands
        return index * count, count


# --- modules -----------------------------------------------------------------------------


class BandNorm(nn.Module):
    """GroupNorm of ``[1, h, W, C]`` with given mean and ``1 / std``, both ``[1, 1, 1, C]``."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        # What rewrites put in the norm's place keeps the order of its weights.
        weight, bias = (t.reshape(1, 1, 1, -1) for t in (self.norm.weight, self.norm.bias))
        return (x - mean) * (rstd * weight) + bias


class BandConv(nn.Module):
    """A 3x3 convolution of one band, with what comes before it point by point.

    Parameters
    ----------
    conv : nn.Conv2d
    norm, activation : modules or None
        Before it; the convolution's padding stays zero.
    first : module or None
        A 1x1 convolution instead of these.
    upsample : bool
        Whether the band is made twice as high and wide first.
    rescale : float or None
        What the sum with ``residual`` is divided by; None if there is no residual.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.GroupNorm | None = None,
        activation: nn.Module | None = None,
        *,
        first: nn.Module | None = None,
        upsample: bool = False,
        rescale: float | None = None,
    ) -> None:
        super().__init__()
        self.conv, self.first, self.activation = conv, first, activation
        self.norm = None if norm is None else BandNorm(norm)
        self.upsample, self.rescale = upsample, rescale

    def forward(
        self, x: Tensor, above: Tensor, below: Tensor, top: Tensor, bottom: Tensor, *more: Tensor
    ) -> Tensor:
        """Run it on NCHW; ``more`` is mean and ``1 / std``, then the residual."""
        # Rows last but channels: what is next to a convolution costs no transposition.
        rows, over, under, *others = (t.permute(0, 2, 3, 1) for t in (x, above, below, *more))
        statistics = others[:2] if self.norm is not None else []
        rows, over, under = (self._point(t, statistics) for t in (rows, over, under))
        over, under = over * top, under * bottom
        if self.upsample:
            rows, over, under = (self._wide(t) for t in (rows, over, under))
            n, h, w, c = rows.shape
            rows = torch.cat([rows, rows], dim=2).reshape(n, 2 * h, w, c)
        y = torch.cat([over, rows, under], dim=1).permute(0, 3, 1, 2)
        y = F.conv2d(y, self.conv.weight, self.conv.bias, padding=(0, 1))
        if self.rescale is None:
            return y
        y = others[-1] + y.permute(0, 2, 3, 1)
        if self.rescale != 1:
            y = y * (1 / self.rescale)
        return y.permute(0, 3, 1, 2)

    def _point(self, x: Tensor, statistics: Sequence[Tensor]) -> Tensor:
        if self.first is not None:
            x = self.first(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.norm is not None:
            x = self.norm(x, *statistics)
        return x if self.activation is None else self.activation(x)

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        return torch.cat([x, x], dim=3).reshape(n, h, 2 * w, c)


class BandTokens(nn.Module):
    """A band as normalised tokens ``[1, h * W, C]``."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = BandNorm(norm)

    def forward(self, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """Run it on NCHW."""
        x, mean, rstd = (t.permute(0, 2, 3, 1) for t in (x, mean, rstd))
        return self.norm(x, mean, rstd).reshape(1, -1, x.shape[3])  # type: ignore[no-any-return]


class BandAttention(nn.Module):
    """Attention of one band's tokens to those of the whole picture, added to the band."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads, self.scale = attention.heads, float(attention.scale)
        self.rescale = float(attention.rescale_output_factor)
        self.to_q, self.to_out = attention.to_q, attention.to_out[0]

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor, x: Tensor) -> Tensor:
        """Run it; tokens, keys and values are ``[1, T, C]``, x is the band in NCHW."""
        q = self._heads(self.to_q(tokens) * self.scale)
        table = torch.softmax(torch.bmm(q, self._heads(keys).transpose(1, 2)), dim=-1)
        y = torch.bmm(table, self._heads(values))
        if self.heads > 1:
            y = y.reshape(1, self.heads, *y.shape[1:]).permute(0, 2, 1, 3)
        y = self.to_out(y.reshape(1, tokens.shape[1], -1))
        n, _, h, w = x.shape
        y = y.reshape(n, h, w, -1) + x.permute(0, 2, 3, 1)
        if self.rescale != 1:
            y = y * (1 / self.rescale)
        return y.permute(0, 3, 1, 2)  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        if self.heads == 1:
            return x
        n, tokens, width = x.shape
        x = x.reshape(n, tokens, self.heads, width // self.heads).permute(0, 2, 1, 3)
        return x.reshape(self.heads, tokens, -1)


# --- passes ------------------------------------------------------------------------------


def passes(graph: Graph, megabytes: float) -> list[Pass]:
    """Cut a decoder into passes.

    Parameters
    ----------
    graph : Graph
        From :func:`~handheld_export.segments.decoder_graph`.
    megabytes : float
        MB (10^6 bytes) of the largest float32 tensor that a call reads or gives. Bands have at
        least one row of the latent, windows four times what they overlap, so there may be none
        that small.

    Returns
    -------
    list of Pass
        In order. Bands of one resolution are the same, and divide those of the one before.

    Raises
    ------
    UsageError
        If the decoder is none that can be drawn in bands.
    """
    model: Any = graph.model
    if isinstance(model, AutoencoderKL):
        return _Cutter(graph, megabytes * 1e6).passes
    if isinstance(model, AutoencoderTiny):
        return _in_windows(graph, megabytes * 1e6)
    raise UsageError(
        f"--decoder-bands does not take {type(model).__name__}", remedy="draw whole pictures"
    )


class _Cutter:
    def __init__(self, graph: Graph, limit: float) -> None:
        self.model: Any = graph.model
        self.limit = limit
        self.passes: list[Pass] = []
        self.sizes: dict[str, tuple[int, int, int]] = {}
        _, channels, height, width = graph.inputs["latent"]
        self.sizes["latent"] = (height, width, channels)
        decoder: Any = self.model.decoder
        blocks: list[Any] = list(decoder.up_blocks)
        mid: Any = decoder.mid_block
        first = [decoder.conv_in.out_channels, *_widths(mid.resnets), *_widths(blocks[0].resnets)]
        self.bands = self._count(height, width, max(first))
        quant = getattr(self.model, "post_quant_conv", None)
        x = self._convolution(
            "decoder.conv_in",
            BandConv(decoder.conv_in, first=quant),
            "latent",
            ["decoder.conv_in", *(["post_quant_conv"] if quant is not None else [])],
        )
        x = self._resnet("decoder.mid_block.resnets.0", mid.resnets[0], x)
        for j, resnet in enumerate(mid.resnets[1:]):
            if mid.attentions[j] is not None:
                x = self._attention(f"decoder.mid_block.attentions.{j}", mid.attentions[j], x)
            x = self._resnet(f"decoder.mid_block.resnets.{j + 1}", resnet, x)
        for i, block in enumerate(blocks):
            path = f"decoder.up_blocks.{i}"
            for j, resnet in enumerate(block.resnets):
                x = self._resnet(f"{path}.resnets.{j}", resnet, x)
            for j, sampler in enumerate(block.upsamplers or ()):
                following = blocks[i + 1].resnets if i + 1 < len(blocks) else ()
                x = self._upsampler(f"{path}.upsamplers.{j}", sampler, x, following)
        self._convolution(
            "decoder.conv_out",
            BandConv(decoder.conv_out, decoder.conv_norm_out, decoder.conv_act),
            x,
            ["decoder.conv_norm_out", "decoder.conv_out"],
            norm=decoder.conv_norm_out,
            whole_result=True,
        )

    def _count(self, height: int, width: int, channels: int, multiple: int = 1) -> int:
        """Return the least number of bands whose tensors are small enough, or the most there is."""
        good = [n for n in range(multiple, height + 1, multiple) if height % n == 0]
        row = 4 * width * channels
        return next((n for n in good if height // n * row <= self.limit), good[-1])

    def _resnet(self, path: str, block: Any, x: str) -> str:
        # Without a time embedding, "group" is what "default" is.
        odd = type(block) is not ResnetBlock2D or block.time_emb_proj is not None
        odd = odd or block.up or block.down or block.time_embedding_norm == "scale_shift"
        if odd or not _plain(block.conv1) or not _plain(block.conv2):
            raise _refused(path)
        paths = [f"{path}.norm1", f"{path}.conv1"]
        shortcut = block.conv_shortcut
        more = []
        if shortcut is not None:
            name = f"{path}.conv_shortcut"
            more.append(Unit(name, Plain(shortcut), ("x",), (name,), path))
        middle = self._convolution(
            f"{path}.conv1",
            BandConv(block.conv1, block.norm1, block.nonlinearity),
            x,
            paths,
            norm=block.norm1,
            more=more,
        )
        return self._convolution(
            f"{path}.conv2",
            BandConv(
                block.conv2,
                block.norm2,
                block.nonlinearity,
                rescale=float(block.output_scale_factor),
            ),
            middle,
            [f"{path}.norm2", f"{path}.conv2"],
            norm=block.norm2,
            residual=x if shortcut is None else f"{path}.conv_shortcut",
        )

    def _upsampler(self, path: str, block: Any, x: str, following: Sequence[Any]) -> str:
        if block.norm is not None or not block.use_conv or block.use_conv_transpose:
            raise _refused(path)
        conv = block.conv if block.name == "conv" else block.Conv2d_0
        if not _plain(conv) or not block.interpolate:
            raise _refused(path)
        height, width, _ = self.sizes[x]
        channels = max([conv.out_channels, *_widths(following)])
        # Every band becomes one of the next resolution.
        self.bands = self._count(height, 4 * width, channels, self.bands)
        name = "conv" if block.name == "conv" else "Conv2d_0"
        return self._convolution(path, BandConv(conv, upsample=True), x, [f"{path}.{name}"])

    def _attention(self, path: str, attention: Any, x: str) -> str:
        special = ("norm_q", "norm_k", "norm_cross", "spatial_norm", "added_kv_proj_dim")
        plain = all(getattr(attention, name, None) is None for name in special)
        if not plain or attention.group_norm is None or not attention.residual_connection:
            raise _refused(path)
        height, width, channels = self.sizes[x]
        norm = attention.group_norm

        def unit(name: str, module: nn.Module, *inputs: str, of: Sequence[str]) -> Unit:
            return Unit(f"{path}.{name}", module, inputs, tuple(f"{path}.{p}" for p in of), path)

        tokens = unit("tokens", BandTokens(norm), "x", "mean", "rstd", of=["group_norm"])
        rows = height // self.bands
        self._pass(
            f"{path}.keys",
            [
                tokens,
                unit("keys", Plain(attention.to_k), tokens.name, of=["to_k"]),
                unit("values", Plain(attention.to_v), tokens.name, of=["to_v"]),
            ],
            x,
            self.bands,
            {"x": (1, channels, rows, width)},
            norm=norm,
            whole_result=True,
        )
        # The table of a band's tokens has a column for each of the picture's.
        bands = self._count(
            height, width, max(channels, attention.heads * height * width), self.bands
        )
        every = (1, height * width, attention.to_k.out_features)
        return self._pass(
            path,
            [
                tokens,
                Unit(
                    path,
                    BandAttention(attention),
                    (tokens.name, "keys", "values", "x"),
                    (f"{path}.to_q", f"{path}.to_out.0"),
                    path,
                ),
            ],
            x,
            bands,
            {"x": (1, channels, height // bands, width), "keys": every, "values": every},
            norm=norm,
            whole={"keys": f"{path}.keys", "values": f"{path}.values"},
        )

    def _convolution(
        self,
        path: str,
        module: BandConv,
        x: str,
        prefixes: Sequence[str],
        *,
        norm: nn.GroupNorm | None = None,
        residual: str | None = None,
        more: Sequence[Unit] = (),
        whole_result: bool = False,
    ) -> str:
        height, width, channels = self.sizes[x]
        rows = height // self.bands
        shapes: dict[str, tuple[int, ...]] = {"x": (1, channels, rows, width)}
        shapes |= dict.fromkeys(("above", "below"), (1, channels, 1, width))
        shapes |= dict.fromkeys(("top", "bottom"), (1, 1, 1, 1))
        inputs = ["x", *_HALO]
        if norm is not None:
            inputs += ["mean", "rstd"]
        if residual is not None:
            inputs.append("residual")
            shapes["residual"] = (1, self.sizes[residual][2], rows, width)
        unit = Unit(path, module, tuple(inputs), tuple(prefixes), path)
        return self._pass(
            path,
            [unit, *more],
            x,
            self.bands,
            shapes,
            norm=norm,
            residual=residual,
            whole_result=whole_result,
            halo=True,
        )

    def _pass(
        self,
        path: str,
        units: Sequence[Unit],
        x: str,
        bands: int,
        shapes: dict[str, tuple[int, ...]],
        *,
        norm: nn.GroupNorm | None = None,
        residual: str | None = None,
        whole: Mapping[str, str] | None = None,
        whole_result: bool = False,
        halo: bool = False,
    ) -> str:
        if norm is not None:
            shapes |= dict.fromkeys(("mean", "rstd"), (1, norm.num_channels, 1, 1))
        graph = finish("decoder", self.model, list(units), shapes, units[-1].name)
        made = {u.name for u in units}
        inputs = dict.fromkeys(n for u in units for n in u.inputs if n not in made)
        read = {n for u in units for n in u.inputs}
        results = tuple(u.name for u in units if u.name not in read)
        name = f"decoder.{len(self.passes):02d}.{path.removeprefix('decoder.')}"
        self.passes.append(
            Pass(
                Segment(name, graph, tuple(units), tuple(inputs), results),
                x,
                self.sizes[x],
                bands,
                halo,
                None if norm is None else (norm.num_groups, float(norm.eps)),
                residual,
                whole or {},
                1 if whole_result else self.bands,
                not whole_result,
            )
        )
        for result in results:
            shape = graph.shapes[result]
            if len(shape) == 4:
                self.sizes[result] = (shape[2] * bands, shape[3], shape[1])
        return results[0]


def _widths(resnets: Any) -> list[int]:
    return [c for r in resnets for c in (r.in_channels, r.out_channels)]


def _plain(conv: nn.Conv2d) -> bool:
    same = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.stride == (1, 1)
    return same and conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"


def _refused(path: str) -> UsageError:
    return UsageError(
        f"'{path}' of the decoder is not built so that it can be drawn in bands",
        remedy="draw whole pictures: --decoder-bands off",
    )


def _in_windows(graph: Graph, limit: float) -> list[Pass]:
    """Cut a tiny decoder into a pass for each resolution."""
    levels: list[list[Unit]] = []
    for unit in graph.units:
        if not levels or isinstance(_layer(unit), nn.Upsample):
            levels.append([])
        levels[-1].append(unit)
    line: list[Pass] = []
    source = "latent"
    for i, units in enumerate(levels):
        _, channels, height, width = graph.shapes[source]
        output = graph.shapes[units[-1].name]
        scale = output[2] // height
        overlap = -(-sum(_reach(u) for u in units) // scale)
        elements = max(channels * width, *(scale * _row(graph, u) for u in units))
        cut = windows(height, overlap, 4 * elements, limit)
        own = [replace(units[0], inputs=("x",)), *units[1:]]
        band: dict[str, tuple[int, ...]] = {"x": (1, channels, cut.rows, width)}
        part = finish("decoder", graph.model, own, band, own[-1].name)
        name = f"decoder.{i:02d}.{units[0].block.removeprefix('decoder.')}"
        line.append(
            Pass(
                Segment(name, part, tuple(own), ("x",), (own[-1].name,)),
                source,
                (height, width, channels),
                bands=len(cut.starts),
                halo=False,
                norm=None,
                residual=None,
                whole={},
                pieces=1,
                stored=False,
                windows=cut,
            )
        )
        source = units[-1].name
    return line


def _layer(unit: Unit) -> nn.Module:
    """Return the layer of a tiny decoder that a unit is."""
    (layer,) = unit.module.children()
    return layer[0] if isinstance(layer, nn.ModuleList) else layer


def _reach(unit: Unit) -> int:
    """Return how many rows away a unit looks."""
    layer = _layer(unit)
    if isinstance(layer, nn.Conv2d) and _plain(layer):
        return 1
    if isinstance(layer, AutoencoderTinyBlock):
        inside = [m for m in layer.conv if isinstance(m, nn.Conv2d)]
        if all(map(_plain, inside)):
            return len(inside)
    if isinstance(layer, nn.Upsample):
        if layer.mode == "nearest":
            return 0
    elif not list(layer.parameters()):
        return 0  # an activation
    raise _refused(unit.name)


def _row(graph: Graph, unit: Unit) -> int:
    _, channels, _, width = graph.shapes[unit.name]
    return channels * width


# --- the program -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """A tensor of the picture, in pieces along its rows."""

    pieces: tuple[str, ...]
    half: bool


def write(draft: Draft, line: Sequence[Pass], latent: str, storage: Storage = "float16") -> str:
    """Append the passes of a decoder; return the name of what it gives, ``[1, H, W, 3]``.

    Parameters
    ----------
    draft : Draft
    line : sequence of Pass
        From :func:`passes`.
    latent : str
        The tensor to decode.
    storage : {'float16', 'float32'}
        What tensors between passes are kept in.
    """
    return _Writer(draft, line, storage).write(latent)


class _Writer:
    def __init__(self, draft: Draft, line: Sequence[Pass], storage: Storage) -> None:
        self.draft, self.line, self.storage = draft, line, storage
        self.kept: dict[str, _Kept] = {}
        self.moments: dict[tuple[str, int], list[str]] = {}
        self.statistics: dict[tuple[str, tuple[int, float]], dict[str, str]] = {}
        self.groups: dict[str, set[int]] = {}
        for step in line:
            if step.norm is not None:
                self.groups.setdefault(step.source, set()).add(step.norm[0])

    def write(self, latent: str) -> str:
        self.kept["latent"] = _Kept((latent,), half=False)
        one = np.ones((1, 1, 1, 1), np.float32)
        self.draft.constants |= {_INSIDE: one, _OUTSIDE: 0 * one}
        for step in self.line:
            self._run(step)
        (result,) = self.kept[self.line[-1].segment.outputs[0]].pieces
        return result

    def _run(self, step: Pass) -> None:
        segment, every = step.segment, step.segment.outputs
        statistics = self._statistics(step)
        whole = {port: self._whole(name) for port, name in step.whole.items()}
        pieces: dict[str, list[str]] = {name: [] for name in every}
        parts: dict[str, list[str]] = {name: [] for name in every}
        for i in range(step.bands):
            args = {**self._band(step, i), **statistics, **whole}
            results = {name: f"{name}@{i}.wide" for name in every}
            args = {port: args[port] for port in segment.inputs}
            self.draft.ops.append(Call(artifact=segment.id, args=args, results=results))
            for port, spec in segment.ports.outputs.items():
                self.draft.tensors[results[port]] = spec
                parts[port].append(self._kept_rows(step, i, results[port]))
            if (i + 1) % (step.bands // step.pieces) == 0:
                for port in every:
                    pieces[port].append(self._keep(step, port, parts[port], len(pieces[port])))
                    parts[port] = []
        for name in every:
            half = step.stored and self.storage == "float16"
            self.kept[name] = _Kept(tuple(pieces[name]), half)

    def _keep(self, step: Pass, name: str, parts: Sequence[str], index: int) -> str:
        """Join what calls gave, take its moments, and keep it."""
        wide = parts[0]
        if len(parts) > 1:
            wide = name if step.pieces == 1 else f"{name}@{index}.joined"
            self._new(Concat(xs=tuple(parts), axis=1, out=wide))
        for groups in sorted(self.groups.get(name, ())):
            out = f"{name}@{index}.moments{groups}"
            self._new(Moments(x=wide, groups=groups, out=out))
            self.moments.setdefault((name, groups), []).append(out)
        if not step.stored or self.storage == "float32":
            return wide
        return self.draft.affine(f"{name}@{index}", (wide, 1 / SCALE), dtype="float16")

    def _kept_rows(self, step: Pass, i: int, wide: str) -> str:
        """Return what is right of a call's result."""
        if step.windows is None or step.bands == 1:
            return wide
        scale = self.draft.spec(wide).shape[1] // step.windows.rows
        start, end = step.windows.kept(i)
        first = (start - step.windows.starts[i]) * scale
        out = wide.removesuffix(".wide")
        self._new(Slice(x=wide, axis=1, start=first, length=(end - start) * scale, out=out))
        return out

    def _band(self, step: Pass, i: int) -> dict[str, str]:
        """Return the arguments that are rows of other tensors."""
        height = step.shape[0]
        start, rows = step.rows(i)
        at = f"{step.segment.id.removeprefix('decoder.')}@{i}"
        args = {"x": self._rows(step.source, height, start, rows, f"{at}.x")}
        if step.halo:
            # Beyond the picture there is nothing: some row is taken, times zero.
            above, below = max(start - 1, 0), min(start + rows, height - 1)
            args["above"] = self._rows(step.source, height, above, 1, f"{at}.above")
            args["below"] = self._rows(step.source, height, below, 1, f"{at}.below")
            args["top"] = _OUTSIDE if i == 0 else _INSIDE
            args["bottom"] = _OUTSIDE if i == step.bands - 1 else _INSIDE
        if step.residual is not None:
            name = f"{at}.residual"
            args["residual"] = self._rows(step.residual, height, start, rows, name)
        return args

    def _rows(self, name: str, height: int, start: int, count: int, out: str) -> str:
        """Return float32 rows of a tensor."""
        kept = self.kept[name]
        each = height // len(kept.pieces)
        piece = kept.pieces[start // each]
        if count < each:
            cut = f"{out}.half" if kept.half else out
            self._new(Slice(x=piece, axis=1, start=start % each, length=count, out=cut))
            piece = cut
        return self.draft.affine(out, (piece, SCALE)) if kept.half else piece

    def _whole(self, name: str) -> str:
        (piece,) = self.kept[name].pieces
        return piece

    def _statistics(self, step: Pass) -> dict[str, str]:
        if step.norm is None:
            return {}
        key = (step.source, step.norm)
        if key not in self.statistics:
            groups, eps = step.norm
            names = {k: f"{step.segment.id.removeprefix('decoder.')}.{k}" for k in ("mean", "rstd")}
            for name in names.values():
                self.draft.tensors[name] = TensorSpec(shape=(1, 1, 1, step.shape[2]))
            moments = tuple(self.moments[step.source, groups])
            self.draft.ops.append(Normalizer(moments=moments, eps=eps, **names))
            self.statistics[key] = names
        return self.statistics[key]

    def _new(self, op: Slice | Concat | Moments) -> None:
        """Append an operation and declare what it writes."""
        match op:
            case Slice():
                spec = self.draft.spec(op.x)
                shape = (*spec.shape[: op.axis], op.length, *spec.shape[op.axis + 1 :])
                spec = TensorSpec(shape=shape, dtype=spec.dtype)
            case Concat():
                specs = [self.draft.spec(x) for x in op.xs]
                total = sum(s.shape[op.axis] for s in specs)
                first = specs[0]
                shape = (*first.shape[: op.axis], total, *first.shape[op.axis + 1 :])
                spec = TensorSpec(shape=shape, dtype=first.dtype)
            case Moments():
                spec = TensorSpec(shape=(1, 3, op.groups))
        self.draft.tensors[op.out] = spec
        self.draft.ops.append(op)
