"""The table of every target's numerics: what was found is kept, and calls add up."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from handheld.manifest import Verification
from handheld.numerics_gates import Gate
from handheld_export.verify import Report, Row

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def numerics(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import numerics

    return numerics


def report(model="critter", target="onnx", precision="int8", snr=41.0):
    limit = Gate("int8", "student", 25.0, 30.0, (0.9, 1.1))
    whole = Verification(snr_db=snr, max_abs_error=0.5, psnr_db=44.0)
    rows = (
        Row("unet.00", 3, 45.0, None, 0.25, 1.01, limit, 1),
        Row("decoder.00", 1, -999.0, None, None, None, limit, None),
    )
    return Report(
        bundle=f"{model}-{target}-{precision}", model=model, target=target, precision=precision,
        size="128x128", reference="checkpoint", rows=rows, end_to_end=whole,
        draws=(whole, whole), text=0.99, gate=limit, problems=("wrong engine",),
        notes=("a note",), pictures={"checkpoint": np.full((2, 3, 3), 7, np.uint8)},
    )  # fmt: skip


def keep(numerics, folder, found):
    bundle = folder / found.bundle.replace(":", "-")
    bundle.mkdir()
    (bundle / numerics.MANIFEST).write_text("{}")
    os.utime(bundle / numerics.MANIFEST, (1, 1))
    numerics.write(found, bundle.with_name(bundle.name + numerics.REPORT))
    return bundle


def test_a_report_is_read_as_it_was_written(numerics, tmp_path):
    before = report()
    numerics.write(before, tmp_path / "a.report")
    after = numerics.read(tmp_path / "a.report")
    assert after.as_dict() == before.as_dict()
    assert (after.rows, after.gate, after.draws) == (before.rows, before.gate, before.draws)
    assert list(after.pictures) == ["checkpoint"]
    assert np.array_equal(after.pictures["checkpoint"], before.pictures["checkpoint"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.report"]


def test_bundles_tell_what_they_were_made_of(numerics, tmp_path, monkeypatch):
    from handheld_export.checkpoint import Checkpoint

    critter = Path(__file__).resolve().parents[1] / "models/critter"
    monkeypatch.setattr(numerics, "find_model", lambda name: tmp_path / name)
    (tmp_path / "critter").symlink_to(critter)
    numerics.present.cache_clear()
    assert numerics.present("critter") == Checkpoint(critter).sha256
    assert numerics.present("gone") is None
    numerics.present.cache_clear()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / numerics.MANIFEST).write_text("{}")
    assert numerics.checkpoint_of(tmp_path / "bundle") is None


def test_reports_of_all_calls_are_in_the_table(numerics, tmp_path, monkeypatch):
    made_of = {}
    monkeypatch.setattr(numerics, "checkpoint_of", lambda path: made_of[path.name])
    monkeypatch.setattr(numerics, "present", lambda model: model)
    for model, target, precision in (
        ("critter-stack1", "onnx", "int8"),
        ("critter", "onnx", "int8"),
        ("critter", "litert-cpu", "int8"),
        ("critter", "litert-cpu", "fp32"),
    ):
        made_of[keep(numerics, tmp_path, report(model, target, precision)).name] = model
    gone = keep(numerics, tmp_path, report("critter-stack2"))
    (gone / numerics.MANIFEST).unlink()
    for precision, was in (("int8", "critter-stack3 before"), ("fp32", None)):
        stale = keep(numerics, tmp_path, report("critter-stack3", precision=precision))
        made_of[stale.name] = was
    numerics.summarize(tmp_path)
    table = (tmp_path / "numerics.md").read_text().splitlines()[2:]
    assert [line.split("|")[1].strip() for line in table] == [
        "critter litert-cpu fp32 128x128",
        "critter litert-cpu int8 128x128",
        "critter onnx int8 128x128",
        "critter-stack1 onnx int8 128x128",
    ]
    assert all("decoder.00; wrong engine" in line for line in table)
