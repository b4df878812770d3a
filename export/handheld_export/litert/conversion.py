"""From modules to flatbuffers, by litert-torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

import torch
from torch import Tensor

from handheld.errors import TargetError
from handheld_export.litert import tflite
from handheld_export.targets.base import SegmentInput

_CONVERTERS: Final = ("litert-torch", "litert-converter", "torch")


def convert(opened: tflite.Open, segment: SegmentInput, weights: Sequence[Tensor]) -> bytes:
    """Convert a module that takes its weights as inputs.

    Segments of one structure share a conversion, see :mod:`handheld_export.structures`.

    Returns
    -------
    bytes
        A flatbuffer for :func:`~handheld_export.litert.tflite.graft`.

    Raises
    ------
    TargetError
        If the converter cannot.
    """
    if segment.shared is None:
        return _convert(opened, segment, weights)
    from handheld_export import structures

    return structures.convert(
        opened,
        (*segment.examples, *weights),
        {name: version(name) for name in _CONVERTERS},
        segment.shared,
        lambda: _convert(opened, segment, weights),
    )


def _convert(opened: tflite.Open, segment: SegmentInput, weights: Sequence[Tensor]) -> bytes:
    import litert_torch
    from litert_torch import progress

    progress.config.show_progress = False
    logging.getLogger("litert_torch").setLevel(logging.ERROR)
    try:
        with torch.no_grad():
            model = litert_torch.convert(opened, (*segment.examples, *weights))
        return bytes(model.model_content())
    except Exception as error:
        raise TargetError(f"litert-torch cannot convert it: {error}") from error
