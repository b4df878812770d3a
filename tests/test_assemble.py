"""Programs compute what a plain diffusers loop computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import tiny
from handheld import noise
from handheld.execute import execute
from handheld.program import Call, TensorSpec, check
from handheld_export import measure, sampling
from handheld_export.assemble import assemble, time_embeddings, time_ids
from handheld_export.checkpoint import SDXL_SCHEDULER, Checkpoint
from handheld_export.segments import decoder_graph, group, unet_graph
from handheld_export.torch_artifacts import TorchArtifacts

BETAS = {k: SDXL_SCHEDULER[k] for k in ("beta_start", "beta_end", "beta_schedule")}
LATENT, SCALE = (8, 12), 2.0


def nchw(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2)


class Setup:
    """A checkpoint, its program, and the same models in diffusers."""

    def __init__(self, folder, config, vae_config, sampler, chosen, guidance=1.0):
        self.unet, self.vae = tiny.unet(**config), tiny.vae(**vae_config)
        self.unet.save_pretrained(folder / "unet")
        self.vae.save_pretrained(folder / "vae")
        checkpoint = Checkpoint(folder)
        graph, embedding = unet_graph(checkpoint.unet, LATENT, tiny.TOKENS)
        decoder = decoder_graph(checkpoint.vae, LATENT)
        self.size = decoder.shapes[decoder.output][2:]
        self.segments = {
            "unet": group(graph, 10**6),
            "embedding": group(embedding, 10**6, "embedding") if embedding else [],
        }
        segments = group(decoder, 10**6)
        steps = sampling.plan(BETAS, sampler, chosen)
        self.program, self.constants = assemble(
            **self.segments,
            decode=lambda draft, z: draft.calls(segments, "", {"latent": z}),
            steps=steps,
            embedded=time_embeddings(checkpoint.unet, graph, chosen),
            size_ids=time_ids(graph, self.size) if embedding else None,
            guidance=guidance,
            latent_scale=(SCALE, 0.0),
        )
        self.segments["decoder"] = segments
        every = [s for line in self.segments.values() for s in line]
        self.pairs = [(s, checkpoint.component(s.graph.component)) for s in every]
        self.ports = {s.id: s.ports for s in every}
        self.guidance = guidance
        draw = np.random.default_rng(5)
        self.inputs = {
            i.name: draw.standard_normal(self.program.tensors[i.name].shape, dtype=np.float32)
            for i in self.program.inputs
            if i.role != "noise"
        }

    def run(self, seed):
        """Picture and decoded tensor of the program."""
        specs = {n: TensorSpec(shape=v.shape) for n, v in self.constants.items()}
        check(self.program, self.ports, specs)
        artifacts = TorchArtifacts(self.pairs)
        outputs = execute(self.program, self.constants, self.inputs, artifacts, seed=seed)
        decoded = next(iter(artifacts.results.values()))
        artifacts.close()
        return outputs["picture"], decoded

    def noise(self, seed, stream=0):
        return nchw(noise.normal(seed, (1, *LATENT, 4), stream))

    def predict(self, x, t):
        """The noise prediction of diffusers, with guidance."""
        predictions = []
        for branch in ("", "negative_") if self.guidance != 1.0 else ("",):
            added = {}
            if f"{branch}pooled" in self.inputs:
                ids = torch.tensor([[*self.size, 0, 0, *self.size]], dtype=torch.float32)
                pooled = torch.from_numpy(self.inputs[f"{branch}pooled"])
                added = {"text_embeds": pooled, "time_ids": ids}
            context = torch.from_numpy(self.inputs[f"{branch}prompt_embeds"])
            predictions.append(
                self.unet(x, torch.tensor([int(t)]), context, added_cond_kwargs=added).sample
            )
        if len(predictions) == 1:
            return predictions[0]
        positive, negative = predictions
        return negative + self.guidance * (positive - negative)

    def expected(self, scheduler, steps, seed):
        """A plain diffusers loop."""
        scheduler.set_timesteps(steps)
        x = self.noise(seed)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(self.predict(x, t), t, x).prev_sample
            return self.vae.decode(x * SCALE).sample.permute(0, 2, 3, 1).numpy()


def ddim():
    return DDIMScheduler(
        **BETAS, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )


def agree(setup, expected, least, seed=3):
    picture, decoded = setup.run(seed)
    assert measure.snr_db(expected, decoded) >= least
    rounded = np.clip(np.rint(expected.astype(np.float32) * 127.5 + 127.5), 0, 255)
    assert picture.dtype == np.uint8
    assert np.abs(picture.astype(int) - rounded).max() <= 1
    return decoded


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("model", ["SDXL", "SD15"])
def test_ddim(tmp_path, model, steps):
    chosen = sampling.timesteps(1000, steps, "trailing")
    setup = Setup(tmp_path, getattr(tiny, model), tiny.KL, "ddim", chosen)
    agree(setup, setup.expected(ddim(), steps, 3), 100)


def test_guidance(tmp_path):
    chosen = sampling.timesteps(1000, 2, "trailing")
    setup = Setup(tmp_path, tiny.SDXL, tiny.TINY, "ddim", chosen, guidance=3.5)
    decoded = agree(setup, setup.expected(ddim(), 2, 3), 100)
    names = {i.name: i for i in setup.program.inputs}
    assert names["negative_prompt_embeds"].negative
    assert names["negative_pooled"].negative
    # The negative prompt counts.
    setup.inputs["negative_prompt_embeds"] = setup.inputs["negative_prompt_embeds"] * 2
    assert measure.snr_db(decoded, setup.run(3)[1]) < 60


def test_dpmpp2m(tmp_path):
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(4)
    chosen = [int(t) for t in scheduler.timesteps]
    setup = Setup(tmp_path, tiny.SDXL, tiny.KL, "dpmpp2m", chosen)
    # diffusers keeps its sigmas in float32, which costs 1e-4.
    agree(setup, setup.expected(scheduler, 4, 3), 60)


def test_dmd_draws_fresh_noise(tmp_path):
    chosen = [999, 749, 499, 249]
    setup = Setup(tmp_path, tiny.SDXL, tiny.KL, "dmd", chosen)
    assert [i.stream for i in setup.program.inputs if i.role == "noise"] == [0, 1, 2, 3]
    a = DDIMScheduler(**BETAS).alphas_cumprod.double()
    x = setup.noise(3)
    with torch.no_grad():
        for i, t in enumerate(chosen):
            x0 = ((x - (1 - a[t]).sqrt() * setup.predict(x, t)) / a[t].sqrt()).float()
            if i < 3:
                b = a[chosen[i + 1]]
                x = (b.sqrt() * x0 + (1 - b).sqrt() * setup.noise(3, i + 1)).float()
        expected = setup.vae.decode(x0 * SCALE).sample.permute(0, 2, 3, 1).numpy()
    agree(setup, expected, 95)


def test_steps_share_artifacts(tmp_path):
    chosen = sampling.timesteps(1000, 4, "trailing")
    setup = Setup(tmp_path, tiny.SDXL, tiny.KL, "ddim", chosen, guidance=2.0)
    calls = [op.artifact for op in setup.program.ops if isinstance(op, Call)]
    for line, times in (("unet", 8), ("embedding", 2), ("decoder", 1)):
        for segment in setup.segments[line]:
            assert calls.count(segment.id) == times
    assert set(calls) == set(setup.ports)
    assert set(setup.constants) == {"time_ids", *(f"time.{t}" for t in chosen)}


def test_seed_decides(tmp_path):
    setup = Setup(tmp_path, tiny.SMALLEST, tiny.SMALLEST_KL, "ddim", [999])
    first, again, other = setup.run(1)[1], setup.run(1)[1], setup.run(2)[1]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
