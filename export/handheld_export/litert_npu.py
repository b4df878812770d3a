"""LiteRT's compiler for Qualcomm's NPUs, and a process that runs what it makes in QNN's simulation.

The compiler of LiteRT's wheel leaves one operator in the file, whose data is a context binary of
QNN. The wheel has nothing that runs it on a PC, but QNN's provider for onnxruntime, which lies in
the same SDK, runs any context binary; so the very binary that ships is what is verified.

QNN ends the process where something is wrong, so all of this happens in processes of its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Final

import ai_edge_litert.schema_py_generated as schema
import numpy as np
from flatbuffers import flexbuffers

from handheld.errors import TargetError
from handheld.program import Ports
from handheld.qnn import Sdk
from handheld_export import tflite
from handheld_export.targets.base import Array, Runner

_STATS: Final = re.compile(
    r"Partitioned subgraph<0>, selected (\d+) ops, from a total of (\d+) ops\. "
    r"resulted in (\d+) partitions\."
)
_SOC: Final = re.compile(rb"soc_type=(SM\d+);arch=(\d+);")
_BUILD: Final = re.compile(rb"v(\d+\.\d+\.\d+\.\d{12})")
_UNUSED: Final = "libQnnLpai.so"
"""A library that the compiler is linked with and takes nothing from; no wheel has it."""


def _environment(sdk: Sdk, folder: Path) -> dict[str, str]:
    paths = (sdk.libraries, sdk.libraries.parent / "onnxruntime_qnn.libs", folder)
    return {**sdk.environment(), "LD_LIBRARY_PATH": os.pathsep.join(map(str, paths))}


def compile_for(sdk: Sdk, soc: str, source: Path, path: Path) -> None:
    """Compile a .tflite file for an NPU.

    Parameters
    ----------
    sdk : Sdk
    soc : str
        For example ``SM8650``.
    source, path : Path
        What to read and to write.

    Raises
    ------
    TargetError
        If the compiler fails, or leaves operators or a second graph, naming the operators.
    """
    spec = find_spec("ai_edge_litert")
    assert spec is not None and spec.origin is not None
    wheel = Path(spec.origin).parent
    with tempfile.TemporaryDirectory(prefix="handheld-qnn-") as folder:
        (Path(folder) / _UNUSED).symlink_to(sdk.libraries / "libQnnSystem.so")
        command = [
            *(str(wheel / "tools" / "apply_plugin_main"), "--cmd=apply", f"--model={source}"),
            *(f"--o={path}", "--soc_manufacturer=Qualcomm", f"--soc_model={soc}", "--err=--"),
            f"--libs={wheel / 'vendors' / 'qualcomm' / 'compiler'}",
        ]
        done = subprocess.run(
            command,
            capture_output=True,  # apart: each has its own buffer, and mixed they cut lines in two
            text=True,
            errors="replace",
            check=False,
            env=_environment(sdk, Path(folder)),
        )
    said = f"{done.stderr}\n{done.stdout}"
    stats = _STATS.search(said)
    taken, total, graphs = map(int, stats.groups()) if stats else (0, 0, 0)
    written = path.is_file() and path.stat().st_size > 0
    if taken == total and (done.returncode or not written or not total):
        errors = [line for line in said.splitlines() if "ERROR" in line.upper()]
        last = errors[-1].strip() if errors else "no error"
        raise TargetError(
            f"LiteRT's compiler for Qualcomm's NPUs ends with code {done.returncode}: {last[:300]}"
        )
    if taken != total or graphs != 1:
        # With no operator taken, the compiler ends with code 1 and an empty file.
        left = tflite.operators(path if written else source)[0]
        raise TargetError(
            f"{taken} of {total} operators go to the NPU, in {graphs} graphs; outside: "
            f"{', '.join(sorted(left - {'CUSTOM'})) or 'none'}"
        )


def binary(path: Path) -> tuple[bytes, str, dict[str, str]]:
    """Read the context binary of a compiled file.

    Returns
    -------
    binary : bytes
    name : str
        Of its graph.
    facts : dict
        ``soc``, ``hexagon`` and ``qnn``, as the binary says them.

    Raises
    ------
    TargetError
        If the file is no such thing.
    """
    data = path.read_bytes()
    try:
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        (operator,) = model.subgraphs[0].operators
        options = flexbuffers.Loads(bytes(operator.customOptions))
        at, size, name = (options[k] for k in ("bytecode_offset", "bytecode_size", "name"))
    except Exception as error:  # the readers raise whatever they like
        raise TargetError("is not compiled for an NPU", path=path) from error
    found = data[at : at + size]
    soc, build = _SOC.search(found), _BUILD.search(found)
    if len(found) != size or soc is None or build is None:
        raise TargetError("holds no whole context binary of QNN", path=path)
    facts = {"soc": soc[1].decode(), "hexagon": soc[2].decode(), "qnn": build[1].decode()}
    return found, name, facts


class Simulated(Runner):
    """A compiled artifact in QNN's simulation of the NPU.

    Parameters
    ----------
    sdk : Sdk
    path : Path
    ports : Ports
    """

    def __init__(self, sdk: Sdk, path: Path, ports: Ports) -> None:
        self._path, self._ports = path, ports
        self._process = _process(sdk)

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        given, made = (
            {name: list(spec.shape) for name, spec in ports.items()}
            for ports in (self._ports.inputs, self._ports.outputs)
        )
        return self._process({"path": str(self._path), "inputs": given, "outputs": made}, inputs)


class _Process:
    """The process that runs artifacts, started by the first request."""

    def __init__(self, sdk: Sdk) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._child = subprocess.Popen(
            [sys.executable, "-m", "handheld_export.litert_npu", str(sdk.libraries)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=_environment(sdk, sdk.libraries),
            start_new_session=True,
        )
        weakref.finalize(self, _end, self._child)

    def __call__(self, request: Mapping[str, Any], arrays: Sequence[Array]) -> tuple[Array, ...]:
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            for array in arrays:
                child.stdin.write(np.ascontiguousarray(array, np.float32).tobytes())
            child.stdin.flush()
            answer = json.loads(child.stdout.readline())
            shapes = () if "error" in answer else request["outputs"].values()
            results = tuple(_read(child.stdout, shape) for shape in shapes)
        except (EOFError, BrokenPipeError, ValueError):
            _process.cache_clear()
            raise TargetError(f"QNN's simulation ended with code {child.wait()}") from None
        if "error" in answer:
            raise TargetError(f"QNN's simulation: {answer['error']}")
        return results


def _read(stream: IO[bytes], shape: Sequence[int]) -> Array:
    """Read a float32 array.

    Raises
    ------
    EOFError
        If it does not come whole.
    """
    size = 4 * math.prod(shape)
    data = stream.read(size)
    if len(data) != size:
        raise EOFError
    return np.frombuffer(data, np.float32).reshape(shape).copy()


@cache
def _process(sdk: Sdk) -> _Process:
    return _Process(sdk)


def _end(child: subprocess.Popen[bytes]) -> None:
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


# --- inside ------------------------------------------------------------------------------


def _session(libraries: Path, request: Mapping[str, Any]) -> Any:
    """Open a context binary. Its tensors have the file's names, and the file's order."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    path = Path(request["path"])
    blob, name, _ = binary(path)
    graph = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0).subgraphs[0]
    given, made = (
        [
            helper.make_tensor_value_info(graph.tensors[i].name.decode(), TensorProto.FLOAT, shape)
            for i, shape in zip(tensors, request[side].values(), strict=True)
        ]
        for side, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs))
    )
    node = helper.make_node(
        "EPContext",
        [x.name for x in given],
        [x.name for x in made],
        domain="com.microsoft",
        name=name,
        ep_cache_context=blob,
        embed_mode=1,
        main_context=1,
        source="QNN",
        partition_name=name,
    )
    opsets = [helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("", 17)]
    model = helper.make_model(helper.make_graph([node], name, given, made), opset_imports=opsets)
    model.ir_version = 10
    options = ort.SessionOptions()
    options.log_severity_level = 3
    devices = [d for d in ort.get_ep_devices() if d.ep_name == "QNN"]
    backend = {"backend_path": str(libraries / "libQnnHtp.so")}
    options.add_provider_for_devices(devices[:1], backend)
    return ort.InferenceSession(model.SerializeToString(), options)


def _serve(libraries: Path, requests: IO[bytes], answers: IO[bytes]) -> None:
    import onnxruntime as ort

    provider = libraries / "libonnxruntime_providers_qnn.so"
    ort.register_execution_provider_library("QNN", str(provider))
    sessions: dict[str, Any] = {}
    while line := requests.readline():
        request = json.loads(line)
        inputs = [_read(requests, shape) for shape in request["inputs"].values()]
        results: list[Array] = []
        try:
            key = request["path"]
            if key not in sessions:
                sessions[key] = _session(libraries, request)
            names = [x.name for x in sessions[key].get_inputs()]
            results = sessions[key].run(None, dict(zip(names, inputs, strict=True)))
            answer: dict[str, Any] = {}
        except Exception as error:  # onnxruntime raises whatever it likes
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer).encode() + b"\n")
        for result in results:
            answers.write(np.ascontiguousarray(result, np.float32).tobytes())
        answers.flush()


def main() -> None:
    """Run artifacts until there are no more requests."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # QNN prints as it likes
    _serve(Path(sys.argv[1]), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
