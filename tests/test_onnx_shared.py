"""Weights that several ONNX graphs share."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from handheld.files import sha256_file
from handheld.program import Ports, TensorSpec
from handheld_export.onnx import shared as onnx_shared
from handheld_export.targets.onnx import ONNX

SIZES = (4, 6, 9)


def graph(path, rows, seed=0):
    """A product with a weight, and a sum with a tensor that has the input's size."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    shift = np.linspace(0, 1, rows * 64, dtype=np.float32).reshape(rows, 64)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, (rows, 64)) for n in "xy")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "s"], "y"),
    ]
    tensors = [numpy_helper.from_array(a, n) for a, n in ((shift, "s"), (weight, "w"))]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], tensors),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=9,
    )  # fmt: skip
    onnx.save_model(
        model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=512
    )
    return path


@pytest.fixture
def shared(tmp_path):
    alone = [graph(tmp_path / f"{rows}.onnx", rows) for rows in SIZES]
    (tmp_path / "shared").mkdir()
    named = {f"g.{rows}x1": path for rows, path in zip(SIZES, alone, strict=True)}
    return alone, ONNX().share(named, "g.weights", tmp_path / "shared")


def test_results_are_the_same_bits(shared):
    alone, together = shared
    for rows, path in zip(SIZES, alone, strict=True):
        spec = TensorSpec(shape=(rows, 64))
        ports = Ports(inputs={"x": spec}, outputs={"y": spec})
        x = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
        files = path, together[f"g.{rows}x1"][0]
        before, after = (ONNX().load(file, ports)(x)[0] for file in files)
        assert before.any()
        assert before.tobytes() == after.tobytes()


def test_weights_are_there_once(shared):
    parts = {part for _, part in shared[1].values()}
    assert [p.name for p in parts] == [sha256_file(p) for p in parts]
    assert len(parts) == 1
    assert parts.pop().stat().st_size == 64 * 64 * 4
    assert all(path.stat().st_size < 4000 for path, _ in shared[1].values())


def test_other_weights_are_not_shared(tmp_path):
    alone = [graph(tmp_path / f"{rows}.onnx", rows, seed=rows) for rows in SIZES]
    outputs = [tmp_path / "shared" / f"g.{p.name}" for p in alone]
    (tmp_path / "shared").mkdir()
    assert onnx_shared.share(alone, outputs, tmp_path / "shared") is None
    assert not any((tmp_path / "shared").iterdir())
