from __future__ import annotations

import threading

import pytest

import fake_harness
import samples
from handheld import fleet, records
from handheld.devices import Obstacle, find, providers
from handheld.errors import DeviceError, UsageError

TABLE = """
devices = ["host"]
[options]
iterations = 2
precision = 0.5
max_seconds = 1
first_ever = false
[gate]
cooldown_s = 0
[[bundles]]
path = "sample"
residency = ["resident", "stream"]
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return fake_harness.install(tmp_path_factory.mktemp("harness") / "fake")


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch, fake):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HANDHELD_HARNESS", str(fake))
    monkeypatch.delenv("HANDHELD_FAKE", raising=False)
    samples.write_bundle(tmp_path / "sample")


def matrix(tmp_path, text=TABLE):
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    return fleet.read(path)


def run(tmp_path, text=TABLE, say=lambda device, words: None):
    file = tmp_path / "records.jsonl"
    runner = fleet.Fleet(matrix(tmp_path, text), tmp_path, file, ("test",), say)
    return runner.run(), records.read(file) if file.exists() else []


def test_a_matrix_and_again(tmp_path):
    results, written = run(tmp_path)
    assert [r.outcome for r in results] == ["done", "done"]
    assert [r.settings.residency for r in written] == ["resident", "stream"]
    results, again = run(tmp_path)
    assert [r.outcome for r in results] == ["already", "already"]
    assert again == written


def test_other_settings_are_run(tmp_path):
    run(tmp_path)
    results, written = run(tmp_path, TABLE.replace("iterations = 2", "iterations = 3"))
    assert [r.outcome for r in results] == ["done", "done"]
    assert len(written) == 4


def test_only_what_is_missing_is_run(tmp_path):
    run(tmp_path)
    file = tmp_path / "records.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    # The last record was cut off as the machine lost power.
    file.write_text(lines[0] + lines[1][:200])
    results, written = run(tmp_path)
    assert [r.outcome for r in results] == ["already", "done"]
    assert [r.settings.residency for r in written] == ["resident", "stream"]


def test_a_wrong_picture_is_a_result_and_a_crash_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HANDHELD_FAKE", "wrong")
    results, written = run(tmp_path)
    assert [r.outcome for r in results] == ["failed", "failed"]
    assert [r.status for r in written] == ["failed", "failed"]
    assert [r.outcome for r in run(tmp_path)[0]] == ["already", "already"]
    (tmp_path / "records.jsonl").unlink()
    monkeypatch.setenv("HANDHELD_FAKE", "die")
    results, written = run(tmp_path, TABLE.replace("[options]", "attempts = 1\n[options]", 1))
    assert {r.status for r in written} == {"partial"}
    monkeypatch.setenv("HANDHELD_FAKE", "")
    assert [r.outcome for r in run(tmp_path)[0]] == ["done", "done"]


def test_a_device_that_goes_away_is_tried_again(tmp_path, monkeypatch):
    failures = iter([DeviceError("gone"), DeviceError("gone")])
    real = fleet.bench.run

    def sometimes(*arguments, **options):
        for error in failures:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(fleet.bench, "run", sometimes)
    before = threading.active_count()
    results, _ = run(tmp_path)
    assert [r.outcome for r in results] == ["done", "done"]
    assert threading.active_count() <= before + 2


def test_what_is_not_there_is_said(tmp_path):
    results, _ = run(tmp_path, TABLE.replace('["host"]', '["host", "pixel"]'))
    assert ("pixel", "missing") in {(r.device, r.outcome) for r in results}


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (TABLE.replace('["host"]', "1"), "devices"),
        (TABLE.replace("iterations", "iteration"), "options.iteration"),
        (TABLE + "\n[[bundles]]\npath = 'x'\nresidency = ['swap']", "bundles[1].residency[0]"),
        (TABLE.replace("[options]", 'adb_servers = ["lab; rm -rf"]\n[options]', 1),
         "adb_servers[0]"),
        ("devices = [", None),
    ],
)  # fmt: skip
def test_a_malformed_matrix(tmp_path, text, field):
    with pytest.raises(UsageError) as e:
        matrix(tmp_path, text)
    assert "fleet.toml" in str(e.value)
    if field:
        assert e.value.field == field


def test_what_keeps_devices_away_is_told_though_others_are_there(tmp_path, monkeypatch):
    class Phones:
        def attached(self):
            return []

        def obstacles(self):
            return [
                Obstacle("there is no phone program", "install it"),
                Obstacle("is not authorized", "unlock it", "R5"),
                Obstacle("no answer", "start the server", "tcp:lab:5037"),
            ]

    kinds = providers()
    monkeypatch.setattr("handheld.devices.providers", lambda: kinds | {"phones": Phones()})
    told = [r for r in run(tmp_path, TABLE.replace('"host"', '"all"'))[0] if r.outcome == "missing"]
    assert [(r.device, r.error) for r in told] == [
        ("R5", "is not authorized (unlock it)"),
        ("tcp:lab:5037", "no answer (start the server)"),
    ]
    results, written = run(tmp_path, TABLE.replace('"host"', '"host", "R5"'))
    assert [r.outcome for r in results if r.device == "R5"] == ["missing"]
    assert len(written) == 2
    with pytest.raises(DeviceError, match="no phone program"):
        find("phones")


def test_a_mistake_of_ours_stops_no_other_run(tmp_path, monkeypatch):
    real = fleet.bench.run
    runs = []

    def broken(*arguments, **options):
        runs.append(1)
        if len(runs) == 1:
            raise ZeroDivisionError("of a phone's thread")
        return real(*arguments, **options)

    monkeypatch.setattr(fleet.bench, "run", broken)
    results, written = run(tmp_path)
    assert [r.outcome for r in results] == ["failed", "done"]
    assert "unexpected ZeroDivisionError in test_fleet.py" in results[0].error
    assert len(written) == 1


def test_records_of_another_harness_do_not_count(tmp_path, monkeypatch):
    _, written = run(tmp_path)
    file = tmp_path / "records.jsonl"
    file.unlink()
    older = written[0].model_copy(update={"handheld": "0.0.9"})
    facts = written[1].device.model_copy(update={"engines": {"litert": "1.0"}})
    for record in (older, written[1].model_copy(update={"device": facts})):
        records.append(file, record)
    assert [r.outcome for r in run(tmp_path)[0]] == ["done", "done"]
    assert [r.outcome for r in run(tmp_path)[0]] == ["already", "already"]
    host = providers()["host"].attached()[0].facts()
    for update, outcome in (
        ({"engines": dict.fromkeys(host.engines, "unknown")}, "already"),
        ({"harness": "another build"}, "done"),
        ({"harness": None}, "already"),  # none is built: with which it would run is not known
    ):
        facts = host.model_copy(update=update)
        with monkeypatch.context() as patched:
            patched.setattr("handheld.devices.host.HostDevice.facts", lambda self, f=facts: f)
            assert [r.outcome for r in run(tmp_path)[0]] == [outcome] * 2, update
    # What a device that does not answer has by now is not known: its records stay.
    monkeypatch.setattr("handheld.devices.host.HostDevice.facts", gone)
    assert [r.outcome for r in run(tmp_path)[0]] == ["already", "already"]


def gone(device):
    raise DeviceError("gone")


def test_a_device_on_which_nothing_is_missing_is_tidied_up(tmp_path, monkeypatch):
    tidied = []

    def tidy(device):
        tidied.append(device.id)

    monkeypatch.setattr("handheld.devices.host.HostDevice.tidy", tidy)
    run(tmp_path)
    assert tidied == []
    run(tmp_path)
    assert len(tidied) == 1
