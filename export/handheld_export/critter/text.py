"""The two text encoders, in the roles that SDXL gives them, and their training.

They learn to say, for every attribute, which value a caption names or that it names none: from
the pooled embedding of the second encoder, from the last state of the first, and from the token
states that the U-Net attends to.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from . import data, tokenizer
from .loop import LoopConfig, Losses, load_ema, step_generator, train

WIDTHS = (96, 160)
PROJECTION = 160
BATCH = 64
EMPTY_RATE = 0.1
LOOP = LoopConfig(steps=600, lr=1e-3, seed=2, warmup=50, ema=0.99)


def _config(width: int, heads: int, act: str, vocab: int, **extra: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.MAX_LENGTH,
        hidden_act=act,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        **extra,
    )


def encode(
    first: CLIPTextModel,
    second: CLIPTextModelWithProjection,
    ids: torch.Tensor,
    ids_2: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode token ids as SDXL's pipeline does.

    Returns
    -------
    tuple
        Prompt embeddings (the penultimate states of both encoders side by side), pooled embedding,
        and the pooled state of the first encoder, which SDXL does not use.
    """
    one: Any = first(ids, output_hidden_states=True)
    two: Any = second(ids_2, output_hidden_states=True)
    states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    return states, two.text_embeds, one.pooler_output


class TextEncoders(nn.Module):
    """Both encoders."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        first = _config(WIDTHS[0], 3, "quick_gelu", vocab, pad_token_id=vocab - 1)
        second = _config(WIDTHS[1], 5, "gelu", vocab, pad_token_id=0, projection_dim=PROJECTION)
        self.first = CLIPTextModel(first)
        self.second = CLIPTextModelWithProjection(second)

    def forward(
        self, ids: torch.Tensor, ids_2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Call `encode` with both encoders."""
        return encode(self.first, self.second, ids, ids_2)


class Reader(nn.Module):
    """The encoders with the linear heads that train them."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.encoders = TextEncoders(vocab)
        outputs = sum(data.COUNTS) + len(data.COUNTS)
        self.from_pooled = nn.Linear(PROJECTION, outputs)
        self.from_first = nn.Linear(WIDTHS[0], outputs)
        self.from_states = nn.Linear(sum(WIDTHS), outputs)

    def forward(self, ids: torch.Tensor, ids_2: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits of each head, all attributes side by side."""
        states, pooled, first = self.encoders(ids, ids_2)
        return [
            self.from_pooled(pooled),
            self.from_first(first),
            self.from_states(states.mean(dim=1)),
        ]


@dataclass(frozen=True)
class Tokenizers:
    """The two tokenizers of a model."""

    first: CLIPTokenizer
    second: CLIPTokenizer

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenize to 77 ids each."""
        return _ids(self.first, captions), _ids(self.second, captions)

    @property
    def vocab(self) -> int:
        """How many tokens there are."""
        return len(self.first)


def _ids(one: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    encoded = one(
        captions,
        padding="max_length",
        max_length=tokenizer.MAX_LENGTH,
        truncation=True,
        return_tensors="pt",
    )
    return torch.as_tensor(encoded["input_ids"])


def tokenizers(root: Path) -> Tokenizers:
    """Load the tokenizers under `root`, learning them first if they are not there."""
    for name, pad in (("tokenizer", tokenizer.EOS), ("tokenizer_2", "!")):
        if not (root / name / "tokenizer_config.json").exists():
            tokenizer.write(root / name, pad)
    return Tokenizers(tokenizer.load(root / "tokenizer"), tokenizer.load(root / "tokenizer_2"))


def captioned(
    creatures: torch.Tensor, generator: torch.Generator
) -> tuple[list[str], torch.Tensor]:
    """Write a training caption for each creature.

    Returns
    -------
    tuple
        Captions; what each caption names (n, 7), the number of values where it names none.
    """
    rng = random.Random(int(torch.randint(2**31, (1,), generator=generator)))  # noqa: S311
    captions, rows = [], []
    for creature in creatures.tolist():
        words, named = data.caption(creature, rng, empty_rate=EMPTY_RATE)
        captions.append(words)
        values = zip(data.NAMES, creature, data.COUNTS, strict=True)
        rows.append([v if name in named else count for name, v, count in values])
    return captions, torch.tensor(rows)


def run(root: Path, loop: LoopConfig = LOOP) -> None:
    """Train the encoders, or go on training them."""
    torch.manual_seed(loop.seed)
    tokens = tokenizers(root)
    reader = Reader(tokens.vocab)
    sizes = [c + 1 for c in data.COUNTS]

    def loss(step: int, generator: torch.Generator) -> Losses:
        creatures = data.sample_creatures(BATCH, "train", generator)
        captions, wanted = captioned(creatures, generator)
        total = torch.zeros(())
        for logits in reader(*tokens(captions)):
            for i, part in enumerate(logits.split(sizes, dim=1)):
                total = total + functional.cross_entropy(part, wanted[:, i])
        return {"loss": total}

    train(reader, loss, loop, root / "text.pt", root / "text.log")


def load_reader(root: Path) -> tuple[Reader, Tokenizers]:
    """Load the averaged encoders with their heads, and the tokenizers."""
    tokens = tokenizers(root)
    reader = Reader(tokens.vocab).eval()
    load_ema(reader, root / "text.pt")
    return reader.requires_grad_(False), tokens


@torch.no_grad()
def report(root: Path, n: int = 512) -> dict[str, float]:
    """Measure on held-out captions how often every attribute is read right, for each head."""
    reader, tokens = load_reader(root)
    generator = step_generator(12, 0)
    captions, wanted = captioned(data.sample_creatures(n, "test", generator), generator)
    heads = dict(zip(("pooled", "first", "states"), reader(*tokens(captions)), strict=True))
    sizes = [c + 1 for c in data.COUNTS]
    figures = {"captions": float(n)}
    for name, logits in heads.items():
        read = torch.stack([p.argmax(dim=1) for p in logits.split(sizes, dim=1)], dim=1)
        figures[f"{name}_attributes"] = float((read == wanted).float().mean())
        figures[f"{name}_captions"] = float((read == wanted).all(dim=1).float().mean())
    return figures
