"""Context binaries through onnxruntime's provider: one graph, its facts, its numbers."""

from __future__ import annotations

import pytest

pytest.importorskip("onnxscript")

import torch
from torch import nn

import target_cases
from handheld import qnn
from handheld.errors import TargetError
from handheld_export.targets.onnx_qnn import ONNXQNN

needs_qnn = pytest.mark.skipif(
    qnn.missing("litert") is not None, reason=f"needs QNN: {qnn.missing('litert')}"
)


def test_what_the_engine_is_told():
    target = ONNXQNN.for_soc("SM8550")
    assert (target.name, target.engine) == ("onnx-qnn:SM8550", "onnx")
    assert target.options == {"provider": "qnn", "soc": "SM8550"}
    assert "onnx-qnn: run in QNN's simulation" in target.caveat()


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HANDHELD_QNN", str(tmp_path))
    assert ONNXQNN.for_soc("SM8650").missing() == qnn.missing("litert")
    with pytest.raises(TargetError, match="'onnx-qnn:SM8650' lacks QNN"):
        ONNXQNN.for_soc("SM8650").versions()


@needs_qnn
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "soc", "hexagon"),
    [("resnet and transformer", "SM8650", "75"), ("tiny decoder", "SM8750", "79")],
)
def test_compiled_and_run(case, soc, hexagon, tmp_path):
    module, shapes = target_cases.CASES[case]()
    item = target_cases.segment(target_cases.randomize(module), shapes)
    target = ONNXQNN.for_soc(soc)
    lowered, db = target_cases.run(target, item, tmp_path / "a.onnx")
    assert db > 40
    facts = {"soc": soc, "hexagon": hexagon, "qnn": qnn.find("litert").build}
    assert facts.items() <= lowered.tools.items()
    assert (lowered.partitions, lowered.parts, lowered.held) == (1, (), {})
    other = "SM8550"
    with pytest.raises(TargetError, match=f"is compiled for {soc}, not for {other}"):
        ONNXQNN.for_soc(other).load(lowered.path, item.ports)


@needs_qnn
@pytest.mark.slow
def test_the_same_segment_gives_the_same_bytes(tmp_path):
    item = target_cases.segment(
        target_cases.randomize(target_cases.Line(nn.Conv2d(4, 8, 3, padding=1))), [(1, 16, 16, 4)]
    )
    target_cases.quantize(item, lambda *_: ("int4",))
    target = ONNXQNN.for_soc("SM8650")
    one, two = (target.lower(item, tmp_path / n) for n in ("a.onnx", "b.onnx"))
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.held == {"int4 as fp16": 288}


@needs_qnn
@pytest.mark.slow
def test_operators_outside_are_named(tmp_path):
    class Sine(nn.Module):
        def forward(self, x):
            return (torch.sinh(x + 1),)

    item = target_cases.segment(Sine(), [(1, 4, 4, 8)])
    with pytest.raises(TargetError, match="outside: Sinh"):
        ONNXQNN.for_soc("SM8650").lower(item, tmp_path / "a.onnx")
