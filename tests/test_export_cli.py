"""Which targets and precisions `handheld export` chooses."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

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
