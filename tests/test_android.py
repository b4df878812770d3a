"""The Android driver: what phones print, and whole runs on a test phone with the real adb."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import lab
import samples
from handheld import bench, devices, fleet, kit, records
from handheld.bench import Options
from handheld.devices import adb, android, process
from handheld.devices.adb import Server
from handheld.devices.android import AndroidDevices
from handheld.errors import DeviceBusyError, DeviceError, HarnessError
from handheld.protocol import Hello
from handheld.thermal_gate import Gate
from phone import PROFILES

FAST = Options(iterations=3, timeout_s=60, first_ever=False)
needs_adb = pytest.mark.skipif(shutil.which("adb") is None, reason="apt install adb")

THERMAL = """@thermal
IsStatusOverride: false
Thermal Status: 2
Cached temperatures:
\tTemperature{mValue=66.0, mType=0, mName=AP, mStatus=3}
HAL Ready: true
Current temperatures from HAL:
\tTemperature{mValue=41.25, mType=0, mName=AP, mStatus=0}
\tTemperature{mValue=-99.9, mType=3, mName=SKIN, mStatus=0}
\tTemperature{mValue=28.4, mType=2, mName=BAT, mStatus=0}
Current cooling devices from HAL:
\tCoolingDevice{mValue=90, mType=0, mName=fan}
@battery
  AC powered: false
  USB powered: true
  level: 80
  scale: 100
  voltage: 4102
  temperature: 284
  Charge counter: 3120000
  --- SamsungBattery ---
  level: 12
  temperature: 455
