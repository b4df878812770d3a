"""A student's card says how it is drawn with."""

from __future__ import annotations

import pytest

card = pytest.importorskip("handheld_export.compress.card")

SETTINGS = {
    "name": "tiny-int4",
    "recipe": "int4",
    "made_from": {"name": "tiny", "sha256": "ab"},
    "data": "12 pictures",
    "command": "handheld compress tiny --stack int4 --output STUDENT",
    "licence": "CC0",
    "history": [{"step": "quantize", "seconds": 90, "settings": {}, "machine": {"threads": 2}}],
}


def drawn_with(**settings):
    (line,) = [x for x in card.text(SETTINGS | settings).splitlines() if x.startswith("| drawn")]
    return line.strip("| ").removeprefix("drawn with | ")


def test_one_of_dmd_is_drawn_at_its_own_timesteps():
    told = drawn_with(steps=1, sampler="dmd", timesteps=[399], guidance=1.0)
    assert told == "1 step(s), dmd, timesteps [399], guidance 1.0"


def test_one_of_several_steps_is_drawn_as_its_teacher():
    told = drawn_with(steps=6, sampler="ddim", guidance=1.75)
    assert told == "6 step(s), ddim, guidance 1.75"


def test_a_teacher_that_says_nothing_leaves_it_to_the_export():
    assert drawn_with() == "what `handheld export` is told"


def test_the_time_of_all_steps_is_added_up():
    history = [*SETTINGS["history"], {"step": "activations", "seconds": 60, "settings": {}}]
    assert "| time | 2 minutes |" in card.text(SETTINGS | {"history": history})
