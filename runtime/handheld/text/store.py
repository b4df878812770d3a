"""Embeddings kept on disk, one safetensors file per prompt."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from handheld.errors import OutputError
from handheld.files import cache_root, write_file
from handheld.text import PromptEmbedding


@dataclass(frozen=True)
class Store:
    """A folder of embeddings; the oldest go when it grows over ``max_bytes``.

    What cannot be read is a miss, what cannot be written is left out: the store makes
    answers faster and never fails one.

    Parameters
    ----------
    folder : Path
    max_bytes : int
        Of all files.
    """

    folder: Path
    max_bytes: int = 256 * 2**20

    @classmethod
    def default(cls) -> Store:
        """Return the store in the user's cache folder."""
        return cls(cache_root() / "text")

    def path(
        self,
        encoders_sha256: str,
        prompt: str,
        prompt_2: str | None,
        clip_skip: int | None,
        datatype: str,
    ) -> Path:
        """Return the file of a prompt."""
        key = json.dumps([encoders_sha256, prompt, prompt_2, clip_skip, datatype])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def get(self, path: Path) -> PromptEmbedding | None:
        """Return the embedding in a file, None if there is none."""
        try:
            tensors = load(path.read_bytes())
            embeds, tokens = tensors["prompt_embeds"], tensors["tokens"]
            os.utime(path)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        pooled = tensors.get("pooled")
        if any(t.dtype != np.float32 for t in (embeds, pooled) if t is not None):
            return None
        if not all(np.isfinite(t).all() for t in (embeds, pooled) if t is not None):
            return None
        return PromptEmbedding(embeds, pooled, tuple(int(t) for t in tokens))

    def put(self, path: Path, embedding: PromptEmbedding) -> None:
        """Write an embedding to a file, and remove the oldest files if there are too many."""
        tensors = {
            "prompt_embeds": embedding.prompt_embeds,
            "tokens": np.array(embedding.tokens, np.int32),
        }
        if embedding.pooled is not None:
            tensors["pooled"] = embedding.pooled
        with contextlib.suppress(OutputError, OSError):
            write_file(path, save(tensors))
            self._trim()

    def _trim(self) -> None:
        found = [(p.stat(), p) for p in self.folder.glob("*.safetensors")]
        total = sum(s.st_size for s, _ in found)
        for status, path in sorted(found, key=lambda f: f[0].st_mtime_ns):
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= status.st_size
