"""Which operators a bundle's time goes to, by the profiler of its engine.

    python benchmarks/profile_ops.py build/full_size/bundles/stack1-tiny-litert-cpu-512x512
    python benchmarks/profile_ops.py BUNDLE --threads 1 --json build/profile.json

For `litert-cpu`. Every artifact runs alone on normal noise, with the options that the harness gives
LiteRT, and XNNPACK's operators are timed by LiteRT's profiler. Operators of one kind are summed
over a whole picture, steps included, with what they multiply and add, counted in the graph. Below
stands what the machine copies in a second. Profiling adds some time of its own; times of whole
pictures are those of `handheld bench`.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import ai_edge_litert
import ai_edge_litert.schema_py_generated as schema
import numpy as np
from rich.console import Console
from rich.table import Table

from handheld.bundle import Bundle
from handheld.devices.host import HostDevice
from handheld.errors import UsageError
from handheld.program import Call, Ports
from handheld_export import sharing
from stages import ROOT, Stages, command, guarded, say, versions, write_summary

XNNPACK_FLAGS: Final = 0x01 | 0x02 | 0x08 | 0x20
"""As the harness has them (engine_litert.cpp)."""
_INSIDE_DELEGATE: Final = 1 << 3
_MULTIPLYING: Final = {
    schema.BuiltinOperator.FULLY_CONNECTED: "Fully Connected",
    schema.BuiltinOperator.CONV_2D: "Convolution",
    schema.BuiltinOperator.BATCH_MATMUL: "Batch Matrix Multiply",
}
_BITS: Final = {schema.TensorType.INT2: 2, schema.TensorType.INT4: 4, schema.TensorType.INT8: 8}
Sums = dict[str, float]


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("element", ctypes.c_int),
        ("rank", ctypes.c_uint),
        ("dimensions", ctypes.c_int32 * 8),
        ("strides", ctypes.c_uint32 * 8),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("tag", ctypes.c_char_p),
        ("type", ctypes.c_int),
        ("start_us", ctypes.c_uint64),
        ("elapsed_us", ctypes.c_uint64),
        ("memory", ctypes.c_size_t * 6),
        ("metadata", ctypes.c_uint64 * 2),
        ("source", ctypes.c_int),
    )


class _Option(ctypes.Structure):
    """An integer option of an environment."""

    _fields_ = (
        ("tag", ctypes.c_int),
        ("type", ctypes.c_int64),
        ("value", ctypes.c_int64),
    )


_INTEGER: Final = 2
_ACCELERATORS, _LEAST_SEVERITY = 24, 25
_CPU, _ERRORS = 1, 3
_KEEP: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
"""Frees nothing: the texts of options are Python's."""


