"""Drawing with any checkpoint or student in torch, many pictures at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from handheld_export import sampling
from handheld_export.checkpoint import Checkpoint, Component
from handheld_export.compress import diffusion
from handheld_export.compress.data import conditions, empty_conditions
from handheld_export.compress.diffusion import Condition
from handheld_export.compress.step import build_unet
from handheld_export.text import LocalTextEncoder


class Painter:
    """A checkpoint or student, dequantized, ready to draw.

    Parameters
    ----------
    checkpoint : Checkpoint
    unet : mapping of str to Tensor, optional
        Weights in place of the checkpoint's.
    steps : int, optional
        Sampling steps in place of the settings'.
    bf16 : bool
        Compute in bfloat16 where autocast does, about twice as fast.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        unet: Mapping[str, Tensor] | None = None,
        steps: int | None = None,
        bf16: bool = False,
    ) -> None:
        self._bf16 = bf16
        self.checkpoint, self.settings = checkpoint, checkpoint.settings
        own = weights(checkpoint.unet) if unet is None else unet
        self.unet: Any = build_unet(checkpoint.unet.config, own).eval().requires_grad_(False)
        self._encoder = LocalTextEncoder(checkpoint.path)
        _, self.decoder, self.factor = load_decoder(checkpoint.vae.config, weights(checkpoint.vae))
        scale = picture_scale(checkpoint.vae.config)
        self.size = int(self.settings.get("size") or self.unet.config["sample_size"] * scale)
        self.side = self.size // scale
        self.channels = int(self.unet.config["in_channels"])
        chosen = self.settings.get("timesteps")
        if chosen is None or steps is not None:
            wanted = steps or int(self.settings.get("steps", 20))
            chosen = sampling.timesteps(1000, wanted, "trailing")
        sampler = str(self.settings.get("sampler", "ddim"))
        self.plan = sampling.plan(checkpoint.scheduler, sampler, list(chosen))
        self.guidance = float(self.settings.get("guidance", 1.0))

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._bf16)

    def latents(self, captions: Sequence[str], noise: Tensor, batch: int = 32) -> Tensor:
        """Draw clean, scaled latents, [n, C, h, w], from noise of that shape.

        What a sampler of several steps adds on its way is always the same.
        """
        generator = torch.Generator().manual_seed(0)
        ids = torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]]).float()
        empty = empty_conditions(self.checkpoint, self._encoder)
        nothing = Condition(empty["states"], empty.get("pooled"), ids).to("cpu")
        made = []
        for at in range(0, len(captions), batch):
            part = conditions(self._encoder, captions[at : at + batch])
            n = len(part["states"])
            condition = Condition(part["states"], part.get("pooled"), ids.expand(n, -1)).to("cpu")
            x = noise[at : at + batch]
            fresh = [torch.randn(x.shape, generator=generator) for _ in self.plan]
            with self._autocast():
                drawn = diffusion.sample(
                    self.unet, x, condition, nothing, self.plan, self.guidance, fresh
                )
            made.append(drawn)
        return torch.cat(made)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 32) -> Tensor:
        """Decode scaled latents to uint8 pictures, [n, 3, height, width]."""
        with self._autocast():
            made = [self.decoder(part / self.factor) for part in torch.split(latents, batch)]
        pictures = torch.cat(made).float().clamp(-1, 1)
        return pictures.add(1).mul(127.5).round().to(torch.uint8)

    def draw(self, captions: Sequence[str], noise: Tensor, batch: int = 32) -> Tensor:
        """Draw uint8 pictures, [n, 3, height, width]."""
        return self.decode(self.latents(captions, noise, batch), batch)


def weights(component: Component) -> dict[str, Tensor]:
    """Read all weights in float32, those with codes dequantized."""
    coded = tuple(f"{layer}.weight." for layer in component.quantized)
    found = component.tensors([n for n in component.store if not n.startswith(coded)])
    for layer in component.quantized:
        found[f"{layer}.weight"] = torch.from_numpy(component.quantized_weight(layer).dequantize())
    return found


def picture_scale(config: Mapping[str, Any]) -> int:
    """Return how many pixels of a picture's side an autoencoder makes of one latent."""
    channels = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return int(2 ** (len(channels) - 1))


def load_decoder(
    config: Mapping[str, Any], own: Mapping[str, Tensor]
) -> tuple[Any, Callable[[Tensor], Tensor], float]:
    """Load a decoder, frozen.

    Returns
    -------
    model : torch.nn.Module
        The autoencoder, of which the decoder has its weights.
    decode : callable
        Latents to pictures, -1 to 1.
    factor : float
        What scaled latents are divided by first.
    """
    import diffusers

    tiny = config["_class_name"] == "AutoencoderTiny"
    vae = getattr(diffusers, str(config["_class_name"])).from_config(dict(config))
    if tiny:
        inner = {k.removeprefix("decoder."): v for k, v in own.items() if k.startswith("decoder.")}
        vae.decoder.load_state_dict(inner)
    else:
        vae.load_state_dict(dict(own))
    vae = vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    if tiny:
        return vae, vae.decoder, 1.0
    return vae, lambda x: vae.decode(x).sample, float(config["scaling_factor"])
