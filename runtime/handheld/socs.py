"""Systems on a chip: how their names compare, and what Qualcomm's NPUs need."""

from __future__ import annotations

import re
from typing import Final

HEXAGON: Final = {"SM8550": 73, "SM8650": 75, "SM8750": 79, "SM8850": 81}
"""The Hexagon architecture of a SoC, as its context binaries name it."""
_ONE_ARCHITECTURE: Final = re.compile(r"libQnnHtpV(\d+)(?:Skel|Stub|CalculatorStub)?\.so")


def is_soc(have: str, wanted: str) -> bool:
    """Tell whether a phone's SoC is the one that artifacts were compiled for.

    Case and spaces do not count, nor does a maker in front (``QTI SM8650``), and a bin such as
    ``SM8650-AC`` is an ``SM8650``.
    """
    theirs = "".join(wanted.upper().split())
    words = have.upper().split()
    for ours in ("".join(words), "".join(words[1:])):
        if ours == theirs or ours.startswith(f"{theirs}-"):
            return True
    return False


def hexagon(soc: str | None) -> int | None:
    """Return the Hexagon architecture of a SoC, None if it is not known."""
    if soc is None:
        return None
    return next((arch for name, arch in HEXAGON.items() if is_soc(soc, name)), None)


def is_skel(file: str) -> bool:
    """Tell whether a library runs on the NPU itself."""
    return _ONE_ARCHITECTURE.fullmatch(file) is not None and "Skel" in file


def is_for(file: str, soc: str | None) -> bool:
    """Tell whether a library can be of use on a SoC.

    Libraries of QNN that name a Hexagon architecture are for it only; all others, and all of
    them where the SoC is not known, may be.
    """
    match = _ONE_ARCHITECTURE.fullmatch(file)
    arch = hexagon(soc)
    return match is None or arch is None or int(match[1]) == arch
