from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tflites
from handheld.placement import operations


def count(path, data, engine):
    path.write_bytes(data)
    bundle = SimpleNamespace(file=lambda ref: path)
    return operations(bundle, SimpleNamespace(engine=engine, file=None))


def test_operators_of_litert(tmp_path):
    for layers in (1, 3):
        data = tflites.convolutions(4, tflites.weights()[:1] * layers)
        assert count(tmp_path / "a.tflite", data, "litert") == {"cpu": layers + 1}


def test_what_was_compiled_for_an_npu(tmp_path):
    flatbuffers = pytest.importorskip("flatbuffers")
    builder = flatbuffers.Builder()

    def table(**fields):
        builder.StartObject(5)
        for name, value in fields.items():
            builder.PrependUOffsetTRelativeSlot(int(name[1:]), value, 0)
        return builder.EndObject()

    def listed(tables):
        builder.StartVector(4, len(tables), 4)
        for item in reversed(tables):
            builder.PrependUOffsetTRelative(item)
        return builder.EndVector()

    def operator(code):
        builder.StartObject(2)
        builder.PrependUint32Slot(0, code, 0)
        return builder.EndObject()

    codes = listed([table(), table(f1=builder.CreateString("DISPATCH_OP"))])
    operators = listed([operator(code) for code in (0, 1, 0)])
    builder.Finish(table(f1=codes, f2=listed([table(f3=operators)])), b"TFL3")
    data = bytes(builder.Output())
    assert count(tmp_path / "a.tflite", data, "litert") == {"cpu": 2, "npu": 1}
    # A list may name a table again and again, so a small file has lists of lists without end.
    many = listed([operator(0)] * 2000)
    builder.Finish(table(f1=codes, f2=listed([table(f3=many)])), b"TFL3")
    data = bytes(builder.Output())
    with mock.patch("handheld.placement.MOST_TABLES", 1000):
        assert count(tmp_path / "a.tflite", data, "litert") is None
    assert count(tmp_path / "a.tflite", data, "litert") == {"cpu": 2000}


@pytest.mark.slow
def test_calls_of_executorch(tmp_path):
    torch = pytest.importorskip("torch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    class Split(torch.nn.Module):
        def forward(self, x):
            return torch.cumsum(x * 2, 1) * 3

    exported = torch.export.export(Split(), (torch.ones(2, 3),))
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    made = edge.to_executorch()
    (chain,) = made.executorch_program.execution_plan[0].chains
    kinds = Counter(type(i.instr_args).__name__ for i in chain.instructions)
    assert min(kinds["DelegateCall"], kinds["KernelCall"]) > 0, kinds
    assert count(tmp_path / "a.pte", made.buffer, "executorch") == {
        "XnnpackBackend": kinds["DelegateCall"], "cpu": kinds["KernelCall"],
    }  # fmt: skip


def test_files_that_do_not_tell(tmp_path):
    for data in (b"x", b"onnx", bytes(64), b"\xff" * 64):
        for engine in ("litert", "executorch", "onnx"):
            assert count(tmp_path / "a", data, engine) is None
    assert count(tmp_path / "a", tflites.convolutions(4, tflites.weights()[:1]), "coreml") is None


@given(at=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 10_000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_are_read_or_passed_over(tmp_path, at, value, cut):
    data = bytearray(tflites.convolutions(2, tflites.weights()[:1]))
    data[at % len(data)] = value
    for engine in ("litert", "executorch"):
        found = count(tmp_path / "a", bytes(data[: 1 + cut % len(data)]), engine)
        assert found is None or sum(found.values()) <= len(data)
