"""Prompts to embeddings, by whatever text encoder is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from handheld.bundle import Bundle
from handheld.errors import (
    BundleError,
    HandheldError,
    MissingDependencyError,
    TextServerError,
    UsageError,
)

GROUP = "handheld.text"


@dataclass(frozen=True, eq=False)
class PromptEmbedding:
    """What a U-Net takes of a prompt."""

    prompt_embeds: NDArray[np.float32]
    """``[tokens, width]``."""
    pooled: NDArray[np.float32] | None = None
    """``[pooled_width]``."""
    tokens: tuple[int, ...] = ()
    """Tokens of the whole prompt per encoder, with those for start and end; empty if unknown."""

    @property
    def truncated(self) -> bool:
        """Whether the prompt was longer than what the encoders read."""
        return any(n > len(self.prompt_embeds) for n in self.tokens)


class TextEncoder(Protocol):
    """Turns prompts into embeddings."""

    @property
    def encoders_sha256(self) -> str:
        """Hash of tokenizers and text encoders, as in a manifest's ``text``."""

    def encode(self, prompts: Sequence[str]) -> list[PromptEmbedding]:
        """Encode prompts, one embedding each."""


def local_encoder(checkpoint: Path) -> TextEncoder:
    """Return the text encoder of a checkpoint, which runs in this process.

    Raises
    ------
    MissingDependencyError
        If what it needs is not installed.
    """
    try:
        entry = next(iter(entry_points(group=GROUP, name="local")))
        factory: Any = entry.load()
    except (StopIteration, ImportError):
        raise MissingDependencyError(
            "text encoders need torch, which is not installed",
            remedy='install with  pip install "handheld[export]"',
        ) from None
    encoder: TextEncoder = factory(checkpoint)
    return encoder


def embed(bundle: Bundle, prompt: str, encoder: TextEncoder | None) -> PromptEmbedding:
    """Return the embedding of a prompt: prefetched in the bundle, or else encoded now.

    Parameters
    ----------
    bundle : Bundle
    prompt : str
    encoder : TextEncoder or None
        None where no text encoder is at hand.

    Raises
    ------
    UsageError
        If the prompt is not prefetched and there is no encoder.
    BundleError
        If the encoder is not the one that the bundle was made for.
    TextServerError
        If the encoder is a server, which fails.
    """
    text = bundle.manifest.text
    if (found := bundle.prefetched(prompt)) is not None:
        return PromptEmbedding(*found)
    known = text.prefetched.prompts if text.prefetched else ()
    listed = "".join(f", or use {p!r}" for p in known[:3])
    if encoder is None:
        raise UsageError(
            "the bundle holds no embeddings of this prompt, and no text encoder is at hand",
            path=bundle.path,
            remedy="name the checkpoint with --text-checkpoint or a server with --text-url"
            f"{listed}",
        )
    try:
        return _encoded(bundle, prompt, encoder)
    except TextServerError as error:
        error.remedy = f"{error.remedy or 'try again'}{listed}"
        raise


def _encoded(bundle: Bundle, prompt: str, encoder: TextEncoder) -> PromptEmbedding:
    text = bundle.manifest.text
    if text.encoders_sha256 and encoder.encoders_sha256 != text.encoders_sha256:
        raise BundleError(
            f"was made for other text encoders ({text.encoders_sha256[:12]}) than these "
            f"({encoder.encoders_sha256[:12]})",
            path=bundle.path,
            field="text.encoders_sha256",
            remedy="name the checkpoint that the bundle was exported from",
        )
    (embedding,) = encoder.encode([prompt])
    _check(bundle, "prompt_embeds", embedding.prompt_embeds, (text.tokens, text.width))
    if text.pooled_width is not None:
        _check(bundle, "pooled", embedding.pooled, (text.pooled_width,))
    return embedding


def _check(
    bundle: Bundle, what: str, value: NDArray[np.float32] | None, wanted: tuple[int, ...]
) -> None:
    if value is None or value.shape != wanted:
        have = "missing" if value is None else f"of shape {list(value.shape)}"
        raise BundleError(
            f"{what} of the text encoder is {have}, the bundle wants {list(wanted)}",
            path=bundle.path,
            field="text",
            remedy="use the text encoders of the checkpoint that the bundle was exported from",
        )
    if not np.isfinite(value).all():
        raise HandheldError(f"the text encoder gave {what} that are not finite")
