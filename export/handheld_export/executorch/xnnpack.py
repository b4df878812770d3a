"""Writing a segment as one XNNPACK delegate of an ExecuTorch program.

ExecuTorch's own lowering retraces the graph some twenty times, quantizes weights itself and
wraps every convolution into transposes. A rewritten segment needs none of that: its
operators are few and all of them are XNNPACK's. :func:`lower` therefore walks the exported
graph once and writes the delegate's graph in the schema that the runtime reads, with each
layer's codes as they are. Pictures stay ``[N, H, W, C]`` from end to end.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xs
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    serialize_xnnpack_binary,
)
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn

from handheld.errors import TargetError
from handheld_export.executorch.graph import QuantizedLayer
from handheld_export.executorch.operators import Emitter
from handheld_export.rewrites import rewrite

_ALIGNMENT = 16


@dataclass(frozen=True)
class Result:
    """What :func:`lower` wrote."""

    layers: tuple[QuantizedLayer, ...]
    nodes: Mapping[str, int]
    """Number of nodes by kind."""
    notes: tuple[str, ...]


def lower(
    module: nn.Module,
    examples: Sequence[Tensor],
    path: Path,
    outputs: Sequence[tuple[int, ...]] | None = None,
) -> Result:
    """Write a module as an ExecuTorch program that is one XNNPACK delegate.

    Parameters
    ----------
    module : torch.nn.Module
        Takes tensors, returns a tuple of tensors; in eval mode.
    examples : sequence of tensors
        One value per input; only the shapes matter.
    path : Path
    outputs : sequence of shapes, optional
        Checked against what the module returns.

    Returns
    -------
    Result

    Raises
    ------
    TargetError
        For an operator without an XNNPACK form and for a layer whose grid does not run.
    """
    rewritten = rewrite(module)
    with torch.no_grad():
        exported = torch.export.export(rewritten, tuple(examples), strict=False)
    emitter = Emitter(rewritten)
    results = emitter.run(exported)
    shapes = [v.sizes for v in results]
    if outputs is not None and shapes != [tuple(s) for s in outputs]:
        raise TargetError(f"the module returns shapes {shapes}, its ports say {list(outputs)}")
    graph, ids = emitter.graph.finish(results)
    store = NamedDataStore()
    for key, data in emitter.graph.data.items():
        if any(c.named_key == key for c in graph.constant_data):
            store.add_named_data(key, data, _ALIGNMENT)
    lowered = LoweredBackendModule(
        _shell(examples, shapes),
        "XnnpackBackend",
        serialize_xnnpack_binary(graph, bytearray()),
        [],
        store.get_named_data_store_output(),
    )
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = lowered.buffer(extract_delegate_segments=True, memory_planning=planning)
    path.write_bytes(program)
    layers = tuple(
        QuantizedLayer(x.name, x.weight, ids[x.value])
        for x in emitter.graph.layers
        if x.value in ids
    )
    return Result(layers, _count(graph), tuple(emitter.graph.notes))


class _Shell(nn.Module):
    """Has a segment's signature; the delegate takes the place of its body."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(s) for s in self.shapes)


def _shell(examples: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> Any:
    inputs = tuple(torch.empty(x.shape) for x in examples)
    program = torch.export.export(_Shell(shapes), inputs, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
        node.meta.pop("nn_module_stack", None)
    return program


def _count(graph: xs.XNNGraph) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in graph.xnodes:
        name = type(node.xnode_union).__name__.removeprefix("XNN")
        counts[name] = counts.get(name, 0) + 1
    return counts
