"""A stand-in for the native harness: same command line, same events, the sample's artifact.

``HANDHELD_FAKE`` makes it misbehave: a comma-separated list of what the code below knows.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import sys
import time
from pathlib import Path

FAULTS = set(filter(None, os.environ.get("HANDHELD_FAKE", "").split(",")))
START = time.monotonic()
ENGINES = json.loads(os.environ.get("HANDHELD_FAKE_ENGINES", '{"litert": "2.3.0"}'))


def install(folder: Path) -> Path:
    """Make a folder that HANDHELD_HARNESS can name. It needs no packages, so it is fast."""
    import samples

    folder.mkdir()
    copy = folder / "fake_harness.py"
    copy.write_text(Path(__file__).read_text())
    (folder / "picture.raw").write_bytes(samples.picture().tobytes())
    program = folder / "handheld-harness"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {copy} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    for name in ("libhandheld.so", "libhandheld.dylib"):
        (folder / name).touch()
    return folder


def emit(event: str, **fields: object) -> None:
    fields = {"event": event, "t_ms": (time.monotonic() - START) * 1000, **fields}
    print(json.dumps(fields), flush=True)


def fail(code: str, message: str) -> None:
    emit("error", code=code, message=message)
    sys.exit(2 if code in ("job", "bundle", "input") else 1)


def main() -> None:
    if sys.argv[1:] == ["--engines"]:
        print(json.dumps(ENGINES))
        return

    job = json.loads(Path(sys.argv[1]).read_bytes())
    emit(
        "hello",
        protocol=9 if "protocol" in FAULTS else 1,
        harness="0.1.0",
        pid=os.getpid(),
        engines=ENGINES,
        platform="linux-x86_64",
        base_rss_bytes=5_000_000,
        news="from the future",
    )
    print("INFO: engines talk on standard output, too")
    print('{"event": "weather", "t_ms": 1.0, "sunny": true}')
    if "bundle" in FAULTS:
        fail("bundle", "artifacts[0].file: is not a flatbuffer")
    if "early" in FAULTS:
        sys.exit(0)
    if "silent" in FAULTS:
        print("something broke inside", file=sys.stderr)
        sys.exit(3)
    kept = Path(job["cache"]) / "unet.0.packed" if job["cache"] else None
    hit = kept is not None and kept.exists()
    if kept is not None:
        kept.touch()
    emit("load", artifact="unet.0", ms=1.0 if hit else 9.0,
         cache="hit" if hit else "built" if kept else "none")  # fmt: skip
    emit("memory", phase="loaded", rss=50_000_000, peak_rss=60_000_000, anon=1, file=2, swap=0)
    kinds = ["first"] + ["warmup"] * job["warmup"] + ["timed"] * job["iterations"]
    timed = time.monotonic()
    for index, kind in enumerate(kinds):
        if kind != "timed":
            timed = time.monotonic()
        begin = time.monotonic()
        if "hang" in FAULTS and index == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in FAULTS else signal.SIG_DFL)
            if kept is not None:
                kept.with_name("hanging").touch()
            time.sleep(600)
        if "die" in FAULTS and index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.4 if "slow" in FAULTS else 0.002)
        while "busy" in FAULTS and time.process_time() < 0.2 * (1 + index):
            pass
        if "warms" in FAULTS:
            time.sleep(0.1 * (time.monotonic() - timed))
        took = (time.monotonic() - begin) * 1000
        if "noisy" in FAULTS:
            took *= 1 + index
        emit("iteration", index=index, kind=kind, total_ms=took, engine_ms=took / 2,
             calls_ms=[took / 2])  # fmt: skip
        if kind == "timed" and index == len(kinds) - 1:
            kinds += ["timed"] * (time.monotonic() - timed < job["min_seconds"])
    picture = bytearray(Path(__file__).with_name("picture.raw").read_bytes())
    if job["seed"] != 5:
        picture.reverse()
    if "wrong" in FAULTS:
        picture = bytearray(255 - b for b in picture)
    if "off-by-one" in FAULTS:
        picture[0] ^= 1
    if "random" in FAULTS:
        picture = bytearray(b ^ os.getpid() % 251 for b in picture)
    if job["dump_calls"]:
        header = {"call.0.y": {"dtype": "F32", "shape": [1, 8, 16, 3], "data_offsets": [0, 1536]}}
        text = json.dumps(header).encode()
        Path(job["dump_calls"]).write_bytes(len(text).to_bytes(8, "little") + text + bytes(1536))
    if job["output"]:
        Path(job["output"]).write_bytes(picture)
    emit("memory", phase="end", rss=70_000_000, peak_rss=80_000_000, anon=30_000_000,
         file=40_000_000, swap=0, activations=1234)  # fmt: skip
    emit("output", role="picture", sha256=hashlib.sha256(picture).hexdigest(),
         shape=[1, 8, 16, 3], dtype="uint8", file=job["output"])  # fmt: skip
    emit("done", iterations=len(kinds))


if __name__ == "__main__":
    main()
