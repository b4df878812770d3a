"""The rule that decides what stays within a memory budget."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from handheld import bundle as bundles
from handheld.cli import run
from handheld.errors import BundleError, UsageError
from handheld.memory_plan import (
    LOADED_BYTES,
    PROCESS_BYTES,
    Weights,
    peak_bytes,
    plan,
    plan_bundle,
)

CASES = json.loads((Path(__file__).parent / "golden/memory_plans.json").read_text())
MB = 1_000_000


def solve(case):
    weights = [Weights(**a) for a in case["artifacts"]]
    return plan(case["budget"], case["activations"], case["packed"], weights, case["calls"])


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_golden_cases(case):
    if "error" in case:
        with pytest.raises(UsageError) as caught:
            solve(case)
        assert caught.value.message == case["error"]
    else:
        answer = solve(case).to_json()
        assert answer.pop("budget_bytes") == case["budget"]
        assert answer == case["plan"]


def walk(case, answer):
    """Run the program in thought; return the most memory that is ever held."""
    by_id = {a["id"]: a for a in case["artifacts"]}
    names = [case["artifacts"][i]["id"] for i in case["calls"]]
    base, packed = PROCESS_BYTES + case["activations"], case["packed"]
    most = PROCESS_BYTES + (2 * max(a["bytes"] for a in case["artifacts"]) if packed else 0)
    held = kept = 0
    for name in answer["resident"]:
        own = by_id[name]["bytes"]
        most = max(most, base + held + (1 if packed else 2) * own + LOADED_BYTES)
        held += own + LOADED_BYTES
    for i, name in enumerate(names):
        own, workspace = by_id[name]["bytes"], by_id[name]["workspace"]
        if name in answer["resident"]:
            kept = max(kept, workspace)
            most = max(most, base + held + kept)
            continue
        if not packed:
            most = max(most, base + held + kept + 2 * own + LOADED_BYTES)
        now = base + held + max(kept, workspace) + own + LOADED_BYTES
        most = max(most, now)
        later = [n for n in names[i + 1 :] if n in answer["streamed"] and n != name]
        if later and answer["prefetch"]:
            following = 0 if packed else 2 * by_id[later[0]]["bytes"]
            most = max(most, now + following + LOADED_BYTES)
    return most


@pytest.mark.parametrize("case", [c for c in CASES if "plan" in c])
def test_budget_is_kept(case):
    answer = case["plan"]
    assert walk(case, answer) <= answer["peak_bytes"] <= case["budget"]
    assert sorted(answer["resident"] + answer["streamed"]) == sorted(
        a["id"] for a in case["artifacts"]
    )


@pytest.mark.parametrize("case", [c for c in CASES if "error" in c])
def test_least_budget_is_exact(case):
    least = int(re.search(r"would do is (\d+) MB", case["error"])[1])
    solve({**case, "budget": least * MB})
    with pytest.raises(UsageError):
        solve({**case, "budget": least * MB - MB})


def test_what_stays():
    # The small c is run in every step, the others once: it stays first, then the largest.
    weights = [Weights(n, s * MB, 0) for n, s in (("a", 60), ("c", 1), ("b", 40), ("d", 50))]
    calls = [0, 1, 2, 1, 3, 1]
    base = PROCESS_BYTES
    few = plan(base + 120 * MB, 0, True, weights, calls)
    assert few.resident == ("a", "c")
    assert few.prefetch
    assert few.peak_bytes == base + 120 * MB  # packing a
    more = plan(base + 151 * MB + 4 * LOADED_BYTES, 0, True, weights, calls)
    assert more.resident == ("a", "c", "b", "d")
    # One that is streamed alone takes as much as if it stayed.
    assert plan(more.peak_bytes - 1, 0, True, weights, calls).resident == ("a", "c")


def test_packing_is_over_before_tensors_and_workspaces_are_there():
    weights = [Weights("a", 60 * MB, 30 * MB), Weights("b", 60 * MB, 40 * MB)]
    answer = plan(PROCESS_BYTES + 120 * MB, 10 * MB, True, weights, [0, 1])
    assert answer.resident == ()
    assert answer.prefetch
    assert answer.peak_bytes == PROCESS_BYTES + 120 * MB
    with pytest.raises(UsageError, match="the least that would do is 138 MB"):
        plan(PROCESS_BYTES + 119 * MB, 10 * MB, True, weights, [0, 1])


def test_without_prefetch_where_two_do_not_fit():
    weights = [Weights("a", 60 * MB, 0), Weights("b", 60 * MB, 0)]
    answer = plan(PROCESS_BYTES + 130 * MB, 0, False, weights, [0, 1])
    assert answer.resident == ()
    assert not answer.prefetch
    assert plan(PROCESS_BYTES + 200 * MB, 0, False, weights, [0, 1]).prefetch


def test_a_workspace_goes_with_what_is_streamed_and_stays_with_what_stays():
    weights = [Weights("a", 60 * MB, 10 * MB), Weights("b", 20 * MB, 40 * MB)]

    def peak(*stays):
        return peak_bytes(stays, False, 0, True, weights, [0, 1], first=False) - PROCESS_BYTES

    assert peak(False, False) == 70 * MB + LOADED_BYTES
    assert peak(True, False) == 120 * MB + 2 * LOADED_BYTES
    assert peak(False, True) == 120 * MB + 2 * LOADED_BYTES
    assert peak(True, True) == 120 * MB + 2 * LOADED_BYTES


def test_bundle_without_workspaces_is_refused():
    import samples

    manifest, _ = samples.content()
    with pytest.raises(BundleError, match="export the bundle again") as caught:
        plan_bundle(manifest, next(iter(manifest.sizes)), 10**9)
    assert caught.value.field == "artifacts[0].workspace"


def test_engines_that_hold_weights_otherwise_are_refused():
    import samples

    manifest, _ = samples.content()
    changes = {"engine": "onnx", "workspace": 1}
    artifacts = tuple(a.model_copy(update=changes) for a in manifest.artifacts)
    manifest = manifest.model_copy(update={"artifacts": artifacts})
    with pytest.raises(BundleError, match="cannot be planned") as caught:
        plan_bundle(manifest, next(iter(manifest.sizes)), 10**9)
    assert caught.value.field == "artifacts[0].engine"


def test_dry_run_prints_the_plan(capsys, tmp_path):
    import samples

    manifest, content = samples.content()
    artifacts = tuple(a.model_copy(update={"workspace": 1 << 20}) for a in manifest.artifacts)
    manifest = manifest.model_copy(update={"artifacts": artifacts})
    bundles.write(manifest, content, tmp_path / "bundle")
    words = ["bench", str(tmp_path / "bundle"), "--dry-run", "--json", "--memory-budget"]
    assert run([*words, "100"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["plans"]
    assert answer["resident"] == [a.id for a in artifacts]
    assert answer["peak_bytes"] <= answer["budget_bytes"] == 100 * MB
    assert run([*words, "10"]) == 2
    assert "the least that would do is" in capsys.readouterr().out
    assert run([*words[:-1]]) == 2
    assert "say how many MB" in capsys.readouterr().out
