"""Fixed grids of an ONNX graph: how far they reach, and what is on them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper

from handheld_export.onnx import static

SHAPE = [2, 4]


def graph(*nodes):
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, SHAPE) for n in ("x", "y")]
    made = helper.make_graph(list(nodes), "g", values[:1], values[1:])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def grids(model):
    """Return the least and the greatest value of each grid."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero = float(stored[node.input[1]]), int(stored[node.input[2]])
            found[node.input[0]] = (-zero * scale, (65535 - zero) * scale)
    return found


def quantized(model, *samples):
    static.quantize(model, static.observe(model, [{"x": s} for s in samples]))
    return model


def test_grids_reach_twice_as_far_as_calibration():
    seen = np.array([[-1, 0, 2, 3], [0, 1, 1, 1]], np.float32)
    model = quantized(graph(helper.make_node("Add", ["x", "x"], ["y"])), seen, seen / 2)
    found = grids(model)
    assert found["x"] == pytest.approx((-2, 6), abs=1e-3)
    assert found["y.raw"] == pytest.approx((-4, 12), abs=1e-3)
    assert run(model, 2 * seen) == pytest.approx(4 * seen, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "least", "most"), [("Softmax", 0, 1), ("Sigmoid", 0, 1), ("Tanh", -1, 1)]
)
def test_what_is_bounded_has_room_up_to_its_bound(kind, least, most):
    nodes = helper.make_node(kind, ["x"], ["s"]), helper.make_node("Add", ["s", "s"], ["y"])
    model = graph(*nodes)
    small = quantized(graph(*nodes), np.full(SHAPE, -0.1, np.float32))
    seen = static.observe(model, [{"x": np.full(SHAPE, -0.1, np.float32)}])["s"]
    assert grids(small)["s"] == pytest.approx((2 * seen[0], min(2 * seen[1], 1)), abs=1e-3)
    x = np.array([[-9, 9, 0, 0], [9, -9, 0, 0]], np.float32)
    wide = quantized(model, x)
    assert grids(wide)["s"] == pytest.approx((least, most), abs=1e-3)


def test_a_reciprocal_divides_an_exact_one():
    model = quantized(
        graph(helper.make_node("Reciprocal", ["x"], ["y"])), np.full(SHAPE, 0.3, np.float32)
    )
    kinds = [node.op_type for node in model.graph.node]
    assert ("Reciprocal" in kinds, kinds.count("Div")) == (False, 1)
    assert grids(model)[static._ONE] == pytest.approx((0, 1), abs=1e-7)
    assert run(model, np.full(SHAPE, 0.4, np.float32)) == pytest.approx(2.5, abs=1e-3)


def test_what_is_on_the_right_of_a_product_is_on_signed_codes():
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["p"]),
        helper.make_node("MatMul", ["p", "x"], ["y"]),
    ]
    x = np.array([[-1, 2, 0.5, 3], [2, -2, 1, 0]], np.float32)
    model = quantized(graph(*nodes), x)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    for product in (n for n in model.graph.node if n.op_type == "MatMul"):
        left, right = (stored[made[name].input[2]].dtype for name in product.input)
        assert (left, right) == (np.uint16, np.int16)
    assert run(model, x) == pytest.approx(x @ x.T @ x, abs=5e-3)
