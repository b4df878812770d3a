"""How a model would be cut into artifacts, from its layers alone.

The rule is that of ``handheld_export.segments``, which cuts modules. Neither weights nor torch are
needed, so that memory can be planned for a model that nobody has made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from handheld.counting import Layer

MOST_WEIGHTS: Final[Mapping[str, int]] = {
    "executorch-xnnpack": 80_000_000,
    "litert-cpu": 80_000_000,
}
"""Of one artifact, by target."""
_UNIT = re.compile(
    r"((?:decoder\.)?(?:down_blocks\.\d+|up_blocks\.\d+|mid_block))\."
    r"(resnets\.\d+|(?:up|down)samplers\.\d+"
    r"|attentions\.\d+(?:\.(?:norm|proj_in|proj_out|transformer_blocks\.\d+))?)"
)


@dataclass
class Unit:
    """The smallest piece that can be lowered alone.

    Parameters
    ----------
    name, block : str
        Units of two blocks are never joined.
    layers : list of Layer
    elements : int
        Of the tensor that it gives.
    inputs : tuple of str
        Units that it reads.
    """

    name: str
    block: str
    layers: list[Layer] = field(default_factory=list)
    elements: int = 0
    inputs: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of parameters."""
        return sum(x.params for x in self.layers)


def units(layers: Sequence[Layer]) -> list[Unit]:
    """Return the units of a U-Net or decoder, in the order of the forward pass.

    Parameters
    ----------
    layers : sequence of Layer
        Of :func:`~handheld.counting.count_unet` or :func:`~handheld.counting.count_decoder`.
    """
    found: list[Unit] = []
    for block, name, layer in _places(layers):
        if not found or found[-1].name != name:
            found.append(Unit(name, block))
        found[-1].layers.append(layer)
        found[-1].elements = layer.outputs
    for one, after in pairwise(found):
        if one.name.startswith("decoder.layers.") and one.block != after.block:
            # What upsampling gives, which has no weights and ends a block.
            first = after.layers[0]
            one.elements = first.outputs * first.shape[1] // first.shape[0]
    _connect(found)
    return found


def _places(layers: Sequence[Layer]) -> Iterator[tuple[str, str, Layer]]:
    """Give block and unit of each layer."""
    block, level, before = "", 0, 1
    for layer in layers:
        name = layer.name
        if name.startswith("time_embedding."):
            continue  # computed when a model is exported
        if found := _UNIT.match(name):
            block = found[1]
            unit = re.sub(r"(attentions\.\d+)\.norm$", r"\1.proj_in", found[2])
            yield block, f"{block}.{unit}", layer
        elif name.startswith("add_embedding."):
            yield "add_embedding", "add_embedding", layer
        elif name == "conv_in":
            yield "down_blocks.0", name, layer
        elif name in ("post_quant_conv", "decoder.conv_in"):
            yield "decoder.mid_block", "decoder.conv_in", layer
        elif tiny := re.match(r"decoder\.layers\.(\d+)", name):
            index = int(tiny[1])
            level += index > before + 1
            before = max(1, index)
            yield f"layers.level{level}", tiny[0], layer
        else:
            yield block, "conv_out", layer


def _connect(found: Sequence[Unit]) -> None:
    x: str | None = None
    entry = ""
    skips: list[str] = []
    for i, unit in enumerate(found):
        if unit.block == "add_embedding":
            continue
        inputs = [] if x is None else [x]
        if unit.name.startswith("up_blocks.") and ".resnets." in unit.name:
            inputs.append(skips.pop())
        if unit.name.endswith(".proj_in"):
            entry = x or ""
        if unit.name.endswith(".proj_out"):
            inputs.append(entry)
        unit.inputs = tuple(inputs)
        x = unit.name
        following = found[i + 1].name if i + 1 < len(found) else ""
        inside = ".attentions." in unit.name and not unit.name.endswith(".proj_out")
        before = ".resnets." in unit.name and following.startswith(
            unit.name.replace(".resnets.", ".attentions.") + "."
        )
        if unit.block.startswith("down_blocks.") and not inside and not before:
            skips.append(x)


def group(found: Sequence[Unit], most_weights: int) -> list[list[Unit]]:
    """Join neighbouring units into artifacts.

    Parameters
    ----------
    found : sequence of Unit
    most_weights : int
        An artifact grows while its weights stay below this; a larger unit stands alone.
    """
    parts: list[list[Unit]] = []
    size = 0
    for unit in found:
        if not parts or parts[-1][-1].block != unit.block or size + unit.weights > most_weights:
            parts.append([])
            size = 0
        parts[-1].append(unit)
        size += unit.weights
    return parts


def held_between(parts: Sequence[Sequence[Unit]]) -> int:
    """Return the most elements of tensors between artifacts that are there at once.

    A tensor is there from the artifact that gives it to the last one that reads it.
    """
    size = {u.name: u.elements for part in parts for u in part}
    made = {u.name: i for i, part in enumerate(parts) for u in part}
    last = dict.fromkeys(size, -1)
    for i, part in enumerate(parts):
        for name in (n for u in part for n in u.inputs if made[n] != i):
            last[name] = i
    last[parts[-1][-1].name] = len(parts)
    return max(
        sum(n for name, n in size.items() if made[name] <= i <= last[name] != -1)
        for i in range(len(parts))
    )
