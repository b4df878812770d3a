"""Files in the naming of latent diffusion, written here by a mapping of our own."""

from __future__ import annotations

import json
import re
import struct

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

import tiny
from handheld.errors import CheckpointError
from handheld_export.checkpoint import Checkpoint
from handheld_export.segments import decoder_graph, unet_graph
from handheld_export.single_file import SD15_UNET, SDXL_UNET
from handheld_export.text import LocalTextEncoder

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def original_resnet_name(name):
    head, _, leaf = name.partition(".")
    return f"{RESNET[head]}.{leaf}"


def original_unet_name(name, layers, names):
    head, _, leaf = name.rpartition(".")
    if head in TOP:
        name = f"{TOP[head]}.{leaf}"
    elif m := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        name = f"middle_block.1.{m[3]}"
        if m[1] == "resnets":
            name = f"middle_block.{2 * int(m[2])}.{original_resnet_name(m[3])}"
    else:
        m = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
        side, i, part, j, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
        if part == "downsamplers":
            name = f"input_blocks.{(i + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
        elif part == "upsamplers":
            at = 2 if any(n.startswith(f"up_blocks.{i}.attentions") for n in names) else 1
            name = f"output_blocks.{i * (layers + 1) + layers}.{at}.{rest}"
        else:
            place = i * (layers + 1) + j
            block = f"input_blocks.{place + 1}" if side == "down" else f"output_blocks.{place}"
            name = f"{block}.1.{rest}"
            if part == "resnets":
                name = f"{block}.0.{original_resnet_name(rest)}"
    return f"model.diffusion_model.{name}"


def original_vae_name(name, levels):
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    if "mid.attn_1" in name:
        for new, old in (("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_", "")):
            name = name.replace(new, old)
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    for new, old in (
        (".resnets.", ".block."), ("upsamplers.0", "upsample"), ("downsamplers.0", "downsample"),
        ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"),
    ):  # fmt: skip
        name = name.replace(new, old)
    return f"first_stage_model.{name}"


def originals(unet, vae, layers):
    state = unet.state_dict()
    result = {original_unet_name(n, layers, state): t for n, t in state.items()}
    levels = len(vae.config.block_out_channels)
    for name, tensor in vae.state_dict().items():
        original = original_vae_name(name, levels)
        convolution = "mid.attn_1" in original and tensor.ndim == 2
        result[original] = tensor[:, :, None, None] if convolution else tensor
    return {n: t.contiguous() if t.device.type != "meta" else t for n, t in result.items()}


def write_sparse(path, tensors):
    """A file of the right size without contents."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + 2 * tensor.numel()
        header[name] = {
            "dtype": "F16", "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + offset)


def tiny_file(folder, unet_config, **extra):
    folder.mkdir(exist_ok=True)
    unet, vae = tiny.unet(**unet_config), tiny.vae(**tiny.KL)
    path = folder / "model.safetensors"
    noise = {"model_ema.decay": torch.zeros(1), "cond_stage_model.x": torch.zeros(2)}
    tensors = originals(unet, vae, unet_config["layers_per_block"]) | noise | extra
    save_file(tensors, path)
    (folder / "model.json").write_text(unet.to_json_string())
    return path, unet, vae


@pytest.mark.parametrize("name", ["SDXL", "SD15"])
def test_tensors_are_those_of_diffusers(tmp_path, name):
    config = getattr(tiny, name) | {"layers_per_block": 2}
    path, unet, vae = tiny_file(tmp_path, config)
    checkpoint = Checkpoint(path)
    for component, model in ((checkpoint.unet, unet), (checkpoint.vae, vae)):
        state = model.state_dict()
        assert set(component.store) == set(state)
        read = component.tensors(list(state))
        assert all(torch.equal(read[n], t) for n, t in state.items())
    unet_graph(checkpoint.unet, (8, 8))
    decoder_graph(checkpoint.vae, (8, 8))
    assert checkpoint.vae.config["scaling_factor"] == (0.13025 if name == "SDXL" else 0.18215)
    assert checkpoint.name == "model"
    assert len(checkpoint.files) == 2  # the configuration counts
    assert len(checkpoint.sha256) == 64


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real sizes, on the meta device."""
    folder = tmp_path_factory.mktemp("real")
    vae_config = tiny.KL | {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    result = {}
    with torch.device("meta"):
        vae = AutoencoderKL(**vae_config)
        for name, config in (("sdxl", SDXL_UNET), ("sd15", SD15_UNET)):
            unet = UNet2DConditionModel.from_config(dict(config))
            result[name] = originals(unet, vae, 2)
            write_sparse(folder / f"{name}.safetensors", result[name])
    return folder, result


@pytest.mark.parametrize(("name", "parameters"), [("sdxl", 2_567_463_684), ("sd15", 859_520_964)])
def test_real_sizes_need_no_configuration(real, name, parameters):
    checkpoint = Checkpoint(real[0] / f"{name}.safetensors")
    graph, embedding = unet_graph(checkpoint.unet, (64, 64))
    assert sum(p.numel() for p in graph.model.parameters()) == parameters
    assert (embedding is None) == (name == "sd15")
    assert decoder_graph(checkpoint.vae, (64, 64)).shapes["decoder.conv_out"] == (1, 3, 512, 512)


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        (
            "sdxl",
            lambda t: {n: v for n, v in t.items() if ".middle_block.1.transformer" not in n},
            "transformer depth of middle_block is 0, not 10",
        ),
        (
            "sdxl",
            lambda t: {
                n: v for n, v in t.items() if not re.search(r"put_blocks.*_blocks\.[4-9]\.", n)
            },
            "transformer depth of input_blocks.7 is 4, not 10",
        ),
        (
            "sd15",
            lambda t: {
                n: torch.empty(320, 9, 3, 3) if n.endswith("input_blocks.0.0.weight") else v
                for n, v in t.items()
            },
            "input channels is 9, not 4",
        ),
        (
            "sd15",
            lambda t: {
                n: torch.empty(v.shape[0], 1024) if "attn2.to_k" in n else v for n, v in t.items()
            },
            "text width is 1024, not 768",
        ),
        ("sdxl", lambda t: t | {"v_pred": torch.empty(1)}, "predicts v"),
    ],
)
def test_variants_are_refused_by_name(real, tmp_path, name, change, what):
    path = tmp_path / "variant.safetensors"
    write_sparse(path, change(real[1][name]))
    with pytest.raises(CheckpointError) as e:
        _ = Checkpoint(path).unet
    assert what in e.value.message
    assert e.value.remedy
    assert e.value.path == str(path)


