"""Recipes: what is read, what is refused, and what a result depends on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st

import recipes
from handheld.errors import HandheldError, UsageError
from handheld.planning import architecture
from handheld.recipes import shape_after
from handheld_export.compress import recipe, steps
from handheld_export.compress.estimate import plan
from handheld_export.compress.load import Cluster
from handheld_export.compress.step import kinds


def read(tmp_path, *steps):
    return recipe.read(recipes.write(tmp_path / "r.toml", *steps))


def test_steps_are_found_by_their_files():
    files = Path(steps.__file__).parent.glob("*.py")
    assert set(kinds()) == {f.stem for f in files} - {"__init__"} >= {"activations", "warmup"}


def test_settings_are_read(tmp_path):
    found = read(tmp_path, recipes.warmup(), recipes.dmd(), recipes.quantize("bits = 4.0"))
    assert [s.kind for s in found.steps] == ["warmup", "dmd", "quantize"]
    assert found.steps[0].train.lr == 1e-3
    assert found.steps[1].timesteps == [399]
    assert found.steps[2].bits == 4.0


@pytest.mark.parametrize(
    ("steps", "field", "words"),
    [
        (recipes.step("warmup", "pears = 3", recipes.train()), "steps[0].pears", "pears"),
        (recipes.step("warmup", "train = { steps = 1, lr = -1 }"), "steps[0].train.lr", "greater"),
        (recipes.step("warmup", 'sampler = "dmd"', recipes.train()), "steps[0].sampler", "ddim"),
        (recipes.step("quantize", 'linear = ["int2", "int4"]'), "steps[0]", "need a budget"),
        (recipes.step("dissolve"), "steps[0].step", "unknown"),
        ('\n[[steps]]\nkind = "dmd"\n', "steps[0].step", "no step"),
        (recipes.distill(), "steps[0]", "trim or quantize"),
        (recipes.quantize() + recipes.trim(), "steps[1]", "cannot come after"),
        (recipes.quantize() + recipes.dmd(), "steps[1]", "cannot come after"),
        (recipes.dmd(timesteps="[399, 999]"), "steps[0].timesteps", "fall"),
        (recipes.quantize("bits = 3.0", "megabytes = 2.0"), "steps[0]", "not both"),
        (recipes.step("trim", "remove = 0.3", "pairs = [1, 1]"), "steps[0]", "either"),
        (recipes.step("trim"), "steps[0]", "either"),
        (recipes.quantize('linear = ["int3"]'), "steps[0].linear[0]", "int8"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, steps, field, words):
    with pytest.raises(UsageError) as error:
        read(tmp_path, steps)
    assert error.value.path == str(tmp_path / "r.toml")
    assert error.value.field == field
    assert words in str(error.value)
    assert error.value.exit_code == 2


def test_unknown_keys_at_the_top_are_refused(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("sede = 1\n" + recipes.text(recipes.trim()))
    with pytest.raises(UsageError, match=r"sede: is unknown \(a recipe has name, about, extends"):
        recipe.read(path)


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"name = ", b"", b"[[steps]]\nstep = 3"])
def test_broken_files_are_refused(tmp_path, raw):
    path = tmp_path / "r.toml"
    path.write_bytes(raw)
    with pytest.raises(UsageError):
        recipe.read(path)
    with pytest.raises(UsageError, match="no such recipe"):
        recipe.read(tmp_path / "missing.toml")


@given(st.text(max_size=400))
def test_any_text_gives_a_recipe_or_a_clear_error(tmp_path_factory, words):
    path = tmp_path_factory.mktemp("r") / "r.toml"
    path.write_text(recipes.text(recipes.trim()) + words, encoding="utf-8", errors="replace")
    try:
        recipe.read(path)
    except HandheldError as e:
        assert e.exit_code == 2


def test_every_recipe_that_ships_is_valid():
    for model in ("sdxl", "critter"):
        for stack in (*recipe.STACKS, "onestep", "warmup", "int4"):
            assert recipe.read(recipe.builtin(stack, model)).name == f"{model}-{stack}"


def test_a_recipe_goes_on_from_the_one_it_extends(tmp_path):
    (tmp_path / "base.toml").write_text(recipes.text(recipes.warmup()))
    path = tmp_path / "r.toml"
    path.write_text('name = "r"\nextends = "base.toml"\n' + recipes.dmd())
    base, found = recipe.read(tmp_path / "base.toml"), recipe.read(path)
    assert [s.kind for s in found.steps] == ["warmup", "dmd"]
    assert found.data == base.data
    assert found.essence(1, "x") == base.essence(1, "x")
    path.write_text('name = "r"\nextends = "critter/onestep"\n' + recipes.trim())
    assert [s.kind for s in recipe.read(path).steps] == ["warmup", "warmup", "dmd", "trim"]


def test_order_is_checked_across_the_recipe_that_is_extended(tmp_path):
    (tmp_path / "base.toml").write_text(recipes.text(recipes.quantize()))
    path = tmp_path / "r.toml"
    path.write_text('name = "r"\nextends = "base.toml"\n' + recipes.dmd())
    with pytest.raises(UsageError, match="cannot come after 'quantize'") as error:
        recipe.read(path)
    assert (error.value.path, error.value.field) == (str(path), "steps[0]")


@pytest.mark.parametrize(
    "extends",
    [
        '"other.toml"',
        '"critter/stack9"',
        '"../r"',
        '"."',
        "3",
        '"folder.toml"',
        f'"{"x" * 300}.toml"',
    ],
)
def test_an_extended_recipe_that_is_not_there_is_refused(tmp_path, extends):
    (tmp_path / "folder.toml").mkdir()
    path = tmp_path / "r.toml"
    path.write_text(f'name = "r"\nextends = {extends}\n' + recipes.dmd())
    for use in (recipe.read, lambda p: shape_after(p, architecture("sdxl"))):
        with pytest.raises(UsageError) as error:
            use(path)
        assert (error.value.path, error.value.field) == (str(path), "extends")


@given(st.text(max_size=40))
def test_any_name_in_extends_is_found_or_refused(tmp_path_factory, name):
    path = tmp_path_factory.mktemp("r") / "r.toml"
    path.write_text(f'name = "r"\nextends = {json.dumps(name)}\n' + recipes.trim())
    try:
        recipe.read(path)
    except HandheldError as e:
        assert e.exit_code == 2


def test_a_circle_is_refused_where_it_closes(tmp_path):
    for name, other in (("r", "a"), ("a", "b"), ("b", "a")):
        text = f'name = "{name}"\nextends = "{other}.toml"\n' + recipes.dmd()
        (tmp_path / f"{name}.toml").write_text(text)
    with pytest.raises(UsageError, match=r"r.toml > .*a.toml > .*b.toml > .*a.toml") as error:
        recipe.read(tmp_path / "r.toml")
    assert (error.value.path, error.value.field) == (str(tmp_path / "b.toml"), "extends")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('name = "r"\nextend = "critter/onestep"\n' + recipes.trim(), "extend"),
        (recipes.text(recipes.trim()).replace("[data]", '[data]\nextends = "a/b"'), "data.extends"),
        (recipes.text(recipes.trim() + 'extends = "a/b"\n'), "steps[0].extends"),
    ],
)
def test_a_misplaced_extends_is_refused_by_all_who_read_recipes(tmp_path, text, field):
    path = tmp_path / "r.toml"
    path.write_text(text)
    for use in (recipe.read, lambda p: shape_after(p, architecture("sdxl"))):
        with pytest.raises(UsageError) as error:
            use(path)
        assert error.value.field == field


def test_data_of_its_own_takes_the_place_of_the_extended_recipes(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(
        'name = "r"\nextends = "sdxl/onestep"\n[data]\nkind = "folder"\npath = "here"\n'
    )
    found = recipe.read(path)
    assert (found.data.path, found.data.pictures) == ("here", 10_000)
    assert [s.kind for s in found.steps] == ["warmup", "dmd"]
    assert {place.path for place in found.places} == {
        recipe.builtin("warmup", "sdxl"), recipe.builtin("onestep", "sdxl"),
    }  # fmt: skip


def test_what_cannot_be_done_is_named_in_the_file_where_it_stands(tmp_path):
    path = tmp_path / "r.toml"
    step = recipes.step("trim", "remove = 0.99")
    path.write_text('name = "r"\nextends = "sdxl/onestep"\n' + step)
    found = recipe.read(path)
    with pytest.raises(UsageError) as error:
        plan(found, architecture("sdxl"), Cluster(devices=8, memory=1e15))
    assert error.value.path == str(path)
    assert (error.value.field or "").startswith("steps[0]")
    with pytest.raises(UsageError, match="'warmup' needs") as error:
        plan(found, architecture("sdxl"), Cluster(memory=80e9))
    assert error.value.path == str(recipe.builtin("warmup", "sdxl"))


def test_an_error_in_an_extended_recipe_names_that_file(tmp_path):
    base = tmp_path / "base.toml"
    base.write_text(recipes.text(recipes.trim()).replace("[data]", "sede = 1\n[data]"))
    path = tmp_path / "r.toml"
    path.write_text('name = "r"\nextends = "base.toml"\n' + recipes.dmd())
    with pytest.raises(UsageError, match="sede") as error:
        recipe.read(path)
    assert error.value.path == str(base)


def test_a_recipe_without_data_needs_one_to_extend(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('name = "r"\n' + recipes.dmd())
    with pytest.raises(UsageError) as error:
        recipe.read(path)
    assert error.value.field == "data"


def test_models_without_their_own_recipe_take_sdxls():
    assert recipe.builtin("stack1", "my-finetune").parent.name == "sdxl"
    for name in ("stack9", "../sdxl/stack1"):
        with pytest.raises(UsageError, match="unknown"):
            recipe.builtin(name, "sdxl")


def test_a_result_depends_on_the_steps_up_to_it_and_on_nothing_later(tmp_path):
    one = read(tmp_path, recipes.warmup(), recipes.dmd())
    other = read(tmp_path, recipes.warmup(), recipes.dmd(steps=4))
    assert one.essence(1, "x") == other.essence(1, "x")
    assert one.essence(2, "x") != other.essence(2, "x")
    assert one.essence(1, "x") != one.essence(1, "y")


def test_how_often_something_is_saved_changes_no_result(tmp_path):
    one = read(tmp_path, recipes.warmup())
    often = read(tmp_path, recipes.warmup().replace("log_every = 1", "log_every = 7"))
    assert one.essence(1, "x") == often.essence(1, "x")


def test_stacks_share_the_distilled_student():
    read = [recipe.read(recipe.builtin(s, "critter")) for s in (*recipe.STACKS, "onestep")]
    shared = [step.kind for step in read[-1].steps]
    assert shared == ["warmup", "warmup", "dmd"]
    assert len({r.essence(len(shared), "x") for r in read}) == 1
    assert len({r.essence(len(r.steps), "x") for r in read}) == len(read)
