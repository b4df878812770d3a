"""The command ``handheld serve-text``."""

from __future__ import annotations

import json
import os
import ssl
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from handheld import models
from handheld.errors import MissingDependencyError, UsageError
from handheld_export.serve.settings import Settings

_DEFAULT = Settings(Path())
_MB = 2**20


def serve_text(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Folder in diffusers layout, or model name.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of HTTP; 0 takes a free one.")
    ] = _DEFAULT.port,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Of gRPC; without it there is none.")
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 is every interface.")] = _DEFAULT.host,
    name: Annotated[str, typer.Option(help="Of the model, in paths.")] = _DEFAULT.model,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Processes, each with the encoders.")
    ] = 1,
    backend: Annotated[Literal["torch", "onnxruntime"], typer.Option()] = "torch",
    device: Annotated[str, typer.Option(help="Of torch.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Of weights in memory.")
    ] = "float32",
    threads: Annotated[
        int, typer.Option(min=0, max=256, help="Per worker; 0 divides the cores.")
    ] = 0,
    max_batch: Annotated[
        int, typer.Option(min=1, max=256, help="Prompts that are encoded at once; 1: no batching.")
    ] = _DEFAULT.max_batch,
    batch_wait: Annotated[
        float, typer.Option(min=0, max=1000, help="ms that idle encoders wait for more prompts.")
    ] = 0.0,
    tokens: Annotated[
        Path | None, typer.Option(help="File of clients' hashed tokens; read again on change.")
    ] = None,
    new_token: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Add a token to the file, print it, and stop."),
    ] = None,
    rate: Annotated[
        float, typer.Option(min=0, help="Prompts per second and client; 0: no limit.")
    ] = 0.0,
    burst: Annotated[
        float, typer.Option(min=1, help="Prompts of a client that may come at once.")
    ] = _DEFAULT.burst,
    policy: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Says which prompts to refuse.")
    ] = None,
    long_prompts: Annotated[
        Literal["truncate", "refuse"],
        typer.Option(help="Prompts over the encoders' length; the answer tells of truncation."),
    ] = "truncate",
    max_prompts: Annotated[int, typer.Option(min=1, max=1024, help="Per request.")] = 32,
    max_body: Annotated[float, typer.Option(min=0.01, max=64, help="MiB of a request.")] = 1.0,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Prompts that may wait; more are refused.")
    ] = _DEFAULT.max_queue,
    max_connections: Annotated[int, typer.Option(min=1)] = _DEFAULT.max_connections,
    timeout: Annotated[float, typer.Option(min=0.1, help="s for an answer.")] = _DEFAULT.timeout,
    cache_mb: Annotated[
        int, typer.Option(min=0, help="MiB of embeddings kept in memory, per worker.")
    ] = _DEFAULT.cache // _MB,
    redis: Annotated[
        str | None,
        typer.Option(help="redis://... that keeps embeddings for all; or HANDHELD_REDIS."),
    ] = None,
    public_cache: Annotated[
        bool, typer.Option("--public-cache", help="Shared caches may keep answers to tokens.")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file; HTTPS and gRPC.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="s for requests in flight when stopped.")
    ] = _DEFAULT.drain,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="Of JSON lines on stderr.")
    ] = "info",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check options and checkpoint, and stop.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Serve the text encoders of a checkpoint by the Open Inference Protocol v2.

    Answers prompts with the embeddings that U-Nets take, by HTTP and gRPC. Stops on Ctrl-C or
    SIGTERM, after the requests in flight.

    \b
    handheld serve-text critter --port 8080
    handheld serve-text --new-token phone-app --tokens tokens.txt
    handheld serve-text ./sdxl --host 0.0.0.0 --workers 2 --grpc-port 8081 --tokens tokens.txt
    handheld generate build/critter "a green robot" --text-url http://localhost:8080 -o out.png
    """  # noqa: D301
    if new_token is not None:
        if tokens is None:
            raise UsageError("needs a file", field="--new-token", remedy="add --tokens FILE")
        _needs_kserve()
        from handheld_export.serve import access

        made = access.new_token(tokens, new_token)
        _say(
            json_output,
            {"name": new_token, "token": made, "tokens": str(tokens)},
            f"{made}\nGive this to {new_token}; {tokens} holds its hash only.",
        )
        return
    if checkpoint is None:
        raise UsageError("no checkpoint is named", remedy="name a folder or a model")
    if (tls_cert is None) != (tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together", remedy="give both or none")
    for path in (tls_cert, tls_key):
        if path is not None and not path.is_file():
            raise UsageError("no such file", path=path, remedy="check the path")
    if tls_cert is not None and tls_key is not None:
        _check_pair(tls_cert, tls_key)
    settings = Settings(
        checkpoint=_folder(checkpoint),
        model=name,
        host=host,
        port=port,
        grpc_port=grpc_port,
        workers=workers,
        backend=backend,
        device=device,
        dtype=dtype,
        threads=threads or max(1, len(os.sched_getaffinity(0)) // workers),
        max_batch=max_batch,
        batch_wait=batch_wait / 1e3,
        tokens=tokens,
        rate=rate,
        burst=burst,
        policy=policy,
        long_prompts=long_prompts,
        max_prompts=max_prompts,
        max_body=round(max_body * _MB),
        max_queue=max(max_queue, max_prompts),
        max_connections=max_connections,
        timeout=timeout,
        cache=cache_mb * _MB,
        redis=redis or os.environ.get("HANDHELD_REDIS"),
        public=public_cache,
        tls_cert=tls_cert,
        tls_key=tls_key,
        drain=drain,
    )
    _needs_kserve()
    # KServe reads the command line when it is imported, in workers too.
    sys.argv = sys.argv[:1]
    # `handheld` as a script lies outside the path that workers search policies in.
    if policy is not None and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    from handheld_export.serve.access import Access
    from handheld_export.serve.cache import RedisCache
    from handheld_export.serve.model import encoder

    Access(settings)
    if settings.redis:
        RedisCache(settings.redis, settings.redis_seconds)
    _check_device(device)
    found = encoder(settings)
    facts = {
        "model": name,
        "encoders_sha256": found.encoders_sha256,
        "tokens": found.length,
        "width": found.width,
        "pooled_width": found.pooled_width,
        "workers": workers,
    }
    if dry_run:
        shape = f"[n, {found.length}, {found.width}]"
        _say(json_output, facts, f"{name}: prompt_embeds {shape}, {found.encoders_sha256}")
        return
    from handheld_export.serve.run import serve

    def say(bound: Settings) -> None:
        scheme = "http" if tls_cert is None else "https"
        url = f"{scheme}://{host}:{bound.port}"
        where = {"url": url, "grpc": None if grpc_port is None else f"{host}:{bound.grpc_port}"}
        plain = f"{url}/v2/models/{name}"
        if grpc_port is not None:
            plain += f" and gRPC on {where['grpc']}"
        if tokens is None and host not in ("127.0.0.1", "localhost", "::1"):
            plain += "; without --tokens everybody may ask"
        _say(json_output, {**where, **facts}, f"serving {plain}; loading the encoders")

    serve(settings, log_level, say)


def _folder(name: str) -> Path:
    """Return a checkpoint's folder; for text encoders alone it needs no U-Net."""
    path = Path(name)
    return path if (path / "text_encoder").is_dir() else models.checkpoint(name)


def _needs_kserve() -> None:
    from importlib.util import find_spec

    for module in ("torch", "transformers", "kserve"):
        if find_spec(module) is None:
            raise MissingDependencyError(
                f"needs {module}, which is missing",
                remedy='install with  pip install "handheld[serve]"',
            )


def _check_pair(cert: Path, key: Path) -> None:
    try:
        # Without a password OpenSSL would ask for one, and wait.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except OSError as error:
        raise UsageError(
            f"no certificate and key can be read from it and {key}: {error.strerror or error}",
            path=cert,
            field="--tls-cert",
            remedy="give a PEM certificate and its key, which needs no password",
        ) from None


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"torch cannot use '{device}': {str(error).splitlines()[0]}",
            field="--device",
            remedy="name one that is there, for example cpu or cuda",
        ) from None


def _say(as_json: bool, facts: dict[str, object], plain: str) -> None:
    sys.stdout.write((json.dumps(facts) if as_json else plain) + "\n")
    sys.stdout.flush()
