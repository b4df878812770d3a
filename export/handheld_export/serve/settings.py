"""How a text server is run; worker processes get it by pickle, so it holds plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """Everything that can be chosen about a server. Times are in seconds, sizes in bytes."""

    checkpoint: Path
    model: str = "text"
    """Name on the endpoint's path."""
    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int | None = None
    """None serves no gRPC."""
    workers: int = 1
    # The encoders.
    backend: Literal["torch", "onnxruntime"] = "torch"
    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    threads: int = 0
    """Of the backend, per worker; 0 divides the cores among the workers."""
    max_batch: int = 32
    """Prompts that the encoders take at once; 1 is no batching."""
    batch_wait: float = 0.0
    """How long an idle encoder waits for more prompts. While it is busy they gather anyway."""
    # Limits.
    timeout: float = 30.0
    """From having read a request to its answer."""
    header_timeout: float = 5.0
    """From opening a connection, or from the first byte of a request, to its last header."""
    body_timeout: float = 10.0
    max_body: int = 2**20
    max_prompts: int = 32
    """Per request."""
    max_prompt: int = 2**16
    """UTF-8 bytes of one prompt."""
    max_queue: int = 512
    """Prompts that wait for the encoders; more are refused."""
    max_connections: int = 1024
    """Requests at once, probes aside, and connections that may rest open, per worker."""
    send_timeout: float = 30.0
    """For a client to read its answer; by gRPC, after a connection's ten minutes."""
    max_unread: int = 256 * 2**20
    """Bytes of answers that clients have not read, per worker and protocol, before more are
    refused."""
    long_prompts: Literal["truncate", "refuse"] = "truncate"
    """What happens to prompts of more tokens than the encoders read."""
    # Who may ask, and how much.
    tokens: Path | None = None
    """File of hashed tokens; None lets everybody in."""
    rate: float = 0.0
    """Prompts per second and client over all workers; 0 is no limit."""
    burst: float = 50.0
    policy: str | None = None
    """``module:function`` that refuses prompts."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    # Keeping answers.
    cache: int = 256 * 2**20
    """Of embeddings in memory, per worker; 0 keeps none."""
    redis: str | None = None
    """URL of a Redis that workers and servers share."""
    redis_seconds: int = 7 * 24 * 3600
    http_seconds: int = 24 * 3600
    """``max-age`` of answers to GET that name no version; with a version they never change."""
    public: bool = False
    """Let shared caches keep answers although a token was asked for."""
    drain: float = 30.0
    """For requests in flight when the server is told to stop."""
