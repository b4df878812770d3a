"""LiteRT's Python runtime: its accelerators, and what its GPU delegate takes."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import ai_edge_litert.schema_py_generated as schema
import flatbuffers
import numpy as np

from handheld.errors import TargetError
from handheld.program import Ports
from handheld_export.litert import tflite
from handheld_export.targets.base import Array, Runner

_FORCE_FP16: Final = 4
"""XNNPACK's flag for arithmetic in half precision."""
GPU_OPERATORS: Final = frozenset(
    (
        *("ADD", "BATCH_MATMUL", "CONCATENATION", "CONV_2D", "DEQUANTIZE", "FULLY_CONNECTED"),
        *("GELU", "LOGISTIC", "MEAN", "MUL", "PAD", "RELU", "RESHAPE", "RSQRT", "SLICE"),
        *("SOFTMAX", "SUB", "TANH", "TRANSPOSE"),
    )
)
"""Operators that the delegate took in segments that ran through WebGPU. The wheel's own analyzer
passes whatever it is given, BROADCAST_TO for one, which the delegate refuses."""
_GPU_DIMENSIONS: Final = 4


def check_gpu(path: Path) -> None:
    """Check that the GPU delegate takes every operator of a file, without a GPU.

    Raises
    ------
    TargetError
        Naming the operators that it does not take, or a tensor of too many dimensions.
    """
    used, most = tflite.operators(path)
    if others := sorted(used - GPU_OPERATORS):
        raise TargetError(f"LiteRT's GPU delegate does not take {', '.join(others)}", path=path)
    if most > _GPU_DIMENSIONS:
        raise TargetError(f"LiteRT's GPU delegate does not take {most} dimensions", path=path)


@contextmanager
def _kept() -> Iterator[list[str]]:
    """Keep what native code writes to either output; it comes when the block ends."""
    said: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    outputs = {fd: os.dup(fd) for fd in (1, 2)}
    with tempfile.TemporaryFile() as file:
        for fd in outputs:
            os.dup2(file.fileno(), fd)
        try:
            yield said
        finally:
            for fd, kept in outputs.items():
                os.dup2(kept, fd)
                os.close(kept)
            file.seek(0)
            said += file.read().decode(errors="replace").splitlines()


@cache
def gpu() -> str | None:
    """Return what WebGPU calls its device, None where no driver gives one.

    Drivers are those that Vulkan's loader finds; ``VK_DRIVER_FILES`` names others.
    """
    from ai_edge_litert.compiled_model import CompiledModel

    with _kept() as said:
        try:
            CompiledModel.from_buffer(_sum(), environment=_environment(), options=_options("gpu"))
            found = True
        except RuntimeError:
            found = False
    mark = "Selected adapter: "
    name = next((line.split(mark)[1] for line in said if mark in line), "unknown device")
    return name.split(",")[0] if found else None


@cache
def _environment() -> Any:
    """Return the one environment; call it where outputs are kept."""
    from ai_edge_litert.environment import Environment

    environment = Environment.create()
    # Its end would be told at length, after the program's own last words.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(environment.capsule))
    return environment


def _options(accelerator: Literal["cpu", "gpu"]) -> Any:
    from ai_edge_litert.options import CpuOptions, HardwareAccelerator, Options

    if accelerator == "gpu":
        return Options(hardware_accelerators=HardwareAccelerator.GPU)
    return Options(cpu_options=CpuOptions(num_threads=2, xnnpack_flags=_FORCE_FP16))


def _sum() -> bytes:
    """Return a model of one addition."""
    model, graph = schema.ModelT(), schema.SubGraphT()
    code, op = schema.OperatorCodeT(), schema.OperatorT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.ADD
    code.version = 1
    op.opcodeIndex, op.inputs, op.outputs = 0, [0, 0], [1]
    op.builtinOptionsType = schema.BuiltinOptions.AddOptions
    op.builtinOptions = schema.AddOptionsT()
    for name in ("x", "y"):
        tensor = schema.TensorT()
        tensor.name, tensor.shape = name, [1, 4, 4, 4]
        graph.tensors = [*(graph.tensors or []), tensor]
    graph.inputs, graph.outputs, graph.operators = [0], [1], [op]
    model.version, model.operatorCodes, model.subgraphs = 3, [code], [graph]
    model.buffers = [schema.BufferT()]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class Compiled(Runner):
    """An artifact on one of LiteRT's accelerators.

    Parameters
    ----------
    path : Path
    ports : Ports
    accelerator : {'cpu', 'gpu'}
        The CPU computes in half precision here, as phones' GPUs do.

    Raises
    ------
    TargetError
        If the accelerator does not take the whole artifact.
    """

    def __init__(self, path: Path, ports: Ports, accelerator: Literal["cpu", "gpu"]) -> None:
        from ai_edge_litert.compiled_model import CompiledModel

        with _kept() as said:
            try:
                model = CompiledModel.from_file(
                    str(path), environment=_environment(), options=_options(accelerator)
                )
            except RuntimeError:
                model = None
        if model is None:
            errors = [line for line in said if line.startswith("ERROR")] or said or ["?"]
            raise TargetError(f"LiteRT's {accelerator} does not take it: {errors[0]}", path=path)
        if accelerator == "gpu" and not model.is_fully_accelerated():
            raise TargetError("parts of it do not run on the GPU", path=path)
        signatures = model.get_signature_list()
        if len(signatures) != 1:
            raise TargetError("the artifact does not have one signature", path=path)
        (self._signature,) = signatures
        self._model, self._ports = model, ports
        self._inputs = {
            n: model.create_input_buffer_by_name(self._signature, n) for n in ports.inputs
        }
        self._outputs = {
            n: model.create_output_buffer_by_name(self._signature, n) for n in ports.outputs
        }

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        for name, value in zip(self._ports.inputs, inputs, strict=True):
            self._inputs[name].write(np.ascontiguousarray(value))
        self._model.run_by_name(self._signature, self._inputs, self._outputs)
        results = []
        for name, spec in self._ports.outputs.items():
            count = int(np.prod(spec.shape))
            results.append(self._outputs[name].read(count, np.float32).reshape(spec.shape))
        return tuple(results)
