"""LiteRT's compiler for Qualcomm's NPUs, and what it makes.

The compiler of LiteRT's wheel leaves one operator in the file, whose data is a context binary of
QNN. The wheel has nothing that runs it on a PC, but QNN's provider for onnxruntime, which lies in
the same SDK, runs any context binary; so the very binary that ships is what is verified.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import ai_edge_litert.schema_py_generated as schema
from flatbuffers import flexbuffers

from handheld.errors import TargetError
from handheld.qnn import Sdk
from handheld_export.litert import tflite
from handheld_export.qnn.hexagon import facts

_STATS: Final = re.compile(
    r"Partitioned subgraph<0>, selected (\d+) ops, from a total of (\d+) ops\. "
    r"resulted in (\d+) partitions\."
)
_UNUSED: Final = "libQnnLpai.so"
"""A library that the compiler is linked with and takes nothing from; no wheel has it."""


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
        environment = sdk.environment()
        environment["LD_LIBRARY_PATH"] += os.pathsep + folder
        done = subprocess.run(
            command,
            capture_output=True,  # apart: each has its own buffer, and mixed they cut lines in two
            text=True,
            errors="replace",
            check=False,
            env=environment,
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
    if len(found) != size:
        raise TargetError("holds no whole context binary of QNN", path=path)
    return found, name, facts(found, path)


def as_onnx(path: Path) -> bytes:
    """Return a compiled file as the graph of ONNX that has its binary, for onnxruntime.

    Tensors have the file's names, and the file's order.
    """
    from onnx import TensorProto, helper

    blob, name, _ = binary(path)
    graph = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0).subgraphs[0]
    given, made = (
        [
            helper.make_tensor_value_info(
                graph.tensors[i].name.decode(),
                TensorProto.FLOAT,
                [int(d) for d in graph.tensors[i].shape],
            )
            for i in tensors
        ]
        for tensors in (graph.inputs, graph.outputs)
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
    return bytes(model.SerializeToString())
