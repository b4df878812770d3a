"""Run bundles in this process: the harness's C API, by ctypes."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from handheld import harness
from handheld.errors import HarnessError
from handheld.protocol import BAD_INPUT, AnyEvent, Job

Array = NDArray[Any]
EventFunction = Callable[[AnyEvent], None]

_EVENT: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p)
_PROGRESS = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_OK = 0
_POLL_S = 0.1
_libraries: dict[Path, ctypes.CDLL] = {}


class NativeError(HarnessError):
    """The harness's library reported an error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.failure = code
        """A code of :class:`handheld.protocol.Failure`."""
        self.exit_code = 2 if code in BAD_INPUT else 1


def load_library(path: Path | None = None) -> ctypes.CDLL:
    """Load the harness's library, building it first if need be.

    Parameters
    ----------
    path : Path, optional
        The library; by default what :mod:`handheld.harness` finds or builds.

    Raises
    ------
    HarnessError
        If it cannot be built or loaded.
    """
    path = (path or harness.library()).resolve()
    if path in _libraries:
        return _libraries[path]
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise HarnessError(
            f"cannot be loaded: {error}", path=path, remedy="run `handheld harness build --force`"
        ) from error
    p, size = ctypes.c_void_p, ctypes.c_size_t
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "hh_version": (ctypes.c_char_p, []),
        "hh_engines": (ctypes.c_char_p, []),
        "hh_last_error": (ctypes.c_char_p, []),
        "hh_open": (ctypes.c_int, [ctypes.c_char_p, _CALLBACK, p, ctypes.POINTER(p)]),
        "hh_set_input": (ctypes.c_int, [p, ctypes.c_char_p, p, size]),
        "hh_set_seed": (ctypes.c_int, [p, ctypes.c_uint64]),
        "hh_run": (ctypes.c_int, [p]),
        "hh_run_job": (ctypes.c_int, [p]),
        "hh_output": (
            ctypes.c_int,
            [p, ctypes.c_char_p, ctypes.POINTER(p), ctypes.POINTER(size)],
        ),
        "hh_cancel": (None, [p]),
        "hh_on_progress": (ctypes.c_int, [p, _PROGRESS, p]),
        "hh_memory_warning": (None, [p]),
        "hh_close": (None, [p]),
        "hh_noise": (None, [ctypes.c_uint64, ctypes.c_uint32, p, size]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    _libraries[path] = lib
    return lib


def version() -> str:
    """Return the version of the harness's library."""
    text: bytes = load_library().hh_version()
    return text.decode()


def engines() -> dict[str, str]:
    """Return the engines built in, name to version."""
    found: dict[str, str] = json.loads(load_library().hh_engines())
    return found


def normal(seed: int, shape: tuple[int, ...], stream: int = 0) -> NDArray[np.float32]:
    """Draw what :func:`handheld.noise.normal` draws, in native code."""
    out = np.empty(shape, np.float32)
    load_library().hh_noise(seed, stream, out.ctypes.data, out.size)
    return out


class Session:
    """A bundle that is open for running.

    Use it as a context manager, from one thread at a time; :meth:`cancel` may be called
    from any. Ctrl-C cancels what is under way and then raises ``KeyboardInterrupt``.

    Parameters
    ----------
    job : Job
    events : callable, optional
        Is given every event as it happens, on another thread.
    library : Path, optional
        The harness's library.

    Raises
    ------
    NativeError
        If the bundle cannot be opened.
    """

    def __init__(
        self, job: Job, events: EventFunction | None = None, library: Path | None = None
    ) -> None:
        self._lib = load_library(library)
        self._events = events
        self._raised: BaseException | None = None
        # Kept alive as long as the library may call it.
        self._callback = _CALLBACK(self._receive)
        self._progress: Any = None
        self._handle: ctypes.c_void_p | None = None
        self._done: threading.Event | None = None
        handle = ctypes.c_void_p()
        text = job.model_dump_json().encode()
        try:
            self._call(
                lambda: self._lib.hh_open(text, self._callback, None, ctypes.byref(handle)),
                lambda: self._lib.hh_cancel(None),
            )
        except BaseException:
            # After Ctrl-C there may be a session none the less.
            if handle:
                self._lib.hh_close(handle)
            raise
        self._handle = handle

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def set_input(self, name: str, value: Array) -> None:
        """Give a program input; dtype and shape must be the program's."""
        value = np.ascontiguousarray(value)
        self._check(
            self._lib.hh_set_input(self._open, name.encode(), value.ctypes.data, value.nbytes)
        )

    def set_inputs(self, values: Mapping[str, Array]) -> None:
        """Give several program inputs."""
        for name, value in values.items():
            self.set_input(name, value)

    def set_seed(self, seed: int) -> None:
        """Draw noise from another seed from the next run on."""
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed} is not in 0 .. 2**64 - 1")
        self._check(self._lib.hh_set_seed(self._open, seed))

    def run(self) -> None:
        """Run the program once."""
        handle = self._open
        self._call(lambda: self._lib.hh_run(handle), self.cancel)

    def run_job(self) -> None:
        """Run the job's iterations, with all their events."""
        handle = self._open
        self._call(lambda: self._lib.hh_run_job(handle), self.cancel)

    def output(
        self, role: str = "picture", shape: tuple[int, ...] | None = None, dtype: Any = np.uint8
    ) -> Array:
        """Return a copy of a result of the last run."""
        data, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._check(
            self._lib.hh_output(self._open, role.encode(), ctypes.byref(data), ctypes.byref(size))
        )
        flat = np.frombuffer(ctypes.string_at(data, size.value), dtype)
        return flat.reshape(shape) if shape else flat

    def cancel(self) -> None:
        """Make the run that is under way end with an error."""
        if self._handle:
            self._lib.hh_cancel(self._handle)

    def on_progress(self, function: Callable[[int, int], None]) -> None:
        """Have a function told after each call how many of how many are done.

        It is called on the thread that runs; what it raises is raised by the run.
        """

        def tell(_user: int | None, done: int, total: int) -> None:
            try:
                if self._raised is None:
                    function(done, total)
            except BaseException as error:
                self._raised = error
                self.cancel()

        told = _PROGRESS(tell)
        self._check(self._lib.hh_on_progress(self._open, told, None))
        self._progress = told  # kept alive as long as the library may call it

    def memory_warning(self) -> None:
        """Drop what is resident and stream it from now on; a run under way goes on."""
        if self._handle:
            self._lib.hh_memory_warning(self._handle)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free everything; the session cannot be used afterwards."""
        handle, self._handle = getattr(self, "_handle", None), None
        if handle:
            if self._done is not None and not self._done.is_set():
                # An interrupt came at an unlucky moment: never free what is still running.
                self._lib.hh_cancel(handle)
                self._done.wait()
            self._lib.hh_close(handle)

    @property
    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise HarnessError("the session is closed")
        return self._handle

    def _receive(self, _user: int | None, text: bytes) -> None:
        if self._events is None or self._raised is not None:
            return
        try:
            self._events(_EVENT.validate_json(text))
        except ValidationError:
            return  # a newer library may know more events
        except BaseException as error:
            # An exception cannot pass through C: stop the run, raise it afterwards.
            self._raised = error
            # Without a handle the session is being opened.
            self._lib.hh_cancel(self._handle)

    def _call(self, function: Callable[[], int], cancel: Callable[[], None]) -> None:
        """Run a blocking call on a thread, so that Ctrl-C arrives while it runs."""
        result: list[tuple[int, bytes]] = []
        # Not Thread.join: interrupted, it takes a running thread for one that has ended.
        done = threading.Event()

        def work() -> None:
            try:
                status = function()
                result.append((status, self._lib.hh_last_error()))
            finally:
                done.set()

        thread = threading.Thread(target=work, name="handheld", daemon=True)
        interrupt: KeyboardInterrupt | None = None
        self._done = done
        while True:
            try:
                if interrupt is not None:
                    cancel()
                elif thread.ident is None:
                    thread.start()
                while not done.wait(_POLL_S):
                    if interrupt is not None and thread.ident is None:
                        done.set()  # the interrupt came before it started
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
        if self._raised is not None:
            raised, self._raised = self._raised, None
            raise raised
        status, text = result[0]
        if status != _OK:
            raise _error(text)

    def _check(self, status: int) -> None:
        if status != _OK:
            raise _error(self._lib.hh_last_error())


def _error(text: bytes) -> NativeError:
    found = json.loads(text)
    return NativeError(found["code"], found["message"])
