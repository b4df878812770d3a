"""Creatures composed from robohash's second set, with every attribute known.

A creature is a tuple of seven attribute values. Its picture is the seven layers laid over white;
its caption names a random subset of the values. The split is by the hash of the four large
attributes, so a held-out (face colour, head, body colour, body) combination never occurs in
training, whatever eyes, mouth and nose it wears.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

SIZE = 128

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Attribute:
    """One attribute of a creature: the folder of its layers and the name of every layer in it."""

    name: str
    folder: str
    values: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The English names of the values, in index order."""
        return tuple(name for _, name in self.values)

    def index(self, name: str) -> int:
        """Return the index of the value called `name`."""
        return self.names.index(name)


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        "face_color",
        "004#01FaceColors",
        (
            ("000#final3", "green"),
            ("001#final2", "turquoise"),
            ("002#final4", "blue"),
            ("003#final5", "purple"),
            ("004#final9", "yellow"),
            ("005#final7", "orange"),
            ("006#final10", "lime"),
            ("007#final6", "pink"),
            ("008#final8", "ochre"),
            ("009#final1", "periwinkle"),
        ),
    ),
    Attribute(
        "head",
        "006#03Faces",
        (
            ("000#final16", "knobbly"),
            ("001#final12", "stalk-eyed"),
            ("002#final13", "wrinkled"),
            ("003#final11", "antennaed"),
            ("004#final3", "horned"),
            ("005#final15", "dimpled"),
            ("006#final2", "crested"),
            ("007#final4", "shaggy"),
            ("008#final5", "helmeted"),
            ("009#final14", "bald"),
            ("010#final9", "bolted"),
            ("011#final7", "propeller"),
            ("012#final10", "periscope"),
            ("013#final6", "canister"),
            ("014#final8", "siren"),
            ("015#final1", "impish"),
        ),
    ),
    Attribute(
        "body_color",
        "003#02BodyColors",
        (
            ("001#final2", "green"),
            ("009#final1", "turquoise"),
            ("000#final3", "blue"),
            ("002#final4", "purple"),
            ("008#final8", "yellow"),
            ("007#final6", "orange"),
            ("004#final9", "lime"),
            ("003#final5", "pink"),
            ("005#final7", "ochre"),
            ("006#final10", "periwinkle"),
        ),
    ),
    Attribute(
        "body",
        "000#04Body",
        (
            ("000#final3", "uniformed"),
            ("001#final2", "stitched"),
            ("002#final4", "plated"),
            ("003#final5", "hosed"),
            ("004#final9", "reactor"),
            ("005#final7", "riveted"),
            ("006#final10", "ribbed"),
            ("007#final6", "spiky"),
            ("008#final8", "smiley"),
            ("009#final1", "plain"),
        ),
    ),
    Attribute(
        "eyes",
        "002#Eyes",
        (
            ("000#final3", "sleepy"),
            ("001#final2", "beady"),
            ("002#final4", "dark"),
            ("003#final5", "crossed"),
            ("004#final9", "worried"),
            ("005#final7", "angry"),
            ("006#final10", "browed"),
            ("007#final6", "round"),
            ("008#final8", "winking"),
            ("009#final1", "uneven"),
        ),
    ),
    Attribute(
        "mouth",
        "001#Mouth",
        (
            ("000#final3", "grinning"),
            ("001#final2", "smirking"),
            ("002#final4", "open"),
            ("003#final5", "smiling"),
            ("004#final9", "frowning"),
            ("005#final7", "licking"),
            ("006#final10", "pouting"),
            ("007#final6", "puckered"),
            ("008#final8", "tusked"),
            ("009#final1", "laughing"),
        ),
    ),
    Attribute(
        "nose",
        "005#Nose",
        (
            ("000#final3", "wavy"),
            ("001#final2", "snouty"),
            ("002#final4", "shaded"),
            ("003#final5", "hooked"),
            ("004#final9", "long"),
            ("005#final7", "bulbous"),
            ("006#final10", "button"),
            ("007#final6", "pointed"),
            ("008#final8", "flat"),
            ("009#final1", "curled"),
        ),
    ),
)

NAMES: tuple[str, ...] = tuple(a.name for a in ATTRIBUTES)
COUNTS: tuple[int, ...] = tuple(len(a.values) for a in ATTRIBUTES)
SPLIT_ON = 4
"""The first four attributes decide the split."""

LAYER_ORDER = ("face_color", "body_color", "head", "body", "eyes", "mouth", "nose")
"""From the back to the front, as robohash stacks them."""


def layer_root() -> Path:
    """Return the folder of robohash's second set in the installed package."""
    return Path(str(importlib.resources.files("robohash"))) / "sets" / "set2"


@dataclass(frozen=True)
class Layers:
    """The layers of one attribute, cut to the box that holds all of them."""

    color: torch.Tensor
    """(values, 3, height, width), premultiplied by alpha."""
    clear: torch.Tensor
    """(values, 1, height, width), one minus alpha."""
    top: int
    left: int


