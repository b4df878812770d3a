"""``handheld plan``: what is known before a model exists."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from handheld import cutting, planning, plans, recipes
from handheld.cli import run


def rows(capsys, *words):
    assert run(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_stacks_sizes_and_targets_side_by_side(capsys, tmp_path):
    picture = tmp_path / "plan.svg"
    found = rows(
        capsys, "sdxl", "-s", "stack1", "-s", "stack2", "--size", "512x512", "--size", "768x512",
        "--budget", "1500", "-o", str(picture),
    )  # fmt: skip
    assert [(r["model"], r["width"], r["height"]) for r in found[::2]] == [
        ("stack1", 512, 512), ("stack1", 768, 512), ("stack2", 512, 512), ("stack2", 768, 512),
    ]  # fmt: skip
    one, two = found[0], found[4]
    assert two["unet_bytes"] < 0.6 * one["unet_bytes"]
    assert one["exceeds"] == {"resident": True, "stream": False}
    assert found[2]["unet_macs"] > 1.4 * one["unet_macs"]
    assert found[2]["activation_bytes"] == pytest.approx(1.5 * one["activation_bytes"], rel=0.01)
    assert one["seconds"] is None
    bars = [e for e in ElementTree.parse(picture).iter() if e.tag.endswith("rect")]
    assert len(bars) == 1 + 4 * len(found)


@pytest.mark.parametrize(
    ("stack", "target", "size"),
    [
        ("stack1", "litert-cpu", 17.78),
        ("stack2", "litert-cpu", 12.4),
        ("stack3", "litert-cpu", 14.5),
        (None, "litert-cpu", 100.6),
        ("stack1", "executorch-xnnpack", 17.4),
        ("stack2", "executorch-xnnpack", 12.2),
        ("stack3", "executorch-xnnpack", 17.0),
        (None, "executorch-xnnpack", 100.7),
    ],
)
def test_files_are_as_large_as_measured(stack, target, size):
    # Measured, in MB: README.md, by `make demo`.
    shape = planning.architecture("models/critter")
    if stack:
        shape = recipes.shape_after(recipes.builtin(stack, "critter"), shape)
    assert sum(plans.file_bytes(shape, target)) == pytest.approx(size * 1e6, rel=0.01)


def test_artifacts_of_full_size_are_as_large_as_measured():
    # Measured, in bytes: all artifacts, and three of them; benchmarks/full_size.py.
    shape = recipes.shape_after(recipes.builtin("stack1", "sdxl"), planning.architecture("sdxl"))
    assert sum(plans.file_bytes(shape, "litert-cpu")) == pytest.approx(1_502_413_248, rel=0.001)
    parts = cutting.group(cutting.units(shape.layers), 80_000_000)
    for index, size in ((1, 40_165_120), (3, 35_458_880), (13, 49_802_880)):
        layers = [x for unit in parts[index + 1] for x in unit.layers]
        assert plans._file(layers, shape.grids, "litert-cpu") == pytest.approx(size, rel=0.001)


@pytest.mark.parametrize(
    ("stack", "target", "resident", "stream"),
    [
        ("stack1", "litert-cpu", 54.1, 24.3),
        ("stack2", "litert-cpu", 45.4, 21.2),
        ("stack3", "litert-cpu", 51.1, 23.1),
        ("stack1", "executorch-xnnpack", 48.9, 21.4),
        ("stack2", "executorch-xnnpack", 40.2, 17.9),
        ("stack3", "executorch-xnnpack", 48.2, 20.9),
        (None, "litert-cpu", 145.7, 55.5),  # float32; the engine's figures were not fitted to it
    ],
)
def test_peaks_are_within_ten_percent_of_runs(stack, target, resident, stream):
    # Measured, in MB: README.md, by `make demo`.
    shape = planning.architecture("models/critter")
    if stack:
        shape = recipes.shape_after(recipes.builtin(stack, "critter"), shape)
    peaks = plans.peak_bytes(shape, target)
    assert peaks["resident"] == pytest.approx(resident * 1e6, rel=0.1)
    assert peaks["stream"] == pytest.approx(stream * 1e6, rel=0.1)


def test_peaks_of_full_size_are_within_ten_percent_of_runs():
    # Measured, in MB: docs/planning.md.
    shape = recipes.shape_after(recipes.builtin("stack1", "sdxl"), planning.architecture("sdxl"))
    peaks = plans.peak_bytes(plans.at_size(shape, 512, 512), "litert-cpu")
    assert peaks["resident"] == pytest.approx(1631e6, rel=0.1)
    assert peaks["stream"] == pytest.approx(144e6, rel=0.1)


@pytest.mark.parametrize("size", [512, 768, 1024])
def test_decoders_in_bands_take_less_than_the_unet(size):
    shape = recipes.shape_after(recipes.builtin("stack1", "sdxl"), planning.architecture("sdxl"))
    shape = plans.at_size(shape, size, size)
    unet = [
        plans._part(p, shape.grids, "litert-cpu")
        for p in cutting.group(cutting.units(shape.layers), 80_000_000)
    ]
    drawn, _ = plans._bands(shape)
    decoder = [plans._part(p, {}, "litert-cpu", rows) for p, rows in drawn]
    assert max(w for _, _, w in decoder) < max(w for _, _, w in unet)
    whole = plans.peak_bytes(shape, "executorch-xnnpack")
    assert plans.peak_bytes(shape, "litert-cpu")["stream"] < 0.7 * whole["stream"]


@pytest.mark.parametrize(
    ("budget", "said"), [(80, "too much"), (95, "close"), (105, "close"), (115, "fits")]
)
def test_budgets_near_an_estimate_are_not_decided(budget, said):
    assert plans.verdict(100, 50, budget) == said
    assert plans.verdict(100, budget + 1, budget) == "too much"


def test_a_target_whose_engine_is_not_known_has_no_peak():
    assert plans.peak_bytes(planning.architecture("models/critter"), "coreml") is None


def test_latency_is_macs_over_a_rate_with_a_source(capsys, tmp_path):
    table = tmp_path / "rates.toml"
    table.write_text(
        'device = "desk"\n[targets.litert-cpu]\ngmacs_per_second = 100\nsource = "bench of today"'
    )
    fast, slow = rows(
        capsys, "sdxl", "-s", "stack1", "--rates", str(table),
        "-t", "litert-cpu", "-t", "executorch-xnnpack",
    )  # fmt: skip
    assert fast["seconds"] == pytest.approx((fast["unet_macs"] + fast["decoder_macs"]) / 1e11)
    assert fast["rate_source"] == "bench of today"
    assert slow["seconds"] is None


def test_rates_that_come_along_have_sources_and_are_asked_for_by_name(capsys):
    assert all(r.source for d in plans.devices() for r in d.targets.values())
    (row,) = rows(capsys, "sdxl", "-s", "stack1", "-t", "executorch-xnnpack", "--device",
                  "oneplus 12")  # fmt: skip
    assert row["seconds"] == pytest.approx((row["unet_macs"] + row["decoder_macs"]) / 253e9)
    assert "https://" in row["rate_source"]
    (unknown,) = rows(capsys, "sdxl", "-t", "litert-cpu", "--device", "OnePlus 12")
    assert (unknown["seconds"], unknown["rate_source"]) == (None, None)


def test_phones_limits_are_published_or_assumed_and_what_is_unknown_stays_unknown(capsys):
    (row,) = rows(capsys, "sdxl", "-s", "stack1", "--size", "512x512", "-t", "executorch-xnnpack",
                  "--phone", "OnePlus 12", "--phone", "iPhone 13 Pro", "--phone", "Xiaomi Redmi 7A",
                  "--phone", "oneplus 12")  # fmt: skip
    found = {(p["phone"], p["ram_gb"]): p for p in row["phones"]}
    assert [p["ram_gb"] for p in row["phones"]] == [12, 16, 24, 6, 2, 3]
    fast, published = found["OnePlus 12", 12], found["iPhone 13 Pro", 6]
    assert fast["app_bytes"] == 6 * 2**30 and fast["app_source"].startswith("assumed: 0.5")
    assert fast["seconds"] == pytest.approx((row["unet_macs"] + row["decoder_macs"]) / 253e9)
    assert published["app_bytes"] == 3_120_000_000
    assert published["app_source"].startswith("https://")
    assert (published["seconds"], published["rate_source"]) == (None, None)
    small = found["Xiaomi Redmi 7A", 2]["verdict"]
    assert (small["resident"], published["verdict"]["resident"]) == ("too much", "fits")


def test_a_phone_of_whose_app_nobody_knows_the_limit_has_no_verdict():
    from handheld import phone_plans
    from handheld.release import catalogue
    from handheld.release.rules import read

    row = plans.row(planning.architecture("models/critter-stack1"), "litert-cpu")
    rules = read().model_copy(update={"budget": {}})
    (entry,) = catalogue.named("Google Pixel 8")
    (found,) = phone_plans.on_phone(row, entry, rules)
    assert (found["app_bytes"], found["app_source"], found["verdict"]) == (None, "unknown", None)


def test_tables_of_phones_name_their_sources(capsys):
    assert run(["plan", "critter-stack1", "-t", "litert-cpu", "--phone", "Google Pixel 8"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "4295.0 assumed" in told
    assert "wiki.lineageos.org/devices/shiba" in told and "rules.toml" in told
    assert told.count("unknown") >= 2  # seconds, here and on the phone


def test_precision_fills_what_is_float(capsys):
    plain, coded = (
        rows(capsys, "sdxl", "-t", "litert-cpu", *more)[0] for more in ([], ["--precision", "int8"])
    )
    assert plain["bits_per_weight"] is None
    assert 8 < coded["bits_per_weight"] < 8.1
    assert 3.8 < plain["unet_bytes"] / coded["unet_bytes"] < 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sdxl", "--size", "500x512"], "no multiple of 8"),
        (["sdxl", "--size", "0x512"], "no multiple of 8"),
        (["sdxl", "--size", "big"], "no size"),
        (["sdxl", "--budget", "-1"], "out of range"),
        (["sdxl", "-t", "coreml"], "not planned"),
        (["sdxl", "-s", "stack9"], "unknown"),
        (["sdxl", "--precision", "int3"], "unknown"),
        (["sdxl", "-o", "plan.png"], "no .svg"),
        (["nowhere"], "no configurations"),
        (["sdxl", "--device", "a phone"], "known are OnePlus 12"),
        (["sdxl", "--device", "OnePlus 12", "--rates", "x.toml"], "exclude each other"),
        (["sdxl", "--phone", "a phone"], "no phone 'a phone' in the catalogue"),
    ],
)
def test_bad_usage(capsys, words, said):
    assert run(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_rate_without_a_source_is_refused(capsys, tmp_path):
    table = tmp_path / "rates.toml"
    table.write_text('device = "x"\n[targets.onnx]\ngmacs_per_second = 1')
    assert run(["plan", "sdxl", "--rates", str(table)]) == 2
    assert "targets.onnx.source" in capsys.readouterr().err
