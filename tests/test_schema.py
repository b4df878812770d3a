from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest

from handheld import schema

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", schema.NAMES)
def test_committed_schemas_are_current(name):
    text = (ROOT / f"docs/schema/{name}.json").read_text()
    assert text == schema.text(name), "run `make docs`"


def test_nothing_else_is_there(tmp_path):
    written = schema.write(tmp_path)
    assert {p.name for p in written} == {p.name for p in (ROOT / "docs/schema").iterdir()}


def test_the_command_line_page_is_current():
    if importlib.util.find_spec("handheld_export") is None:
        pytest.skip("handheld_export is not installed")
    page = runpy.run_path(str(ROOT / "docs/generate.py"))["command_line"]()
    assert (ROOT / "docs/cli.md").read_text() == page, "run `make docs`"
    for words in ("handheld bench", "handheld bundle show", "handheld export"):
        assert f"## {words}\n" in page