def test_small_variant_asks_for_its_configuration(tmp_path):
    path, _, _ = tiny_file(tmp_path, tiny.SDXL)
    (tmp_path / "model.json").unlink()
    with pytest.raises(CheckpointError, match="first width is 32, not 320") as e:
        _ = Checkpoint(path).unet
    assert "model.json" in e.value.remedy
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Other"}))
    with pytest.raises(CheckpointError, match="first width"):
        _ = Checkpoint(path).unet
    tiny.unet(**tiny.SDXL).save_config(tmp_path)
    unet_graph(Checkpoint(path).unet, (8, 8))
    (tmp_path / "model.json").write_text(json.dumps({"_class_name": "Other"}))
    with pytest.raises(CheckpointError) as e:
        _ = Checkpoint(path).unet
    assert e.value.field == "_class_name"


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"lora_unet_a.down": 1, "lora_unet_b.down": 1}, "lora_unet_a.* (1)"),
        ({"double_blocks.0.img.weight": 1}, "double_blocks.* (1)"),
        ({}, "no tensors"),
    ],
)
def test_unknown_contents_are_named(tmp_path, tensors, found):
    path = tmp_path / "x.safetensors"
    save_file({n: torch.zeros(1) for n in tensors}, path)
    with pytest.raises(CheckpointError) as e:
        _ = Checkpoint(path).unet
    assert found in e.value.message
    assert "diffusers layout" in e.value.remedy


def test_missing_parts(tmp_path):
    unet = tiny.unet(**tiny.SDXL)
    full = originals(unet, tiny.vae(**tiny.KL), 1)
    path = tmp_path / "model.safetensors"
    (tmp_path / "model.json").write_text(unet.to_json_string())
    save_file({n: t for n, t in full.items() if "diffusion_model" in n}, path)
    with pytest.raises(CheckpointError, match="has no autoencoder"):
        _ = Checkpoint(path).vae
    save_file({n: t for n, t in full.items() if "label_emb" not in n}, path)
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        _ = Checkpoint(path).unet
    save_file(full | {"model.diffusion_model.adapter.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"'model.diffusion_model.adapter.weight' has no"):
        _ = Checkpoint(path).unet
    save_file({"first_stage_model.decoder.conv_in.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(CheckpointError, match="no autoencoder like"):
        _ = Checkpoint(path).vae
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="not a complete safetensors"):
        _ = Checkpoint(path).unet


def test_text_encoders_are_read_from_folders_only(tmp_path):
    path, _, _ = tiny_file(tmp_path, tiny.SDXL)
    with pytest.raises(CheckpointError) as e:
        LocalTextEncoder(path)
    assert "folders in diffusers layout only" in e.value.remedy
