"""Recipes and pictures that train in seconds."""

from __future__ import annotations

import numpy as np
from PIL import Image

HEAD = """
name = "{name}"

[data]
kind = "folder"
pictures = 12
"""
TRAIN = (
    "train = {{ steps = {steps}, batch = 4, lr = {lr}, seed = 3, log_every = 1, warmup = 2, "
    "save_seconds = 0.001, weight_decay = 0.01 }}"
)


def train(steps=4, lr=1e-3):
    return TRAIN.format(steps=steps, lr=lr)


def step(kind, *lines):
    return "\n".join(["", "[[steps]]", f'step = "{kind}"', *lines, ""])


def warmup(steps=4, lr=1e-3):
    return step(
        "warmup", "pairs = 8", 'sampler = "ddim"', "teacher_steps = 2", "guidance = 2.0",
        train(steps, lr),
    )  # fmt: skip


def dmd(steps=3, timesteps="[399]", *lines):
    given = (f"timesteps = {timesteps}", "guidance = 2.0", "fake_updates = 2", "fake_lr = 1e-3")
    return step("dmd", *given, *lines, train(steps))


def trim():
    return step("trim", "depth = [1, 1]", 'middle = "drop"')


def quantize(*lines):
    given = lines or ('linear = ["int4"]', 'convolution = ["int8"]')
    return step("quantize", "calibration = 2", *given)


def distill(steps=4, *lines, matching=0.0, lr=1e-3):
    return step(
        "distill", "features = 0.1", "attention = 0.1", f"matching = {matching}",
        "guidance = 2.0", *lines, train(steps, lr),
    )  # fmt: skip


def decoder(steps=4):
    return step("decoder", "width = 8", "blocks = [1, 1]", "held_out = 4", train(steps))


def text(*steps, name="test"):
    return HEAD.format(name=name) + "".join(steps)


def write(path, *steps, name="test"):
    path.write_text(text(*steps, name=name))
    return path


def pictures(folder, count=12):
    """Write captioned pictures of one color each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        color = rng.integers(0, 255, 3)
        pixels = np.broadcast_to(color, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"a picture of color {color[0]}")
    return folder
