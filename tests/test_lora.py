"""LoRA files in every naming give the weights that the formula says."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tiny
from handheld.errors import CheckpointError, HandheldError, UsageError
from handheld_export.checkpoint import Checkpoint
from handheld_export.compress.painter import weights
from handheld_export.lora import Lora, _ldm_name, fused
from handheld_export.text import LocalTextEncoder

RANK = 4
# In diffusers' names: a projection, a feed-forward layer, a 3x3 and a 1x1 convolution, the middle.
LAYERS = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "input_blocks_3_1_transformer_blocks_0_attn1_to_q"
    ),
    "up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_out.0": (
        "output_blocks_1_1_transformer_blocks_1_attn2_to_out_0"
    ),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (
        "middle_block_1_transformer_blocks_0_ff_net_0_proj"
    ),
    "mid_block.resnets.1.conv1": "middle_block_2_in_layers_2",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_3_0_skip_connection",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
    "conv_in": "input_blocks_0_0",
}


def halves(checkpoint, layers=LAYERS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in layers:
        shape = checkpoint.unet.store.shape(f"{layer}.weight")
        down = torch.randn(RANK, *shape[1:], generator=generator) * 0.05
        up = torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=generator) * 0.05
        found[layer] = down, up
    return found


def diffusers_file(path, parts, alpha=None, prefix="unet."):
    tensors = {}
    for layer, (down, up) in parts.items():
        tensors[f"{prefix}{layer}.lora_A.weight"] = down
        tensors[f"{prefix}{layer}.lora_B.weight"] = up
        if alpha is not None:
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def kohya_file(path, parts, alpha=None, *, ldm=False):
    tensors = {}
    for layer, (down, up) in parts.items():
        name = LAYERS[layer] if ldm else layer.replace(".", "_")
        tensors[f"lora_unet_{name}.lora_down.weight"] = down
        tensors[f"lora_unet_{name}.lora_up.weight"] = up
        if alpha is not None:
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


@pytest.fixture
def base(sdxl):
    return Checkpoint(sdxl)


def test_every_naming_gives_the_same_weights(base, sdxl, tmp_path):
    parts = halves(base)
    old = {}
    for layer, (down, up) in parts.items():
        old[f"unet.{layer}.lora.down.weight"] = down
        old[f"unet.{layer}.lora.up.weight"] = up
    save_file(old, tmp_path / "old.safetensors")
    files = [
        diffusers_file(tmp_path / "d.safetensors", parts),
        kohya_file(tmp_path / "k.safetensors", parts),
        kohya_file(tmp_path / "l.safetensors", parts, ldm=True),
        tmp_path / "old.safetensors",
    ]
    before = weights(base.unet)
    for file in files:
        after = weights(Checkpoint(fused(sdxl, [Lora(file, 0.5)], tmp_path / "cache")).unet)
        for name, value in after.items():
            layer = name.removesuffix(".weight")
            if layer in parts:
                down, up = (p.numpy().astype(np.float64) for p in parts[layer])
                change = 0.5 * up.reshape(-1, RANK) @ down.reshape(RANK, -1)
                wanted = before[name].numpy() + change.reshape(value.shape)
                np.testing.assert_allclose(value.numpy(), wanted, atol=1e-6)
            else:
                assert torch.equal(value, before[name])


def test_alphas_in_the_header_count_as_those_beside_the_tensors(base, sdxl, tmp_path):
    parts = halves(base)
    special = "conv_in"
    header = {"unet.r": RANK, "unet.lora_alpha": 2.0, "unet.alpha_pattern": {special: 1.0}}

    def fuse(tensors, name, header=None):
        metadata = {"lora_adapter_metadata": json.dumps(header)} if header is not None else None
        save_file(tensors, tmp_path / name, metadata)
        folder = fused(sdxl, [Lora(tmp_path / name)], tmp_path / "cache")
        return weights(Checkpoint(folder).unet)

    plain = {}
    for layer, (down, up) in parts.items():
        plain[f"unet.{layer}.lora_A.weight"] = down
        plain[f"unet.{layer}.lora_B.weight"] = up
    beside = {f"unet.{x}.alpha": torch.tensor(1.0 if x == special else 2.0) for x in parts}
    wanted = fuse(plain | beside, "beside.safetensors")
    found = fuse(plain, "header.safetensors", header)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    stable = fuse(plain, "stable.safetensors", {"unet.lora_alpha": 1, "unet.use_rslora": True})
    root = {f"unet.{x}.alpha": torch.tensor(RANK**0.5) for x in parts}
    rooted = fuse(plain | root, "root.safetensors")
    assert all(torch.equal(value, rooted[name]) for name, value in stable.items())
    for broken in ([], {"unet.lora_alpha": "much"}, {"unet.alpha_pattern": {"(": 1}}):
        with pytest.raises(CheckpointError, match="no configuration") as error:
            fuse(plain, "broken.safetensors", broken)
        assert error.value.field == "lora_adapter_metadata"


def test_attention_processors_of_old_files_are_understood(base, sdxl, tmp_path):
    layer = "up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_out.0"
    parts = halves(base, [layer])
    head = f"unet.{layer.removesuffix('.to_out.0')}.processor.to_out_lora"
    tensors = {f"{head}.down.weight": parts[layer][0], f"{head}.up.weight": parts[layer][1]}
    save_file(tensors, tmp_path / "a.safetensors")
    diffusers_file(tmp_path / "b.safetensors", parts)
    one, two = (
        weights(Checkpoint(fused(sdxl, [Lora(tmp_path / f)], tmp_path / "c")).unet)
        for f in ("a.safetensors", "b.safetensors")
    )
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_alpha_and_strength_scale_the_change(base, sdxl, tmp_path):
    parts = halves(base, list(LAYERS)[:2])
    alpha = fused(sdxl, [Lora(diffusers_file(tmp_path / "a.safetensors", parts, 8.0))], tmp_path)
    plain = diffusers_file(tmp_path / "p.safetensors", parts)
    strong = fused(sdxl, [Lora(plain, 2.0)], tmp_path)
    one, two = weights(Checkpoint(alpha).unet), weights(Checkpoint(strong).unet)
    assert all(torch.allclose(one[n], two[n], atol=1e-7) for n in one)
    nothing = weights(Checkpoint(fused(sdxl, [Lora(plain, 0.0)], tmp_path)).unet)
    assert all(torch.equal(v, nothing[n]) for n, v in weights(base.unet).items())


def test_several_files_add_up(base, sdxl, tmp_path):
    files = [diffusers_file(tmp_path / f"{i}.safetensors", halves(base, seed=i)) for i in range(2)]
    both = weights(Checkpoint(fused(sdxl, [Lora(f) for f in files], tmp_path / "c")).unet)
    each = [weights(Checkpoint(fused(sdxl, [Lora(f)], tmp_path / "c")).unet) for f in files]
    before = weights(base.unet)
    for name in before:
        wanted = each[0][name] + each[1][name] - before[name]
        assert torch.allclose(both[name], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("kohya", "diffusers", "kind"),
    [("lora_te1_", "text_encoder.", 0), ("lora_te2_", "text_encoder_2.", 1)],
)
def test_text_encoders_are_fused(sdxl, tmp_path, kohya, diffusers, kind):
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    width = tiny.WIDTHS[kind]
    down, up = torch.randn(RANK, width), torch.randn(width, RANK)
    for name, file in ((f"{kohya}{layer.replace('.', '_')}", "k"), (f"{diffusers}{layer}", "d")):
        tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        save_file(tensors, tmp_path / f"{file}.safetensors")
    plain = LocalTextEncoder(sdxl).encode(["a red robot"])[0].prompt_embeds
    changed = [
        LocalTextEncoder(fused(sdxl, [Lora(tmp_path / f"{f}.safetensors")], tmp_path / "c"))
        .encode(["a red robot"])[0]
        .prompt_embeds
        for f in "kd"
    ]
    assert np.array_equal(*changed)
    own = slice(0, tiny.WIDTHS[0]) if kind == 0 else slice(tiny.WIDTHS[0], None)
    assert not np.allclose(changed[0][:, own], plain[:, own], atol=1e-3)


def test_a_fused_checkpoint_is_made_once_and_says_of_what(base, sdxl, tmp_path):
    file = diffusers_file(tmp_path / "style.safetensors", halves(base))
    folder = fused(sdxl, [Lora(file, 0.8)], tmp_path / "c")
    stamp = (folder / "handheld.json").stat().st_mtime_ns
    assert fused(sdxl, [Lora(file, 0.8)], tmp_path / "c") == folder
    assert (folder / "handheld.json").stat().st_mtime_ns == stamp
    assert fused(sdxl, [Lora(file, 0.7)], tmp_path / "c") != folder
    said = json.loads((folder / "handheld.json").read_text())["lora"]
    assert said[0]["name"] == "style.safetensors"
    assert said[0]["strength"] == 0.8
    assert Checkpoint(folder).vae_sha256 == base.vae_sha256


def test_every_layer_of_sdxl_has_one_original_name():
    """Checked against diffusers' own converter in test_single_file; here: no two share one."""
    from handheld import counting
    from handheld_export.single_file import SD15_UNET, SDXL_UNET

    for config in (SDXL_UNET, SD15_UNET):
        layers = [x.name for x in counting.count_unet(config, (64, 64)) if len(x.shape) > 1]
        names = [_ldm_name(n, config) for n in layers]
        assert all(names)
        assert len(set(names)) == len(names)


