"""A process that has QNN loaded: it compiles segments for a Hexagon NPU and runs them.

QNN's libraries are found by variables that must be set before a process starts, cannot be loaded
in two versions side by side, and end the process where something is wrong. So they never enter the
exporter itself. Requests come by standard input and answers go out by standard output, one at a
time: a line of JSON, then the bytes of the arrays that it lists.

On x86-64 the artifacts run in QNN's own simulation of the NPU: programs of ExecuTorch in its
runtime, files of LiteRT and ONNX in onnxruntime, whose provider for QNN lies among QNN's libraries.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from handheld.errors import TargetError
from handheld.qnn import Sdk

Array = NDArray[Any]
PROGRAM, SAMPLES, CODES, ARTIFACT = "program.pt2", "samples", "codes.safetensors", "artifact.pte"
"""What is in the folder of a segment that is to be compiled."""
_PREFIX = "[ERROR] [Qnn ExecuTorch]:"


def _send(stream: IO[bytes], header: Mapping[str, Any], arrays: Sequence[Array] = ()) -> None:
    kept = [np.ascontiguousarray(a) for a in arrays]
    listed = [[a.dtype.str, list(a.shape)] for a in kept]
    stream.write(json.dumps({**header, "arrays": listed}).encode() + b"\n")
    for array in kept:
        stream.write(array.tobytes())
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[Array]]:
    """Read one message.

    Raises
    ------
    EOFError
        If there is none.
    """
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    header = json.loads(line)
    arrays = []
    for dtype, shape in header["arrays"]:
        wanted = math.prod(shape) * np.dtype(dtype).itemsize
        data = stream.read(wanted)
        if len(data) != wanted:
            raise EOFError
        arrays.append(np.frombuffer(data, dtype).reshape(shape).copy())
    return header, arrays


class Process:
    """The process, as its user sees it; started by the first request, ended with this object.

    Parameters
    ----------
    sdk : Sdk
    """

    def __init__(self, sdk: Sdk) -> None:
        self._sdk = sdk
        self._child: subprocess.Popen[bytes] | None = None
        self._said: Any = None
        self._handles = itertools.count()

    def load(self, path: Path) -> int:
        """Load an artifact and return its handle.

        Raises
        ------
        TargetError
            If it cannot be loaded.
        """
        handle = next(self._handles)
        self({"do": "load", "path": str(path), "handle": handle})
        return handle

    def drop(self, handle: int) -> None:
        """Let go of an artifact, where the process still lives."""
        if self._child is not None and self._child.poll() is None:
            with contextlib.suppress(TargetError):
                self({"do": "drop", "handle": handle})

    def __call__(
        self, request: Mapping[str, Any], arrays: Sequence[Array] = ()
    ) -> tuple[dict[str, Any], list[Array]]:
        """Send a request and return the answer.

        Raises
        ------
        TargetError
            If it says that something is wrong, or ends.
        """
        child = self._started()
        assert child.stdin is not None and child.stdout is not None
        try:
            _send(child.stdin, request, arrays)
            answer, results = _receive(child.stdout)
        except (EOFError, BrokenPipeError):
            code = child.wait()
            self._child = None
            raise TargetError(f"QNN ended with code {code}: {self._last_words()}") from None
        if "error" in answer:
            last = self._last_words()
            raise TargetError(answer["error"] + (f"; QNN: {last}" if last else ""))
        return answer, results

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            self._said = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
            self._child = subprocess.Popen(
                [sys.executable, "-m", "handheld_export.qnn.process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=self._sdk.environment(),
                start_new_session=True,  # Ctrl-C is for who asks; the end of its input ends it
            )
            weakref.finalize(self, _end, self._child)
        return self._child

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").splitlines()
        return next((x.removeprefix(_PREFIX).strip() for x in reversed(lines) if _PREFIX in x), "")


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


_Run = Callable[[list[Array]], list[Array]]


def _program(path: Path) -> _Run:
    import torch
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    assert method is not None

    def run(arrays: list[Array], _: Any = program) -> list[Array]:
        return [r.numpy() for r in method.execute([torch.from_numpy(a) for a in arrays])]

    return run


def _context(path: Path) -> _Run:
    from handheld_export.litert import npu
    from handheld_export.qnn import onnx

    source = npu.as_onnx(path) if path.suffix == ".tflite" else path
    session = onnx.session(source)
    names = [x.name for x in session.get_inputs()]
    return lambda arrays: list(session.run(None, dict(zip(names, arrays, strict=True))))


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    loaded: dict[int, _Run] = {}

    def lower(header: dict[str, Any], _: list[Array]) -> tuple[dict[str, Any], list[Array]]:
        from handheld_export.qnn import executorch

        executorch.preload()
        return _forked(lambda: executorch.lower(Path(header["folder"]), header["soc"])), []

    def compile_onnx(header: dict[str, Any], _: list[Array]) -> tuple[dict[str, Any], list[Array]]:
        from handheld_export.qnn import onnx

        source, path = Path(header["source"]), Path(header["path"])
        return _forked(lambda: onnx.compile_for(header["soc"], source, path)), []

    def load(header: dict[str, Any], _: list[Array]) -> tuple[dict[str, Any], list[Array]]:
        path = Path(header["path"])
        loaded[header["handle"]] = (_program if path.suffix == ".pte" else _context)(path)
        return {}, []

    def run(header: dict[str, Any], arrays: list[Array]) -> tuple[dict[str, Any], list[Array]]:
        return {}, loaded[header["handle"]](arrays)

    def drop(header: dict[str, Any], _: list[Array]) -> tuple[dict[str, Any], list[Array]]:
        loaded.pop(header["handle"], None)
        return {}, []

    operations: dict[str, Callable[..., tuple[dict[str, Any], list[Array]]]] = {
        "lower": lower,
        "compile": compile_onnx,
        "load": load,
        "run": run,
        "drop": drop,
    }
    while True:
        try:
            header, arrays = _receive(requests)
        except EOFError:
            return
        try:
            answer, results = operations[header["do"]](header, arrays)
        except Exception as error:  # engines raise whatever they like
            _send(answers, {"error": _line(error)})
        else:
            _send(answers, answer, results)


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:500]


def _forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``work`` returns in a copy of this process, as it is before QNN is loaded.

    Names in a binary count what its process has compiled before. In a fresh copy, the same
    segment gives the same bytes.

    Raises
    ------
    RuntimeError
        If it raises, or its process ends.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            told = {"answer": work()}
        except Exception as error:  # engines raise whatever they like
            told = {"error": {"line": _line(error)}}
        with os.fdopen(writing, "w") as out:
            json.dump(told, out)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    _, status = os.waitpid(pid, 0)
    if not text:
        raise RuntimeError(f"the compiler ended with code {os.waitstatus_to_exitcode(status)}")
    told = json.loads(text)
    if "error" in told:
        raise RuntimeError(told["error"]["line"])
    result: dict[str, Any] = told["answer"]
    return result


def main() -> None:
    """Serve requests until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # QNN prints as it likes
    from handheld_export.cli import quiet

    quiet()
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
