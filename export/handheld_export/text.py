"""Encoding prompts in process with the checkpoint's own text encoders."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from handheld.errors import CheckpointError, UsageError
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


@dataclass(frozen=True, eq=False)
class Tokens:
    """Prompts as the encoders read them, padded and cut to what they take."""

    ids: tuple[NDArray[np.int64], ...]
    """Per encoder ``[n, tokens]``."""
    lengths: tuple[tuple[int, ...], ...]
    """Per prompt, the tokens of the whole prompt for each encoder."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.lengths)

    def key(self, i: int) -> bytes:
        """Return what tells a prompt's embeddings from all others: its token ids."""
        return b"".join(part[i].astype("<i4").tobytes() for part in self.ids)

    def take(self, rows: Sequence[int]) -> Tokens:
        """Return some of the prompts."""
        index = list(rows)
        return Tokens(tuple(p[index] for p in self.ids), tuple(self.lengths[i] for i in index))

    @classmethod
    def join(cls, parts: Sequence[Tokens]) -> Tokens:
        """Return the prompts of several as one."""
        ids = tuple(np.concatenate(column) for column in zip(*(p.ids for p in parts), strict=True))
        return cls(ids, tuple(row for p in parts for row in p.lengths))


class LocalTextEncoder:
    """Text encoders of a checkpoint in diffusers layout, run with torch.

    Gives the numbers of diffusers' ``encode_prompt``: for SDXL the penultimate hidden
    states of both encoders side by side and the projected embedding of the second; for
    SD 1.5, which has one encoder, its last hidden state.

    Parameters
    ----------
    checkpoint : path-like
    device : str
        Of torch.
    dtype : str
        Of the weights in memory: float32, float16 or bfloat16.

    Raises
    ------
    CheckpointError
        If the checkpoint has no text encoder, or its files cannot be loaded.
    """

    def __init__(
        self, checkpoint: str | Path, *, device: str = "cpu", dtype: str = "float32"
    ) -> None:
        self.path = Path(checkpoint)
        self.device = device
        self.dtype = dtype
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
    def configs(self) -> list[dict[str, Any]]:
        """Configuration of each encoder."""
        found = []
        for _, encoder in self._parts:
            path = self.path / encoder / "config.json"
            config = read_json(path)
            kind = (config.get("architectures") or ["CLIPTextModel"])[0]
            if kind not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
                raise CheckpointError(
                    f"'{kind}' is not supported",
                    path=path,
                    field="architectures",
                    remedy="use CLIP text encoders",
                )
            found.append(config)
        return found

    @property
    def width(self) -> int:
        """Width of ``prompt_embeds``."""
        return sum(int(c["hidden_size"]) for c in self.configs)

    @property
    def pooled_width(self) -> int | None:
        """Width of ``pooled``, None for a single encoder."""
        return int(self.configs[-1]["projection_dim"]) if len(self.configs) > 1 else None

    @property
    def length(self) -> int:
        """Tokens that the encoders read, with those for start and end."""
        return self._lengths[0]

    @property
    def max_clip_skip(self) -> int:
        """Largest ``clip_skip`` for which there are hidden states."""
        return min(int(c["num_hidden_layers"]) for c in self.configs) - 1

    @cached_property
    def _tokenizers(self) -> list[Any]:
        import transformers

        transformers.logging.set_verbosity_error()
        loaded = []
        for name, _ in self._parts:
            folder = self.path / name
            if not folder.is_dir():
                raise CheckpointError(
                    "is missing", path=folder, remedy="fetch the checkpoint again"
                )
            try:
                words = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, RuntimeError) as e:
                raise CheckpointError(f"cannot be loaded: {e}", path=folder) from None
            # A file keeps how its tokenizer was last used.
            words.backend_tokenizer.no_truncation()
            words.backend_tokenizer.no_padding()
            loaded.append(words)
        return loaded

    @cached_property
    def _lengths(self) -> list[int]:
        return [
            min(words.model_max_length, int(config["max_position_embeddings"]))
            for words, config in zip(self._tokenizers, self.configs, strict=True)
        ]

    @cached_property
    def models(self) -> list[Any]:
        """The encoders, loaded from safetensors only."""
        import transformers

        transformers.logging.disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        loaded = []
        for (_, encoder), config in zip(self._parts, self.configs, strict=True):
            kind = (config.get("architectures") or ["CLIPTextModel"])[0]
            try:
                model = getattr(transformers, kind).from_pretrained(
                    self.path / encoder,
                    use_safetensors=True,
                    dtype=getattr(torch, self.dtype),
                    local_files_only=True,
                )
            except (OSError, ValueError, RuntimeError, SafetensorError) as e:
                raise CheckpointError(f"cannot be loaded: {e}", path=self.path / encoder) from None
            loaded.append(model.eval().to(self.device))
        return loaded

    def load(self) -> None:
        """Load everything now instead of when it is first used."""
        _ = self._lengths, self.models

    def tokenize(self, prompts: Sequence[str], prompts_2: Sequence[str] | None = None) -> Tokens:
        """Return the token ids that diffusers gives the encoders.

        Parameters
        ----------
        prompts : sequence of str
        prompts_2 : sequence of str, optional
            For the second encoder; ``prompts`` by default.
        """
        ids, lengths = [], []
        for i, words in enumerate(self._tokenizers):
            texts = prompts_2 if i == 1 and prompts_2 is not None else prompts
            length = self._lengths[i]
            # The tokenizer's own truncation would hide how long a prompt was, and keeps its
            # setting in an object that threads share.
            found = [e.ids for e in words.backend_tokenizer.encode_batch(list(texts))]
            rows = np.full((len(found), length), words.pad_token_id, np.int64)
            for row, whole in zip(rows, found, strict=True):
                row[: len(whole)] = (
                    whole if len(whole) <= length else [*whole[: length - 1], whole[-1]]
                )
            ids.append(rows)
            lengths.append([len(whole) for whole in found])
        return Tokens(tuple(ids), tuple(zip(*lengths, strict=True)))

    def run(self, tokens: Tokens, clip_skip: int | None = None) -> list[PromptEmbedding]:
        """Encode prompts that are tokens already.

        Parameters
        ----------
        tokens : Tokens
        clip_skip : int, optional
            As in diffusers: layers before the usual one.

        Returns
        -------
        list of PromptEmbedding
        """
        hidden: list[torch.Tensor] = []
        pooled = None
        for ids, model in zip(tokens.ids, self.models, strict=True):
            with torch.inference_mode():
                result = model(torch.from_numpy(ids).to(self.device), output_hidden_states=True)
                if len(self.models) > 1:
                    hidden.append(result.hidden_states[-2 - (clip_skip or 0)])
                    pooled = getattr(result, "text_embeds", None)
                elif clip_skip is None:
                    hidden.append(result.last_hidden_state)
                else:
                    norm = getattr(model, "text_model", model).final_layer_norm
                    hidden.append(norm(result.hidden_states[-1 - clip_skip]))
        embeds = torch.cat(hidden, dim=-1).float().cpu().numpy()
        return embeddings(embeds, None if pooled is None else pooled.float().cpu().numpy(), tokens)

    def encode(
        self,
        prompts: Sequence[str],
        prompts_2: Sequence[str] | None = None,
        clip_skip: int | None = None,
    ) -> list[PromptEmbedding]:
        """Encode prompts.

        Parameters
        ----------
        prompts : sequence of str
        prompts_2 : sequence of str, optional
            For the second encoder; ``prompts`` by default.
        clip_skip : int, optional
            As in diffusers: layers before the usual one.

        Returns
        -------
        list of PromptEmbedding
            ``prompt_embeds`` float32 [tokens, width], ``pooled`` float32 [pooled width] or
            None.

        Raises
        ------
        UsageError
            If ``clip_skip`` is more than the encoders have layers.
        """
        if clip_skip is not None and not 0 <= clip_skip <= self.max_clip_skip:
            raise UsageError(
                f"clip_skip is {clip_skip}",
                remedy=f"the encoders have layers for 0 to {self.max_clip_skip}",
            )
        return self.run(self.tokenize(prompts, prompts_2), clip_skip)


def embeddings(
    embeds: NDArray[np.float32], pooled: NDArray[np.float32] | None, tokens: Tokens
) -> list[PromptEmbedding]:
    """Return the rows of what the encoders gave."""
    return [
        PromptEmbedding(
            np.ascontiguousarray(embeds[i], dtype=np.float32),
            None if pooled is None else np.ascontiguousarray(pooled[i], dtype=np.float32),
            tokens.lengths[i],
        )
        for i in range(len(tokens))
    ]