class Profiled:
    """One artifact in LiteRT, with its profiler on.

    Parameters
    ----------
    path : Path
    ports : Ports
    threads : int

    Raises
    ------
    UsageError
        If LiteRT refuses.
    """

    def __init__(self, path: Path, ports: Ports, threads: int) -> None:
        self._library = ctypes.CDLL(str(Path(next(iter(ai_edge_litert.__path__))) / "libLiteRt.so"))
        self._path = path
        self._data = np.fromfile(path, np.uint8)
        environment, model, options = (ctypes.c_void_p() for _ in range(3))
        self._owned = {"Model": model, "Options": options, "Environment": environment}
        told = (_Option * 2)(
            _Option(_ACCELERATORS, _INTEGER, _CPU), _Option(_LEAST_SEVERITY, _INTEGER, _ERRORS)
        )
        self._call("CreateEnvironment", len(told), told, ctypes.byref(environment))
        self._call(
            "CreateModelFromBuffer", environment, ctypes.c_void_p(self._data.ctypes.data),
            ctypes.c_size_t(self._data.nbytes), ctypes.byref(model),
        )  # fmt: skip
        self._call("CreateOptions", ctypes.byref(options))
        self._call("SetOptionsHardwareAccelerators", options, _CPU)
        payloads = {
            b"xnnpack": f"num_threads = {threads}\nflags = {XNNPACK_FLAGS}\n",
            b"runtime_options_string": "enable_profiling = true\n",
        }
        self._texts = [ctypes.create_string_buffer(text.encode()) for text in payloads.values()]
        for name, text in zip(payloads, self._texts, strict=True):
            opaque = ctypes.c_void_p()
            self._call("CreateOpaqueOptions", name, text, _KEEP, ctypes.byref(opaque))
            self._call("AddOpaqueOptions", options, opaque)
        self._compiled, self._profiler = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("CreateCompiledModel", environment, model, options, ctypes.byref(self._compiled))
        self._call("CompiledModelGetProfiler", self._compiled, ctypes.byref(self._profiler))
        generator = np.random.default_rng(0)
        self._arrays: list[Any] = []
        self._inputs = self._buffers(model, "Input", ports, generator)
        self._outputs = self._buffers(model, "Output", ports, generator)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, f"LiteRt{name}")(*arguments)
        if status != 0:
            raise UsageError(f"LiteRt{name} gives status {status}", path=self._path)

    def _buffers(
        self, model: ctypes.c_void_p, way: str, ports: Ports, generator: np.random.Generator
    ) -> Any:
        signature, count = ctypes.c_void_p(), ctypes.c_size_t()
        self._call("GetModelSignature", model, ctypes.c_size_t(0), ctypes.byref(signature))
        self._call(f"GetNumSignature{way}s", signature, ctypes.byref(count))
        specs = ports.inputs if way == "Input" else ports.outputs
        made = (ctypes.c_void_p * count.value)()
        for i in range(count.value):
            name, tensor, kind = ctypes.c_char_p(), ctypes.c_void_p(), _Tensor()
            at = ctypes.c_size_t(i)
            self._call(f"GetSignature{way}Name", signature, at, ctypes.byref(name))
            self._call(f"GetSignature{way}TensorByIndex", signature, at, ctypes.byref(tensor))
            self._call("GetRankedTensorType", tensor, ctypes.byref(kind))
            kind.rank &= 0x7F  # without strides
            assert name.value is not None
            shape = specs[name.value.decode()].shape
            # LiteRT wants host memory at 64 bytes.
            room = np.zeros(math.prod(shape) + 16, np.float32)
            first = -(room.ctypes.data // 4) % 16
            array = room[first : first + math.prod(shape)]
            array[:] = generator.standard_normal(array.shape, np.float32)
            self._arrays.append(array)
            buffer = ctypes.c_void_p()
            self._call(
                "CreateTensorBufferFromHostMemory", ctypes.byref(kind),
                ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), None,
                ctypes.byref(buffer),
            )  # fmt: skip
            made[i] = buffer.value
        return made

    def run(self) -> list[tuple[str, float]]:
        """Run once; return the operators with their milliseconds, in order."""
        self._call("ResetProfiler", self._profiler)
        self._call("StartProfiler", self._profiler)
        self._call(
            "RunCompiledModel", self._compiled, ctypes.c_size_t(0),
            ctypes.c_size_t(len(self._inputs)), self._inputs,
            ctypes.c_size_t(len(self._outputs)), self._outputs,
        )  # fmt: skip
        self._call("StopProfiler", self._profiler)
        count = ctypes.c_int()
        self._call("GetNumProfilerEvents", self._profiler, ctypes.byref(count))
        events = (_Event * count.value)()
        self._call("GetProfilerEvents", self._profiler, count, events)
        return [
            ((e.tag or b"").decode(), e.elapsed_us / 1e3)
            for e in events
            if e.type == _INSIDE_DELEGATE
        ]

    def close(self) -> None:
        """Give its memory back."""
        buffers = [("TensorBuffer", ctypes.c_void_p(x)) for x in (*self._inputs, *self._outputs)]
        for kind, handle in (*buffers, ("CompiledModel", self._compiled), *self._owned.items()):
            destroy = getattr(self._library, f"LiteRtDestroy{kind}")
            destroy.restype = None
            destroy(handle)


def multiplied(path: Path) -> Sums:
    """Return multiply-accumulates by kind of operator, from a graph's shapes and types."""
    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    found: Sums = defaultdict(float)
    for g in range(model.SubgraphsLength()):
        graph = model.Subgraphs(g)
        for i in range(graph.OperatorsLength()):
            op = graph.Operators(i)
            code = model.OperatorCodes(op.OpcodeIndex())
            name = _MULTIPLYING.get(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()))
            if name is None:
                continue
            out = math.prod(graph.Tensors(op.Outputs(0)).ShapeAsNumpy().tolist())
            weight = graph.Tensors(op.Inputs(1))
            inner = math.prod(weight.ShapeAsNumpy().tolist()[1:])
            if name == "Batch Matrix Multiply":
                inner = _inner(graph, op)
            found[_kind(name, _BITS.get(weight.Type()))] += out * inner
    return found


def _inner(graph: Any, op: Any) -> int:
    left, out = (graph.Tensors(i).ShapeAsNumpy().tolist() for i in (op.Inputs(0), op.Outputs(0)))
    right = graph.Tensors(op.Inputs(1)).ShapeAsNumpy().tolist()
    # Whichever of the two dimensions of the left one is not in the result.
    return int(left[-1] if out[-2] == left[-2] and left[-1] in right[-2:] else left[-2])


def kind_of(tag: str) -> str:
    """Return the kind of an operator from XNNPACK's name of it: what it does, on which weights."""
    name = tag.partition(" (")[0]
    bits = re.search(r"QB?C?(\d)W", tag)
    return _kind(name, int(bits[1]) if bits else None)


