from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import tiny
from handheld.errors import CheckpointError, UsageError
from handheld.text.oip import from_wire, to_wire
from handheld_export.text import LocalTextEncoder, encoders_sha256

CRITTER = Path(__file__).resolve().parents[1] / "models" / "critter"
PROMPTS = ["a small red robot", "", "a picture of a very long prompt that is cut off at the end"]


def test_embeddings_are_those_of_diffusers(sdxl):
    pipeline = pipeline_of(sdxl)
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


def pipeline_of(checkpoint):
    import transformers

    parts = {
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
        "tokenizer": transformers.CLIPTokenizer,
        "tokenizer_2": transformers.CLIPTokenizer,
    }
    loaded = {
        n: c.from_pretrained(checkpoint / n, **({"dtype": torch.float32} if "enc" in n else {}))
        for n, c in parts.items()
    }
    return StableDiffusionXLPipeline(
        vae=tiny.vae(**tiny.KL), unet=tiny.unet(**tiny.SDXL), scheduler=None, **loaded
    )


@pytest.mark.parametrize(("second", "clip_skip"), [(None, None), ("two", None), ("two", 1)])
def test_critter_in_fp16_is_diffusers_in_fp32(second, clip_skip):
    pipeline = pipeline_of(CRITTER)
    encoder = LocalTextEncoder(CRITTER)
    prompts = [*PROMPTS, "a purple horned creature"]
    seconds = None if second is None else [f"{second} {p}" for p in prompts]
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, seconds, device="cpu", do_classifier_free_guidance=False, clip_skip=clip_skip
        )
    rows = encoder.encode(prompts, seconds, clip_skip)
    for name, wanted in (("prompt_embeds", embeds.numpy()), ("pooled", pooled.numpy())):
        made = np.stack([getattr(r, name) for r in rows])
        half = from_wire(name, to_wire(name, made, "FP16"))
        assert np.abs(half - wanted).max() / np.abs(wanted).max() <= 1e-3


def fuzzed(count):
    """Prompts of every kind, the same in every run."""
    rng = random.Random(8)
    pieces = [
        "robot", " ", "  ", "\t\n", "É", "e\u0301", "ß", "İ", "ﬁ", "漢字", "한글", "עברית", "🤖",
        "👩‍👩‍👧‍👦", "🇨🇭", "\u200d", "\ufeff", "\x00", "\x1b[0m", "\x7f", "\u2028", "'s", "'LL",
        "don't", "<|endoftext|>", "<|startoftext|>", "<|endof", "1234567", "٣", "½", "a" * 90,
        "_" * 90, "!", "!!!", "\U0010ffff", "\U000e0041", "ﷺ", "Ω", "\u1e9e", "\xa0", "\u3000",
    ]  # fmt: skip
    yield from ("", " ", "\x00", "x" * 10_000, "🤖" * 10_000, "word " * 2_000, "\n" * 10_000)
    for _ in range(count - 7):
        kind = rng.random()
        if kind < 0.6:
            yield "".join(rng.choice(pieces) for _ in range(rng.randrange(60)))
        else:
            top = rng.choice((0x80, 0x500, 0x3000, 0x110000))
            found = (chr(rng.randrange(top)) for _ in range(rng.randrange(200)))
            yield "".join(c for c in found if not 0xD800 <= ord(c) < 0xE000)


def test_token_ids_of_fuzzed_prompts_are_those_of_diffusers():
    import transformers

    prompts = list(fuzzed(1000))
    assert len(prompts) == 1000
    tokens = LocalTextEncoder(CRITTER).tokenize(prompts)
    cut = 0
    for i, name in enumerate(("tokenizer", "tokenizer_2")):
        words = transformers.CLIPTokenizer.from_pretrained(CRITTER / name)
        wanted = words(
            prompts, padding="max_length", max_length=77, truncation=True, return_tensors="np"
        ).input_ids
        assert (tokens.ids[i] == wanted).all()
        for row, text in zip(tokens.lengths, prompts, strict=True):
            assert row[i] == len(words(text).input_ids)
            cut += row[i] > 77
    assert cut > 100


@pytest.mark.parametrize("length", [3, tiny.TOKENS, 99])
def test_how_a_tokenizer_was_last_used_does_not_matter(sdxl, tmp_path, length):
    import transformers

    copy = tiny.copied(sdxl, tmp_path / "copy")
    for name in ("tokenizer", "tokenizer_2"):
        words = transformers.CLIPTokenizer.from_pretrained(copy / name)
        words("a", padding="max_length", max_length=length, truncation=True)
        words.save_pretrained(copy / name)
        kept = json.loads((copy / name / "tokenizer.json").read_text())
        assert kept["padding"] and kept["truncation"]
    wanted, found = (LocalTextEncoder(path).tokenize(PROMPTS) for path in (sdxl, copy))
    assert found.lengths == wanted.lengths
    for i in range(2):
        np.testing.assert_array_equal(found.ids[i], wanted.ids[i])


def test_clip_skip_has_an_end(sdxl):
    encoder = LocalTextEncoder(sdxl)
    assert encoder.max_clip_skip == 2
    assert len(encoder.encode(["a"], clip_skip=2)) == 1
    for wrong in (-1, 3):
        with pytest.raises(UsageError, match="clip_skip"):
            encoder.encode(["a"], clip_skip=wrong)


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
