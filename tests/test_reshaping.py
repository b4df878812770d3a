"""What recipes make of shapes without torch, against the steps themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest

from handheld import planning, recipes
from handheld.errors import UsageError


@pytest.mark.parametrize("model", ["sdxl", "critter"])
@pytest.mark.parametrize("stack", recipes.STACKS)
def test_it_agrees_with_the_steps(model, stack):
    pytest.importorskip("torch")
    from handheld_export.compress import recipe

    path = recipes.builtin(stack, model)
    first = planning.architecture("sdxl" if model == "sdxl" else "models/critter")
    shape = first
    for step in recipe.read(path).steps:
        shape = step.shape(shape)
    light = recipes.shape_after(path, first)
    assert light == shape
    assert light.grids and light.steps == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = 3", "steps.*valid list"),
        ("", "steps: there are none"),
        ('[[steps]]\nstep = "fly"', "unknown to the planner"),
        ("[[steps]]\nwidth = 3", "unknown to the planner"),
        ('[[steps]]\nstep = "trim"', "say either"),
        ('[[steps]]\nstep = "trim"\npairs = [9, 1]', "does not fit"),
        ("[", "not readable TOML"),
    ],
)
def test_broken_recipes_are_named(tmp_path, text, words):
    path = tmp_path / "r.toml"
    path.write_text(f'name = "r"\n{text}')
    with pytest.raises(UsageError, match=words) as e:
        recipes.shape_after(path, planning.architecture("sdxl"))
    assert e.value.path == str(path)


def test_it_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from handheld import planning, precision, recipes\n"
        "path = recipes.builtin('stack3', 'sdxl')\n"
        "print(len(recipes.shape_after(path, planning.architecture('sdxl')).grids))"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(said.stdout) > 700


def test_a_recipe_has_a_name(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[[steps]]\nstep = "trim"\nremove = 0.1')
    with pytest.raises(UsageError) as e:
        recipes.shape_after(path, planning.architecture("sdxl"))
    assert (e.value.path, e.value.field) == (str(path), "name")
