"""Segments as Core ML packages that hold the student's codes.

coremltools reads, beside a parameter, buffers that say how it is compressed, and makes of them the
program's decompression: a palette of the codes themselves with one scale per output channel for 2
and 4 bits, which the Neural Engine runs where linear 4 bits crashed its compiler, and 8-bit codes
with scales. Codes stay the student's to the bit; scales are rounded to fp16 with all other weights.
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from handheld.errors import TargetError
from handheld.files import sha256_file
from handheld_export.quantization import BITS, LIMITS, QuantizedWeight

ABOUT = "_COREML_/weight/"
"""What the names of buffers about a parameter ``weight`` begin with."""
_PALETTE, _LINEAR = 2, 3
"""``compression_type`` of palettization and of quantization."""
_NAMESPACE = uuid.UUID("6f1c2a52-3a0c-5e0e-9f0b-0b8a4f3d7c11")
_DATED = "com.github.apple.coremltools.conversion_date"


@dataclass(frozen=True)
class Layer:
    """A quantized layer of a package, to be read back."""

    name: str
    weight: QuantizedWeight


def compress(
    module: nn.Module, container: Callable[[QuantizedWeight], QuantizedWeight]
) -> list[Layer]:
    """Put buffers beside the weights of quantized layers, in place.

    Parameters
    ----------
    module : torch.nn.Module
        A rewritten copy.
    container : callable
        Returns a weight on the grid that holds it.

    Returns
    -------
    list of Layer

    Raises
    ------
    TargetError
        If a grid does not fit Core ML.
    """
    layers = []
    for name, layer in module.named_modules():
        stored: QuantizedWeight | None = getattr(layer, "quantized", None)
        if stored is None or not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        source = str(getattr(layer, "source_name", name))
        weight = container(stored)
        if weight.group_size is not None and weight.grid != "int4":
            raise TargetError(f"layer '{source}': {weight.grid} in groups is not taken")
        for key, value in _about(weight).items():
            layer.register_buffer(f"{ABOUT}{key}", value)
        layers.append(Layer(source, weight))
    return layers


def _about(weight: QuantizedWeight) -> dict[str, Tensor]:
    rank = weight.codes.ndim
    scale = torch.from_numpy(weight.scales.reshape(len(weight.scales), -1).copy())
    if weight.grid == "int8" or weight.group_size is not None:
        return {
            "compression_type": torch.tensor([_LINEAR]),
            "quantization_n_bits": torch.tensor(BITS[weight.grid]),
            "quantization_scale": scale,
        }
    if weight.codebook is not None:
        entries = weight.codebook
        scales: dict[str, Tensor] = {}
    else:
        low, high = LIMITS[weight.grid]
        entries = np.arange(low, high + 1, dtype=np.float32)
        scales = {"palettization_scale": scale}
    lut = torch.from_numpy(entries.copy()).reshape([1] * rank + [-1, 1])
    return {"compression_type": torch.tensor([_PALETTE]), "lut": lut, **scales}


def convert(
    module: nn.Module, examples: Sequence[Tensor], outputs: int, path: Path, *, half: bool = True
) -> list[Path]:
    """Write a module as an .mlpackage.

    Parameters
    ----------
    module : torch.nn.Module
    examples : sequence of float32 tensors
        Inputs become ``in0``, ``in1``, ...
    outputs : int
        How many results there are; they become ``out0``, ``out1``, ...
    path : Path
        The package; what is there is replaced.
    half : bool
        Compute in fp16, else in fp32.

    Returns
    -------
    list of Path
        The files of the package, ``Manifest.json`` first. Equal modules give equal bytes.

    Raises
    ------
    TargetError
        If coremltools cannot convert it.
    """
    with _silence():
        import coremltools as ct

        try:
            with torch.no_grad():
                program = torch.export.export(module, tuple(examples)).run_decompositions({})
            model: Any = ct.convert(
                program,
                inputs=[
                    ct.TensorType(name=f"in{i}", shape=tuple(x.shape), dtype=np.float32)
                    for i, x in enumerate(examples)
                ],
                outputs=[ct.TensorType(name=f"out{i}", dtype=np.float32) for i in range(outputs)],
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
                convert_to="mlprogram",
                skip_model_load=True,
            )
        except Exception as error:
            raise TargetError(f"coremltools cannot convert it: {error}") from error
        shutil.rmtree(path, ignore_errors=True)
        model.save(str(path))
    return _settle(path)


@contextmanager
def _silence() -> Iterator[None]:
    for name in ("coremltools", "torchao"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import tqdm  # coremltools draws bars of its own, and has no switch

    before = tqdm.tqdm.__init__

    def quiet(self: Any, *given: Any, **named: Any) -> None:
        before(self, *given, **{**named, "disable": True})

    tqdm.tqdm.__init__ = quiet
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.tqdm.__init__ = before


def _settle(path: Path) -> list[Path]:
    """Remove from a package what differs from run to run."""
    from coremltools.proto import Model_pb2

    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    listing = json.loads((path / "Manifest.json").read_text())
    data = path / "Data"
    for entry in listing["itemInfoEntries"].values():
        if (file := data / entry["path"]).suffix == ".mlmodel":
            spec = Model_pb2.Model()
            spec.ParseFromString(file.read_bytes())
            spec.description.metadata.userDefined.pop(_DATED, None)
            file.write_bytes(spec.SerializeToString(deterministic=True))
    files = sorted(p for p in data.rglob("*") if p.is_file())
    essence = " ".join(sha256_file(f) for f in files)
    fixed = {
        old: str(uuid.uuid5(_NAMESPACE, f"{entry['path']} {essence}")).upper()
        for old, entry in sorted(listing["itemInfoEntries"].items())
    }
    listing["itemInfoEntries"] = {
        fixed[old]: listing["itemInfoEntries"][old] for old in sorted(fixed, key=fixed.__getitem__)
    }
    listing["rootModelIdentifier"] = fixed[listing["rootModelIdentifier"]]
    manifest = path / "Manifest.json"
    manifest.write_text(json.dumps(listing, indent=4, sort_keys=True) + "\n")
    for file in (manifest, *files):
        file.chmod(0o644)
    return [manifest, *files]


def read_back(path: Path, layers: Sequence[Layer]) -> None:
    """Compare the codes in a package with the student's.

    Layers are found by what they hold: every weight must be there with its codes and its scales in
    fp16, as often as the student has it.

    Raises
    ------
    TargetError
        For the first layer that is not there.
    """
    from handheld_export.coreml.mil import Package

    found = [_essence(*stored) for stored in Package(path).compressed()]
    for layer in layers:
        weight = layer.weight
        scales = weight.scales.reshape(len(weight.scales), -1)
        values = weight.codes if weight.codebook is None else weight.codebook[weight.codes]
        wanted = _essence(
            values.astype(np.float32), None if weight.codebook is not None else scales
        )
        if wanted not in found:
            raise TargetError(f"layer '{layer.name}': the package holds other codes or scales")
        found.remove(wanted)


def _essence(values: Any, scales: Any) -> tuple[bytes, bytes]:
    half = b"" if scales is None else np.asarray(scales, np.float16).tobytes()
    return np.asarray(values, np.float16).tobytes(), half
