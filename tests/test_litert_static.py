"""Files on fixed grids, run by LiteRT's own kernels for 16-bit activations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import ai_edge_litert.schema_py_generated as schema
import numpy as np
import pytest
import torch
from torch import nn

import target_cases
from handheld.errors import TargetError
from handheld_export.litert import conversion, static, tflite
from handheld_export.measure import snr_db
from handheld_export.quantization import ROOM

CODED, FLOAT = "steps.0.weight", "steps.1.weight"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A convolution with codes, one without, and their file in float."""
    convolutions = [nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)]
    module = target_cases.randomize(target_cases.Line(*convolutions))
    item = target_cases.segment(module, [(1, 6, 10, 8)])
    target_cases.quantize(item, lambda name, _: ("int8",) if name == "steps.0" else None)
    with torch.no_grad():
        (expected,) = item.module(*item.examples)  # before its weights are taken out
    opened = tflite.Open(item.module, 1).eval()
    opened.layers = [replace(x, half=x.quantized is None) for x in opened.layers]
    flatbuffer = conversion.convert(opened, item, [x.weight for x in opened.layers])
    path = tmp_path_factory.mktemp("static") / "float.tflite"
    tflite.graft(flatbuffer, [replace(x, quantized=None) for x in opened.layers], item.ports, path)
    return item, opened.layers, flatbuffer, path, expected


def run(path, x):
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(str(path), experimental_op_resolver_type=plain)
    interpreter.allocate_tensors()
    return interpreter.get_signature_runner()(in0=x)["out0"]


@pytest.mark.slow
def test_codes_stay_and_values_are_on_grids(case, tmp_path):
    item, layers, flatbuffer, floats, expected = case
    samples = [[item.examples[0].numpy()], [item.examples[0].numpy() * 1.5]]
    ranges = static.observe(floats, samples)
    path = tmp_path / "a.tflite"
    edit = partial(static.quantize, ranges=ranges)
    tflite.graft(flatbuffer, layers, item.ports, path, edit)
    tflite.check(path, layers)
    graph = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0).subgraphs[0]
    types = {t.name.decode(): t.type for t in graph.tensors}
    assert types[CODED] == schema.TensorType.INT8
    assert types[FLOAT] == schema.TensorType.FLOAT16
    assert {graph.tensors[i].type for i in (*graph.inputs, *graph.outputs)} == {0}
    scale = max(
        t.quantization.scale[0]
        for t in graph.tensors
        if t.type == schema.TensorType.INT16 and list(t.shape) == [1, 6, 10, 8]
    )
    assert scale == pytest.approx(ROOM * 1.5 * float(item.examples[0].abs().max()) / 32767)
    assert snr_db(expected.numpy(), run(path, item.examples[0].numpy())) > 60


@pytest.mark.slow
def test_a_bias_that_leaves_32_bits_is_named(case, tmp_path):
    item, layers, flatbuffer, floats, _ = case
    ranges = static.observe(floats, [[item.examples[0].numpy() * 0]])
    edit = partial(static.quantize, ranges=ranges)
    with pytest.raises(TargetError, match=r"layer 'steps\.0': its bias leaves 32 bits"):
        tflite.graft(flatbuffer, layers, item.ports, tmp_path / "a.tflite", edit)


@pytest.mark.slow
def test_buffers_of_kernels_are_no_values(tmp_path):
    """A product of computed matrices has some, in which nothing was written at first."""
    item = target_cases.product()
    opened = tflite.Open(item.module, 2).eval()
    flatbuffer = conversion.convert(opened, item, [x.weight for x in opened.layers])
    path = tmp_path / "float.tflite"
    layers = [replace(x, quantized=None) for x in opened.layers]
    tflite.graft(flatbuffer, layers, item.ports, path)
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    (graph,) = model.subgraphs
    assert schema.BuiltinOperator.BATCH_MATMUL in [
        tflite.code_of(model, o) for o in graph.operators
    ]
    ranges = static.observe(path, [[x.numpy() for x in item.examples]])
    assert len(ranges) == len(graph.tensors)


@pytest.mark.slow
def test_values_that_are_not_finite_are_told(case):
    item, _, _, floats, _ = case
    with pytest.raises(TargetError, match="not finite"):
        static.observe(floats, [[np.full(item.examples[0].shape, np.nan)]])
