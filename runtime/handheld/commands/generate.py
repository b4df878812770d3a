"""``handheld generate``."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from handheld import __version__, devices, models
from handheld import generate as generate_
from handheld.bundle import MANIFEST, Bundle
from handheld.commands.output import announce_build, print_json
from handheld.devices import Device
from handheld.errors import BundleError, HandheldError, MissingDependencyError, UsageError
from handheld.protocol import AnyEvent, Residency
from handheld.text import PromptEmbedding, TextEncoder, embed, local_encoder

TARGET, PRECISION = "litert-cpu", "int8"


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE_OR_MODEL", help="A bundle, a checkpoint, or a model's name."
        ),
    ],
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG file.")],
    negative: Annotated[
        str | None, typer.Option(help="What not to draw; for bundles with guidance.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1)] = 0,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, of those in the bundle.")] = None,
    residency: Annotated[
        Residency, typer.Option(help="stream needs less memory and takes longer.")
    ] = "resident",
    memory_budget: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            metavar="MB",
            help="What fits stays in memory, the rest is streamed. On this machine what Python "
            "itself takes comes on top.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", "-d", help="Draw on a phone: its id, serial or kind.")
    ] = "host",
    threads: Annotated[int, typer.Option(min=1, max=256)] = 2,
    cache: Annotated[bool, typer.Option(help="Keep packed weights in files.")] = True,
    text_checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint or model whose text encoders to use.")
    ] = None,
    text_url: Annotated[
        str | None,
        typer.Option(help="Text server to ask; its token is read from HANDHELD_TEXT_TOKEN."),
    ] = None,
    text_deadline: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds for the text server's answer.")
    ] = 10.0,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw a picture from a prompt.

    A model or checkpoint is first exported for this machine's CPU, once. Prompts that the
    bundle holds need nothing more; others are encoded by a text server, or with the
    checkpoint's text encoders. What a server answered is kept on disk.

    \b
    handheld generate critter "a purple horned creature" -o out.png
    handheld generate build/critter "a green robot" --device android -o phone.png
    handheld generate build/critter "a green robot" --seed 7 --residency stream -o out.png
    handheld generate build/critter "a green robot" --text-url http://localhost:8080 -o out.png
    """  # noqa: D301
    if text_url is not None and text_checkpoint is not None:
        raise UsageError("--text-url and --text-checkpoint exclude each other")
    if memory_budget is not None and residency != "resident":
        raise UsageError("--memory-budget decides the residency", remedy="leave out --residency")
    if output.suffix.lower() != ".png":
        raise UsageError("pictures are PNG files", path=output, remedy="name it .png")
    # Bound to the stream itself, so that progress is seen while libraries are kept quiet.
    console = Console(file=sys.stderr)
    bundle, checkpoint = _resolve(model, console)
    if text_checkpoint is not None:
        checkpoint = models.checkpoint(text_checkpoint)
    _, chosen = bundle.size(size)
    guided = generate_.needs_negative(chosen.program)
    if negative is not None and not guided:
        raise UsageError(
            "the bundle was exported without guidance and takes no negative prompt",
            path=bundle.path,
            remedy="leave out --negative",
        )
    chosen_device = _device(device)
    if chosen_device is None:
        announce_build(console)
    make = (
        _local(bundle, checkpoint) if text_url is None else _remote(bundle, text_url, text_deadline)
    )
    with console.status("encoding the prompt"), contextlib.ExitStack() as held:
        encode = _Encoder(bundle, lambda: make(held))
        embedding = encode(prompt)
        other = encode(negative or "") if guided else None
    for words, found in ((prompt, embedding), (negative or "", other)):
        if found is not None and found.truncated:
            console.print(
                f"the encoders read {bundle.manifest.text.tokens} tokens, the end of this prompt "
                f"was cut off: {words}",
                markup=False,
                soft_wrap=True,
            )
    with console.status("drawing") as status:

        def show(event: AnyEvent) -> None:
            if event.event == "load":
                status.update(f"loading {event.artifact}")

        def sending(name: str, done: int, total: int) -> None:
            status.update(f"sending {done / 1e6:.0f} of {total / 1e6:.0f} MB")

        draw = generate_.draw
        if chosen_device is not None:
            draw = partial(generate_.draw_on, chosen_device, sending=sending)
        picture = draw(
            bundle,
            prompt,
            embedding,
            negative=negative,
            negative_embedding=other,
            seed=seed,
            size=size,
            residency=residency,
            memory_budget=None if memory_budget is None else round(memory_budget * 1e6),
            threads=threads,
            cache=cache,
            on_event=show,
        )
    generate_.save(picture, output)
    if json_output:
        print_json(
            {
                "output": str(output),
                "width": chosen.width,
                "height": chosen.height,
                "seed": seed,
                "device": chosen_device.id if chosen_device else "host",
                "bundle": bundle.sha256,
                "ms": picture.milliseconds,
                "sha256": hashlib.sha256(picture.pixels.tobytes()).hexdigest(),
            }
        )
    else:
        console.print(
            f"{output}: {chosen.width}x{chosen.height} in {picture.milliseconds:.0f} ms",
            markup=False,
            soft_wrap=True,
        )


