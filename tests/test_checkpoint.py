from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tiny
from handheld.errors import CheckpointError
from handheld_export.checkpoint import Checkpoint, check_unet, write_student_component
from handheld_export.quantization import ActivationRange, QuantizedWeight, round_to_nearest
from handheld_export.segments import decoder_graph, group, materialize, unet_graph

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def broken(smallest, tmp_path):
    return tiny.copied(smallest, tmp_path / "broken")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def read_all(folder):
    """What an export reads."""
    checkpoint = Checkpoint(folder)
    graphs = [*unet_graph(checkpoint.unet, (8, 8)), decoder_graph(checkpoint.vae, (8, 8))]
    for graph in graphs:
        for segment in group(graph, 1_000_000):
            materialize(segment, checkpoint.component(graph.component), None)
    return checkpoint


def refusal(folder, call=read_all):
    with pytest.raises(CheckpointError) as e:
        call(folder)
    return e.value


def test_folder(smallest):
    checkpoint = read_all(smallest)
    stored = load_file(smallest / "unet" / WEIGHTS)
    assert set(checkpoint.unet.store) == set(stored)
    read = checkpoint.unet.tensors(list(stored))
    assert all(torch.equal(read[n], stored[n]) for n in stored)
    assert checkpoint.name == "smallest"
    assert checkpoint.scheduler["beta_end"] == 0.012
    assert [f.name for f in checkpoint.files].count(WEIGHTS) == 2
    assert Checkpoint(smallest).sha256 == checkpoint.sha256


def test_hash_changes_with_what_is_read(smallest, broken):
    before = Checkpoint(broken).sha256
    assert before == Checkpoint(smallest).sha256
    edit(broken / "handheld.json", steps=2)
    assert Checkpoint(broken).sha256 != before


def test_shards_with_an_index(smallest, tmp_path):
    folder = tiny.copied(smallest, tmp_path / "sharded")
    (folder / "unet" / WEIGHTS).unlink()
    tiny.unet(**tiny.SMALLEST).save_pretrained(folder / "unet", max_shard_size="100KB")
    assert (folder / "unet" / f"{WEIGHTS}.index.json").is_file()
    names = list(Checkpoint(smallest).unet.store)
    a, b = (Checkpoint(f).unet.tensors(names) for f in (smallest, folder))
    assert all(torch.equal(a[n], b[n]) for n in names)
    read_all(folder)
    next((folder / "unet").glob("*-00002-*.safetensors")).unlink()
    error = refusal(folder)
    assert "-00002-" in error.path
    assert "shards" in error.remedy
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../b"}}')
    assert refusal(folder).field == "weight_map"


def test_fp16_variant(smallest, tmp_path):
    folder = tiny.copied(smallest, tmp_path / "half")
    (folder / "unet" / WEIGHTS).unlink()
    tiny.unet(**tiny.SMALLEST).half().save_pretrained(folder / "unet", variant="fp16")
    assert [f.name for f in Checkpoint(folder).unet.store.files] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    value = read_all(folder).unet.tensors(["conv_in.weight"])["conv_in.weight"]
    assert value.dtype == torch.float32
    assert torch.equal(
        value, load_file(smallest / "unet" / WEIGHTS)["conv_in.weight"].half().float()
    )


def test_old_names_of_attention(smallest, tmp_path):
    folder = tiny.copied(smallest, tmp_path / "old")

    def rename(tensors):
        for name in [n for n in tensors if ".attentions." in n]:
            for new, old in (
                ("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"),
            ):  # fmt: skip
                if f".{new}." in name:
                    tensors[name.replace(new, old)] = tensors.pop(name)

    change_tensors(folder / "vae" / WEIGHTS, rename)
    assert any("proj_attn" in n for n in load_file(folder / "vae" / WEIGHTS))
    names = list(Checkpoint(smallest).vae.store)
    a, b = (Checkpoint(f).vae.tensors(names) for f in (smallest, folder))
    assert all(torch.equal(a[n], b[n]) for n in names)
    read_all(folder)


def test_not_a_checkpoint(tmp_path):
    error = refusal(tmp_path)
    assert error.message == "is not a checkpoint"
    assert "unet/config.json" in error.remedy
    assert "does not exist" in str(refusal(tmp_path / "nowhere"))
    (tmp_path / "model.ckpt").write_bytes(b"")
    assert "not a safetensors file" in str(refusal(tmp_path / "model.ckpt"))


def test_no_weights(broken):
    (broken / "unet" / WEIGHTS).unlink()
    assert "no safetensors weights" in str(refusal(broken))
    (broken / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert "convert .bin" in refusal(broken).remedy


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.999])
def test_truncated_weights(broken, keep):
    path = broken / "unet" / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    error = refusal(broken)
    assert error.path == str(path)
    assert "complete safetensors" in error.message