def _kind(name: str, bits: int | None) -> str:
    if name not in _MULTIPLYING.values():
        return name
    return f"{name}, {f'{bits}-bit weights' if bits else 'float'}"


def copied(megabytes: int = 512, times: int = 5) -> float:
    """Return GB that this process reads and writes in a second, the best of several copies."""
    source = np.ones(megabytes * 125_000, np.float64)
    target = np.empty_like(source)
    best = math.inf
    for _ in range(times):
        began = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best / 1e9


def profile(bundle: Bundle, threads: int, runs: int) -> list[dict[str, Any]]:
    """Return a row for every artifact of a bundle's default size."""
    rows = []
    counts = calls(bundle)
    for known in bundle.manifest.called(bundle.manifest.default_size):
        with sharing.whole(bundle.path / known.file.path) as path:
            macs = multiplied(path)
            with closing(Profiled(path, known.ports, threads)) as model:
                model.run()
                seen = [model.run() for _ in range(runs)]
        kinds: Sums = defaultdict(float)
        best: Sums = defaultdict(float)
        for position, (tag, _) in enumerate(seen[0]):
            ms = min(run[position][1] for run in seen)
            kinds[kind_of(tag)] += ms
            best[tag] += ms
        rows.append(
            {
                "artifact": known.id,
                "calls": counts[known.id],
                "ms": round(sum(kinds.values()), 3),
                "bytes": sum(f.bytes for f in known.files),
                "kinds_ms": {k: round(v, 3) for k, v in kinds.items()},
                "macs": dict(macs),
                "operators_ms": {k: round(v, 3) for k, v in best.items()},
            }
        )
    return rows


def calls(bundle: Bundle) -> Counter[str]:
    """Return how often a picture of the default size calls each artifact."""
    ops = bundle.manifest.sizes[bundle.manifest.default_size].program.ops
    return Counter(op.artifact for op in ops if isinstance(op, Call))


def summed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sum over artifacts, by kind, the longest first."""
    ms: Sums = defaultdict(float)
    macs: Sums = defaultdict(float)
    for row in rows:
        for kind, value in row["kinds_ms"].items():
            ms[kind] += row["calls"] * value
        for kind, value in row["macs"].items():
            macs[kind] += row["calls"] * value
    whole = sum(ms.values())
    return [
        {
            "kind": kind,
            "ms": round(value, 2),
            "share": round(value / whole, 4) if whole else 0.0,
            "gmac": round(macs.get(kind, 0.0) / 1e9, 2),
            "gmac_s": _a_second(macs.get(kind, 0.0) / 1e9, value),
        }
        for kind, value in sorted(ms.items(), key=lambda x: -x[1])
    ]


def _a_second(amount: float, ms: float) -> float | None:
    """Return a rate, None where nothing is counted or less than the timer's microsecond passed."""
    return round(amount / ms * 1e3, 1) if amount and ms else None


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*("" if x is None else str(x) for x in row))
    Console().print(table)


def main() -> int:
    """Profile, sum, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3, help="of each artifact; the best counts")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "profile.json")
    arguments = parser.parse_args()
    bundle, stages = Bundle.open(arguments.bundle), Stages()
    if bundle.manifest.target != "litert-cpu":
        raise UsageError(
            f"is for {bundle.manifest.target}, which has no profiler here",
            path=arguments.bundle,
            remedy="give a bundle for litert-cpu",
        )
    with stages("copying memory"):
        bandwidth = copied()
    with stages(f"profiling {len(calls(bundle))} artifacts"):
        rows = profile(bundle, arguments.threads, arguments.runs)
    kinds = summed(rows)
    show(
        "operators of one picture",
        ("operator", "ms", "share", "GMAC", "GMAC/s"),
        [(k["kind"], k["ms"], f"{k['share']:.1%}", k["gmac"] or None, k["gmac_s"]) for k in kinds],
    )
    slowest = sorted(rows, key=lambda r: -r["ms"])[:8]
    show(
        "slowest artifacts",
        ("artifact", "ms", "GMAC", "GMAC/s", "MB", "GB/s of its file"),
        [
            (r["artifact"], r["ms"], round(sum(r["macs"].values()) / 1e9, 2),
             _a_second(sum(r["macs"].values()) / 1e9, r["ms"]), round(r["bytes"] / 1e6, 1),
             _a_second(r["bytes"] / 1e9, r["ms"]))
            for r in slowest
        ],
    )  # fmt: skip
    say(f"memory: {bandwidth:.1f} GB/s read and written by one thread")
    write_summary(
        arguments.json,
        {
            "command": list(command()),
            "versions": versions(),
            "device": HostDevice().facts().model_dump(mode="json"),
            "bundle": bundle.sha256,
            "threads": arguments.threads,
            "copied_gb_s": round(bandwidth, 2),
            "kinds": kinds,
            "artifacts": rows,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
