"""The iOS driver against a stand-in for devicectl and the app. Not run on hardware."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import envelopes
import samples
from fake_xcrun import CORE, UDID, IPhone
from handheld import bench, devices, fleet
from handheld.bench import Options
from handheld.bundle import MANIFEST, Bundle, references
from handheld.devices import devicectl, ios, process, programs, pymobiledevice3
from handheld.devices.devicectl import DevicectlError
from handheld.devices.ios import IosDevices
from handheld.devices.pymobiledevice3 import Pymobiledevice3
from handheld.errors import DeviceBusyError, DeviceError, HandheldError
from handheld.thermal_gate import Gate

GOLDEN = Path(__file__).parent / "golden"
FAST = Options(iterations=3, timeout_s=60, first_ever=False, gate=Gate(patience_s=0))


@pytest.fixture
def iphone(tmp_path, monkeypatch):
    phone = IPhone(tmp_path / "iphone")
    monkeypatch.setenv("HANDHELD_XCRUN", str(phone.xcrun))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ios, "POLL_S", 0.1)
    return phone


@pytest.fixture
def sample(tmp_path):
    return samples.write_bundle(tmp_path / "sample")


def device():
    (found,) = devices.find("ios")
    return found


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_devices_of_every_version(iphone, version):
    iphone.set(version=version)
    found = device()
    facts = found.facts()
    assert found.serial == UDID
    assert (facts.model, facts.soc) == ("iPhone 15 Pro (iPhone16,1)", "A17 Pro")
    assert (facts.os, facts.os_build) == ("iOS 18.1", "22B83")
    assert (facts.ram_bytes, facts.free_bytes, facts.cores) == (8 * 10**9, 90 * 10**9, 6)
    assert facts.engines == {"litert": "2.3.0", "coreml": "18.1"}
    assert (found.heat().status, found.heat().battery_percent) == (0, 77)
    assert UDID not in facts.model_dump_json()


@pytest.mark.parametrize(
    ("state", "what", "remedy"),
    [
        ({"properties": {"developerModeStatus": "disabled"}}, "Developer Mode is off", "Settings"),
        ({"connection": {"pairingState": "unpaired"}}, "is not paired", "tap Trust"),
        ({"connection": {"transportType": None}}, "is not connected", "plug it in"),
        (
            {"connection": {"tunnelState": "disconnected"},
             "properties": {"ddiServicesAvailable": False}},
            "developer services", "Xcode",
        ),
        ({"properties": {"osVersionNumber": "16.7.2"}}, "needs 17", "another phone"),
        ({"locked": True}, "is locked", "keep it unlocked"),
        ({"timeout": True}, "took too long", "Xcode that is older"),
        ({"garbage": "{"}, "is not understood", "update handheld"),
        ({"silent": True}, "answered nothing", "xcode-select"),
    ],
)  # fmt: skip
def test_what_stops_a_phone_is_said_with_its_remedy(iphone, state, what, remedy):
    iphone.set(**state)
    (obstacle,) = IosDevices().obstacles()
    assert what in obstacle.what
    assert remedy in obstacle.remedy
    assert IosDevices().attached() == []


def test_a_phone_whose_app_is_missing_or_in_use_tells_less(iphone, sample):
    iphone.set(not_installed=True)
    facts = device().facts()
    assert (facts.soc, facts.ram_bytes, facts.engines) == ("A17 Pro", None, {})
    iphone.set(thermal=3)
    one = device()
    with one.prepare(sample):
        launched = len(iphone.calls())
        other = device()
        assert other.facts().ram_bytes is None
        assert other.heat().status is None
        assert not any("launch" in call for call in iphone.calls()[launched:]), "it would end it"
    assert device().heat().status == 4


def test_an_xcode_that_does_not_know_locks(iphone):
    iphone.set(locked=True, no_values=True)
    assert IosDevices().obstacles() == []


@pytest.fixture
def linux(iphone, monkeypatch):
    """The same phone, by the program that Linux has."""
    monkeypatch.setenv("HANDHELD_XCRUN", "there-is-no-xcrun")
    monkeypatch.setenv("HANDHELD_PYMOBILEDEVICE3", str(iphone.pmd))
    return iphone


def test_a_phone_on_linux(linux):
    found = device()
    facts = found.facts()
    assert found.serial == UDID
    assert (facts.soc, facts.os, facts.os_build) == ("A17 Pro", "iOS 18.1", "22B83")
    assert (facts.model, facts.ram_bytes) == ("iPhone16,1", 8 * 10**9)
    assert facts.transport == "pymobiledevice3"
    assert UDID not in facts.model_dump_json()


@pytest.mark.parametrize(
    ("state", "what", "remedy"),
    [
        ({"garbage": "no devices"}, "is not understood", "update"),
        ({"garbage": "{}"}, "is not understood", "update"),
        ({"fails": "Failed to connect to usbmuxd socket."}, "usbmuxd", "start usbmuxd"),
        ({"fails": "Device is not paired"}, "not paired", "tap Trust"),
        ({"fails": "Developer Mode is disabled."}, "disabled", "Settings"),
        ({"fails": ""}, "failed", "unlock"),
        ({"developer_mode": False}, "Developer Mode is off", "Settings"),
        ({"locked": True}, "is locked", "keep it unlocked"),
        ({"unmounted": True}, "developer services", "mounter auto-mount"),
        ({"unpaired": True}, "does not trust", "tap Trust"),
        ({"ios": "16.7.2"}, "needs 17", "another phone"),
        ({"phone_fails": "The user refused to trust this computer."}, "refused", "tap Trust"),
        ({"phone_fails": "The device no longer accepts this computer's pairing record. Pair it "
          "again."}, "no longer accepts", "lockdown pair"),
        ({"phone_fails": "Device is password protected. Please unlock and retry."},
         "password protected", "unlock"),
        ({"recovery": "Incorrect mode returned."}, "Incorrect mode", "unlock"),
        ({"developer_mode": "so?"}, "is not understood", "update"),
    ],
)  # fmt: skip
def test_what_stops_a_phone_on_linux(linux, monkeypatch, state, what, remedy):
    monkeypatch.setattr("handheld.devices.pymobiledevice3.ASK_S", 1.0)
    linux.set(**state)
    (obstacle,) = IosDevices().obstacles()
    assert what in obstacle.what
    assert remedy in obstacle.remedy
    assert IosDevices().attached() == []


def test_a_phone_that_stops_is_told_by_its_serial(linux):
    linux.set(locked=True)
    with pytest.raises(DeviceError, match="is locked"):
        devices.find(UDID)
    # One that does not say so is found out when the app is started.
    linux.set(locked=True, no_values=True)
    assert devices.find(UDID)


@pytest.mark.parametrize("on", ["mac", "linux"])
def test_a_phone_that_is_back(iphone, monkeypatch, on):
    if on == "linux":
        monkeypatch.setenv("HANDHELD_XCRUN", "there-is-no-xcrun")
        monkeypatch.setenv("HANDHELD_PYMOBILEDEVICE3", str(iphone.pmd))
    found = device()
    found.contact()
    for state, message in (
        ({"connection": {"transportType": None}, "gone": True}, "not connected"),
        ({"properties": {"developerModeStatus": "disabled"}, "developer_mode": False}, "is off"),
        ({"fails": "Failed to connect to usbmuxd socket.", "silent": True}, "xcode-select|usbmuxd"),
    ):
        iphone.set(**state)
        with pytest.raises(DeviceError, match=message):
            found.contact()


def test_a_fleet_waits_for_a_phone_to_be_back(linux, monkeypatch, tmp_path, sample):
    monkeypatch.setattr(fleet, "POLL_S", 0.05)
    table = fleet.Matrix(devices=("ios",), bundles=({"path": str(sample.path)},), return_s=30)
    runner = fleet.Fleet(table, tmp_path, tmp_path / "records.jsonl")
    phone = device()
    linux.set(gone=True)
    timer = threading.Timer(1.0, linux.set)
    timer.start()
    began = time.monotonic()
    assert runner._back(phone)
    assert time.monotonic() - began > 0.9
    linux.set(gone=True)
    runner.matrix = table.model_copy(update={"return_s": 0.0})
    assert not runner._back(phone)


@pytest.mark.slow
def test_a_fleet_goes_on_until_the_app_has_other_engines(iphone, tmp_path, sample):
    table = fleet.Matrix(
        devices=("ios",),
        bundles=({"path": str(sample.path), "residency": ("resident", "stream")},),
        options={"iterations": 2, "precision": None, "first_ever": False},
        gate={"cooldown_s": 0},
    )

    def run():
        return [r.outcome for r in fleet.Fleet(table, tmp_path, tmp_path / "runs.jsonl").run()]

    assert run() == ["done", "done"]
    assert run() == ["already", "already"]
    iphone.set(engines={"litert": "2.4.0"})
    assert run() == ["done", "done"]
    assert iphone.left() == []


def test_one_handheld_at_a_time(iphone, sample):
    one, other = device(), device()
    with (
        one.prepare(sample),
        pytest.raises(DeviceBusyError, match="another handheld"),
        other.prepare(sample),
    ):
        pass
    with other.prepare(sample):
        pass


def test_packed_weights_are_gone_when_that_is_said(iphone, sample):
    """Whatever the app takes to start: the next start would end it."""
    iphone.set(launch_s=0.6)
    with device().prepare(sample) as place:
        kept = iphone.files / ios._weights("a")
        other = iphone.files / ios._weights("b")
        for folder in (kept, other):
            folder.mkdir(parents=True)
            (folder / "packed").touch()
        place.forget_cache("a")
        assert (kept.exists(), other.exists()) == (False, True)


def test_a_program_that_hangs_is_ended(linux, monkeypatch):
    monkeypatch.setattr("handheld.devices.pymobiledevice3.CALL_S", 0.3)
    linux.set(hang=True)
    (obstacle,) = IosDevices().obstacles()
    assert "did not answer" in obstacle.what
    assert obstacle.remedy


@pytest.mark.slow
def test_a_whole_job_on_linux(linux, sample, tmp_path, monkeypatch):
    app = tmp_path / "Bench; rm -rf $HOME.app"
    app.mkdir()
    monkeypatch.setenv("HANDHELD_IOS_APP", str(app))
    linux.set(not_installed=True)
    record = bench.run(sample, device(), Options(iterations=3, timeout_s=60))
    assert (record.status, record.error) == ("ok", None)
    assert record.check.psnr_db == 999.0
    assert record.transfer.bytes > 0
    assert bench.run(sample, device(), FAST).transfer.bytes == 0
    assert linux.left() == []
    linux.set(harness="die")
    assert "ended before its job was done" in bench.run(sample, device(), FAST).error


def test_simulators_and_watches_are_no_phones(iphone):
    iphone.set(hardware={"reality": "virtual"})
    assert IosDevices().attached() == []
    iphone.set(hardware={"platform": "watchOS"})
    assert IosDevices().attached() == []


@pytest.mark.slow
def test_a_whole_job_and_a_second_that_sends_nothing(iphone, sample):
    found = device()
    record = bench.run(sample, found, Options(iterations=3, timeout_s=60))
    assert (record.status, record.error) == ("ok", None)
    assert [p.purpose for p in record.passes] == ["first-ever", "latency", "memory"]
    assert record.passes[0].loads[0].cache == "built"
    assert record.passes[1].loads[0].cache == "hit"
    assert record.check.psnr_db == 999.0
    assert record.heat_start.battery_percent == 77
    assert record.transfer.bytes > 0
    again = bench.run(sample, found, FAST)
    assert again.transfer.bytes == 0
    assert again.status == "ok"
    assert iphone.left() == []
    assert all(isinstance(call, list) for call in iphone.calls())


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_whole_job_of_every_version_after_a_failed_start(iphone, sample, version):
    iphone.set(version=version, not_installed=True)
    with pytest.raises(DeviceError, match="HANDHELD_IOS_APP"):
        bench.run(sample, device(), FAST)
    iphone.set(version=version)
    record = bench.run(sample, device(), FAST)
    assert (record.status, record.error, record.check.psnr_db) == ("ok", None, 999.0)
    assert iphone.left() == []


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"gone": True}, "not connected"),
        ({"killed": True}, "ended before its job was done"),
        ({"silent": True}, "answered nothing"),
        ({"garbage": '{"info": {"outcome": "maybe"}}'}, "is not understood"),
        ({"timeout": True}, "took too long"),
        ({"hang": True}, "did not answer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_faults_in_the_midst_of_a_run(iphone, sample, monkeypatch, version, fault, message):
    if "hang" in fault:
        for name in ("CALL_S", "INSTALL_S"):
            monkeypatch.setattr(devicectl, name, 3.0)

    def strike(purpose, event):
        if event is not None and event.event == "iteration":
            iphone.set(version=version, harness="hang", **fault)
            if "killed" in fault:
                for pid in iphone.running():
                    os.killpg(pid, signal.SIGKILL)

    iphone.set(version=version, harness="hang")
    found = device()
    record = bench.run(sample, found, FAST, progress=strike)
    assert (record.status, message in record.error) == ("partial", True), record.error
    assert [len(p.iterations) for p in record.passes] == [1]
    iphone.set(version=version)
    assert bench.run(sample, found, FAST).status == "ok"
    assert iphone.left() == []
    assert iphone.is_idle()


@pytest.mark.slow
@pytest.mark.parametrize("copies", [0, 1, 2, 3])
def test_unplugged_while_files_are_sent(iphone, sample, copies):
    found = device()
    iphone.set(gone_after_copies=copies)
    kept = []
    with pytest.raises(DeviceError, match="not connected"):
        bench.run(sample, found, FAST, keep=kept.append)
    assert [(r.status, r.passes) for r in kept] == [("failed", ())]
    iphone.set()
    record = bench.run(sample, found, FAST)
    assert record.status == "ok"
    # What had arrived is not sent again.
    assert (record.transfer.files, record.transfer.kept_files) == (4 - copies, copies)
    assert iphone.left() == []


@pytest.mark.slow
def test_storage_that_fills_while_files_are_sent(iphone, sample):
    iphone.set(room=100)
    kept = []
    with pytest.raises(DeviceError, match="free some space"):
        bench.run(sample, device(), FAST, keep=kept.append)
    assert [(r.status, r.passes) for r in kept] == [("failed", ())]
    iphone.set()
    assert bench.run(sample, device(), FAST).status == "ok"
    assert iphone.left() == []


@pytest.mark.slow
def test_a_hot_iphone_is_waited_for_or_marked(iphone, sample, monkeypatch):
    monkeypatch.setattr("handheld.thermal_gate.POLL_S", 0.2)
    iphone.set(thermal=2)
    hot = bench.run(sample, device(), FAST)
    assert (hot.gate.passed, hot.throttled, hot.heat_start.status) == (False, True, 3)

    def cool(text):
        if text.startswith("waiting for"):
            iphone.set()

    options = FAST.model_copy(update={"gate": Gate(patience_s=120)})
    record = bench.run(sample, device(), options, notice=cool)
    assert (record.gate.passed, record.gate.waited_for) == (True, ("thermal status 3",))
    assert (record.status, record.throttled) == ("ok", False)


@pytest.mark.slow
def test_a_picture_from_a_prompt(iphone, sample, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "handheld", "generate", sample.path, samples.PROMPT,
         "--device", UDID, "--seed", "5", "-o", tmp_path / "out.png", "--json"],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["device"] == device().id
    with Image.open(tmp_path / "out.png") as picture:
        assert (np.asarray(picture) == samples.picture()[0]).all()
    assert iphone.left() == []
    iphone.set(locked=True)
    locked = subprocess.run(
        [sys.executable, "-m", "handheld", "generate", sample.path, samples.PROMPT,
         "--device", UDID, "-o", tmp_path / "none.png"],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ,
    )  # fmt: skip
    assert (locked.returncode, (tmp_path / "none.png").exists()) == (2, False)
    assert "unlock it" in locked.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harness", "status", "message"),
    [
        ("wrong", "failed", "the picture is wrong"),
        ("die", "partial", "ended before its job was done"),
        ("bundle", "failed", "is not a flatbuffer"),
        ("protocol", "failed", "install an app of the same version"),
    ],
)
def test_what_goes_wrong_is_recorded(iphone, sample, harness, status, message):
    iphone.set(harness=harness)
    record = bench.run(sample, device(), FAST)
    assert (record.status, message in record.error) == (status, True), record.error


@pytest.fixture
def packages(tmp_path):
    """A bundle for Core ML, whose reference holds what its call gives."""
    return Bundle.open(shutil.copytree(GOLDEN / "packages", tmp_path / "packages"))


@pytest.mark.slow
def test_a_package_is_whole_on_the_phone(iphone, packages):
    record = bench.run(packages, device(), FAST)
    assert (record.status, record.error, record.check.psnr_db) == ("ok", None, 999.0)
    there = iphone.folder / "bundle-of-the-last-job"
    opened = [packages.path / MANIFEST, packages.file(packages.manifest.constants)]
    opened += [packages.file(ref) for ref in packages.manifest.artifacts[0].files]
    wanted = {p.relative_to(packages.path): p.read_bytes() for p in opened}
    found = {p.relative_to(there): p.read_bytes() for p in there.rglob("*") if p.is_file()}
    assert found == wanted
    # Equal files are sent once.
    assert record.transfer.files == len({ref.sha256 for _, ref in references(packages.manifest)})
    assert iphone.left() == []


@pytest.mark.slow
def test_the_first_wrong_segment_is_named(iphone, packages):
    iphone.set(harness="wrong")
    record = bench.run(packages, device(), FAST)
    assert record.status == "failed"
    assert "the first segment that went wrong is 'unet.0' (call 0, 0.0 dB" in record.error
    assert record.passes[-1].purpose == "diagnosis"
    assert iphone.left() == []


@pytest.mark.slow
def test_more_events_than_can_be_read(iphone, sample, monkeypatch):
    monkeypatch.setattr(ios, "MAX_EVENTS_BYTES", 300)
    record = bench.run(sample, device(), FAST)
    assert "of events" in record.error
    assert len(iphone.terminated()) == 1
    assert iphone.is_idle()


@pytest.mark.slow
def test_an_app_that_hangs_is_ended(iphone, sample):
    iphone.set(harness="hang")
    record = bench.run(sample, device(), Options(timeout_s=3, first_ever=False))
    assert record.status == "partial"
    assert "longer than 3 s" in record.error
    assert len(iphone.terminated()) == 1
    assert iphone.is_idle()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"locked": True}, "unlock the phone"),
        ({"untrusted": True}, "trust the developer"),
        ({"gone": True}, "plug it in"),
        ({"not_installed": True}, "HANDHELD_IOS_APP"),
        ({"free": 10}, "free some space"),
        ({"flip": True}, "changed on its way"),
    ],
)
def test_what_keeps_a_bundle_from_the_phone(iphone, sample, monkeypatch, state, message):
    found = device()
    iphone.set(**state)
    monkeypatch.delenv("HANDHELD_IOS_APP", raising=False)
    with pytest.raises(DeviceError) as e:
        bench.run(sample, found, FAST)
    assert message in str(e.value)


@pytest.mark.slow
def test_the_app_is_installed_if_it_is_missing(iphone, sample, monkeypatch, tmp_path):
    (tmp_path / "Bench.app").mkdir()
    monkeypatch.setenv("HANDHELD_IOS_APP", str(tmp_path / "Bench.app"))
    iphone.set(not_installed=True)
    assert bench.run(sample, device(), FAST).status == "ok"


@pytest.mark.slow
def test_a_copy_that_times_out_once_is_made_again(iphone, sample):
    iphone.set(copy_timeout=True)
    assert bench.run(sample, device(), FAST).status == "ok"
    assert (iphone.folder / "timed-out").exists()


def test_a_devicectl_that_hangs(iphone):
    iphone.set(hang=True)
    with pytest.raises(DeviceError, match="did not answer"):
        devicectl.call(["list", "devices"], timeout_s=0.5)


def test_causes_are_found_at_any_depth():
    inner = {"domain": "NSPOSIXErrorDomain", "code": 60, "userInfo": {}}
    middle = {"domain": "x", "code": 1, "userInfo": {"NSUnderlyingError": {"error": inner}}}
    envelope = devicectl.read(
        json.dumps(
            {
                "info": {"outcome": "failed"},
                "error": {"domain": CORE, "code": 7000,
                          "userInfo": {"NSLocalizedDescription": {"string": "no"},
                                       "NSUnderlyingError": {"error": middle}}},
            }
        ).encode()
    )  # fmt: skip
    with pytest.raises(DevicectlError) as e:
        devicectl.result(envelope)
    assert e.value.causes == [(CORE, 7000), ("x", 1), ("NSPOSIXErrorDomain", 60)]
    assert e.value.remedy


@pytest.mark.parametrize("name", envelopes.SUCCESSES)
def test_every_success_is_read(name):
    for tree in envelopes.versions(envelopes.SUCCESSES[name]):
        found = devicectl.result(devicectl.read(json.dumps(tree).encode()))
        assert found == tree.get("result", {})
        obstacles = [devicectl.obstacle(d) for d in devicectl.parse_devices(found)]
        told = [o.what if o else None for o in obstacles]
        if name == "list":
            assert told == [None, "is not connected", "is not paired", None]
            listed = devicectl.parse_devices(found)
            assert [d.hardware.product_type for d in listed if devicectl._is_phone(d)] == [
                "iPhone16,1"
            ] * 3
        else:
            assert told == []
        if name == "launch":
            assert devicectl.parse_process(found).pid == 4711
        assert devicectl.parse_processes(found) == ({1, 4711} if name == "processes" else set())
        assert devicectl.is_passcode_required(found) == (name == "lock-state")


@pytest.mark.parametrize(
    ("name", "cause", "remedy"),
    [
        ("not-connected", (CORE, 1011), "plug it in"),
        ("no-such-device", (CORE, 1000), None),
        ("vanished", (CORE, 1), "plug the phone in again"),
        ("locked", (envelopes.BOARD, 7), "unlock the phone"),
        ("untrusted", (envelopes.BOARD, 3), "trust the developer"),
        ("not-installed", (envelopes.SERVICE, 1), None),
        ("no-file", (CORE, 7000), "check that the file is there"),
        ("copy-timed-out", ("NSPOSIXErrorDomain", 60), "check that the file is there"),
        ("full", ("NSPOSIXErrorDomain", 28), "free some space"),
        ("renamed-field", (CORE, 28001), "update handheld"),
        ("lock-state", ("com.apple.mobiledevice", -402653181), None),
        ("install", ("MIInstaller", 13), None),
        ("plain-text", (CORE, 7000), "check that"),
        ("no-user-info", (CORE, 7000), "check that"),
        ("no-error", None, "update it"),
        ("timeout", None, "update it"),
    ],
)
def test_every_failure_is_read(name, cause, remedy):
    for tree in envelopes.versions(envelopes.FAILURES[name]):
        with pytest.raises(DevicectlError) as e:
            devicectl.result(devicectl.read(json.dumps(tree).encode()))
        assert cause is None or e.value.caused_by(*cause)
        assert e.value.message
        assert (remedy or "") in (e.value.remedy or "")
    assert set(envelopes.FAILURES) == {
        mark.args[1][i][0]
        for mark in test_every_failure_is_read.pytestmark
        for i in range(len(mark.args[1]))
    }


EVENTS = [
    {"event": "hello", "t_ms": 0.1, "protocol": 1, "harness": "1", "pid": 7,
     "engines": {"coreml": "18.1"}, "platform": "ios-arm64", "base_rss_bytes": 5},
    {"event": "plan", "t_ms": 1, "resident": ["a"], "streamed": [], "prefetch": True,
     "peak_bytes": 1, "budget_bytes": 2},
    {"event": "load", "t_ms": 1, "artifact": "a", "ms": 1.5, "cache": "built",
     "units": {"npu": 3, "cpu": 1}},
    {"event": "iteration", "t_ms": 1, "index": 0, "kind": "first", "total_ms": 1, "engine_ms": 1,
     "load_ms": 0, "calls_ms": [0.5, 0.5]},
    {"event": "memory", "t_ms": 1, "phase": "end", "rss": 1, "peak_rss": 2, "anon": 1, "file": 1,
     "swap": None, "phys_footprint": 3, "phys_footprint_peak": 4, "dma_buf": None},
    {"event": "thermal", "t_ms": 1, "status": 3},
    {"event": "output", "t_ms": 2, "role": "picture", "sha256": "0", "shape": [1], "dtype": "u",
     "file": "picture.raw", "psnr_db": 41.5},
    {"event": "error", "t_ms": 2, "code": "memory", "message": "x"},
    {"event": "done", "t_ms": 2, "iterations": 7},
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def mutated(trees):
    """Documents with one value replaced, or some bytes."""

    @st.composite
    def build(draw):
        tree = json.loads(json.dumps(draw(st.sampled_from(trees))))
        place = tree
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            place[key] = draw(JSON)
            break
        data = bytearray(json.dumps(tree).encode())
        for _ in range(draw(st.integers(0, 3))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)

    return build()


def read_all(data):
    try:
        found = devicectl.result(devicectl.read(data))
    except HandheldError:
        return
    for item in devicectl.parse_devices(found):
        devicectl.obstacle(item)
    devicectl.parse_processes(found)
    devicectl.is_passcode_required(found)
    try:
        devicectl.parse_process(found)
    except HandheldError:
        return


# The full figure:  pytest tests/test_ios.py -k mutated --hypothesis-profile full --timeout 0
@given(mutated(envelopes.ALL))
def test_mutated_envelopes_give_errors_of_ours(data):
    read_all(data)


@given(mutated(EVENTS))
def test_mutated_events_are_read_or_passed_over(data):
    event = process.parse(data)
    if event is not None:
        # What was read can be written into a record.
        json.dumps(event.model_dump(mode="json"), ensure_ascii=False, allow_nan=False).encode()


REPORTS = [
    {"objects": {"00": 7}, "engines": {"coreml": "18.1"}, "ram_bytes": 8, "free_bytes": 9,
     "cores": 6, "thermal": 0, "battery_percent": 77, "charging": True},
    {},
]  # fmt: skip


@given(mutated(REPORTS))
def test_mutated_reports_of_the_app_give_errors_of_ours(data):
    class Phone(Pymobiledevice3):
        def launch(self, app, arguments):
            return 7

        def copy_from(self, app, source, target):
            target.write_bytes(data)
            return True

    phone = ios.IosDevice(Phone(pymobiledevice3.Listed(UniqueDeviceID=UDID)))
    with mock.patch.object(ios.lock, "held", return_value=contextlib.nullcontext()):
        record = phone.facts()
        phone.heat()
    json.dumps(record.model_dump(mode="json"), ensure_ascii=False, allow_nan=False).encode()


ANSWERS = [
    [{"UniqueDeviceID": UDID, "DeviceClass": "iPhone", "ProductType": "iPhone16,1",
      "ProductVersion": "18.1", "BuildVersion": "22B83"}],
    [UDID, UDID],
    {"dev.handheld.bench": {"CFBundleName": "Bench"}},
    [{"DiskImageType": "Personalized", "ImageSignature": "00ff"}],
    [True],
]  # fmt: skip
SAID = [
    "Process launched with pid 7",
    "2026-01-01 host pymobiledevice3[1] ERROR Device is not paired.\nINFO Run again with -v",
    "No such file on the device: x (AFC status OBJECT_NOT_FOUND).",
    "true",
    "",
]


@given(
    out=mutated(ANSWERS) | st.sampled_from([s.encode() for s in SAID]) | st.binary(max_size=60),
    err=st.sampled_from(SAID) | st.text(max_size=60),
    code=st.sampled_from([0, 0, 1, 2, -9]),
)
def test_mutated_answers_of_pymobiledevice3_give_errors_of_ours(tmp_path_factory, out, err, code):
    ended = programs.Ended(code, out.decode(errors="replace"), err)
    phone = Pymobiledevice3(pymobiledevice3.Listed(UniqueDeviceID=UDID))
    missing = tmp_path_factory.getbasetemp() / "missing"
    with (
        mock.patch.object(programs, "call", return_value=ended),
        mock.patch.object(pymobiledevice3, "program", return_value="/none"),
    ):
        for ask in (
            lambda: [p.obstacle() for p in pymobiledevice3.phones()],
            lambda: phone.launch("dev.handheld.bench", ["--job", "runs/a b"]),
            lambda: phone.is_running(7),
            lambda: phone.copy_from("dev.handheld.bench", "x", missing),
        ):
            with contextlib.suppress(HandheldError):
                ask()
        assert phone.obstacle() is None or phone.obstacle().device == UDID
