"""Reading an artifact's graph back, to compare what it holds with the student's codes."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    XNNHeader,
    _get_schema_bytes,
)
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._program import deserialize_pte_binary
from numpy.typing import NDArray

from handheld.errors import TargetError
from handheld_export.executorch.graph import QuantizedLayer
from handheld_export.executorch.weights import bfloat16, refuse_layer


def check(path: Path, layers: Sequence[QuantizedLayer]) -> None:
    """Read an artifact and compare every quantized layer with its codes and scales.

    Raises
    ------
    TargetError
        Naming the first layer that is not the student's.
    """
    program, data = read(path)
    for layer in layers:
        weight = layer.weight
        union = program["xvalues"][layer.value]["xvalue_union"]
        tensor, params = union["tensor_value"], union["quant_params"]
        codes: NDArray[np.int8]
        stored = np.frombuffer(data(tensor["constant_buffer_idx"]), np.uint8)
        scales = data(params["scale_buffer_idx"])
        if weight.codes.ndim == 4:
            expected = weight.codes.transpose(0, 2, 3, 1).reshape(-1).view(np.int8)
            codes = stored.view(np.int8)
        elif weight.grid == "int8":
            expected, codes = weight.codes.reshape(-1), stored.view(np.int8)
        else:
            expected = weight.codes.reshape(-1)
            pairs = np.stack([stored & 15, stored >> 4], axis=-1).reshape(-1)
            codes = pairs.astype(np.int8) - 8
        if weight.group_size is None:
            wanted = np.ascontiguousarray(weight.scales, np.float32).tobytes()
        else:
            wanted, _ = bfloat16(np.ascontiguousarray(weight.scales, np.float32))
        if not np.array_equal(codes, expected):
            raise refuse_layer(layer.name, "the artifact does not hold the student's codes")
        if scales != wanted:
            raise refuse_layer(layer.name, "the artifact does not hold the student's scales")


def read(path: Path) -> tuple[dict[str, Any], Callable[[int], bytes]]:
    """Return the delegate's graph as its schema has it, and what gives a constant's bytes."""
    file = deserialize_pte_binary(path.read_bytes())
    plan = file.program.execution_plan[0]
    if len(plan.delegates) != 1:
        raise TargetError(f"has {len(plan.delegates)} delegates, not one", path=path)
    blob = bytes(file.program.backend_delegate_data[plan.delegates[0].processed.index].data)
    header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as folder:
        schema = Path(folder) / "schema.fbs"
        schema.write_bytes(_get_schema_bytes())
        binary = Path(folder) / "graph.bin"
        binary.write_bytes(blob[start : start + header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        text = (Path(folder) / "graph.json").read_text()
    # flatc writes the bounds of fused activations as a bare `inf`, which is not JSON.
    graph = json.loads(re.sub(r"(?<=: )([+-]?)inf\b", r'"\1inf"', text))

    def data(index: int) -> bytes:
        assert file.named_data is not None
        entry = file.named_data.pte_data[graph["constant_data"][index]["named_key"]]
        return bytes(file.named_data.buffers[entry.buffer_index])

    return graph, data
