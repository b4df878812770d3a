"""Running a server in this process or in workers.

Imports neither torch nor KServe: a worker's supervisor waits for it to unpickle what is here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.loops.auto import auto_loop_factory
from uvicorn.supervisors import Multiprocess

from handheld.errors import HandheldError, UsageError
from handheld_export.serve import logs
from handheld_export.serve.settings import Settings

HEALTHCHECK_SECONDS = 30
"""A worker that does not answer its supervisor for this long is replaced."""
_MAX_FILES = 2**16
_log = logging.getLogger("handheld.serve")


class Application:
    """Makes the ASGI application of a worker; travels to it by pickle.

    Parameters
    ----------
    settings : Settings
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(self) -> Any:
        """Return the application; exit if there is none, which starting again would not mend."""
        if (parent := multiprocessing.parent_process()) is not None:
            threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
        try:
            from handheld_export.serve.server import application

            return application(self.settings)
        except Exception as error:
            reason = str(error) if isinstance(error, HandheldError) else repr(error)
            _log.exception("failed", extra={"event": "start-failed", "reason": reason})
            sys.exit(STARTUP_FAILURE)


def _leave_with(parent: Any) -> None:
    """Stop this worker when its supervisor is gone, which nobody else would do then."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


class _Supervisor(Multiprocess):
    """uvicorn's supervisor, which notices at once when a worker dies.

    It holds the workers' ends of the pipes by which it asks for their health, and so waits
    for an answer of one that died while it was asked.
    """

    def init_processes(self) -> None:
        super().init_processes()
        self._let_go()

    def keep_subprocess_alive(self) -> None:
        before = {p.pid for p in self.processes}
        super().keep_subprocess_alive()
        self._let_go()
        for pid in before - {p.pid for p in self.processes}:
            if pid is not None:
                from prometheus_client.multiprocess import mark_process_dead

                mark_process_dead(pid)  # type: ignore[no-untyped-call]

    def _let_go(self) -> None:
        for process in self.processes:
            process.child_conn.close()


def tls_loop() -> asyncio.AbstractEventLoop:
    """Return a loop whose servers wait for a TLS handshake no longer than for a request."""
    loop: Any = auto_loop_factory()()
    loop.create_server = partial(loop.create_server, ssl_handshake_timeout=Settings.header_timeout)
    return loop  # type: ignore[no-any-return]


def configuration(settings: Settings, level: str = "info") -> uvicorn.Config:
    """Return uvicorn's configuration of a server."""
    return uvicorn.Config(
        Application(settings),
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        # By name, as workers are started before what is imported for it.
        http="handheld_export.serve.guard:Protocol",
        ws="none",
        lifespan="on",
        log_config=logs.config(level),
        access_log=False,
        server_header=False,
        timeout_keep_alive=65,
        timeout_graceful_shutdown=int(settings.drain),
        timeout_worker_healthcheck=HEALTHCHECK_SECONDS,
        backlog=2048,
        loop="auto" if settings.tls_cert is None else "handheld_export.serve.run:tls_loop",
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )


def serve(settings: Settings, level: str, on_bound: Callable[[Settings], None]) -> None:
    """Serve until told to stop by SIGINT or SIGTERM, and finish what is in flight.

    Parameters
    ----------
    settings : Settings
    level : str
        Of logs.
    on_bound : callable
        Told the settings with the ports that were chosen, before the encoders are loaded.

    Raises
    ------
    HandheldError
        If a port is taken, or the encoders cannot be loaded.
    """
    _raise_file_limit()
    with ExitStack() as held:
        bound = held.enter_context(_bind(settings.host, settings.port, shared=False))
        settings = replace(settings, port=bound.getsockname()[1])
        if settings.grpc_port is not None:
            # Held so that nobody else takes the port; workers listen on it with SO_REUSEPORT.
            shared = held.enter_context(_bind(settings.host, settings.grpc_port, shared=True))
            settings = replace(settings, grpc_port=shared.getsockname()[1])
        config = configuration(settings, level)
        on_bound(settings)
        # uvicorn raises the signal again when it has drained.
        signal.signal(signal.SIGTERM, lambda *_: None)
        if settings.workers > 1:
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="handheld-metrics-"))
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            supervisor = _Supervisor(config, [bound])
            supervisor.run()
            if any(p.exitcode == STARTUP_FAILURE for p in supervisor.processes):
                raise HandheldError("a worker did not start", remedy="see its line in the log")
            return
        try:
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run([bound])
        except SystemExit:
            raise HandheldError(
                "the server did not start", remedy="see the last line of the log"
            ) from None


def _raise_file_limit() -> None:
    """Make room for connections in the TLS handshake, which nothing counts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _bind(host: str, port: int, *, shared: bool) -> socket.socket:
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = info[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            remedy="choose another --port, --grpc-port or --host",
        ) from None
    sock.set_inheritable(True)
    return sock