def test_original_names_are_those_of_single_files(tmp_path):
    """diffusers' converter is the judge."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from handheld import counting
    from handheld_export.single_file import SDXL_UNET

    layers = [x for x in counting.count_unet(SDXL_UNET, (64, 64)) if len(x.shape) > 1]
    names = {_ldm_name(x.name, SDXL_UNET): x.name for x in layers}
    given = {f"model.diffusion_model.{n}.weight": torch.empty(0) for n in names}
    given |= {k.replace(".weight", ".bias"): v for k, v in given.items()}
    marks = {k: torch.tensor([float(i)]) for i, k in enumerate(given)}
    try:
        made = convert_ldm_unet_checkpoint(dict(marks), dict(SDXL_UNET))
    except KeyError as e:
        pytest.skip(f"the converter wants norms too: {e}")
    by_value = {float(v): k for k, v in made.items()}
    for key, mark in marks.items():
        if key.endswith(".weight"):
            name = key.removeprefix("model.diffusion_model.").removesuffix(".weight")
            assert by_value[float(mark)] == f"{names[name]}.weight"


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("C:\\a.safetensors", "C:\\a.safetensors", 1.0),
    ],
)
def test_strengths_are_read_from_the_command_line(text, path, strength):
    lora = Lora.parse(text)
    assert str(lora.path) == path
    assert lora.strength == strength


@pytest.mark.parametrize("strength", ["nan", "inf"])
def test_strengths_that_are_not_finite_are_refused(strength):
    with pytest.raises(UsageError, match="not finite"):
        Lora.parse(f"a.safetensors:{strength}")


NAME = "unet.conv_in"
GOOD = {f"{NAME}.lora_A.weight": (RANK, 4, 3, 3), f"{NAME}.lora_B.weight": (32, RANK, 1, 1)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{NAME}.lora_B.weight": None}, "up half is missing"),
        ({f"{NAME}.lora_A.weight": None}, "down half is missing"),
        ({f"{NAME}.lora_B.weight": (33, RANK, 1, 1)}, "do not fit"),
        ({f"{NAME}.lora_A.weight": (RANK, 5, 3, 3)}, "do not fit"),
        ({f"{NAME}.lora_A.weight": (RANK + 1, 4, 3, 3)}, "do not fit"),
        ({f"{NAME}.lora_A.weight": (0, 4, 3, 3)}, "shape"),
        ({f"{NAME}.lora_A.weight": (RANK,)}, "shape"),
        ({"unet.nowhere.lora_A.weight": (RANK, 4)}, "no layer 'unet.nowhere'"),
        ({"lora_te2_nowhere.lora_up.weight": (RANK, 4)}, "no layer"),
        ({f"{NAME}.dora_scale": (32,)}, "DoRA"),
        ({f"{NAME}.lora_magnitude_vector": (32,)}, "DoRA"),
        ({"lora_unet_conv_in.hada_w1_a": (4, 4)}, "LoHa"),
        ({"lora_unet_conv_in.lokr_w1": (4, 4)}, "LoKr"),
        ({"lora_unet_conv_in.lora_mid.weight": (4, 4, 3, 3)}, "CP"),
        ({f"{NAME}.alpha": (2,)}, "not one number"),
    ],
)
def test_what_cannot_be_fused_is_named(sdxl, tmp_path, change, words):
    shapes = {k: v for k, v in (GOOD | change).items() if v is not None}
    save_file({k: torch.ones(v) for k, v in shapes.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=words) as error:
        fused(sdxl, [Lora(tmp_path / "bad.safetensors")], tmp_path / "c")
    assert error.value.path == str(tmp_path / "bad.safetensors")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(sdxl, tmp_path, value):
    tensors = {k: torch.full(v, value) for k, v in GOOD.items()}
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        fused(sdxl, [Lora(tmp_path / "bad.safetensors")], tmp_path / "c")


def test_missing_and_empty_files_are_named(sdxl, tmp_path):
    with pytest.raises(CheckpointError, match="no such LoRA"):
        fused(sdxl, [Lora(tmp_path / "missing.safetensors")], tmp_path)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        fused(sdxl, [Lora(tmp_path / "empty.safetensors")], tmp_path)


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_bytes_give_a_clear_error(sdxl, tmp_path_factory, raw):
    folder = tmp_path_factory.mktemp("lora")
    (folder / "x.safetensors").write_bytes(raw)
    with pytest.raises(HandheldError):
        fused(sdxl, [Lora(folder / "x.safetensors")], folder)


@given(st.text(alphabet="abkloruntevw_.012", max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_key_gives_a_clear_error(sdxl, tmp_path_factory, key):
    folder = tmp_path_factory.mktemp("lora")
    save_file({key: torch.ones(4, 4)}, folder / "x.safetensors")
    with pytest.raises(HandheldError):
        fused(sdxl, [Lora(folder / "x.safetensors")], folder)
