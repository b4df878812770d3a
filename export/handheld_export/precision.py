"""Precisions: which layer of an unquantized checkpoint gets which grid.

A precision is a short name for a rule. Embeddings, the first and the last convolution stay
in float: they are a thousandth of the weights and carry the whole signal.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from handheld.errors import UsageError
from handheld_export.quantization import Grid


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

    def choose(self, component: str, layer: str, module: nn.Module) -> Choice | None:
        """Return what a layer is quantized to, or None for float.

        Parameters
        ----------
        component : str
            ``unet`` or ``decoder``.
        layer : str
            Module path.
        module : nn.Linear or nn.Conv2d
        """
        if layer.endswith(("conv_in", "conv_out")) or layer.startswith(
            ("add_embedding", "time_embedding", "post_quant_conv")
        ):
            return None
        if isinstance(module, nn.Linear) and (
            ".transformer_blocks." in layer or layer.endswith(("proj_in", "proj_out"))
        ):
            if (
                self.linear
                and self.linear.group_size
                and module.in_features % self.linear.group_size
            ):
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