@pytest.mark.parametrize(
    ("part", "changes", "field"),
    [
        ("unet", {"_class_name": "FluxTransformer2DModel"}, "_class_name"),
        ("unet", {"down_block_types": ["SimpleCrossAttnDownBlock2D"]}, "down_block_types[0]"),
        ("unet", {"up_block_types": ["AttnUpBlock2D"]}, "up_block_types[0]"),
        ("unet", {"up_block_types": "UpBlock2D"}, "up_block_types"),
        ("unet", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet", {"encoder_hid_dim": 16}, "encoder_hid_dim"),
        ("unet", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ("unet", {"conv_in_kernel": 5}, "conv_in_kernel"),
        ("unet", {"only_cross_attention": [True]}, "only_cross_attention"),
        ("unet", {"addition_embed_type": "image"}, "addition_embed_type"),
        ("vae", {"_class_name": "VQModel"}, "_class_name"),
    ],
)
def test_unsupported_options_are_named(broken, part, changes, field):
    edit(broken / part / "config.json", **changes)
    error = refusal(broken)
    assert error.field == field
    assert error.path == str(broken / part / "config.json")
    assert error.remedy


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\xff"])
@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "handheld.json"])
def test_broken_json(broken, text, file):
    (broken / file).write_bytes(text.encode("latin-1"))
    error = refusal(broken, lambda f: read_all(f).settings)
    assert error.path == str(broken / file)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"size": "big"}, "size"),
        ({"steps": 0}, "steps"),
        ({"prompts": "one"}, "prompts"),
        ({"timesteps": [1.5]}, "timesteps[0]"),
    ],
)
def test_broken_settings(broken, changes, field):
    edit(broken / "handheld.json", **changes)
    error = refusal(broken, lambda f: Checkpoint(f).settings)
    assert error.field == field
    assert error.path == str(broken / "handheld.json")


def test_configuration_of_another_model(broken):
    edit(broken / "unet" / "config.json", cross_attention_dim=48)
    error = refusal(broken)
    assert "has shape (32, 40)" in error.message
    assert error.path.endswith(WEIGHTS)
    edit(broken / "unet" / "config.json", cross_attention_dim=40, layers_per_block=2)
    assert "is missing" in refusal(broken).message
    edit(broken / "unet" / "config.json", layers_per_block=1, block_out_channels="many")
    assert "describes no UNet2DConditionModel" in refusal(broken).message


def test_unexpected_tensor(broken):
    change_tensors(broken / "vae" / WEIGHTS, lambda t: t.update(extra=torch.zeros(1)))
    error = refusal(broken)
    assert "'extra' has no place" in error.message
    assert error.remedy


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(broken, value):
    def spoil(tensors):
        tensors["mid_block.resnets.0.conv1.weight"][0, 0, 0, 0] = value

    change_tensors(broken / "unet" / WEIGHTS, spoil)
    error = refusal(broken)
    assert "'mid_block.resnets.0.conv1.weight'" in error.message
    assert error.path == str(broken / "unet" / WEIGHTS)
    assert error.remedy


# --- students ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(smallest, tmp_path_factory):
    """A student with all four storages."""
    folder = tiny.copied(smallest, tmp_path_factory.mktemp("student") / "student")
    tensors = load_file(smallest / "unet" / WEIGHTS)
    layers = {
        "mid_block.resnets.0.conv1": ("int8", None),
        "mid_block.attentions.0.proj_in": ("int4", None),
        "mid_block.attentions.0.proj_out": ("int4", 8),
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": ("int2", None),
    }
    quantized = {
        n: round_to_nearest(tensors.pop(f"{n}.weight").numpy(), *how) for n, how in layers.items()
    }
    palette = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
    del tensors[f"{palette}.weight"]
    codes = np.random.default_rng(0).integers(0, 4, (32, 32)).astype(np.int8)
    book = np.array([-1.5, -0.2, 0.3, 1.0], np.float32)
    quantized[palette] = QuantizedWeight("palette", codes, np.ones(32, np.float32), None, book)
    ranges = {"mid_block.resnets.0.conv1": ActivationRange(-1.0, 2.0, -3.0, 4.5)}
    config = json.loads((smallest / "unet" / "config.json").read_text())
    floats = ["mid_block.resnets.0.conv1", "conv_in"]
    write_student_component(folder / "unet", config, tensors, quantized, ranges, floats)
    return folder, quantized, ranges


def test_student_round_trip(student):
    folder, quantized, ranges = student
    unet = read_all(folder).unet
    assert unet.quantized == set(quantized)
    assert unet.activation_ranges == ranges
    assert unet.float_inputs == {"mid_block.resnets.0.conv1", "conv_in"}
    for name, weight in quantized.items():
        read = unet.quantized_weight(name)
        assert read.sha256() == weight.sha256()
        assert read.group_size == weight.group_size
        assert np.array_equal(read.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t["mid_block.resnets.0.conv1.weight.codes"].fill_(-128), "codes leave -127"),
        (lambda t: t["mid_block.resnets.0.conv1.weight.scales"].fill_(0), "scales"),
        (lambda t: t["mid_block.resnets.0.conv1.weight.scales"].fill_(float("nan")), "scales"),
        (lambda t: t.pop("mid_block.resnets.0.conv1.weight.scales"), "is missing"),
        (lambda t: t.pop("mid_block.resnets.0.conv1.weight.codes"), "is missing"),
    ],
)
def test_broken_codes(student, tmp_path, change, what):
    folder = tiny.copied(student[0], tmp_path / "broken")
    change_tensors(folder / "unet" / WEIGHTS, change)
    error = refusal(folder)
    assert what in error.message
    assert "unet" in error.path


