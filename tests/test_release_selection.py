from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import releases
from handheld.errors import UsageError
from handheld.records import DeviceFacts
from handheld.release import catalogue
from handheld.release.manifest import parse
from handheld.release.selection import RULES, Phone, candidates, is_soc, select

GOLDEN = Path(__file__).parent / "golden" / "selection"
GB = 2**30


def chosen(phone, release=None):
    return select(release or releases.sdxl(), phone)


def phone(ram=8, **changes):
    return Phone(**{"platform": "android", "ram_bytes": ram * GB, "os": 14, **changes})


def test_the_soc_it_was_compiled_for_gets_the_npu():
    answer = chosen(phone(soc="SM8650-AC"))
    assert (answer.variant, answer.residency) == ("qnn-sm8650", "resident")
    assert "npu" in answer.reason
    assert chosen(phone(soc="SM8550")).variant == "qnn-sm8550"


def test_an_unknown_soc_gets_another_variant_and_is_told_why():
    answer = chosen(phone(soc="Dimensity 9000"))
    assert answer.variant == "gpu"
    assert "'Dimensity 9000', it was compiled for SM8650" in answer.verdicts[0].reason
    assert answer.verdicts[0].rule == "soc"
    assert "unknown" in chosen(phone()).verdicts[0].reason


def test_less_memory_gets_less():
    answers = [chosen(phone(ram)) for ram in (8, 6, 4, 3, 2, 1)]
    assert [(a.variant, a.residency) for a in answers] == [
        ("gpu", "resident"),
        ("gpu", "resident"),
        ("stack1-cpu", "stream"),
        ("stack1-cpu", "stream"),
        ("stack3-cpu", "stream"),
        (None, None),
    ]


def test_nothing_fits_is_an_answer():
    answer = chosen(phone(1))
    assert answer.variant is None
    assert answer.reason.startswith("nothing fits")
    assert len(answer.verdicts) == len(list(candidates(releases.sdxl())))
    assert not any(v.fits for v in answer.verdicts)


def test_what_the_app_measured_counts_more_than_the_assumption():
    assert chosen(phone(16, budget_bytes=950 * 10**6)).variant == "stack3-cpu"
    assert chosen(Phone(platform="android")).variant is None
    assert "nobody knows" in chosen(Phone(platform="android")).verdicts[-1].reason


def test_every_rule_can_refuse():
    seen = {
        v.rule
        for p in (
            phone(soc="SM8650", os=11),
            phone(soc="SM8650", os=None),
            phone(engines=("executorch",)),
            phone(engines=()),
            phone(free_bytes=10**9),
            phone(1),
            Phone(platform="ios", ram_bytes=8 * GB, os=17),
        )
        for v in chosen(p).verdicts
    }
    assert seen >= set(RULES)


@pytest.mark.parametrize(
    ("have", "wanted", "same"),
    [
        ("SM8650", "SM8650", True),
        ("sm8650-ac", "SM8650", True),
        ("Tensor G3", "tensorg3", True),
        ("SM8650P", "SM8650", False),
        ("SM865", "SM8650", False),
        ("", "SM8650", False),
    ],
)
def test_socs(have, wanted, same):
    assert is_soc(have, wanted) is same


def test_facts_of_a_device():
    facts = DeviceFacts(id="a", kind="android", soc="SM8650", ram_bytes=8 * GB, os="Android 14",
                        engines={"litert": "2.3.0"})  # fmt: skip
    found = Phone.of(facts)
    assert (found.os, found.soc, found.engines) == (14, "SM8650", ("litert",))


def test_the_catalogue_is_sourced():
    entries = catalogue.entries()
    assert len(entries) >= 40
    assert len({e.name for e in entries}) == len(entries)
    assert all(e.source.startswith("https://") for e in entries)
    assert all(0 < ram <= 24 for e in entries for ram in e.ram_gb)
    limited = [e for e in entries if e.app_mb is not None]
    assert limited
    assert all(e.app_source.startswith("https://") for e in limited)
    assert all(0 < e.app_mb * 10**6 < min(e.ram_gb) * GB for e in limited)


def test_every_phone_of_the_catalogue_is_explained():
    phones = catalogue.find("all")
    assert len(phones) >= 40
    answers = {p.name: chosen(p) for p in phones}
    for answer in answers.values():
        assert answer.reason
        assert all(v.reason for v in answer.verdicts)
        assert answer.variant is None or answer.verdicts[-1].fits
    assert answers["OnePlus 12, 12 GB"].variant == "qnn-sm8650"
    assert answers["Google Pixel 8, 8 GB"].variant == "gpu"
    assert answers["Xiaomi Redmi 7A, 2 GB"].variant == "stack3-cpu"
    assert answers["iPhone 15 Pro, 8 GB"].variant == "stack1-cpu"
    assert len({a.variant for a in answers.values()}) >= 4


def test_unknown_phones():
    with pytest.raises(UsageError, match="did you mean Google Pixel 8"):
        catalogue.find("pixel 8")


def rank(release, answer):
    order = [(v.id, m.residency) for v, m in candidates(release)]
    if answer.variant is None:
        return len(order)
    return order.index((answer.variant, answer.residency))


MODES = st.dictionaries(
    st.sampled_from(["resident", "stream"]), st.integers(0, 20 * GB), min_size=1
)
UNITS = st.tuples(
    st.sampled_from(["npu", "gpu", "cpu"]), st.sampled_from([(), ("SM8650",), ("SM8550",)]), MODES
)
PHONES = st.builds(
    Phone,
    platform=st.sampled_from(["android", "ios", "host"]),
    soc=st.sampled_from([None, "SM8650", "SM8550-AB", "other"]),
    ram_bytes=st.integers(0, 32 * GB),
    os=st.one_of(st.none(), st.integers(8, 20)),
    free_bytes=st.one_of(st.none(), st.integers(0, 2 * 10**6)),
)


@given(st.lists(UNITS, min_size=1, max_size=5), PHONES, st.integers(0, 16 * GB))
def test_more_memory_never_gets_a_worse_variant(units, one, more):
    variants = [
        releases.variant(f"v{i}", unit=unit, soc=soc, memory=memory)
        for i, (unit, soc, memory) in enumerate(units)
    ]
    release = releases.manifest(*variants)
    better = one.model_copy(update={"ram_bytes": one.ram_bytes + more})
    assert rank(release, select(release, better)) <= rank(release, select(release, one))
    assert select(release, one) == select(release, one)


def test_answers_are_those_that_apps_are_tested_with():
    release = parse((GOLDEN / "release.json").read_bytes())
    cases = json.loads((GOLDEN / "cases.json").read_text())
    assert len(cases) >= 40
    for case in cases:
        answer = select(release, Phone.model_validate(case["phone"]))
        assert (answer.variant, answer.residency) == (case["variant"], case["residency"])
