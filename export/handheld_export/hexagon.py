"""What the roads to Qualcomm's Hexagon NPUs have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from handheld.errors import TargetError
from handheld_export.quantization import QuantizedWeight


def check(name: str, weight: QuantizedWeight) -> None:
    """Refuse grids that QNN does not compute on.

    Raises
    ------
    TargetError
        Naming the layer. Blockwise 3x3 convolutions compile, and come out wrong without a word.
    """
    if weight.grid == "palette":
        raise TargetError(f"layer '{name}': palettes do not run on QNN")
    if weight.group_size is not None:
        raise TargetError(
            f"layer '{name}': {weight.grid} in groups does not run on QNN",
            remedy="give scales per channel",
        )


def counted(weights: Iterable[QuantizedWeight]) -> dict[str, int]:
    """Count weights that are held in fp16 by their own grid, as the manifest's ``held``."""
    counts: Counter[str] = Counter()
    for weight in weights:
        counts[f"{weight.grid} as fp16"] += weight.codes.size
    return dict(sorted(counts.items()))
