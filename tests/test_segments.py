from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

import tiny
from handheld.errors import UsageError
from handheld.precision import find as find_precision
from handheld_export.segments import (
    _untouched,
    decoder_graph,
    forget_floats,
    group,
    layers,
    materialize,
    release,
    unet_graph,
)
from handheld_export.torch_artifacts import TorchArtifacts

UNETS = {
    "SDXL": tiny.SDXL | {"layers_per_block": 2},
    "SD 1.5: convolutions project, nothing is added": tiny.SD15,
    "no mid block": tiny.SDXL | {"mid_block_type": None},
    "plain mid block": tiny.SDXL | {"mid_block_type": "UNetMidBlock2D"},
    "BK-SDM: one layer a block": tiny.SD15 | {"layers_per_block": 1},
    "layers by block": tiny.SDXL | {"layers_per_block": (1, 2)},
    "SSD-1B: depths by layer": tiny.SDXL
    | {
        "layers_per_block": 2,
        "transformer_layers_per_block": ((0, 0), (1, 3)),
        "reverse_transformer_layers_per_block": ((3, 1, 2), (0, 0, 0)),
        "mid_block_type": "UNetMidBlock2D",
    },
    "one resolution": tiny.SMALLEST,
    "three resolutions, other channels": tiny.SDXL
    | {
        "in_channels": 8,
        "out_channels": 8,
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 2, 4),
    },
    "upcast attention, shifted time": tiny.SDXL
    | {"upcast_attention": True, "flip_sin_to_cos": False, "freq_shift": 1},
}
VAES = {
    "KL": tiny.KL,
    "KL without attention": tiny.KL | {"mid_block_add_attention": False},
    "KL without post_quant_conv": tiny.KL | {"use_post_quant_conv": False, "use_quant_conv": False},
    "KL, two layers": tiny.KL | {"layers_per_block": 2},
    "tiny": tiny.TINY,
}


def nhwc(x):
    return np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy()) if x.ndim == 4 else x.numpy()


def run(segments, component, values):
    """Run segments one after another through their ports."""
    artifacts = TorchArtifacts([(s, component) for s in segments])
    for s in segments:
        args = {n: values[n] for n in s.inputs}
        assert {n: v.shape for n, v in args.items()} == {
            n: spec.shape for n, spec in s.ports.inputs.items()
        }
        results = artifacts(s.id, args)
        assert {n: v.shape for n, v in results.items()} == {
            n: spec.shape for n, spec in s.ports.outputs.items()
        }
        values |= results
    artifacts.close()
    return values


@pytest.mark.parametrize("most", [0, 10**9])
@pytest.mark.parametrize("name", UNETS)
def test_units_are_the_unet(name, most, tmp_path):
    model = tiny.unet(**UNETS[name])
    component = tiny.component(model, tmp_path)
    height, width = 8, 12
    graph, embedding = unet_graph(component, (height, width), tiny.TOKENS)
    generator = torch.Generator().manual_seed(0)
    shape = (1, model.config.in_channels, height, width)
    sample = torch.randn(shape, generator=generator)
    context = torch.randn(1, tiny.TOKENS, model.config.cross_attention_dim, generator=generator)
    added = {}
    timestep = torch.tensor([321])
    emb = model.time_embedding(model.time_proj(timestep))
    assert (embedding is None) == (model.config.addition_embed_type is None)
    if embedding is not None:
        pooled = torch.randn(1, tiny.POOLED, generator=generator)
        ids = torch.tensor([[64.0, 96, 0, 0, 64, 96]])
        added = {"text_embeds": pooled, "time_ids": ids}
        values = run(
            group(embedding, most, "embedding"),
            component,
            {
                "pooled": nhwc(pooled),
                "time_ids": nhwc(model.add_time_proj(ids.flatten()).reshape(1, -1)),
            },
        )
        emb = emb + torch.from_numpy(values[embedding.output])
    with torch.no_grad():
        expected = model(sample, timestep, context, added_cond_kwargs=added).sample
    segments = group(graph, most)
    values = run(
        segments,
        component,
        {"sample": nhwc(sample), "emb": nhwc(emb.detach()), "context": nhwc(context)},
    )
    actual = values[graph.output]
    assert np.abs(actual - nhwc(expected)).max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", VAES)
def test_units_are_the_decoder(name, tmp_path):
    model = tiny.vae(**VAES[name])
    component = tiny.component(model, tmp_path)
    latent = 2 * torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.decode(latent).sample
    for most in (0, 10**9):
        graph = decoder_graph(component, (8, 6))
        values = run(group(graph, most), component, {"latent": nhwc(latent)})
        actual = values[graph.output]
        assert actual.shape == (1, 16, 12, 3)
        assert np.abs(actual - nhwc(expected)).max() <= 1e-5 * expected.abs().max()


