"""Every segment of the U-Net is one XNNPACK delegate partition, but for reviewed exceptions."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from handheld import models
from handheld.bundle import Bundle
from handheld.errors import UsageError
from handheld.precision import find as find_precision
from handheld_export import lowering, targets
from handheld_export.checkpoint import Checkpoint
from handheld_export.export import Options, export
from handheld_export.litert import conversion
from handheld_export.segments import SegmentModule, materialize, release
from handheld_export.targets.base import SegmentInput

LIST = Path(__file__).with_name("xnnpack_partitions.toml")
FIELDS = {"target", "precision", "segment", "partitions", "reason"}
COMBINATIONS = [
    ("executorch-xnnpack", "fp32"),
    ("executorch-xnnpack", "int8"),
    ("executorch-xnnpack", "int4"),
    ("litert-cpu", "fp32"),
    ("litert-cpu", "int8"),
    ("litert-cpu", "int4"),
]


def exceptions():
    entries = tomllib.loads(LIST.read_text(encoding="utf-8"))["exception"]
    for entry in entries:
        assert set(entry) == FIELDS, f"{LIST.name}: {entry}"
        assert entry["partitions"] > 1, f"{LIST.name}: {entry['segment']} needs no entry"
        assert entry["reason"].strip(), f"{LIST.name}: {entry['segment']} has no reason"
    found = {(e["target"], e["precision"], e["segment"]): e["partitions"] for e in entries}
    assert len(found) == len(entries), f"{LIST.name} names a segment twice"
    return found


def executorch_partitions(path):
    """Count what the program runs: delegates, and operators outside of them."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    (plan,) = deserialize_pte_binary(path.read_bytes()).program.execution_plan
    calls = [type(i.instr_args).__name__ for c in plan.chains for i in c.instructions]
    assert {d.id for d in plan.delegates} == {"XnnpackBackend"}
    outside = [c for c in calls if c != "DelegateCall"]
    return len(calls) if outside else calls.count("DelegateCall")


def litert_partitions(path):
    """Count the delegate's nodes in what the interpreter runs."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    return sum(op["op_name"] == "DELEGATE" for op in interpreter._get_ops_details())


COUNT = {"executorch-xnnpack": executorch_partitions, "litert-cpu": litert_partitions}


@pytest.fixture(scope="module")
def checkpoint():
    try:
        return Checkpoint(models.checkpoint("critter"))
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def converted():
    """Graphs that LiteRT's converter made; weights of each precision are put into them later."""
    return {}


def test_the_list_is_well_formed():
    known = set(COMBINATIONS)
    for target, precision, segment in exceptions():
        assert (target, precision) in known, f"{LIST.name}: {segment} is never tested"


@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision"), COMBINATIONS)
def test_partitions_of_critter(target, precision, checkpoint, converted, tmp_path, monkeypatch):
    """As an export lowers its U-Net; what the artifacts compute is tested elsewhere."""
    convert = conversion.convert

    def once(opened, given, weights):
        if given.id not in converted:
            converted[given.id] = convert(opened, given, weights)
        return converted[given.id]

    monkeypatch.setattr(conversion, "convert", once)
    lowers = targets.find(target)
    side = checkpoint.unet.config["sample_size"]
    segments = lowering.lines(checkpoint, (side, side), 77).cut("unet", lowers, precision)
    assert segments
    allowed = {k[2]: n for k, n in exceptions().items() if k[:2] == (target, precision)}
    problems = []
    for segment in segments:
        materialize(segment, checkpoint.unet, find_precision(precision))
        inputs = [torch.zeros(p.shape) for p in segment.ports.inputs.values()]
        module = SegmentModule(segment).eval()
        given = SegmentInput(segment.id, module, segment.ports, inputs)
        lowered = lowers.lower(given, tmp_path / f"{segment.id}{lowers.suffix}")
        release(segment)
        count = COUNT[target](lowered.path)
        if count != lowered.partitions:
            problems.append(f"{segment.id}: {count}, the target says {lowered.partitions}")
        most = allowed.pop(segment.id, 1)
        if count > most:
            problems.append(f"{segment.id}: {count} partitions, {most} allowed")
        if count < most:
            problems.append(f"{segment.id}: {count} partitions, {LIST.name} still allows {most}")
    problems += [f"{LIST.name}: there is no segment {s} any more" for s in allowed]
    assert not problems, f"{target} {precision}:\n" + "\n".join(problems)


@pytest.mark.slow
def test_partitions_of_a_tiny_model(sdxl, tmp_path, monkeypatch):
    """The same structure in seconds; no exceptions here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export(Checkpoint(sdxl), Options("executorch-xnnpack", "fp32"), tmp_path / "bundle", jobs=1)
    bundle = Bundle.open(tmp_path / "bundle")
    for artifact in bundle.manifest.artifacts:
        count = executorch_partitions(bundle.file(artifact.file))
        assert count == artifact.partitions == 1, artifact.id


@pytest.mark.slow
def test_an_attention_in_many_parts_stays_in_one_partition(tmp_path, monkeypatch):
    """As SDXL's at 768 px and more: XNNPACK does not join the results of so many parts at once."""
    import litert_torch
    from diffusers.models.attention_processor import Attention

    from handheld import banding
    from handheld_export.litert.rewrites import REPLACEMENTS
    from handheld_export.rewrites import rewrite

    tokens, heads, width = 48, 12, 96
    monkeypatch.setattr(banding, "TABLE_BYTES", 4 * 2 * tokens)
    assert banding.attention(heads, tokens, tokens) == (2, 1)
    attention = Attention(width, heads=heads, dim_head=width // heads).eval()
    module = torch.nn.Sequential(rewrite(attention, REPLACEMENTS), torch.nn.Linear(width, width))
    path = tmp_path / "attention.tflite"
    litert_torch.convert(module.eval(), (torch.zeros(1, tokens, width),)).export(str(path))
    assert litert_partitions(path) == 1
