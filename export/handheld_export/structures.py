"""Converting a structure once for all segments that have it.

Most of a big U-Net is the same few layers over and over, and tracing them in Python is most of what
a conversion costs. Large weights are inputs of a conversion already; what is left in it are biases,
norms and tables. So a structure is converted twice with random numbers in their place. Where the
results differ in nothing but data that is one of these tensors to the bit, they are a template:
segments put their own values there. Where they differ in more, every segment is converted alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ai_edge_litert.schema_py_generated as schema
import numpy as np
import torch
from torch import Tensor

from handheld.files import write_file
from handheld_export.litert.tflite import Open, packed

Convert = Callable[[], bytes]


def convert(
    opened: Open, inputs: tuple[Tensor, ...], versions: dict[str, str], folder: Path, run: Convert
) -> bytes:
    """Convert a module, by a template if there is one or can be one.

    Parameters
    ----------
    opened : Open
        Takes its weights as inputs.
    inputs : tuple of Tensor
        Examples of all its inputs.
    versions : dict
        Of what converts.
    folder : Path
        Where templates are kept; made if it is missing.
    run : callable
        Converts ``opened`` as it is at that moment.

    Returns
    -------
    bytes
        What ``run`` gives.
    """
    small = _small(opened)
    key = _key(opened, inputs, small, versions)
    folder.mkdir(parents=True, exist_ok=True)
    template = _read(folder / key, small)
    if template is None:
        with _lock(folder / f"{key}.lock") as ours:
            if not ours:  # another process is at it; waiting takes as long as converting
                return run()
            template = _read(folder / key, small) or _make(opened, small, run)
            _write(folder / key, template)
    if template.places is None:
        return run()
    model = schema.ModelT.InitFromPackedBuf(template.flatbuffer, 0)
    for buffer, name in template.places.items():
        model.buffers[buffer].data = _bytes(small[name])
    return bytes(packed(model))


class _Template:
    def __init__(self, flatbuffer: bytes, places: dict[int, str] | None) -> None:
        self.flatbuffer = flatbuffer
        self.places = places
        """Buffer to the tensor whose data it holds; None where there can be no template."""


def _small(opened: Open) -> dict[str, Tensor]:
    """Return the tensors of a module that are not among its inputs."""
    own = {f"inner.{path}" for path in opened.paths}
    tensors: dict[str, Tensor] = dict(opened.named_parameters(remove_duplicate=False))
    tensors |= dict(opened.named_buffers(remove_duplicate=False))
    return {n: t for n, t in sorted(tensors.items()) if n not in own}


def _key(
    opened: Open, inputs: tuple[Tensor, ...], small: dict[str, Tensor], versions: dict[str, str]
) -> str:
    """Hash everything but the values of the small tensors."""
    with torch.no_grad():
        exported = torch.export.export(opened, inputs, strict=False)
    h = hashlib.sha256(json.dumps(versions, sort_keys=True).encode())
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        shape = (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else None
        h.update(
            f"{node.op}|{node.name}|{node.target}|{node.args}|{node.kwargs}|{shape}\n".encode()
        )
    h.update(str(exported.graph_signature).encode())
    for name, constant in sorted(exported.constants.items()):
        if name in small:
            continue
        h.update(f"{name}|".encode())
        if isinstance(constant, Tensor):
            h.update(_bytes(constant).tobytes())
        else:
            h.update(repr(constant).encode())
    # A change of our own may change what surrounds the conversion.
    h.update(Path(__file__).read_bytes())
    return h.hexdigest()


def _make(opened: Open, small: dict[str, Tensor], run: Convert) -> _Template:
    """Convert twice, with other values in the small tensors, and compare."""
    results = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        with _replaced(small, generator) as values:
            results.append((run(), values))
    (first, ones), (second, others) = results
    a, b = (schema.ModelT.InitFromPackedBuf(f, 0) for f in (first, second))
    if len(a.buffers) != len(b.buffers):
        return _Template(b"", None)
    known = {(ones[n], others[n]): n for n in small}
    places: dict[int, str] = {}
    for i, (x, y) in enumerate(zip(a.buffers, b.buffers, strict=True)):
        left, right = (b"" if v.data is None else bytes(np.asarray(v.data)) for v in (x, y))
        if left == right:
            continue
        name = known.get((left, right))
        if name is None:
            return _Template(b"", None)
        places[i] = name
        x.data = y.data = None
    same = packed(a) == packed(b)
    return _Template(first, places) if same else _Template(b"", None)


@contextmanager
def _replaced(small: dict[str, Tensor], generator: torch.Generator) -> Iterator[dict[str, bytes]]:
    """Put random numbers into tensors for a while; gives what they are, in bytes."""
    before = {n: t.data for n, t in small.items()}
    try:
        for name, t in small.items():
            if not t.is_floating_point():
                continue
            noise = torch.randn(t.shape, generator=generator, dtype=t.dtype)
            small[name].data = noise
        yield {n: bytes(_bytes(t)) for n, t in small.items()}
    finally:
        for name, data in before.items():
            small[name].data = data


def _bytes(t: Tensor) -> Any:
    flat: Any = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def _read(path: Path, small: dict[str, Tensor]) -> _Template | None:
    try:
        data = path.read_bytes()
        head, _, body = data.partition(b"\n")
        stated = json.loads(head)
        if hashlib.sha256(body).hexdigest() != stated["sha256"]:
            return None
        places = stated["places"]
    except (OSError, ValueError, KeyError):
        return None
    if places is None:
        return _Template(b"", None)
    if not set(places.values()) <= set(small):
        return None
    return _Template(body, {int(k): v for k, v in places.items()})


def _write(path: Path, template: _Template) -> None:
    stated = {
        "sha256": hashlib.sha256(template.flatbuffer).hexdigest(),
        "places": template.places,
    }
    write_file(path, json.dumps(stated).encode() + b"\n" + template.flatbuffer)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a lock that ends with the process; False if another process holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)
