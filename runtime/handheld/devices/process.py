"""A harness as a subprocess: its events as they come, and its end in every case."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from typing import IO

from pydantic import TypeAdapter, ValidationError

from handheld.devices.base import Received
from handheld.errors import HarnessError
from handheld.native import NativeError
from handheld.protocol import PROTOCOL_VERSION, AnyEvent, Done, Failure, Hello

GRACE_S = 5.0
"""How long a harness may take to end after SIGTERM before it is killed."""

_EVENT: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> Generator[Received, None, None]:
    """Run a harness and yield its events.

    Lines that are no events (engines print to standard output, too) are passed over.

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
            yield from _events(process, start, timeout_s, errors)
        finally:
            _end(process)


def _events(
    process: subprocess.Popen[bytes], start: float, timeout_s: float | None, errors: IO[bytes]
) -> Generator[Received, None, None]:
    assert process.stdout is not None
    lines: queue.SimpleQueue[tuple[bytes, float] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process.stdout, lines, start), daemon=True).start()
    deadline = None if timeout_s is None else start + timeout_s
    failure: Failure | None = None
    done = False
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        try:
            item = lines.get(timeout=None if left is None else max(left, 0.0))
        except queue.Empty:
            raise HarnessError(
                f"the harness took longer than {timeout_s:g} s", remedy="raise --timeout"
            ) from None
        if item is None:
            break
        event = _parse(item[0])
        if event is None:
            continue
        if isinstance(event, Hello) and event.protocol != PROTOCOL_VERSION:
            raise HarnessError(
                f"the harness speaks protocol {event.protocol}, this handheld {PROTOCOL_VERSION}",
                remedy="run `handheld harness build`",
            )
        failure = event if isinstance(event, Failure) else failure
        done = done or isinstance(event, Done)
        yield Received(event, item[1])
    code = process.wait()
    if failure:
        raise NativeError(failure.code, f"{failure.code}: {failure.message}")
    if code or not done:
        raise HarnessError(_describe_end(code, errors))


def _read(
    stream: IO[bytes], lines: queue.SimpleQueue[tuple[bytes, float] | None], start: float
) -> None:
    with stream:
        for line in stream:
            lines.put((line, (time.monotonic() - start) * 1000))
    lines.put(None)


def _parse(line: bytes) -> AnyEvent | None:
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        return _EVENT.validate_json(line)
    except ValidationError:
        return None


def _describe_end(code: int, errors: IO[bytes]) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        text = f"the harness was ended by {name}"
        if -code == signal.SIGKILL:
            text += ", probably because memory ran out"
    elif code:
        text = f"the harness ended with {code} and no error event"
    else:
        text = "the harness ended before its job was done"
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - 2000))
    tail = errors.read().decode(errors="replace").strip().splitlines()[-8:]
    return "\n".join([text, *(f"  {line}" for line in tail)])


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
