"""A tiny decoder in place of the VAE's, which in one-step generation is the heavier half."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from handheld import counting
from handheld.errors import UsageError
from handheld.planning import Shape
from handheld.reshaping import DecoderShape
from handheld_export.compress import samples
from handheld_export.compress.data import Prepared, keep
from handheld_export.compress.engine import Loop, Trained, Trainer
from handheld_export.compress.load import Load, outputs, passes
from handheld_export.compress.step import Context, Step, Student, essential, load_vae


class Decoder(DecoderShape, Step):
    """Train the decoder of an AutoencoderTiny (TAESD's architecture) on the VAE's own pictures."""

    kind: ClassVar[str] = "decoder"
    before: ClassVar[tuple[str, ...]] = ("decoder", "activations")

    train: Loop
    l1: float = Field(default=0.1, ge=0)
    color: float = Field(default=10.0, ge=0)
    """Weight of the error of 8x8 areas' mean color."""
    held_out: int = Field(default=64, ge=1)
    """Latents that training never sees, on which the PSNR is measured."""
    keep: bool = False
    """Decode every latent once and keep the pictures, 3 bytes a pixel, in place of decoding the
    same latents again and again."""

    def load(self, after: Shape, reference: Shape, teacher: Shape) -> Load:
        """Count the tiny decoder in training, and the VAE beside it."""
        loop = self.train
        own, whole = (counting.summary(x.decoder_layers) for x in (after, teacher))
        work = passes(loop) * own["macs"] + whole["macs"]
        saved = outputs(after.decoder_layers) + max(x.outputs for x in teacher.decoder_layers)
        return Load(
            (own["params"],), (2 * whole["params"],), saved, work * loop.batch * loop.steps, loop
        )

    def run(self, student: Student, context: Context) -> Student:
        """Train, then measure on held-out latents."""
        from diffusers import AutoencoderTiny

        data = context.data
        if len(data) <= self.held_out:
            raise UsageError(
                f"{len(data)} pictures leave none for training",
                field="data.pictures",
                remedy=f"take more than held_out = {self.held_out}",
            )
        config = self.config(student.vae_config)
        torch.manual_seed(self.train.seed)
        tiny = AutoencoderTiny.from_config(config).decoder.to(memory_format=torch.channels_last)
        initialize(tiny)
        vae = load_vae(context.teacher).to(context.device)
        factor = float(vae.config["scaling_factor"])
        # It depends on nothing that other steps change, so recipes share it wherever they have it.
        essence = context.key(
            settings=essential(self), vae=context.teacher.vae_sha256, data=data.folder.name
        )
        trainer = Trainer(
            self.kind,
            self.train,
            {"decoder": Trained(tiny, self.train.lr, self.train.clip)},
            context.machine,
            context.cache / f"decoder-{essence}",
            essence,
            context.watch,
        )

        kept = pictures(context, vae) if self.keep else None

        def one(trainer: Trainer) -> dict[str, Tensor]:
            rows = trainer.draws().integers(0, len(data) - self.held_out).cpu()
            latents = data.rows("latents", rows).to(trainer.device)
            with trainer.accelerator.autocast():
                if kept is None:
                    with torch.no_grad():
                        wanted = vae.decode(latents / factor).sample.float()
                else:
                    wanted = kept.rows("pictures", rows).to(trainer.device).div(127.5).sub(1)
                made = trainer.models["decoder"](latents).float()
            error = made - wanted
            mse = error.square().mean()
            color = functional.avg_pool2d(error, 8).square().mean()
            loss = mse + self.l1 * error.abs().mean() + self.color * color
            trainer.update("decoder", loss)
            return {"loss": loss, "mse": mse, "color": color}

        shown = data.rows("latents", torch.arange(len(data) - self.held_out, len(data)))
        shown = shown[: samples.COUNT].to(context.device)

        @torch.no_grad()
        def sample(trainer: Trainer) -> None:
            if trainer.accelerator.is_main_process:
                made = trainer.bare("decoder")(shown)
                samples.keep(trainer, made.float().cpu())

        trainer.run(one, sample, context.sample_every)
        weights = trainer.averaged()
        tiny = AutoencoderTiny.from_config(config).decoder
        tiny.load_state_dict(weights)
        figures = fidelity(tiny.to(context.device).eval(), vae, data, self.held_out)
        side = int(student.unet_config["sample_size"])
        macs = [
            counting.summary(counting.count_decoder(c, (side, side)))["macs"]
            for c in (student.vae_config, config)
        ]
        student.vae = {f"decoder.{k}": v for k, v in weights.items()}
        student.vae_config = config
        student.history.append(
            {"step": self.kind, "settings": self.model_dump(), "macs": macs, **figures}
        )
        return student


@torch.no_grad()
def initialize(tiny: Any, branch: float = 0.3) -> None:
    """Keep the size of activations from layer to layer, and start from gray.

    He initialisation (arXiv 1502.01852), residual branches scaled by ``branch``. PyTorch's own
    shrinks activations at each of the layers without a nonlinearity, and training starts slowly.
    """
    from diffusers.models.autoencoders.vae import AutoencoderTinyBlock

    for module in tiny.modules():
        if isinstance(module, AutoencoderTinyBlock):
            inner = _convolutions(cast(nn.Sequential, module.conv))
            for layer in inner:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            inner[-1].weight.mul_(branch)
    first, *others = _convolutions(tiny.layers)
    # After the first one comes a ReLU, after the others nothing.
    nn.init.kaiming_normal_(first.weight, nonlinearity="relu")
    for layer in others:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    last = others[-1]
    last.weight.mul_(0.1)
    if last.bias is not None:
        last.bias.fill_(0.5)


def _convolutions(layers: nn.Sequential) -> list[nn.Conv2d]:
    return [m for m in layers if isinstance(m, nn.Conv2d)]


@torch.no_grad()
def pictures(context: Context, vae: Any) -> Prepared:
    """Decode all latents, or read what was decoded before: ``pictures`` uint8 [n, 3, H, W]."""
    data, acc = context.data, context.machine.accelerator
    key = context.key(data=data.folder.name, vae=context.teacher.vae_sha256)
    folder = context.cache / f"pictures-{key}"
    if not (folder / "meta.json").is_file() and acc.is_main_process:
        factor = float(vae.config["scaling_factor"])
        made = []
        for rows in torch.split(torch.arange(len(data)), 32):
            latents = data.rows("latents", rows).to(context.device)
            with acc.autocast():
                drawn = vae.decode(latents / factor).sample.float()
            made.append(drawn.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu())
            context.watch.step("decoding", int(rows[-1]) + 1, len(data), {})
        keep(folder, {"pictures": torch.cat(made).contiguous()}, {"count": len(data)})
    acc.wait_for_everyone()
    return Prepared(folder)


@torch.no_grad()
def fidelity(tiny: Any, vae: Any, data: Prepared, count: int) -> dict[str, float]:
    """Return the PSNR of the tiny decoder to the VAE on the last ``count`` latents, dB."""
    factor = float(vae.config["scaling_factor"])
    device = next(vae.parameters()).device
    errors = []
    for rows in torch.split(torch.arange(len(data) - count, len(data)), 16):
        latents = data.rows("latents", rows).to(device)
        made = tiny(latents).clamp(-1, 1)
        wanted = vae.decode(latents / factor).sample.clamp(-1, 1)
        errors.append(((made - wanted) / 2).square().flatten(1).mean(dim=1))
    error = torch.cat(errors)
    return {
        "held_out": float(count),
        "psnr_of_mean_error_db": float(-10 * error.mean().log10()),
        "psnr_mean_db": float((-10 * error.log10()).mean()),
        "psnr_min_db": float(-10 * error.max().log10()),
    }