@load
cpu  100 0 100 800 0 0 0 0 0 0
cpu  200 0 150 1650 0 0 0 0 0 0
"""


def test_heat_is_what_is_current():
    heat = android.parse_heat(THERMAL)
    assert (heat.status, heat.celsius, heat.battery_celsius) == (2, 41.25, 28.4)
    assert (heat.battery_percent, heat.charging) == (80, True)
    assert (heat.charge_uah, heat.battery_mv) == (3120000, 4102)
    assert heat.busy == pytest.approx(0.15)


def test_what_a_phone_does_not_tell_is_none():
    heat = android.parse_heat("@thermal\n@battery\n@load\ncpu 1\n")
    assert all(v is None for v in heat.model_dump().values())


@given(st.text(max_size=400))
def test_any_answer_is_read(text):
    android.parse_heat(f"@thermal\n{text}\n@battery\n{text}\n@load\n{text}")
    android.parse_free(text)
    android.parse_cores(text)
    android.parse_meminfo(text)
    android.soc(android.parse_getprop(text))


@pytest.mark.parametrize(
    ("properties", "name"),
    [
        ({"ro.soc.manufacturer": "QTI", "ro.soc.model": "SM8650"}, "QTI SM8650"),
        ({"ro.soc.model": "unknown", "ro.board.platform": "mt6768"}, "mt6768"),
        ({"ro.hardware.chipname": "exynos990"}, "exynos990"),
        ({}, None),
    ],
)
def test_the_system_on_chip_has_several_names(properties, name):
    assert android.soc(properties) == name


def test_free_space_and_cores():
    df = "Filesystem 1K-blocks Used Available Use% Mounted on\n/dev/block/dm-48\n 9 1 2048 34% /d x"
    assert android.parse_free(df) == 2048 * 1024
    assert android.parse_free("df: no such file") is None
    assert android.parse_cores("0-7\n") == 8
    assert android.parse_cores("0-3,6") == 5
    assert android.parse_cores("9-1") is None


def test_the_manifest_on_a_phone_has_one_folder(tmp_path):
    bundle = samples.write_bundle(tmp_path / "b")
    tree = android.flattened(bundle)
    paths = [tree["artifacts"][0]["file"]["path"], tree["constants"]["path"]]
    assert paths == [
        f"objects/{bundle.manifest.artifacts[0].file.sha256}",
        f"objects/{bundle.manifest.constants.sha256}",
    ]


def test_energy_needs_a_battery_that_empties():
    before = android.parse_heat(THERMAL.replace("USB powered: true", "USB powered: false"))
    after = before.model_copy(update={"charge_uah": before.charge_uah - 10_000})
    assert bench.energy_j(before, after, 100) == pytest.approx(10_000 * 3.6e-3 * 4.102 / 100)
    assert bench.energy_j(before, before, 100) is None
    charging = before.model_copy(update={"charging": True})
    assert bench.energy_j(charging, after, 100) is None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with lab.adb_server(tmp_path_factory.mktemp("adb") / "home") as environment:
        yield environment


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    return lab.fake_kit(tmp_path_factory.mktemp("kits"))


@pytest.fixture
def sample(tmp_path):
    return samples.write_bundle(tmp_path / "sample")


@pytest.fixture
def phone(tmp_path, server, kits, monkeypatch):
    for key, value in {**server, "HANDHELD_KITS": str(kits)}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HANDHELD_FAKE", raising=False)
    with lab.make_phone(tmp_path / "phone") as made:
        lab.connect(made, server)
        yield made
        lab.disconnect(made, server)


@pytest.fixture
def device(phone):
    (found,) = devices.find("android")
    return found


def system(function):
    return pytest.mark.system(needs_adb(function))


@system
def test_facts(phone, device):
    facts = device.facts()
    assert device.serial == phone.address
    assert facts.model == "samsung SM-S921B"
    assert facts.soc == "QTI SM8650"
    assert facts.cores == 8
    assert facts.ram_bytes == 7_642_108 * 1024
    assert facts.engines == {"litert": "2.3.0"}
    assert facts.transport.startswith("adb ")
    assert "own loader" in facts.harness
    assert phone.serial not in facts.model_dump_json()
    assert device.heat().celsius == 41.2


@system
def test_a_run_and_a_second_one_that_sends_nothing(phone, device, sample):
    record = bench.run(sample, device, Options(iterations=3, timeout_s=60))
    assert (record.status, record.error) == ("ok", None)
    assert [p.purpose for p in record.passes] == ["first-ever", "latency", "memory"]
    assert record.passes[0].loads[0].cache == "built"
    assert record.passes[1].loads[0].cache == "hit"
    assert record.check.psnr_db == 999.0
    assert record.transfer.files == 7
    assert record.transfer.bytes > sample.nbytes
    again = bench.run(sample, device, FAST)
    assert again.status == "ok"
    assert (again.transfer.files, again.transfer.bytes) == (0, 0)
    assert again.transfer.kept_bytes == record.transfer.bytes
    assert phone.left() == []
    assert phone.harnesses() == []


@system
def test_only_what_changed_is_sent(phone, device, sample, tmp_path):
    bench.run(sample, device, FAST)
    other = samples.write_bundle(
        tmp_path / "other", model=sample.manifest.model.model_copy(update={"id": "other"})
    )
    assert bench.run(other, device, FAST).transfer.bytes == 0
    manifest, files = samples.content()
    files["artifacts/unet.0.tflite"] = b"another model, that is longer"
    reference = samples.ref("artifacts/unet.0.tflite", files["artifacts/unet.0.tflite"])
    artifact = manifest.artifacts[0].model_copy(update={"file": reference})
    changed = samples.bundles.write(
        manifest.model_copy(update={"artifacts": (artifact,)}), files, tmp_path / "changed"
    )
    transfer = bench.run(changed, device, FAST).transfer
    assert (transfer.files, transfer.bytes) == (1, reference.bytes)


@system
def test_hostile_names_reach_no_shell(phone, device, tmp_path):
    evil = "a b;touch owned;$(touch owned)`touch owned`'"
    sample = samples.write_bundle(tmp_path / evil)
    record = bench.run(sample, device, FAST)
    assert record.status == "ok"
    assert not list(phone.folder.rglob("owned"))
    assert not any("owned" in command for command in phone.commands)


@system
@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("wrong", "failed", "the picture is wrong"),
        ("bundle", "failed", "bundle: artifacts[0].file: is not a flatbuffer"),
        ("die", "partial", "SIGKILL, probably because memory ran out"),
        ("silent", "failed", "something broke inside"),
    ],
)
def test_what_goes_wrong_is_recorded(phone, device, sample, monkeypatch, fault, status, message):
    monkeypatch.setenv("HANDHELD_FAKE", fault)
    kept = []
    record = bench.run(sample, device, FAST, keep=kept.append)
    assert kept == [record]
    assert (record.status, message in record.error) == (status, True), record.error
    assert phone.left() == []


@system
def test_the_first_wrong_segment_is_named(phone, device, tmp_path, monkeypatch):
    monkeypatch.setenv("HANDHELD_FAKE", "wrong")
    record = bench.run(samples.write_bundle_with_calls(tmp_path / "calls"), device, FAST)
    assert record.status == "failed"
    assert "the first segment that went wrong is 'unet.0' (call 0, 0.0 dB" in record.error
    assert record.passes[-1].purpose == "diagnosis"
    assert phone.left() == []


@system
def test_a_harness_that_hangs_is_ended_on_the_phone(phone, device, sample, monkeypatch):
    monkeypatch.setattr(process, "GRACE_S", 0.5)
    monkeypatch.setenv("HANDHELD_FAKE", "hang,deaf")
    record = bench.run(sample, device, Options(timeout_s=5, first_ever=False))
    assert record.status == "partial"
    assert "longer than 5 s" in record.error
    assert phone.harnesses() == []
    assert phone.left() == []


@system
def test_unplugged_during_a_run(phone, device, sample, monkeypatch):
    monkeypatch.setenv("HANDHELD_FAKE", "hang")

    def unplug(purpose, event):
        if event is not None and event.event == "iteration":
            phone.unplug()

    start = time.monotonic()
    record = bench.run(sample, device, FAST, progress=unplug)
    assert record.status == "partial"
    assert "does not answer" in record.error
    assert time.monotonic() - start < 60
    assert phone.harnesses(), "on the phone the harness goes on"
    phone.plug()
    monkeypatch.setenv("HANDHELD_FAKE", "")
    assert bench.run(sample, device, FAST).status == "ok"
    assert phone.harnesses() == []
    assert phone.left() == []


@system
def test_unplugged_while_files_are_sent(phone, device, sample):
    phone.state.on_bytes = lambda n: (
        phone.state.__setattr__("plugged", n < 2000)
        or (n >= 2000 and [h.abort() for h in list(phone._hosts)])
    )
    kept = []
    with pytest.raises(DeviceError) as error:
        bench.run(sample, device, FAST, keep=kept.append)
    (failed,) = kept
    assert (failed.status, failed.error) == ("failed", str(error.value))
    assert (failed.passes, failed.transfer) == ((), None)
    assert failed.device.model == "samsung SM-S921B"
    phone.state.on_bytes = None
    phone.plug()
    record = bench.run(sample, device, FAST)
    assert record.status == "ok"
    assert phone.left() == []


@system
def test_a_restart_during_a_run(phone, device, sample, monkeypatch):
    monkeypatch.setenv("HANDHELD_FAKE", "hang")

    def restart(purpose, event):
        if event is not None and event.event == "iteration":
            phone.reboot()

    record = bench.run(sample, device, FAST, progress=restart)
    assert record.status == "partial"
    assert "restarted" in record.error or "does not answer" in record.error


@system
def test_a_full_phone(phone, device, sample):
    phone.state.capacity = phone.used() + android.SPARE_BYTES // 2
    with pytest.raises(DeviceError, match="MB free, the bundle needs"):
        bench.run(sample, device, FAST)
    assert phone.left() == []


@system
def test_the_phone_fills_while_files_are_sent(phone, device, sample, monkeypatch):
    monkeypatch.setattr(android, "SPARE_BYTES", 0)
    monkeypatch.setattr(android, "parse_free", lambda text: None)
    phone.state.capacity = phone.used() + 3000
    kept = []
    with pytest.raises(DeviceError, match="storage is full"):
        bench.run(sample, device, FAST, keep=kept.append)
    assert [r.status for r in kept] == ["failed"]
    assert "storage is full" in kept[0].error
    assert phone.left() == []


@system
def test_a_hot_phone_is_waited_for_or_marked(phone, device, sample, monkeypatch):
    monkeypatch.setattr("handheld.thermal_gate.POLL_S", 0.2)
    phone.state.thermal = 3

    def cool(text):
        if text.startswith("waiting for"):
            phone.state.thermal = 0

    record = bench.run(sample, device, FAST, notice=cool)
    assert record.gate.passed
    assert record.gate.waited_for == ("thermal status 3",)
    assert record.throttled is False
    phone.state.thermal = 3
    hot = bench.run(
        sample, device, Options(iterations=1, first_ever=False, gate=Gate(patience_s=0.3))
    )
    assert not hot.gate.passed
    assert hot.throttled is True


@system
@pytest.mark.parametrize("moment", [0.1, 0.6])
def test_heat_that_passes_while_a_phone_is_measured_is_seen(
    phone, device, sample, monkeypatch, moment
):
    monkeypatch.setattr("handheld.bench.WATCH_S", 0.1)
    monkeypatch.setenv("HANDHELD_FAKE", "slow")
    spells = []

    def see(purpose, event):
        if isinstance(event, Hello) and purpose == "latency":
            for seconds, status in ((moment, 3), (moment + 0.5, 0)):
                spells.append(threading.Timer(seconds, setattr, (phone.state, "thermal", status)))
                spells[-1].start()

    options = Options(iterations=5, first_ever=False)
    record = bench.run(sample, device, options, progress=see)
    for spell in spells:
        spell.join()
    assert record.heat_start.status == record.heat_end.status == 0
    assert record.throttled is True


@system
def test_what_ends_a_script_early_is_told(phone, device):
    told = device.phone.shell("echo before; exit 3; echo after")
    assert (told.code, told.text.strip()) == (3, "before")


@system
def test_machines_take_turns_on_a_phone(phone, device, sample):
    lock = phone.storage / "handheld" / "lock"
    boot = (phone.system / "boot_id").read_text().strip()
    lock.mkdir(parents=True)
    (lock / "owner").write_text(f"another {boot}\n")
    kept = []
    with pytest.raises(DeviceError, match="another machine is using this phone"):
        bench.run(sample, device, FAST, keep=kept.append)
    assert kept == [], "nothing was tried"
    assert (lock / "owner").is_file(), "its lock stays"
    (lock / "owner").write_text("")
    with pytest.raises(DeviceBusyError):
        bench.run(sample, device, FAST)
    for left_over in (f"{android.owner()} {boot}", "another from-before-a-restart"):
        lock.mkdir(exist_ok=True)
        (lock / "owner").write_text(f"{left_over}\n")
        assert bench.run(sample, device, FAST).status == "ok"
        assert phone.left() == [] and not lock.exists()
    lock.mkdir()
    (lock / "owner").write_text(f"another {boot}\n")
    gone = time.time() - android.LOCK_S - 5
    os.utime(lock, (gone, gone))
    assert bench.run(sample, device, FAST).status == "ok"


@system
def test_a_slow_link(phone, device, sample, monkeypatch):
    phone.state.bytes_per_s = 20_000
    assert bench.run(sample, device, FAST).status == "ok"
    shutil.rmtree(phone.storage / "handheld")
    phone.state.bytes_per_s = 200
    monkeypatch.setattr(adb, "CALL_S", 1.0)
    monkeypatch.setattr(adb, "SLOWEST_BYTES_PER_S", 10_000)
    kept = []
    with pytest.raises(DeviceError, match="did not answer within"):
        bench.run(sample, device, FAST, keep=kept.append)
    assert [(r.status, r.passes) for r in kept] == [("failed", ())]
    monkeypatch.undo()
    phone.state.bytes_per_s = None


@system
def test_a_phone_that_falls_silent_during_a_run(phone, device, sample, server, monkeypatch):
    """Its connection stays, and it answers nothing."""
    monkeypatch.setattr(process, "PROBE_S", 0.5)
    monkeypatch.setenv("HANDHELD_FAKE", "hang")
    real = Server.call

    def hasty(self, *words, timeout_s=1.0):
        return real(self, *words, timeout_s=min(timeout_s, 1.0))

    def fall_silent(purpose, event):
        if event is not None and event.event == "iteration":
            phone.state.deaf = True
            monkeypatch.setattr(Server, "call", hasty)

    start = time.monotonic()
    record = bench.run(sample, device, FAST, progress=fall_silent)
    assert (record.status, len(record.passes[-1].iterations)) == ("partial", 1)
    assert "did not answer" in record.error
    assert time.monotonic() - start < 60
    monkeypatch.setattr(Server, "call", real)
    monkeypatch.setenv("HANDHELD_FAKE", "")
    phone.state.deaf = False
    lab.disconnect(phone, server)
    lab.connect(phone, server)
    assert bench.run(sample, device, FAST).status == "ok"
    assert (phone.left(), phone.harnesses()) == ([], [])


@system
@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_is_set_during_a_run(phone, device, sample, days):
    def reset(purpose, event):
        if event is not None and event.event == "iteration":
            phone.state.clock_offset_s = days * 86400

    record = bench.run(sample, device, FAST, progress=reset)
    assert (record.status, record.error) == ("ok", None)
    assert record.finished - record.started < datetime.timedelta(minutes=5)
    assert phone.left() == []
    again = bench.run(sample, device, FAST)
    assert (again.status, again.transfer.bytes) == ("ok", 0)


@system
def test_two_servers_are_one_fleet(phone, server, sample, tmp_path, monkeypatch):
    """As in a lab whose phones hang on several machines, one of which is down."""
    sockets = [f"tcp:127.0.0.1:{server['ANDROID_ADB_SERVER_PORT']}"]
    monkeypatch.setenv(adb.SERVERS, "")
    with (
        lab.adb_server(tmp_path / "home") as other,
        lab.make_phone(tmp_path / "other", "older", serial="OTHER") as second,
    ):
        lab.connect(second, other)
        sockets.append(f"tcp:127.0.0.1:{other['ANDROID_ADB_SERVER_PORT']}")
        down = f"tcp:127.0.0.1:{lab.free_port()}"
        table = fleet.Matrix(
            devices=("android",),
            bundles=({"path": str(sample.path)},),
            adb_servers=(*sockets, down),
            options={"iterations": 2, "precision": None, "first_ever": False},
        )
        file = tmp_path / "records.jsonl"
        results = fleet.Fleet(table, tmp_path, file).run()
        assert sorted(r.outcome for r in results) == ["done", "done", "missing"]
        assert next(r for r in results if r.outcome == "missing").device == down
        models = {r.device.model for r in records.read(file)}
        assert models == {"samsung SM-S921B", "Xiaomi Redmi Note 9"}
        assert phone.left() == second.left() == []
        # The variable of adb's own names one server.
        monkeypatch.setenv(adb.SERVERS, "")
        monkeypatch.setenv("ADB_SERVER_SOCKET", sockets[1])
        (found,) = devices.find("android")
        assert found.serial == second.address


@system
def test_what_an_unplugged_phone_kept_goes_at_the_next_contact(phone, device, sample, server):
    with device.prepare(sample):
        phone.unplug()
    assert phone.left() != []
    phone.plug()
    lab.connect(phone, server)
    device.tidy()
    assert phone.left() == []
    lock = phone.storage / "handheld" / "lock"
    lock.mkdir()
    (lock / "owner").write_text("another machine's\n")
    device.tidy()
    assert lock.is_dir()


@system
def test_a_phone_without_exit_codes(tmp_path, server, kits, monkeypatch, sample):
    for key, value in {**server, "HANDHELD_KITS": str(kits)}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with lab.make_phone(tmp_path / "old", "older", serial="OLD") as phone:
        phone.state.shell_v2 = False
        phone.state.clock_offset_s = -40 * 365 * 86400
        lab.connect(phone, server)
        (device,) = devices.find("android")
        assert device.facts().soc == "mt6768"
        record = bench.run(sample, device, FAST)
        assert (record.status, record.error) == ("ok", None)
        lab.disconnect(phone, server)


@system
def test_what_stops_a_phone_is_said_with_its_remedy(tmp_path, server, kits, monkeypatch):
    for key, value in {**server, "HANDHELD_KITS": str(kits)}.items():
        monkeypatch.setenv(key, value)
    with lab.make_phone(tmp_path / "p", serial="SHY") as phone:
        phone.state.authorized = False
        lab.connect(phone, server)
        found = [o for o in AndroidDevices().obstacles() if o.device == phone.address]
        assert "not allowed in" in found[0].what or "offline" in found[0].what, found
        with pytest.raises(DeviceError):
            devices.find(phone.address)
        done = subprocess.run(
            [sys.executable, "-m", "handheld", "devices", "--json"],
            capture_output=True, text=True, timeout=60, check=True, env=os.environ,
        )  # fmt: skip
        assert phone.address in {o["device"] for o in json.loads(done.stdout)["obstacles"]}
        lab.disconnect(phone, server)


@system
def test_a_picture_from_a_prompt(phone, device, sample, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "handheld", "generate", sample.path, samples.PROMPT,
         "--device", device.serial, "--seed", "5", "-o", tmp_path / "out.png", "--json"],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["device"], told["width"]) == (device.id, 16)
    with Image.open(tmp_path / "out.png") as picture:
        assert (np.asarray(picture) == samples.picture()[0]).all()
        assert picture.text["prompt"] == samples.PROMPT
    assert phone.left() == []


@system
def test_no_harness_for_this_phone(phone, monkeypatch, tmp_path, sample):
    monkeypatch.setenv("HANDHELD_KITS", str(tmp_path / "none"))
    (device,) = devices.find("android")
    assert device.facts().engines == {}
    told = AndroidDevices().obstacles()
    (obstacle,) = (o for o in told if o.device == device.serial)
    assert "harness build --for linux-x86_64" in obstacle.remedy
    with pytest.raises(HarnessError, match="no harness is built"):
        bench.run(sample, device, FAST)


@system
def test_a_harness_of_other_sources(phone, monkeypatch, tmp_path, sample):
    kits = tmp_path / "kits"
    shutil.copytree(kit.folder("linux-x86_64"), kits / "linux-x86_64")
    path = kits / "linux-x86_64" / "kit.json"
    info = kit.KitInfo.model_validate_json(path.read_bytes())
    path.write_text(info.model_copy(update={"sources": "0" * 64}).model_dump_json())
    monkeypatch.setenv("HANDHELD_KITS", str(kits))
    (device,) = devices.find("android")
    with pytest.raises(HarnessError, match=r"another version's.*harness build --for linux-x86_64"):
        bench.run(sample, device, FAST)


def test_a_broken_kit(tmp_path, monkeypatch):
    monkeypatch.setenv("HANDHELD_KITS", str(tmp_path))
    assert kit.find("linux-x86_64") is None
    (tmp_path / "linux-x86_64").mkdir()
    for text in (
        "{}",
        "[",
        '{"name": "x", "engines": {}, "command": ["a"], "files": {"../a": "0"}}',
    ):
        (tmp_path / "linux-x86_64" / "kit.json").write_text(text)
        with pytest.raises(HarnessError, match="broken"):
            kit.find("linux-x86_64")


def test_profiles_name_their_processor():
    assert all("ro.product.cpu.abi" in p.properties for p in PROFILES.values())