def _device(wanted: str) -> Device | None:
    """Return the phone to draw on, or None for this machine, which needs no process for it."""
    if wanted == "host":
        return None
    found = devices.find(wanted)
    if len(found) != 1:
        raise UsageError(
            f"'{wanted}' means {len(found)} devices",
            field="--device",
            remedy=f"choose one: {', '.join(d.id for d in found) or 'see handheld devices'}",
        )
    return None if found[0].kind == "host" else found[0]


_Make = Callable[[contextlib.ExitStack], TextEncoder | None]


def _local(bundle: Bundle, checkpoint: Path | None) -> _Make:
    def make(_: contextlib.ExitStack) -> TextEncoder | None:
        path = checkpoint or _checkpoint_of(bundle)
        return None if path is None else local_encoder(path)

    return make


def _remote(bundle: Bundle, url: str, deadline: float) -> _Make:
    def make(held: contextlib.ExitStack) -> TextEncoder:
        from handheld.text.client import TextClient
        from handheld.text.store import Store

        token = os.environ.get("HANDHELD_TEXT_TOKEN") or None
        return held.enter_context(
            TextClient.for_bundle(
                url, bundle, token=token, deadline=deadline, store=Store.default()
            )
        )

    return make


class _Encoder:
    """Embeddings from the bundle, or from a text encoder that is made when it is needed."""

    def __init__(self, bundle: Bundle, make: Callable[[], TextEncoder | None]) -> None:
        self._bundle = bundle
        self._make = make
        self._encoder: TextEncoder | None = None

    def __call__(self, prompt: str) -> PromptEmbedding:
        if (found := self._bundle.prefetched(prompt)) is not None:
            return PromptEmbedding(*found)
        with _quiet():
            self._encoder = self._encoder or self._make()
            return embed(self._bundle, prompt, self._encoder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch and its friends say on import and while loading off the terminal."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _checkpoint_of(bundle: Bundle) -> Path | None:
    try:
        return models.checkpoint(bundle.manifest.model.id)
    except UsageError:
        return None


def _resolve(name: str, console: Console) -> tuple[Bundle, Path | None]:
    """Return the bundle that a name means, and the checkpoint if it is a model's."""
    if models.is_bundle(Path(name)):
        return Bundle.open(name), None
    checkpoint = models.checkpoint(name)
    path = models.bundle_cache(_label(checkpoint), TARGET, PRECISION)
    if (path / MANIFEST).is_file():
        try:
            return Bundle.open(path), checkpoint
        except BundleError as error:
            console.print(f"the cached bundle is broken: {error}", markup=False)
    console.print(
        f"exporting {checkpoint} for this machine ({TARGET}, {PRECISION}), once: {path}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    _export(checkpoint, path)
    return Bundle.open(path), checkpoint


def _label(checkpoint: Path) -> str:
    """Name a checkpoint as it is now; any change of place, files or handheld gives another."""
    folder = checkpoint.resolve()
    facts: list[Any] = [__version__, str(folder)]
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        status = path.stat()
        facts.append([str(path.relative_to(folder)), status.st_size, status.st_mtime_ns])
    return f"{folder.name}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


def _export(checkpoint: Path, path: Path) -> None:
    try:
        command: Any = next(iter(entry_points(group="handheld.commands", name="export"))).load()
        # What the command prints must not mix with what this one prints.
        with contextlib.redirect_stdout(sys.stderr):
            command(str(checkpoint), target=[TARGET], precision=[PRECISION], output=path)
    except (StopIteration, ModuleNotFoundError) as error:
        raise MissingDependencyError(
            "a checkpoint must be exported first, and the exporter is not installed",
            path=checkpoint,
            remedy='install with  pip install "handheld[export]", or name a bundle',
        ) from error
    if not (path / MANIFEST).is_file():
        raise HandheldError("the export made no bundle", path=path)
