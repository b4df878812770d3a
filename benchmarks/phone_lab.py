"""Show what the Android driver and the fleet do, with test phones instead of phones.

Three test phones (tests/phone.py; one runs arm64 under qemu) are attached to the real adb.
A matrix of two bundles is run on them, then a fault is made at random moments, again and
again. No figure of time or memory in its records says anything about phones.

    python benchmarks/phone_lab.py matrix build/a build/b
    python benchmarks/phone_lab.py faults --times 20
    python benchmarks/phone_lab.py faults --fault unplug-push --times 5

Results are printed and written as JSON, by default to build/lab-NAME.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import lab  # noqa: E402
import samples  # noqa: E402
from handheld import __version__, bench, fleet, records, thermal_gate  # noqa: E402
from handheld.bundle import Bundle  # noqa: E402
from handheld.devices import adb, android, process  # noqa: E402
from handheld.files import write_file  # noqa: E402
from phone import Phone  # noqa: E402

LONGEST_S = 300.0
"""Whatever happens to a phone, a run must have ended after this."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", required=True)
    one = commands.add_parser("matrix", help="two bundles on three phones")
    one.add_argument("bundles", nargs="+", type=Path)
    two = commands.add_parser("faults", help="faults at random moments")
    two.add_argument("--times", type=int, default=20)
    two.add_argument("--fault", choices=sorted(FAULTS), action="append")
    two.add_argument("--seed", type=int, default=0)
    for command in (one, two):
        command.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="handheld-lab-") as name:
        result = (
            matrix(arguments, Path(name))
            if arguments.name == "matrix"
            else faults(arguments, Path(name))
        )
    result = {
        "command": sys.argv,
        "handheld": __version__,
        "adb": adb.version(shutil.which("adb") or "adb"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "seconds": round(time.monotonic() - start, 1),
        **result,
    }
    text = json.dumps(result, indent=2)
    print(text)
    output = arguments.output or ROOT / "build" / f"lab-{arguments.name}.json"
    write_file(output, text.encode())
    return 0 if result["ok"] else 1


@contextlib.contextmanager
def phones(folder: Path, profiles: list[str], **more: str) -> Iterator[tuple[list[Phone], Any]]:
    # adb gets a home of its own; what this machine has built stays where it is.
    kept = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    more = {"XDG_CACHE_HOME": kept, **more}
    with contextlib.ExitStack() as held:
        environment = held.enter_context(lab.adb_server(folder / "home"))
        held.enter_context(lab.environ({**environment, **more}))
        made = [
            held.enter_context(lab.make_phone(folder / f"phone{i}", profile, serial=f"TEST{i}"))
            for i, profile in enumerate(profiles)
        ]
        for phone in made:
            lab.connect(phone, environment)
        yield made, environment


def matrix(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the bundles on three phones at once, twice."""
    table = folder / "fleet.toml"
    bundles = "".join(f'[[bundles]]\npath = "{b.resolve()}"\n' for b in arguments.bundles)
    table.write_text(
        'devices = ["android"]\n[options]\niterations = 1\nprecision = 1.0\nmax_seconds = 1\n'
        f"threads = 1\n[gate]\ncooldown_s = 0\n{bundles}"
    )
    file = folder / "records.jsonl"
    with phones(folder, ["qualcomm", "older", "arm64"]) as (made, _):
        listed = subprocess.run(
            [sys.executable, "-m", "handheld", "devices"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        print(listed)
        script = ROOT / "benchmarks" / "phones.py"
        command = [sys.executable, str(script), str(table), "--records", str(file),
                   "--json"]  # fmt: skip
        first = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        left = [p.left() for p in made]
        seen = records.read(file) if file.exists() else []
        again = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        # A run with other settings: what it needs is on the phones already.
        table.write_text(table.read_text().replace("iterations = 1", "iterations = 2"))
        third = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        sent = [r["sent_bytes"] for r in json.loads(third.stdout)["results"]]
        drawn = [row for b in arguments.bundles for row in pictures(b, made, folder)]
    outcomes = Counter(r["outcome"] for r in json.loads(again.stdout)["results"])
    return {
        "ok": first.returncode == again.returncode == third.returncode == 0
        and not any(left)
        and not any(sent)
        and all(row["matches"] for row in drawn),
        "devices": listed,
        "records": [_row(r) for r in seen],
        "left_on_phones": left,
        "second_run": dict(outcomes),
        "bytes_sent_when_settings_changed": sent,
        "pictures_against_the_host": drawn,
    }


def pictures(path: Path, made: list[Phone], folder: Path) -> list[dict[str, Any]]:
    """Draw one prompt on this machine and on every phone, and compare the PNG files."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    prompt = (manifest.reference and manifest.reference.prompt) or ""

    def draw(device: str) -> NDArray[np.uint8]:
        file = folder / f"{device}.png"
        subprocess.run(
            [sys.executable, "-m", "handheld", "generate", str(path), prompt, "--seed", "7",
             "--device", device, "-o", str(file)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return np.asarray(Image.open(file))

    own = draw("host")
    rows = []
    for phone in made:
        limit = bench.expected_psnr(bundle, manifest.default_size)
        check = bench.compare(draw(phone.address), own, limit)
        rows.append(
            {
                "phone": phone.serial,
                "bundle": f"{manifest.model.id} {manifest.target} {manifest.precision}",
                "prompt": prompt,
                "psnr_db": round(check.psnr_db, 1),
                "min_psnr_db": round(limit, 1),
                "matches": check.matches,
            }
        )
    return rows


def _row(record: records.RunRecord) -> dict[str, Any]:
    figures = record.summary()
    return {
        "device": f"{record.device.model} ({record.device.arch}, {record.device.harness})",
        "bundle": f"{record.bundle.model} {record.bundle.target} {record.bundle.precision}",
        "status": record.status,
        "error": record.error,
        "psnr_db": figures["psnr_db"],
        "device_psnr_db": record.check.device_psnr_db if record.check else None,
        "min_psnr_db": record.check.min_psnr_db if record.check else None,
        "noisy": len(record.noisy),
        "throttled": record.throttled,
        "sent_bytes": record.transfer.bytes if record.transfer else None,
        "median_ms": figures["median_ms"],
        "placement": dict(sum(map(Counter, (record.placement or {}).values()), Counter())),
        "placement_note": record.placement_note,
        "not_counted": record.memory.not_counted if record.memory else None,
    }


Fault = Callable[[Phone, dict[str, str], random.Random], "Trouble"]


class Trouble:
    """A fault that waits for its moment."""

    def __init__(self, make: Callable[[], None], undo: Callable[[], None]) -> None:
        self._make, self._undo = make, undo
        self._lock = threading.Lock()
        self._over = False
        self.happened = False

    def now(self) -> None:
        """Make it, once, unless its time is over."""
        with self._lock:
            if not self.happened and not self._over:
                self.happened = True
                self._make()

    def end(self) -> None:
        """Put things right; from now on it does not happen."""
        with self._lock:
            self._over = True
        self._undo()

    def after(self, seconds: float) -> None:
        """Make it in a while."""
        timer = threading.Timer(seconds, self.now)
        timer.daemon = True
        timer.start()


def _on_bytes(phone: Phone, rng: random.Random, trouble: Trouble) -> Trouble:
    moment = phone.received + rng.randrange(1, 12_000)

    def look(received: int) -> None:
        if received >= moment:
            trouble.now()

    phone.state.on_bytes = look
    return trouble


def _cut(phone: Phone) -> None:
    phone.state.plugged = False
    for host in list(phone._hosts):
        host.abort()


def _unplug_push(phone: Phone, _: dict[str, str], rng: random.Random) -> Trouble:
    shutil.rmtree(phone.storage / "handheld", ignore_errors=True)
    return _on_bytes(phone, rng, Trouble(lambda: _cut(phone), phone.plug))


def _in_run(phone: Phone, rng: random.Random, trouble: Trouble) -> Trouble:
    """Make it at a random moment of a run, the first one or the second."""
    seconds = rng.uniform(0.0, 6.0)

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not phone.harnesses() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(seconds)
        while not phone.harnesses() and time.monotonic() < deadline:
            time.sleep(0.02)
        trouble.now()

    threading.Thread(target=wait, daemon=True).start()
    return trouble


def _unplug_run(phone: Phone, _: dict[str, str], rng: random.Random) -> Trouble:
    return _in_run(phone, rng, Trouble(phone.unplug, phone.plug))


def _server(phone: Phone, environment: dict[str, str], rng: random.Random) -> Trouble:
    trouble = Trouble(lambda: lab.adb("kill-server", environment=environment) and None, phone.plug)
    trouble.after(rng.uniform(0.0, 3.0))
    return trouble


def _killed(phone: Phone, _: dict[str, str], rng: random.Random) -> Trouble:
    return _in_run(phone, rng, Trouble(lambda: phone.kill_harness() and None, phone.plug))


def _full(phone: Phone, _: dict[str, str], rng: random.Random) -> Trouble:
    shutil.rmtree(phone.storage / "handheld", ignore_errors=True)
    room = phone.used() + rng.randrange(0, 8_000)

    def make() -> None:
        phone.state.capacity = room

    def undo() -> None:
        phone.state.capacity = 60_000_000_000

    trouble = Trouble(make, undo)
    trouble.now()
    return trouble


def _hot(phone: Phone, _: dict[str, str], rng: random.Random) -> Trouble:
    seconds = rng.uniform(1.0, 4.0)

    def make() -> None:
        phone.state.thermal = 3
        timer = threading.Timer(seconds, undo)
        timer.daemon = True
        timer.start()

    def undo() -> None:
        phone.state.thermal = 0

    return _in_run(phone, rng, Trouble(make, undo))


FAULTS: dict[str, Fault] = {
    "unplug-push": _unplug_push,
    "unplug-run": _unplug_run,
    "server-killed": _server,
    "harness-killed": _killed,
    "storage-full": _full,
    "hot": _hot,
}


SLOW = ("unplug-run", "harness-killed", "hot")
"""Faults that are made while something runs."""


def faults(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make every fault at random moments; after each, run again and look what is lost."""
    thermal_gate.POLL_S = bench.WATCH_S = 0.2
    fleet.POLL_S = 0.2
    process.PROBE_S = 3.0
    android.SPARE_BYTES = 0
    android.parse_free = lambda text: None  # so that the phone fills in the midst of sending
    sample = samples.write_bundle(folder / "sample")
    kits = lab.fake_kit(folder / "kits")
    rng = random.Random(arguments.seed)
    told: dict[str, Any] = {}
    more = {"HANDHELD_KITS": str(kits), "XDG_CACHE_HOME": str(folder / "cache")}
    with phones(folder, ["qualcomm"], **more) as ((phone,), environment):
        for name in arguments.fault or FAULTS:
            tries = []
            # So that a run lasts, and heat does not pass before anything is measured.
            os.environ["HANDHELD_FAKE"] = "slow" if name in SLOW else ""
            for i in range(arguments.times):
                path = folder / f"{name}-{i}.jsonl"
                tries.append(_once(phone, environment, FAULTS[name], rng, sample.path, path))
                print(name, i, tries[-1], file=sys.stderr, flush=True)
            told[name] = _sum_up(tries)
    return {"ok": all(t["bad"] == 0 for t in told.values()), "faults": told}


def _once(
    phone: Phone, environment: dict[str, str], fault: Fault, rng: random.Random,
    bundle: Path, path: Path,
) -> dict[str, Any]:  # fmt: skip
    table = fleet.Matrix.model_validate(
        {
            "devices": ["android"],
            "bundles": [{"path": str(bundle), "residency": ["resident", "stream"]}],
            "attempts": 1,
            "return_s": 5,
            "options": {"iterations": 5, "precision": None, "first_ever": False, "timeout_s": 60},
            "gate": {"cooldown_s": 0, "patience_s": 30},
        }
    )
    lab.connect(phone, environment)
    trouble = fault(phone, environment, rng)
    start = time.monotonic()
    first = fleet.Fleet(table, Path("/"), path).run()
    took = time.monotonic() - start
    phone.state.on_bytes = None
    trouble.end()
    before = records.read(path) if path.exists() else []
    whole = {r.id for r in before if r.status == "ok"}
    lab.connect(phone, environment)
    second = fleet.Fleet(table, Path("/"), path).run()
    after = records.read(path)
    third = fleet.Fleet(table, Path("/"), path).run()
    sends = fault in (_unplug_push, _full)
    hot = [r for r in after if r.throttled or (r.gate and r.gate.waited_for)]
    return {
        "happened": trouble.happened,
        "seconds": round(took, 1),
        "first": dict(Counter(r.outcome for r in first)),
        "records": dict(Counter(r.status for r in before)),
        "bounded": took < LONGEST_S,
        "partial_are_marked": len(whole) == sum(r.outcome == "done" for r in first)
        and all(r.error for r in before if r.status != "ok"),
        # What could not be sent leaves a record as well, without passes.
        "failures_are_recorded": not sends
        or not trouble.happened
        or any(r.status == "failed" and not r.passes for r in before),
        "none_lost": whole <= {r.id for r in after},
        "rerun_ran_only_what_was_missing": Counter(r.outcome for r in second)
        == Counter({k: v for k, v in (("already", len(whole)), ("done", 2 - len(whole))) if v}),
        "then_complete": [r.outcome for r in third] == ["already", "already"],
        "left": phone.left(),
        "running": len(phone.harnesses()),
        "hot_seen": len(hot),
        "hot": fault is _hot,
    }


def _sum_up(tries: list[dict[str, Any]]) -> dict[str, Any]:
    checks = (
        "bounded",
        "partial_are_marked",
        "failures_are_recorded",
        "none_lost",
        "rerun_ran_only_what_was_missing",
        "then_complete",
    )
    bad = [
        t
        for t in tries
        if not all(t[c] for c in checks)
        or t["left"]
        or t["running"]
        or (t["hot"] and t["happened"] and not t["hot_seen"])
    ]
    seconds = [t["seconds"] for t in tries]
    outcomes: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    for t in tries:
        outcomes.update(t["first"])
        statuses.update(t["records"])
    return {
        "times": len(tries),
        "happened": sum(t["happened"] for t in tries),
        "bad": len(bad),
        "longest_s": max(seconds),
        "median_s": float(np.median(seconds)),
        "outcomes": dict(outcomes),
        "records_after_fault": dict(statuses),
        "records_that_saw_heat": sum(t["hot_seen"] for t in tries),
        "examples_of_bad": bad[:3],
    }


if __name__ == "__main__":
    sys.exit(main())
