"""Text servers that tests run in their own process, on a free port of loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn

from handheld_export.serve.run import configuration
from handheld_export.serve.settings import Settings


@dataclass(frozen=True)
class Running:
    url: str
    grpc: str | None
    port: int
    settings: Settings
    server: uvicorn.Server


@contextlib.contextmanager
def running(
    checkpoint: Path,
    *,
    grpc: bool = False,
    level: str = "error",
    send_buffer: int | None = None,
    **options,
):
    """Serve in a thread until the block ends, then drain."""
    with contextlib.ExitStack() as held:
        sock = held.enter_context(socket.socket())
        if send_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        options.setdefault("threads", 1)
        options.setdefault("max_batch", 4)
        settings = Settings(checkpoint, port=port, **options)
        if grpc:
            other = held.enter_context(socket.socket())
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            other.bind(("127.0.0.1", 0))
            settings = replace(settings, grpc_port=other.getsockname()[1])
        server = uvicorn.Server(configuration(settings, level))
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        scheme = "https" if settings.tls_cert else "http"
        give_up = time.monotonic() + 300
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < give_up
            time.sleep(0.01)
        try:
            yield Running(
                f"{scheme}://127.0.0.1:{port}",
                f"127.0.0.1:{settings.grpc_port}" if grpc else None,
                port,
                settings,
                server,
            )
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not stop"
