"""Precisions: which layer of an unquantized checkpoint gets which grid.

A precision is a short name for a rule. Embeddings, the first and the last convolution stay
in float: they are a thousandth of the weights and carry the whole signal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handheld.errors import UsageError
from handheld.planning import FLOAT, Grid


@dataclass(frozen=True)
class Choice:
    """Grid and group size of one layer."""

    grid: Grid
    group_size: int | None = None


@dataclass(frozen=True)
class Precision:
    """A rule.

    Parameters
    ----------
    name : str
    linear : Choice or None
        For the linear layers of transformer blocks; None leaves them in float.
    other : Choice or None
        For all other linear layers and the convolutions.
    """

    name: str
    linear: Choice | None = None
    other: Choice | None = None

    def choose(self, component: str, layer: str, shape: Sequence[int]) -> Choice | None:
        """Return what a layer is quantized to, or None for float.

        Parameters
        ----------
        component : str
            ``unet`` or ``decoder``.
        layer : str
            Module path.
        shape : sequence of int
            Of its weight: 2 dimensions are a linear layer, 4 a convolution.
        """
        if layer.endswith(("conv_in", "conv_out")) or layer.startswith(FLOAT):
            return None
        if len(shape) == 2 and (
            ".transformer_blocks." in layer or layer.endswith(("proj_in", "proj_out"))
        ):
            group = self.linear.group_size if self.linear else None
            if self.linear and group and shape[1] % group:
                return Choice(self.linear.grid)
            return self.linear
        return self.other


_INT8 = Choice("int8")
PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("fp32"),
        Precision("fp16"),
        Precision("int8", _INT8, _INT8),
        Precision("int4", Choice("int4"), _INT8),
        Precision("int4g32", Choice("int4", 32), _INT8),
        Precision("int2", Choice("int2"), _INT8),
        # The same, for engines whose activations are on fixed 16-bit grids.
        Precision("16a8w", _INT8, _INT8),
        Precision("16a4w", Choice("int4"), _INT8),
        Precision("16a2w", Choice("int2"), _INT8),
    )
}


def find(name: str) -> Precision:
    """Return a precision by name.

    Raises
    ------
    UsageError
        If there is none of this name.
    """
    if name not in PRECISIONS:
        raise UsageError(
            f"precision '{name}' is unknown", remedy=f"choose one of {', '.join(PRECISIONS)}"
        )
    return PRECISIONS[name]
