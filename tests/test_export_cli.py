"""Which targets and precisions `handheld export` chooses."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import samples
from handheld.cli import run as handheld
from handheld.errors import TargetError, UsageError
from handheld_export import cli, targets


class Ready:
    precisions = ("fp32", "int8")


@pytest.fixture
def installed(monkeypatch):
    def find(name):
        if name == "lacking":
            raise TargetError("target 'lacking' lacks its tools", remedy="pip install tools")
        if name not in ("one", "two"):
            raise UsageError(f"target '{name}' is unknown")
        return Ready()

    monkeypatch.setattr(targets, "one_each", lambda: ["lacking", "one", "two"])
    monkeypatch.setattr(targets, "find", find)


def test_all_targets_go_on_without_those_that_lack_their_tools(installed):
    chosen, absent = cli._choose(["all"], ["int8"])
    assert chosen == [("one", "int8"), ("two", "int8")]
    assert [(e.field, e.remedy) for e in absent] == [("lacking", "pip install tools")]


def test_a_target_that_was_named_must_be_there(installed):
    with pytest.raises(TargetError, match="lacks its tools"):
        cli._choose(["one", "lacking"], ["int8"])
    with pytest.raises(TargetError, match="lacks its tools"):
        cli._choose(["all", "lacking"], ["int8"])
    with pytest.raises(UsageError, match="unknown"):
        cli._choose(["three"], ["int8"])


def test_all_precisions_are_those_of_each_target(installed):
    chosen, _ = cli._choose(["two"], ["all"])
    assert chosen == [("two", "fp32"), ("two", "int8")]
    chosen, _ = cli._choose(["one", "one"], ["int8", "int8"])
    assert chosen == [("one", "int8")]


def test_nothing_at_all_is_an_error(installed, monkeypatch):
    monkeypatch.setattr(targets, "one_each", lambda: ["lacking"])
    with pytest.raises(TargetError, match="lacks its tools"):
        cli._choose(["all"], ["int8"])


def test_all_targets_take_the_precisions_that_they_run(installed, monkeypatch):
    class Half:
        precisions = ("fp16",)

    ready = targets.find
    monkeypatch.setattr(targets, "find", lambda n: Half() if n == "two" else ready(n))
    chosen, absent = cli._choose(["all"], ["int8"])
    assert chosen == [("one", "int8")]
    assert [(e.field, e.remedy) for e in absent[1:]] == [("two", "choose from fp16")]
    chosen, _ = cli._choose(["all"], ["all"])
    assert chosen == [("one", "fp32"), ("one", "int8"), ("two", "fp16")]
    with pytest.raises(UsageError, match="'two' does not run precision 'int8'"):
        cli._choose(["one", "two"], ["int8"])
    with pytest.raises(UsageError, match="'two' does not run precision 'int8'"):
        cli._choose(["all", "two"], ["int8"])
    with pytest.raises(TargetError):
        cli._choose(["all"], ["int7"])


@pytest.fixture
def exports(installed, monkeypatch, sdxl):
    """Exports of two targets, of which 'one' cannot lower."""
    from handheld_export import export

    done = []

    def run(source, options, place, **_):
        if options.target == "one":
            raise TargetError("layer 'a' does not run", field="unet.00")
        done.append(options.target)
        return SimpleNamespace(
            sha256="0" * 64, artifacts=[], sizes=["8x8"], nbytes=1,
            verification=SimpleNamespace(snr_db=90.0, student_snr_db=None, psnr_db=90.0),
        )  # fmt: skip

    monkeypatch.setattr(export, "export", run)
    return done


def test_one_target_that_cannot_lower_does_not_stop_the_others(exports, sdxl, tmp_path, capsys):
    command = ["export", str(sdxl), "-t", "all", "-p", "int8", "-o", str(tmp_path / "all")]
    assert handheld([*command, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [(r["target"], "failed" in r, "bundle" in r) for r in told[:2]] == [
        ("one", True, False),
        ("two", False, True),
    ]
    assert exports == ["two"]
    assert handheld(command) == 2
    assert "1 of 2 exports failed: unet.00: layer 'a' does not run" in capsys.readouterr().err
    assert handheld(["export", str(sdxl), "-t", "one", "-t", "two", "-o", str(tmp_path / "b")]) == 2
    assert exports == ["two", "two"]


def test_bundles_whose_tools_are_missing_do_not_stop_the_others(tmp_path, monkeypatch, capsys):
    from handheld_export import verify

    class Passed:
        passed = True
        notes = problems = ()

        def as_dict(self):
            return {"bundle": "good"}

    def run(bundle, *_):
        if bundle.path.name == "bad":
            raise TargetError("lacks its tools", remedy="pip install tools")
        return Passed()

    monkeypatch.setattr(verify, "verify", run)
    for name in ("bad", "good"):
        samples.write_bundle(tmp_path / name)
    assert handheld(["verify", str(tmp_path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)["bundles"]
    assert told[0] == {"bundle": "good"}
    assert told[1]["skipped"] == "lacks its tools"
    assert told[1]["remedy"] == "pip install tools"
    assert handheld(["verify", str(tmp_path / "bad")]) == 2
    assert "pip install tools" in capsys.readouterr().err
