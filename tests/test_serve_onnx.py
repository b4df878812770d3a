from __future__ import annotations

import time
from threading import Thread

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("kserve")

import tiny
from handheld.errors import CheckpointError
from handheld_export.serve.onnx import OnnxTextEncoder
from handheld_export.text import LocalTextEncoder

PROMPTS = ["a small red robot", "", "many words " * 9]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_numbers_are_those_of_torch(sdxl, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encoder = OnnxTextEncoder(sdxl, threads=1)
    encoder.load()
    assert (encoder.folder / "export.json").is_file()
    for skip in (None, 0, 1, 2):
        for count in (1, 3):
            wanted = LocalTextEncoder(sdxl).encode(PROMPTS[:count], clip_skip=skip)
            for row, right in zip(
                encoder.encode(PROMPTS[:count], clip_skip=skip), wanted, strict=True
            ):
                np.testing.assert_allclose(row.prompt_embeds, right.prompt_embeds, atol=1e-5)
                np.testing.assert_allclose(row.pooled, right.pooled, atol=1e-5)
                assert row.tokens == right.tokens
    again = OnnxTextEncoder(sdxl, threads=1)
    monkeypatch.setattr(again, "_export", lambda: pytest.fail("exported twice"))
    again.load()


def test_workers_that_start_together_export_once(sdxl, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    exported = []

    def export(self):
        exported.append(self)
        time.sleep(0.3)
        self.folder.mkdir()

    monkeypatch.setattr(OnnxTextEncoder, "_export", export)
    encoders = [OnnxTextEncoder(sdxl) for _ in range(3)]
    threads = [Thread(target=e._export_once) for e in encoders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(exported) == 1 and encoders[0].folder.is_dir()


def test_one_encoder_is_refused(sdxl, tmp_path):
    for name in ("text_encoder", "tokenizer"):
        tiny.copied(sdxl / name, tmp_path / name)
    with pytest.raises(CheckpointError, match="one text encoder"):
        OnnxTextEncoder(tmp_path)
