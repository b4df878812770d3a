"""One file of weights beside several ONNX graphs.

A graph names the tensors that lie beside it by file, offset and length. So graphs of one segment at
several picture sizes can name the same file. Tensors that differ come into the graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import onnx

from handheld.errors import TargetError
from handheld.files import sha256_file

_ALIGNMENT: Final = 4096
"""Offsets at which systems map files."""


def share(paths: Sequence[Path], outputs: Sequence[Path], folder: Path) -> Path | None:
    """Write graphs again with their tensors in one file.

    Parameters
    ----------
    paths : sequence of Path
        One segment at several sizes, as :func:`~handheld_export.onnx.graphs.lower` writes it.
    outputs : sequence of Path
        One for each, in ``folder``.
    folder : Path

    Returns
    -------
    Path or None
        The file of tensors, named by its SHA-256. None if no tensor is the same in all; nothing is
        written then.

    Raises
    ------
    TargetError
        If what was written is not what was read.
    """
    models = [onnx.load(str(path), load_external_data=False) for path in paths]
    external = [
        {t.name: _content(t, path) for t in model.graph.initializer if t.external_data}
        for model, path in zip(models, paths, strict=True)
    ]
    first, *others = external
    common = {n: data for n, data in first.items() if all(o.get(n) == data for o in others)}
    if not common:
        return None
    places, at = {}, 0
    weights = folder / "weights.partial"
    with weights.open("wb") as out:
        for name, data in common.items():
            at = -(-at // _ALIGNMENT) * _ALIGNMENT
            out.write(bytes(at - out.tell()) + data)
            places[name] = at
            at += len(data)
    weights = weights.replace(folder / sha256_file(weights))
    for model, own, output in zip(models, external, outputs, strict=True):
        for tensor in model.graph.initializer:
            if tensor.name in places:
                data = common[tensor.name]
                _point(tensor, location=weights.name, offset=places[tensor.name], length=len(data))
            elif tensor.name in own:
                _point(tensor)
                tensor.raw_data = own[tensor.name]
        output.write_bytes(model.SerializeToString(deterministic=True))
        written = onnx.load(str(output), load_external_data=False)
        for tensor in written.graph.initializer:
            if tensor.name in places and _content(tensor, output) != common[tensor.name]:
                raise TargetError(f"tensor '{tensor.name}' is not what it was", path=output)
    return weights


def _content(tensor: Any, path: Path) -> bytes:
    """Read the bytes of a tensor that lies beside its graph."""
    entry: dict[str, str] = {e.key: e.value for e in tensor.external_data}
    with (path.parent / entry["location"]).open("rb") as file:
        file.seek(int(entry.get("offset", 0)))
        return file.read(int(entry["length"]))


def _point(tensor: Any, **place: str | int) -> None:
    """Name where the data of a tensor is: beside the graph, or in it if there is no place."""
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL if place else onnx.TensorProto.DEFAULT
    for key, value in place.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
