"""Pictures from prompts, through the same native library that apps embed."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from handheld import __version__
from handheld.bundle import Bundle
from handheld.devices.base import Device, Sending
from handheld.errors import HarnessError, UsageError
from handheld.files import output_errors, weights_cache, write_file
from handheld.memory_plan import plan_bundle
from handheld.program import Program
from handheld.protocol import AnyEvent, Job, Residency, TensorFile
from handheld.text import PromptEmbedding

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture and what it was made of."""

    pixels: NDArray[np.uint8]
    """``[H, W, 3]``."""
    prompt: str
    negative: str | None
    seed: int
    bundle_sha256: str
    milliseconds: float
    """Of the program, without loading."""


def draw(
    bundle: Bundle,
    prompt: str,
    embedding: PromptEmbedding,
    *,
    negative: str | None = None,
    negative_embedding: PromptEmbedding | None = None,
    seed: int = 0,
    size: str | None = None,
    residency: Residency = "resident",
    memory_budget: int | None = None,
    threads: int = 2,
    cache: bool = True,
    on_event: Callable[[AnyEvent], None] | None = None,
) -> Picture:
    """Draw one picture.

    Parameters
    ----------
    bundle : Bundle
    prompt, negative : str
        For the picture's metadata.
    embedding, negative_embedding : PromptEmbedding
    seed : int
        0 <= seed < 2**64.
    size : str, optional
    residency : Residency
    memory_budget : int, optional
        Bytes; decides what stays and what is streamed, instead of ``residency``.
    threads : int
    cache : bool
        Keep packed weights in files, so that the next picture starts faster.
    on_event : callable, optional
        Told what the library says.

    Raises
    ------
    UsageError
        If the budget is too small.
    HarnessError
        If the library is not built or the run fails.
    """
    from handheld.native import Session

    name, chosen = bundle.size(size)
    if memory_budget is not None:
        plan_bundle(bundle.manifest, name, memory_budget, packed=cache)
    inputs = program_inputs(chosen.program, embedding, negative_embedding)
    folder = weights_cache(bundle.sha256, threads)
    if cache:
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    job = Job(
        bundle=str(bundle.path.resolve()),
        size=name,
        seed=seed,
        residency=residency,
        memory_budget=memory_budget,
        threads=threads,
        cache=str(folder) if cache else None,
        verify_hashes=False,
    )
    total = 0.0

    def see(event: AnyEvent) -> None:
        nonlocal total
        if event.event == "iteration":
            total = event.total_ms
        if on_event is not None:
            on_event(event)

    with Session(job, see) as session:
        for key, value in inputs.items():
            session.set_input(key, value)
        session.run()
        raw = session.output("picture")
    pixels = np.asarray(raw, dtype=np.uint8).reshape(chosen.height, chosen.width, 3)
    return Picture(pixels, prompt, negative, seed, bundle.sha256, total)


def draw_on(
    device: Device,
    bundle: Bundle,
    prompt: str,
    embedding: PromptEmbedding,
    *,
    negative: str | None = None,
    negative_embedding: PromptEmbedding | None = None,
    seed: int = 0,
    size: str | None = None,
    residency: Residency = "resident",
    memory_budget: int | None = None,
    threads: int = 2,
    cache: bool = True,
    on_event: Callable[[AnyEvent], None] | None = None,
    sending: Sending = lambda name, done, total: None,
) -> Picture:
    """Draw one picture on a device, such as a phone; otherwise as :func:`draw`.

    Raises
    ------
    DeviceError
        If the device goes away.
    HarnessError
        If its harness is not built or the run fails.
    """
    name, chosen = bundle.size(size)
    if memory_budget is not None:
        plan_bundle(bundle.manifest, name, memory_budget, packed=cache)
    inputs = program_inputs(chosen.program, embedding, negative_embedding)
    total = 0.0
    with tempfile.TemporaryDirectory(prefix="handheld-") as folder:
        file, output = Path(folder) / "inputs.safetensors", Path(folder) / "picture.raw"
        with output_errors(file):
            save_file(inputs, file)
        job = Job(
            bundle=str(bundle.path.resolve()),
            size=name,
            seed=seed,
            inputs={key: TensorFile(path=str(file), tensor=key) for key in inputs},
            residency=residency,
            memory_budget=memory_budget,
            threads=threads,
            cache=str(weights_cache(bundle.sha256, threads)) if cache else None,
            warmup=0,
            verify_hashes=False,
            output=str(output),
        )
        with device.prepare(bundle, sending) as place:
            for received in place.run(job, timeout_s=3600):
                event = received.event
                if event.event == "iteration":
                    total = event.total_ms
                if on_event is not None:
                    on_event(event)
        pixels = np.fromfile(output, np.uint8)
    if pixels.size != chosen.height * chosen.width * 3:
        raise HarnessError(f"the picture has {pixels.size} bytes", path=bundle.path)
    shaped = pixels.reshape(chosen.height, chosen.width, 3)
    return Picture(shaped, prompt, negative, seed, bundle.sha256, total)


def needs_negative(program: Program) -> bool:
    """Tell whether a program takes a negative prompt."""
    return any(item.negative for item in program.inputs)


def program_inputs(
    program: Program, embedding: PromptEmbedding, negative: PromptEmbedding | None
) -> dict[str, Array]:
    """Give a program's inputs the shapes and dtypes that they have there.

    Raises
    ------
    UsageError
        If the program has an input that no prompt gives.
    """
    out: dict[str, Array] = {}
    for item in program.inputs:
        if item.role == "noise":
            continue
        source = negative if item.negative else embedding
        value = None
        if source is not None and item.role == "prompt_embeds":
            value = source.prompt_embeds
        if source is not None and item.role == "pooled":
            value = source.pooled
        if value is None:
            raise UsageError(f"nothing is given for the program's input '{item.name}'")
        spec = program.tensors[item.name]
        out[item.name] = np.ascontiguousarray(value.reshape(spec.shape), dtype=spec.dtype)
    return out


def save(picture: Picture, path: Path) -> None:
    """Write a picture as PNG with what it was made of as text.

    Raises
    ------
    OutputError
        If the place cannot be written.
    """
    info = PngInfo()
    facts = {
        "prompt": picture.prompt,
        "negative": picture.negative,
        "seed": str(picture.seed),
        "bundle": picture.bundle_sha256,
        "Software": f"handheld {__version__}",
    }
    for key, value in facts.items():
        if value is not None:
            info.add_itxt(key, value)
    data = io.BytesIO()
    Image.fromarray(picture.pixels, "RGB").save(data, "PNG", pnginfo=info)
    write_file(path, data.getvalue())