@cache
def layers(size: int = SIZE) -> tuple[Layers, ...]:
    """Load all layers, premultiplied by alpha and downscaled.

    Parameters
    ----------
    size
        Side of the picture in pixels.

    Returns
    -------
    tuple of Layers
        One for each attribute, in the order of `ATTRIBUTES`.
    """
    root = layer_root()
    stacks = []
    for attribute in ATTRIBUTES:
        rows = []
        for file, _ in attribute.values:
            with Image.open(root / attribute.folder / f"{file}.png") as opened:
                rgba = np.asarray(opened.convert("RGBA"), dtype=np.float32) / 255.0
            rgba = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)
            planes = [
                np.asarray(Image.fromarray(rgba[..., c]).resize((size, size), Image.Resampling.BOX))
                for c in range(4)
            ]
            rows.append(np.stack(planes))
        rgba_stack = torch.from_numpy(np.stack(rows)).clamp_(0, 1)
        seen = rgba_stack[:, 3].amax(dim=0) > 0
        ys, xs = seen.any(dim=1).nonzero().flatten(), seen.any(dim=0).nonzero().flatten()
        top, left = int(ys[0]), int(xs[0])
        cut = rgba_stack[:, :, top : int(ys[-1]) + 1, left : int(xs[-1]) + 1]
        stacks.append(Layers(cut[:, :3].contiguous(), 1 - cut[:, 3:], top, left))
    return tuple(stacks)


def compose(
    creatures: torch.Tensor, size: int = SIZE, order: Sequence[str] = LAYER_ORDER
) -> torch.Tensor:
    """Draw creatures over white.

    Parameters
    ----------
    creatures
        Attribute indices, (n, 7) integers in the order of `ATTRIBUTES`.
    size
        Side of the pictures in pixels.
    order
        Which layers are laid, from the back to the front.

    Returns
    -------
    torch.Tensor
        uint8 pictures, (n, 3, size, size).
    """
    stacks = layers(size)
    out = torch.ones(len(creatures), 3, size, size)
    for name in order:
        i = NAMES.index(name)
        layer, picked = stacks[i], creatures[:, i]
        height, width = layer.color.shape[-2:]
        box = out[:, :, layer.top : layer.top + height, layer.left : layer.left + width]
        box.mul_(layer.clear[picked]).add_(layer.color[picked])
    return out.mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def to_float(pictures: torch.Tensor) -> torch.Tensor:
    """Map uint8 pictures to floats in -1..1."""
    return pictures.float().div_(127.5).sub_(1)


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """Map floats in -1..1 to uint8 pictures."""
    return pictures.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def split_of(combination: Sequence[int]) -> Split:
    """Return the split that the first four attributes decide: 80 % train, 10 % val, 10 % test."""
    key = "/".join(str(int(v)) for v in combination[:SPLIT_ON])
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
    return "test" if bucket == 0 else "val" if bucket == 1 else "train"


@cache
def combinations(split: Split) -> torch.Tensor:
    """Return all (face colour, head, body colour, body) combinations of a split, (n, 4)."""
    every = itertools.product(*(range(n) for n in COUNTS[:SPLIT_ON]))
    return torch.tensor([c for c in every if split_of(c) == split])


def sample_creatures(n: int, split: Split, generator: torch.Generator) -> torch.Tensor:
    """Draw `n` creatures uniformly from a split, (n, 7)."""
    table = combinations(split)
    big = table[torch.randint(len(table), (n,), generator=generator)]
    small = [torch.randint(c, (n, 1), generator=generator) for c in COUNTS[SPLIT_ON:]]
    return torch.cat([big, *small], dim=1)


NAMING_RATE: Mapping[str, float] = {
    "face_color": 0.8,
    "head": 0.8,
    "body_color": 0.6,
    "body": 0.5,
    "eyes": 0.3,
    "mouth": 0.3,
    "nose": 0.2,
}
"""How often a caption names each attribute."""


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeio" or phrase.startswith("une") else "a ") + phrase


def describe(creature: Sequence[int], named: Sequence[str], rng: random.Random) -> str:
    """Write a caption that names the given attributes of a creature and no other.

    Parameters
    ----------
    creature
        Attribute indices in the order of `ATTRIBUTES`.
    named
        Names of the attributes that the caption tells.
    rng
        Chooses among the templates.

    Returns
    -------
    str
        The caption, for example ``a purple horned creature with a lime body and sleepy eyes``.
    """
    word = {
        a.name: a.names[int(v)]
        for a, v in zip(ATTRIBUTES, creature, strict=True)
        if a.name in named
    }
    noun = rng.choice(("creature", "monster", "critter"))
    head = word.get("head")
    details = []
    face = word.get("face_color")
    if face and rng.random() < 0.5:
        details.append(_article(f"{face} face"))
        face = None
    subject = " ".join(w for w in (face, head, noun) if w)
    body = " ".join(w for w in (word.get("body_color"), word.get("body")) if w)
    if body:
        details.append(_article(f"{body} body"))
    if "eyes" in word:
        details.append(f"{word['eyes']} eyes")
    if "mouth" in word:
        details.append(_article(f"{word['mouth']} mouth"))
    if "nose" in word:
        details.append(_article(f"{word['nose']} nose"))
    rng.shuffle(details)
    style = rng.randrange(3)
    if style == 0 or not details:
        lead = rng.choice(("", "a picture of ", "a drawing of ")) + _article(subject)
        if not details:
            return lead
        joined = (
            details[0] if len(details) == 1 else ", ".join(details[:-1]) + " and " + details[-1]
        )
        return f"{lead} with {joined}"
    if style == 1:
        return ", ".join([_article(subject), *details])
    return ", ".join([subject, *(d.removeprefix("an ").removeprefix("a ") for d in details)])


def random_subset(rng: random.Random) -> tuple[str, ...]:
    """Choose which attributes a training caption names."""
    return tuple(name for name in NAMES if rng.random() < NAMING_RATE[name])


def caption(
    creature: Sequence[int], rng: random.Random, *, empty_rate: float = 0.0
) -> tuple[str, tuple[str, ...]]:
    """Write a training caption: a random subset of the attributes, or nothing.

    Returns
    -------
    tuple
        The caption and the names of the attributes that it tells.
    """
    if rng.random() < empty_rate:
        return "", ()
    named = random_subset(rng)
    return describe(creature, named, rng), named
