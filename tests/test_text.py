from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import tiny
from handheld.errors import CheckpointError
from handheld_export.text import LocalTextEncoder, encoders_sha256

PROMPTS = ["a small red robot", "", "a picture of a very long prompt that is cut off at the end"]


def test_embeddings_are_those_of_diffusers(sdxl):
    import transformers

    parts = {
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
        "tokenizer": transformers.CLIPTokenizer,
        "tokenizer_2": transformers.CLIPTokenizer,
    }
    loaded = {n: c.from_pretrained(sdxl / n) for n, c in parts.items()}
    pipeline = StableDiffusionXLPipeline(
        vae=tiny.vae(**tiny.KL), unet=tiny.unet(**tiny.SDXL), scheduler=None, **loaded
    )
    encoder = LocalTextEncoder(sdxl)
    for prompt, found in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
        with torch.no_grad():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompt, device="cpu", do_classifier_free_guidance=False
            )
        assert found.prompt_embeds.shape == (tiny.TOKENS, sum(tiny.WIDTHS))
        assert found.pooled.shape == (tiny.POOLED,)
        np.testing.assert_allclose(found.prompt_embeds, embeds[0].numpy(), atol=2e-6)
        np.testing.assert_allclose(found.pooled, pooled[0].numpy(), atol=2e-6)


def test_one_encoder_gives_its_last_state(sdxl, tmp_path):
    import transformers

    for name in ("text_encoder", "tokenizer"):
        tiny.copied(sdxl / name, tmp_path / name)
    (found,) = LocalTextEncoder(tmp_path).encode(["a robot"])
    assert found.pooled is None
    model = transformers.CLIPTextModel.from_pretrained(sdxl / "text_encoder")
    words = transformers.CLIPTokenizer.from_pretrained(sdxl / "tokenizer")
    ids = words("a robot", padding="max_length", max_length=tiny.TOKENS, return_tensors="pt")
    with torch.no_grad():
        expected = model(ids.input_ids).last_hidden_state[0].numpy()
    np.testing.assert_allclose(found.prompt_embeds, expected, atol=2e-6)


def test_hash(sdxl, tmp_path):
    copy = tiny.copied(sdxl, tmp_path / "copy")
    assert encoders_sha256(copy) == encoders_sha256(sdxl) == LocalTextEncoder(sdxl).encoders_sha256
    (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b\n")
    assert encoders_sha256(copy) != encoders_sha256(sdxl)


def test_refusals(sdxl, smallest, tmp_path):
    with pytest.raises(CheckpointError, match="has no text encoder"):
        LocalTextEncoder(smallest)
    copy = tiny.copied(sdxl, tmp_path / "copy")
    path = copy / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": ["T5EncoderModel"]}))
    with pytest.raises(CheckpointError) as e:
        LocalTextEncoder(copy).encode(["x"])
    assert e.value.field == "architectures"
    path.write_text(json.dumps(config))
    weights = copy / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="cannot be loaded") as e:
        LocalTextEncoder(copy).encode(["x"])
    assert e.value.path == str(copy / "text_encoder")
