"""Reading the attributes back from pictures, by two independent ways.

Nearest composed truth. The four large attributes come in two pairs that each own a region of the
picture: face colour and head decide every pixel that no body, body colour, eyes, mouth or nose
layer can touch; body colour and body decide every pixel that no face colour, head, eyes, mouth or
nose layer can touch. Inside such a region a candidate's composed picture is the same whatever the
other attributes are, so the squared RGB distance to all 160 (or 100) candidate pairs needs no
guess about them. Eyes, mouth and nose follow with the first four held at what was read: all 1,000
candidates are compared in the box around those layers.

Classifier. A small convolutional network with one head for each attribute, trained on composed
pictures of the training split with blur and noise.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from . import data
from .loop import LoopConfig, Losses, load_ema, train

BATCH = 32
LOOP = LoopConfig(steps=700, lr=2e-3, seed=6, warmup=50, ema=0.99)
LARGE = data.SPLIT_ON
FILE = "judge.safetensors"


@cache
def _touched(name: str) -> torch.Tensor:
    index = data.NAMES.index(name)
    layer = data.layers()[index]
    height, width = layer.clear.shape[-2:]
    out = torch.zeros(data.SIZE, data.SIZE, dtype=torch.bool)
    rows = slice(layer.top, layer.top + height)
    columns = slice(layer.left, layer.left + width)
    out[rows, columns] = (layer.clear < 1).any(dim=0)[0]
    return out


@cache
def _pair(first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    own = {first, first + 1}
    others = [_touched(name) for i, name in enumerate(data.NAMES) if i not in own]
    region = ~torch.stack(others).any(dim=0)
    pairs = list(itertools.product(range(data.COUNTS[first]), range(data.COUNTS[first + 1])))
    creatures = torch.zeros(len(pairs), len(data.NAMES), dtype=torch.long)
    creatures[:, first : first + 2] = torch.tensor(pairs)
    truths = data.compose(creatures)[:, :, region].flatten(1).float()
    return region, torch.tensor(pairs), truths


def _nearest(pixels: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
    distance = truths.square().sum(dim=1) - 2 * pixels @ truths.T
    return distance.argmin(dim=1)


def read_large(pictures: torch.Tensor) -> torch.Tensor:
    """Read face colour, head, body colour and body as the nearest composed truth.

    Parameters
    ----------
    pictures
        uint8 pictures (n, 3, 128, 128).

    Returns
    -------
    torch.Tensor
        Attribute indices, (n, 4).
    """
    columns = []
    for first in (0, 2):
        region, pairs, truths = _pair(first)
        pixels = pictures[:, :, region].flatten(1).float()
        columns.append(pairs[_nearest(pixels, truths)])
    return torch.cat(columns, dim=1)


@cache
def _overlays() -> tuple[tuple[slice, slice], torch.Tensor, torch.Tensor, torch.Tensor]:
    touched = torch.stack([_touched(name) for name in data.NAMES[LARGE:]]).any(dim=0)
    ys, xs = touched.any(dim=1).nonzero().flatten(), touched.any(dim=0).nonzero().flatten()
    box = slice(int(ys[0]), int(ys[-1]) + 1), slice(int(xs[0]), int(xs[-1]) + 1)
    small = torch.tensor(list(itertools.product(*(range(n) for n in data.COUNTS[LARGE:]))))
    clear = torch.ones(len(small), 1, data.SIZE, data.SIZE)
    color = torch.zeros(len(small), 3, data.SIZE, data.SIZE)
    for i in range(LARGE, len(data.NAMES)):
        layer, picked = data.layers()[i], small[:, i - LARGE]
        height, width = layer.clear.shape[-2:]
        rows = slice(layer.top, layer.top + height)
        columns = slice(layer.left, layer.left + width)
        clear[:, :, rows, columns] *= layer.clear[picked]
        color[:, :, rows, columns] *= layer.clear[picked]
        color[:, :, rows, columns] += layer.color[picked]
    inside = (..., *box)
    return box, small, clear[inside].contiguous(), 255 * color[inside]


def read_all(pictures: torch.Tensor) -> torch.Tensor:
    """Read all seven attributes as the nearest composed truth, (n, 7)."""
    large = read_large(pictures)
    (rows, columns), small, clear, color = _overlays()
    blank = torch.cat([large, torch.zeros(len(large), len(data.COUNTS) - LARGE).long()], dim=1)
    bare = data.compose(blank, order=data.LAYER_ORDER[:LARGE])[..., rows, columns].float()
    found = []
    for picture, base in zip(pictures[..., rows, columns].float(), bare, strict=True):
        truths = (base * clear + color).flatten(1)
        found.append(small[_nearest(picture.reshape(1, -1), truths)[0]])
    return torch.cat([large, torch.stack(found)], dim=1)


class Classifier(nn.Module):
    """Reads the seven attributes from pictures in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        parts: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            parts += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(8, o), nn.SiLU()]
        self.body = nn.Sequential(*parts, nn.Conv2d(widths[-1], 32, 1), nn.SiLU(), nn.Flatten())
        self.head = nn.Linear(32 * (data.SIZE // 16) ** 2, sum(data.COUNTS))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return logits for each attribute."""
        return self.head(self.body(pictures)).split(data.COUNTS, dim=1)  # type: ignore[no-any-return]


def _blurred(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    small = functional.interpolate(pictures, scale_factor=0.5, mode="area")
    soft = functional.interpolate(small, size=data.SIZE, mode="bilinear")
    share = torch.rand(len(pictures), 1, 1, 1, generator=generator)
    noise = torch.randn(pictures.shape, generator=generator)
    strength = 0.1 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    return pictures * share + soft * (1 - share) + strength * noise


def run(root: Path, loop: LoopConfig = LOOP) -> None:
    """Train the classifier, or go on training it."""
    torch.manual_seed(loop.seed)
    model = Classifier()

    def loss(step: int, generator: torch.Generator) -> Losses:
        creatures = data.sample_creatures(BATCH, "train", generator)
        pictures = _blurred(data.to_float(data.compose(creatures)), generator)
        total = torch.zeros(())
        for i, logits in enumerate(model(pictures)):
            total = total + functional.cross_entropy(logits, creatures[:, i])
        return {"loss": total}

    train(model, loss, loop, root / "classifier.pt", root / "classifier.log")


def pack(root: Path, folder: Path) -> None:
    """Write the averaged classifier beside a packed model, in fp16."""
    model = Classifier()
    load_ema(model, root / "classifier.pt")
    save_file(model.half().state_dict(), folder / FILE)


def load(folder: Path) -> Classifier:
    """Load the classifier of a packed model, in fp32."""
    model = Classifier().eval()
    model.load_state_dict(load_file(folder / FILE))
    return model.requires_grad_(False)


@torch.no_grad()
def classify(model: Classifier, pictures: torch.Tensor) -> torch.Tensor:
    """Read all seven attributes with the classifier, (n, 7)."""
    rows = []
    for chunk in torch.split(pictures, 128):
        logits = model(data.to_float(chunk))
        rows.append(torch.stack([part.argmax(dim=1) for part in logits], dim=1))
    return torch.cat(rows)


def accuracy(read: torch.Tensor, asked: torch.Tensor) -> dict[str, float]:
    """Return, for each attribute, how often it was read as asked; negative means not asked."""
    figures = {}
    for i in range(read.shape[1]):
        known = asked[:, i] >= 0
        if known.any():
            hits = read[known, i] == asked[known, i]
            figures[data.NAMES[i]] = float(hits.float().mean())
    return figures
