from __future__ import annotations

from typing import Any

import pytest

from handheld.counting import Layer, count_decoder, count_unet, summary
from handheld.errors import CheckpointError

SDXL: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
SD15: dict[str, Any] = {
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "layers_per_block": 2,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SMALL: dict[str, Any] = {
    **SDXL,
    "block_out_channels": [32, 64, 96],
    "attention_head_dim": [2, 4, 6],
    "cross_attention_dim": 48,
    "projection_class_embeddings_input_dim": 112,
    "addition_time_embed_dim": 16,
}
UNETS = {
    "sdxl": SDXL,
    "sd15": SD15,
    "small": SMALL,
    "no mid block": {**SMALL, "mid_block_type": None},
    "plain mid block": {**SMALL, "mid_block_type": "UNetMidBlock2D"},
    "nested depths": {
        **SMALL,
        "mid_block_type": None,
        "transformer_layers_per_block": [0, [2, 1], [4, 3]],
        "reverse_transformer_layers_per_block": [[4, 3, 5], [2, 1, 1], 0],
    },
    "uneven blocks": {**SMALL, "layers_per_block": [1, 2, 3], "cross_attention_dim": [8, 16, 24]},
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TINY: dict[str, Any] = {
    "_class_name": "AutoencoderTiny",
    "decoder_block_out_channels": [64, 64, 64, 64],
    "num_decoder_blocks": [3, 3, 3, 1],
    "latent_channels": 4,
}


def shapes(layers: list[Layer]) -> dict[str, tuple[int, ...]]:
    found = {f"{x.name}.weight": x.shape for x in layers if x.shape}
    return found | {f"{x.name}.bias": x.shape[:1] for x in layers if x.bias}


def millions(value: int) -> float:
    return round(value / 1e6, 1)


@pytest.mark.parametrize("name", UNETS)
def test_unet_layers_are_those_of_diffusers(name):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        config = {k: v for k, v in UNETS[name].items() if k != "_class_name"}
        model = diffusers.UNet2DConditionModel(**config)
    layers = count_unet(UNETS[name], (64, 64))
    assert shapes(layers) == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert summary(layers)["params"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", [VAE, TINY, {**VAE, "use_post_quant_conv": False}])
def test_decoder_layers_are_those_of_diffusers(config):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        cls = getattr(diffusers, config["_class_name"])
        model = cls(**{k: v for k, v in config.items() if k != "_class_name"})
    wanted = {
        k: tuple(v.shape)
        for k, v in model.state_dict().items()
        if k.startswith(("decoder.", "post_quant_conv."))
    }
    assert shapes(count_decoder(config, (64, 64))) == wanted


@pytest.mark.parametrize("name", ["small", "nested depths", "sd15"])
@pytest.mark.parametrize("latent", [(8, 8), (13, 10)])
def test_macs_are_those_that_torch_counts(name, latent):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from torch.utils.flop_counter import FlopCounterMode

    config = {k: v for k, v in UNETS[name].items() if k != "_class_name"}
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config).eval()
        added = {"text_embeds": torch.empty(1, 16), "time_ids": torch.empty(1, 6)}
        if name == "sd15":
            added = None
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(
                torch.empty(1, 4, *latent),
                torch.empty(1),
                torch.empty(1, 77, config["cross_attention_dim"]),
                added_cond_kwargs=added,
            )
    assert 2 * summary(count_unet(config, latent))["macs"] == counter.get_total_flops()


def test_sdxl_in_numbers():
    by_kind = summary(count_unet(SDXL, (64, 64)))["params_by_kind"]
    assert millions(by_kind["linear"]) == pytest.approx(2232.6, abs=1)
    assert millions(by_kind["conv3x3"]) == pytest.approx(319.8, abs=1)
    assert millions(summary(count_unet(SDXL, (64, 64)))["params"]) == 2567.5
    for latent, gmac in ((64, 794), (96, 1821), (128, 3381)):
        total = summary(count_unet(SDXL, (latent, latent)))
        assert total["macs"] / 1e9 == pytest.approx(gmac, abs=1)


def test_decoders_in_numbers():
    full = summary(count_decoder(VAE, (64, 64)))
    tiny = summary(count_decoder(TINY, (64, 64)))
    assert (millions(full["params"]), round(full["macs"] / 1e9)) == (49.5, 1257)
    assert (round(tiny["params"] / 1e6, 2), round(tiny["macs"] / 1e9)) == (1.22, 71)


def test_batch_and_bytes():
    one, two = (count_unet(SMALL, (8, 8), batch=n) for n in (1, 2))
    assert [2 * x.macs for x in one] == [x.macs for x in two]
    layer = Layer("x", "linear", (6, 4), True, 24, 6)
    assert (layer.params, layer.nbytes(), layer.nbytes(4, 16)) == (30, 120, 24)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types[0]"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"addition_embed_type": "image"}, "addition_embed_type"),
        ({"only_cross_attention": True}, "only_cross_attention"),
    ],
)
def test_what_is_not_supported_is_refused(change, field):
    with pytest.raises(CheckpointError) as e:
        count_unet({**SMALL, **change}, (8, 8))
    assert e.value.field == field


def test_other_autoencoders_are_refused():
    with pytest.raises(CheckpointError, match="AutoencoderDC"):
        count_decoder({"_class_name": "AutoencoderDC"}, (8, 8))