def graphs(folder):
    unet = tiny.component(tiny.unet(**UNETS["SDXL"]), folder)
    vae = tiny.component(tiny.vae(**tiny.KL), folder)
    return [
        *((g, unet) for g in unet_graph(unet, (8, 8), tiny.TOKENS)),
        (decoder_graph(vae, (8, 8)), vae),
    ]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return graphs(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize("most", [0, 5_000, 30_000, 100_000, 10**9])
def test_grouping(parts, most):
    for graph, _ in parts:
        segments = group(graph, most)
        assert [u.name for s in segments for u in s.units] == [u.name for u in graph.units]
        assert len({s.id for s in segments}) == len(segments)
        for i, s in enumerate(segments):
            assert len({u.block for u in s.units}) == 1
            assert s.weights <= most or len(s.units) == 1
            if i + 1 < len(segments) and segments[i + 1].units[0].block == s.units[0].block:
                # It stopped growing for a reason.
                assert s.weights + graph.weights(segments[i + 1].units[0]) > most
        known = set(graph.inputs)
        for s in segments:
            assert set(s.inputs) <= known
            known |= set(s.outputs)
        assert graph.output in known


def test_weights_add_up(parts):
    for graph, component in parts:
        total = sum(s.weights for s in group(graph, 0))
        prefixes = tuple(p for u in graph.units for p in u.prefixes)
        used = [n for n in component.store if n.startswith(prefixes)]
        assert total == sum(int(np.prod(component.store.shape(n))) for n in used)
        if graph.component == "unet" and "sample" in graph.inputs:
            left = {n.split(".")[0] for n in component.store} - {p.split(".")[0] for p in prefixes}
            assert left == {"time_embedding", "add_embedding"}


def test_skips_cross_segments(parts):
    graph, _ = parts[0]
    segments = group(graph, 10**9)
    assert [s.id for s in segments] == [
        "unet.00.down_blocks.0", "unet.01.down_blocks.1", "unet.02.mid_block",
        "unet.03.up_blocks.0", "unet.04.up_blocks.1",
    ]  # fmt: skip
    down, up = segments[0], segments[-1]
    assert "conv_in" in down.outputs  # the last resnet takes it
    assert "conv_in" in up.inputs
    taken = [n for s in segments[3:] for n in s.inputs]
    for i in range(2):
        assert f"down_blocks.0.resnets.{i}" in taken
    # Tensors that stay inside a block are no ports.
    assert not any("proj_in" in n for s in segments for n in (*s.inputs, *s.outputs))


def test_latents_must_divide(tmp_path):
    component = tiny.component(tiny.unet(**tiny.SDXL), tmp_path)
    with pytest.raises(UsageError) as e:
        unet_graph(component, (8, 9))
    assert "16" in e.value.remedy


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4g32"])
def test_materialize_and_release(parts, precision):
    rule = find_precision(precision)
    graph, component = parts[0]
    for segment in group(graph, 10**9):
        quantized = materialize(segment, component, rule)
        for name, layer in layers(segment):
            choice = rule.choose("unet", name, tuple(layer.weight.shape))
            assert (choice is None) == (name not in quantized)
            if choice is not None:
                assert layer.quantized is quantized[name]
                assert quantized[name].grid == choice.grid
                assert np.array_equal(layer.weight.detach().numpy(), quantized[name].dequantize())
            else:
                stored = component.tensors([f"{name}.weight"])[f"{name}.weight"]
                assert torch.equal(layer.weight, stored)
        release(segment)
        for _, layer in layers(segment):
            assert layer.weight.is_meta
            assert not hasattr(layer, "quantized")


def test_model_is_built_without_weights(parts):
    for graph, _ in parts:
        assert isinstance(graph.model, torch.nn.Module)
        if isinstance(graph.model, UNet2DConditionModel):
            assert graph.model.conv_in.weight.is_meta


def test_chunks_across_blocks(parts):
    graph, _ = parts[0]
    total = sum(graph.weights(u) for u in graph.units)
    largest = max(graph.weights(u) for u in graph.units)
    (one,) = group(graph, total, across_blocks=True)
    assert one.units == graph.units
    assert one.inputs == tuple(graph.inputs)
    for most in (total // 2 + largest, total // 4 + largest):
        chunks = group(graph, most, across_blocks=True)
        assert [u for c in chunks for u in c.units] == list(graph.units)
        assert all(c.weights <= most for c in chunks)
        assert len(chunks) <= -(-total // most) + 1
        assert len({u.block for u in chunks[0].units}) > 1


def test_forgotten_floats_keep_their_shape_and_take_no_memory(tmp_path):
    component = tiny.component(tiny.unet(**tiny.SDXL), tmp_path)
    graph, _ = unet_graph(component, (8, 8), tiny.TOKENS)
    (segment, *_) = group(graph, 10**9)
    quantized = materialize(segment, component, find_precision("int8"))
    before = {n: layer.weight.detach().clone() for n, layer in layers(segment)}
    forget_floats(segment)
    for name, layer in layers(segment):
        assert layer.weight.shape == before[name].shape
        kept = torch.equal(layer.weight, before[name])
        assert kept == (name not in quantized)
        assert kept or not layer.weight.any()
    release(segment)


def test_zeros_that_nobody_writes_take_no_memory():
    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmRSS"))

    before = resident()
    zeros = [_untouched(torch.Size((1024, 4096))) for _ in range(8)]
    assert resident() - before < 4 * 8 * 1024 * 4096 / 4
    assert all(z.shape == (1024, 4096) for z in zeros)
