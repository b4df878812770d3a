"""Text encoders run with ONNX Runtime, from graphs that are exported once and kept."""

from __future__ import annotations

import json
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handheld.errors import CheckpointError
from handheld.files import cache_root, locked, output_errors, replaced_folder
from handheld.text import PromptEmbedding
from handheld_export.text import LocalTextEncoder, Tokens, embeddings

OPSET = 18


class _Outputs(torch.nn.Module):
    """An encoder whose outputs are a tuple: every hidden state, and the projection."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(ids, output_hidden_states=True)
        last = getattr(result, "text_embeds", None)
        return (*result.hidden_states, result.last_hidden_state if last is None else last)


class OnnxTextEncoder(LocalTextEncoder):
    """Text encoders of a checkpoint with two encoders, run with ONNX Runtime on the CPU.

    Parameters
    ----------
    checkpoint : path-like
    threads : int
        Of ONNX Runtime; 0 leaves it the choice.

    Raises
    ------
    CheckpointError
        If the checkpoint has not two text encoders.
    """

    def __init__(self, checkpoint: str | Path, *, threads: int = 0) -> None:
        super().__init__(checkpoint)
        self._threads = threads
        if len(self._parts) != 2:
            raise CheckpointError(
                "has one text encoder; the ONNX Runtime backend runs two",
                path=self.path,
                remedy="use --backend torch",
            )

    @property
    def folder(self) -> Path:
        """Where the exported graphs are kept."""
        tools = f"torch{version('torch')}-transformers{version('transformers')}-opset{OPSET}"
        return cache_root() / "text-onnx" / f"{self.encoders_sha256[:32]}-{tools}"

    @cached_property
    def _sessions(self) -> list[Any]:
        import onnxruntime

        self._export_once()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        found = []
        for name in ("text_encoder", "text_encoder_2"):
            path = self.folder / f"{name}.onnx"
            found.append(
                onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            )
        return found

    def _export_once(self) -> None:
        """Export, unless it was done; workers that start together wait for the first."""
        if self.folder.is_dir():
            return
        parent = self.folder.parent
        with output_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            with locked(parent, wait=True):
                if not self.folder.is_dir():
                    self._export()

    def _export(self) -> None:
        with replaced_folder(self.folder) as folder:
            for (_, name), model in zip(self._parts, self.models, strict=True):
                layers = int(model.config.num_hidden_layers)
                ids = torch.zeros((2, self.length), dtype=torch.int64)
                ids[:, -1] = int(model.config.eos_token_id)
                torch.onnx.export(
                    _Outputs(model).eval(),
                    (ids,),
                    str(folder / f"{name}.onnx"),
                    input_names=["ids"],
                    output_names=[*(f"hidden_{i}" for i in range(layers + 1)), "last"],
                    dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},),
                    opset_version=OPSET,
                    dynamo=True,
                    external_data=True,
                    verbose=False,
                )
            facts = {"encoders_sha256": self.encoders_sha256, "opset": OPSET}
            (folder / "export.json").write_text(json.dumps(facts))

    def load(self) -> None:
        """Load everything now instead of when it is first used, and let go of torch's copy."""
        _ = self._lengths, self._sessions
        self.__dict__.pop("models", None)

    def run(self, tokens: Tokens, clip_skip: int | None = None) -> list[PromptEmbedding]:
        """Encode prompts that are tokens already."""
        hidden = []
        for ids, session, config in zip(tokens.ids, self._sessions, self.configs, strict=True):
            index = int(config["num_hidden_layers"]) - 1 - (clip_skip or 0)
            state, pooled = session.run([f"hidden_{index}", "last"], {"ids": ids})
            hidden.append(state)
        return embeddings(np.concatenate(hidden, axis=-1), pooled, tokens)
