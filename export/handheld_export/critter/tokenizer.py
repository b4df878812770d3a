"""A small byte-pair vocabulary in CLIP's format, learnt from the captions."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from . import data
from .loop import step_generator

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END = "</w>"
MAX_LENGTH = 77
VOCAB_SIZE = 1024


def byte_alphabet() -> list[str]:
    """Return the 256 printable characters that stand for bytes, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words: Counter[str], count: int) -> list[tuple[str, str]]:
    """Learn byte-pair merges from word counts; ties go to the lexically smaller pair.

    Parameters
    ----------
    words
        How often each word occurs.
    count
        The largest number of merges; fewer come back once every word is one token.

    Returns
    -------
    list of tuple
        The merges in order.
    """
    spelt = {word: [*word[:-1], word[-1] + END] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelt.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in spelt.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            spelt[word] = joined
    return merges


def caption_words(n: int = 20_000, seed: int = 3) -> Counter[str]:
    """Count the words of `n` training captions."""
    rng = random.Random(seed)  # noqa: S311
    words: Counter[str] = Counter()
    for creature in data.sample_creatures(n, "train", step_generator(seed, 0)).tolist():
        words.update(re.findall(r"[a-z]+|[^\sa-z]+", data.caption(creature, rng)[0]))
    return words


@cache
def vocabulary() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Learn the tokens, in id order, and the merges."""
    alphabet = byte_alphabet()
    base = [*alphabet, *(c + END for c in alphabet)]
    merges = learn_merges(caption_words(), VOCAB_SIZE - len(base) - 2)
    return (*base, *(a + b for a, b in merges), BOS, EOS), tuple(merges)


def write(folder: Path, pad: str = EOS) -> None:
    """Write vocab.json, merges.txt and the configs of a tokenizer folder.

    Parameters
    ----------
    folder
        Where the files go.
    pad
        The padding token: SDXL pads with EOS for its first encoder and with ``!`` for its second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges = vocabulary()
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2))
    config = names | {"model_max_length": MAX_LENGTH, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def load(folder: Path) -> CLIPTokenizer:
    """Load a tokenizer folder."""
    return CLIPTokenizer.from_pretrained(folder)