def test_a_float_input_of_no_layer_is_refused(student, tmp_path):
    folder = tiny.copied(student[0], tmp_path / "broken")
    for name in ("mid_block.none", "mid_block.resnets.0.norm1"):
        change_quantization(folder, lambda q, name=name: q.update(float_inputs=[name]))
        error = refusal(folder, read_all)
        assert (error.field, name in error.message) == ("float_inputs", True)
        assert error.path.endswith("quantization.json")


def test_students_with_a_byte_for_each_code_are_read(student, tmp_path):
    folder, quantized, _ = student
    old = tiny.copied(folder, tmp_path / "old")

    def spread(tensors):
        for name, weight in quantized.items():
            if tensors.pop(f"{name}.weight.packed", None) is not None:
                tensors[f"{name}.weight.codes"] = torch.from_numpy(weight.codes)

    change_tensors(old / "unet" / WEIGHTS, spread)
    change_quantization(
        old,
        lambda q: [q.update(schema_version=1), *(e.pop("shape", 0) for e in q["layers"].values())],
    )
    unet = read_all(old).unet
    for name, weight in quantized.items():
        assert unet.quantized_weight(name).sha256() == weight.sha256()


def change_quantization(folder, change):
    path = folder / "unet" / "quantization.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.update(schema_version=4),
        lambda q: q["layers"]["mid_block.attentions.0.proj_in"].update(shape=[32, 31]),
        lambda q: q["layers"]["mid_block.attentions.0.proj_in"].update(shape=[0, 32]),
        lambda q: q["layers"]["mid_block.attentions.0.proj_in"].pop("shape"),
        lambda q: q["layers"]["mid_block.resnets.0.conv1"].update(shape=[32, 32, 3, 3]),
        lambda q: q.update(layers=[]),
        lambda q: q.update(surplus=1),
        lambda q: q["layers"]["mid_block.resnets.0.conv1"].update(grid=None),
        lambda q: q["layers"]["mid_block.resnets.0.conv1"].update(grid="int3"),
        lambda q: q["layers"]["mid_block.resnets.0.conv1"].update(group_size="8"),
        lambda q: q["layers"]["mid_block.resnets.0.conv1"].update(group_size=7),
        lambda q: q["layers"].update(nowhere={"grid": "int8", "group_size": None}),
        lambda q: q["layers"].pop("mid_block.resnets.0.conv1"),
        lambda q: q["activations"].update(x={"input_min": 0}),
        lambda q: q["activations"]["mid_block.resnets.0.conv1"].update(input_min=float("nan")),
    ],
)
def test_broken_quantization_json(student, tmp_path, change):
    folder = tiny.copied(student[0], tmp_path / "broken")
    change_quantization(folder, change)
    error = refusal(folder, lambda f: read_all(f).unet.activation_ranges)
    assert "unet" in error.path


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    value=json_values
    | st.fixed_dictionaries(
        {"schema_version": st.just(1), "layers": json_values, "activations": json_values}
    )
    | st.fixed_dictionaries(
        {
            "schema_version": st.just(1),
            "layers": st.dictionaries(
                st.sampled_from(["conv_in", "mid_block.resnets.0.conv1"]), json_values
            ),
        }
    )
)
def test_any_quantization_json_is_read_or_refused(smallest, tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp() / "fuzz-json"
    if not folder.exists():
        tiny.copied(smallest, folder)
    (folder / "unet" / "quantization.json").write_text(json.dumps(value))
    unet = Checkpoint(folder).unet
    try:
        _ = unet.activation_ranges
        for layer in unet.quantized:
            unet.quantized_weight(layer)
    except CheckpointError as e:
        assert e.path


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    header=st.binary(max_size=64)
    | json_values.map(lambda v: json.dumps(v).encode())
    | st.dictionaries(
        st.text(max_size=8),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "I8", "X"]),
                "shape": st.lists(st.integers(-1, 9), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ).map(lambda v: json.dumps(v).encode()),
    length=st.none() | st.integers(0, 2**64 - 1),
    data=st.binary(max_size=40),
)
def test_any_header_is_read_or_refused(smallest, tmp_path_factory, header, length, data):
    folder = tmp_path_factory.getbasetemp() / "fuzz-header"
    if not folder.exists():
        tiny.copied(smallest, folder)
    size = struct.pack("<Q", len(header) if length is None else length)
    (folder / "unet" / WEIGHTS).write_bytes(size + header + data)
    with pytest.raises(CheckpointError) as e:
        unet_graph(Checkpoint(folder).unet, (8, 8))
    assert e.value.path


def test_options_of_lists_are_checked_too():
    config = dict(tiny.SDXL) | {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": list(tiny.SDXL["down_block_types"]),
        "up_block_types": list(tiny.SDXL["up_block_types"]),
        "only_cross_attention": [False, False],
    }
    check_unet(config, "config.json")
