"""Encoding prompts in process with the checkpoint's own text encoders."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from handheld.errors import CheckpointError
from handheld.files import sha256_file
from handheld.text import PromptEmbedding
from handheld_export.checkpoint import read_json

_PARTS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))


def encoders_sha256(checkpoint: Path) -> str:
    """Hash of tokenizers and text encoders: every file's name and contents.

    Parameters
    ----------
    checkpoint : Path
        Folder in diffusers layout.
    """
    h = hashlib.sha256()
    for folder in sorted(name for part in _PARTS for name in part):
        for file in sorted((checkpoint / folder).glob("*")):
            h.update(f"{folder}/{file.name}\n{sha256_file(file)}\n".encode())
    return h.hexdigest()


class LocalTextEncoder:
    """Text encoders of a checkpoint in diffusers layout, run with torch.

    Gives the numbers of diffusers' ``encode_prompt``: for SDXL the penultimate hidden
    states of both encoders side by side and the projected embedding of the second; for
    SD 1.5, which has one encoder, its last hidden state.

    Parameters
    ----------
    checkpoint : path-like

    Raises
    ------
    CheckpointError
        If the checkpoint has no text encoder, or its files cannot be loaded.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self.path = Path(checkpoint)
        self._parts = [p for p in _PARTS if (self.path / p[1] / "config.json").is_file()]
        if not self._parts:
            raise CheckpointError(
                "has no text encoder",
                path=self.path,
                remedy="text encoders are read from folders in diffusers layout only: convert "
                "the file, or leave out prompts"
                if self.path.is_file()
                else "prefetch prompts or use a text server",
            )

    @cached_property
    def encoders_sha256(self) -> str:
        """Hash of tokenizers and encoders."""
        return encoders_sha256(self.path)

    @cached_property
    def _models(self) -> list[tuple[Any, Any]]:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        loaded = []
        for tokenizer, encoder in self._parts:
            config = read_json(self.path / encoder / "config.json")
            kind = (config.get("architectures") or ["CLIPTextModel"])[0]
            if kind not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
                raise CheckpointError(
                    f"'{kind}' is not supported",
                    path=self.path / encoder / "config.json",
                    field="architectures",
                    remedy="use CLIP text encoders",
                )
            try:
                model = getattr(transformers, kind).from_pretrained(
                    self.path / encoder, use_safetensors=True, dtype=torch.float32
                )
                words = transformers.CLIPTokenizer.from_pretrained(self.path / tokenizer)
            except (OSError, ValueError, RuntimeError, SafetensorError) as e:
                raise CheckpointError(f"cannot be loaded: {e}", path=self.path / encoder) from None
            loaded.append((words, model.eval()))
        return loaded

    def encode(self, prompts: Sequence[str]) -> list[PromptEmbedding]:
        """Encode prompts.

        Parameters
        ----------
        prompts : sequence of str

        Returns
        -------
        list of PromptEmbedding
            ``prompt_embeds`` float32 [tokens, width], ``pooled`` float32 [pooled width] or
            None.
        """
        hidden: list[torch.Tensor] = []
        pooled = None
        for words, model in self._models:
            length = min(words.model_max_length, model.config.max_position_embeddings)
            tokens = words(
                list(prompts),
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            with torch.no_grad():
                result = model(tokens, output_hidden_states=True)
            if len(self._models) > 1:
                hidden.append(result.hidden_states[-2])
                pooled = getattr(result, "text_embeds", None)
            else:
                hidden.append(result.last_hidden_state)
        embeds = torch.cat(hidden, dim=-1).numpy()
        return [
            PromptEmbedding(
                np.ascontiguousarray(embeds[i], dtype=np.float32),
                None if pooled is None else pooled[i].numpy().astype(np.float32),
            )
            for i in range(len(prompts))
        ]
