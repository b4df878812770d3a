"""A harness as a subprocess: its events as they come, and its end in every case."""

from __future__ import annotations

import math
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import IO

from pydantic import TypeAdapter, ValidationError

from handheld.devices.base import Received
from handheld.errors import HarnessError
from handheld.native import NativeError
from handheld.protocol import PROTOCOL_VERSION, AnyEvent, Done, Failure, Hello

PROBE_S = 20.0
"""After so long without a word, a remote harness's device is asked whether it is there."""
MAX_LINE_BYTES = 4 * 2**20
WAIT_S = 0.005
GRACE_S = 5.0
"""How long a harness may take to end after SIGTERM before it is killed."""


class HarnessEndedError(HarnessError):
    """A harness ended before its job was done, and did not say why."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        """Exit code, negative for a signal."""


_EVENT: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    probe: Callable[[], None] | None = None,
    used: Callable[[float], None] = lambda seconds: None,
) -> Generator[Received, None, None]:
    """Run a harness and yield its events.

    Lines that are no events (engines print to standard output, too) are passed over.
    ``probe`` is called after each :data:`PROBE_S` of silence, and raises if the harness's
    device is gone. ``used`` is told, once it has ended, its processor seconds.

    Raises
    ------
    HarnessError
        If it cannot be started, reports an error, ends without saying so or takes too long.
    """
    with tempfile.TemporaryFile() as errors:
        start = time.monotonic()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **(environment or {})},
                # Ctrl-C shall reach it through us only, so that it can end in good order.
                start_new_session=True,
            )
        except OSError as error:
            raise HarnessError(
                f"cannot be started: {error.strerror}",
                path=command[0],
                remedy="run `handheld harness build`",
            ) from None
        try:
            yield from _events(process, start, timeout_s, errors, probe, used)
        finally:
            _end(process, used)


def _events(
    process: subprocess.Popen[bytes],
    start: float,
    timeout_s: float | None,
    errors: IO[bytes],
    probe: Callable[[], None] | None,
    used: Callable[[float], None],
) -> Generator[Received, None, None]:
    assert process.stdout is not None
    lines: queue.SimpleQueue[tuple[bytes, float] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process.stdout, lines, start), daemon=True).start()
    deadline = None if timeout_s is None else start + timeout_s
    failure: Failure | None = None
    done = False
    while True:
        left = math.inf if deadline is None else max(deadline - time.monotonic(), 0.0)
        wait = min(left, math.inf if probe is None else PROBE_S)
        try:
            item = lines.get(timeout=None if wait == math.inf else wait)
        except queue.Empty:
            if probe is not None and wait < left:
                probe()
                continue
            raise HarnessError(
                f"the harness took longer than {timeout_s:g} s", remedy="raise --timeout"
            ) from None
        if item is None:
            break
        event = parse(item[0])
        if event is None:
            continue
        check_protocol(event, "run `handheld harness build`")
        failure = event if isinstance(event, Failure) else failure
        done = done or isinstance(event, Done)
        yield Received(event, item[1])
    try:
        code = _wait(process, GRACE_S, used)
    except subprocess.TimeoutExpired:
        raise HarnessError("the harness closed its output and did not end") from None
    if failure:
        raise NativeError(failure.code, f"{failure.code}: {failure.message}")
    if code or not done:
        raise HarnessEndedError(_describe_end(code, errors), code)


def _read(
    stream: IO[bytes], lines: queue.SimpleQueue[tuple[bytes, float] | None], start: float
) -> None:
    with stream:
        whole = True
        while line := stream.readline(MAX_LINE_BYTES):
            # What follows the head of an endless line is no event either.
            if whole and line.endswith(b"\n"):
                lines.put((line, (time.monotonic() - start) * 1000))
            whole = line.endswith(b"\n")
    lines.put(None)


def parse(line: bytes) -> AnyEvent | None:
    """Read a line as an event; None if it is none."""
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        return _EVENT.validate_json(line)
    except ValidationError:
        return None


def check_protocol(event: AnyEvent, remedy: str) -> None:
    """Refuse a harness of another protocol.

    Raises
    ------
    HarnessError
        If the event says so.
    """
    if isinstance(event, Hello) and event.protocol != PROTOCOL_VERSION:
        raise HarnessError(
            f"the harness speaks protocol {event.protocol}, this handheld {PROTOCOL_VERSION}",
            remedy=remedy,
        )


def _describe_end(code: int, errors: IO[bytes]) -> str:
    # A shell, and Android's, adds 128 to a signal's number.
    number = -code if code < 0 else code - 128
    if number in set(signal.Signals):
        text = f"the harness was ended by {signal.Signals(number).name}"
        if number == signal.SIGKILL:
            text += ", probably because memory ran out"
    elif code:
        text = f"the harness ended with {code} and no error event"
    else:
        text = "the harness ended before its job was done"
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - 2000))
    tail = errors.read().decode(errors="replace").strip().splitlines()[-8:]
    return "\n".join([text, *(f"  {line}" for line in tail)])


def _end(process: subprocess.Popen[bytes], used: Callable[[float], None]) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            _wait(process, GRACE_S, used)
        except subprocess.TimeoutExpired:
            process.kill()
            _wait(process, math.inf, used)


def _wait(process: subprocess.Popen[bytes], timeout_s: float, used: Callable[[float], None]) -> int:
    """Wait for a process of which nobody else waits, and tell its processor seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        # What Popen.wait does, but for the usage, which it throws away.
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            used(usage.ru_utime + usage.ru_stime)
            return process.returncode
        if time.monotonic() >= deadline:
            raise subprocess.TimeoutExpired(process.args, timeout_s)
        time.sleep(WAIT_S)
