"""The LiteRT target on real diffusers modules: numerics, codes in the file, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import ai_edge_litert.schema_py_generated as schema
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from handheld import planning
from handheld.errors import TargetError
from handheld.program import Ports, TensorSpec
from handheld_export.litert import tflite
from handheld_export.quantization import QuantizedWeight, round_to_nearest
from handheld_export.targets.base import Lowered, SegmentInput
from handheld_export.targets.litert_cpu import LiteRTCPU

TARGET = LiteRTCPU()
INT8, INT4, INT2 = ("int8", None), ("int4", None), ("int2", None)
INT4_G32 = ("int4", 32)


class Picture(nn.Module):
    """``[N, H, W, C]`` outside, ``[N, C, H, W]`` inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        y = self.module(x.permute(0, 3, 1, 2), *others)
        y = y[0] if isinstance(y, tuple) else y
        return (y.permute(0, 2, 3, 1),)


class Tokens(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.layers(x),)


class Spatial(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.model(x, encoder_hidden_states=context, return_dict=False)[0]


def _resnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    block = ResnetBlock2D(in_channels=64, out_channels=96, temb_channels=48, groups=32)
    return Picture(block), (torch.randn(1, 8, 8, 64) + 3, torch.randn(1, 48))


def _transformer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = Transformer2DModel(
        2, 32, 64, cross_attention_dim=96, use_linear_projection=True, norm_num_groups=32
    )
    return Picture(Spatial(model)), (torch.randn(1, 8, 8, 64), torch.randn(1, 7, 96))


def _attention() -> tuple[nn.Module, tuple[Tensor, ...]]:
    attention = Attention(
        64,
        heads=1,
        dim_head=64,
        eps=1e-6,
        norm_num_groups=32,
        residual_connection=True,
        bias=True,
        upcast_softmax=True,
        _from_deprecated_attn_block=True,
    )
    return Picture(attention), (torch.randn(1, 8, 8, 64),)


def _downsample() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Picture(Downsample2D(64, use_conv=True, padding=1)), (torch.randn(1, 8, 8, 64),)


def _upsample() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Picture(Upsample2D(64, use_conv=True)), (torch.randn(1, 8, 8, 64),)


MODULES = {
    "resnet": _resnet,
    "transformer": _transformer,
    "attention": _attention,
    "downsample": _downsample,
    "upsample": _upsample,
}


def _make(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    module, examples = MODULES[name]()
    for path, parameter in module.named_parameters():
        if "norm" in path:
            parameter.data = torch.randn_like(parameter) * 0.3 + 1
    return module.eval(), examples


def _quantize(layer: nn.Module, grid: str, group_size: int | None = None) -> None:
    q = round_to_nearest(layer.weight.detach().numpy(), grid, group_size)  # type: ignore[arg-type]
    layer.quantized = q
    layer.weight = nn.Parameter(torch.from_numpy(q.dequantize()), requires_grad=False)


def _quantized(module: nn.Module, linear: tuple, convolution: tuple = INT8) -> nn.Module:
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            _quantize(layer, *linear)
        elif isinstance(layer, nn.Conv2d):
            _quantize(layer, *convolution)
    return module


def _segment(module: nn.Module, examples: tuple[Tensor, ...]) -> SegmentInput:
    with torch.no_grad():
        results = module(*examples)
    # Names whose alphabetical order is not the order of the ports.
    ports = Ports(
        inputs={f"in{9 - i}": TensorSpec(shape=tuple(x.shape)) for i, x in enumerate(examples)},
        outputs={f"out{9 - i}": TensorSpec(shape=tuple(x.shape)) for i, x in enumerate(results)},
    )
    return SegmentInput("s", module, ports, examples)


def _lower(module: nn.Module, examples: tuple[Tensor, ...], path: Path) -> tuple[Lowered, float]:
    segment = _segment(module, examples)
    lowered = TARGET.lower(segment, path)
    with torch.no_grad():
        wanted = module(*examples)[0].double().numpy()
    got = TARGET.load(path, segment.ports)(*(x.numpy() for x in examples))[0]
    noise = np.square(wanted - got).sum()
    return lowered, 10 * np.log10(np.square(wanted).sum() / noise)


def _stored(path: Path) -> dict[str, tuple[int, np.ndarray, np.ndarray | None]]:
    """Read type, codes and scales of all weights, independently of the writer."""
    data = path.read_bytes()
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    graph = model.subgraphs[0]
    found = {}
    for tensor in graph.tensors:
        if not tensor.name.endswith(b".weight"):
            continue
        buffer = model.buffers[tensor.buffer]
        raw = np.frombuffer(data, np.uint8, buffer.size, buffer.offset)
        shape = [int(d) for d in tensor.shape]
        bits = {9: 8, 17: 4, 19: 2, 0: 32}[int(tensor.type)]
        if bits == 32:
            found[tensor.name.decode()] = (32, raw.view(np.float32).reshape(shape), None)
            continue
        fields = (raw[:, None] >> np.arange(0, 8, bits)) & ((1 << bits) - 1)
        codes = fields.astype(np.int16).reshape(-1)
        codes = np.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
        q = tensor.quantization
        scales = q.scale
        if isinstance(q.details, schema.BlockwiseQuantizationT):
            scales = model.buffers[graph.tensors[q.details.scales].buffer].data.view(np.float16)
        found[tensor.name.decode()] = (bits, codes[: np.prod(shape)].reshape(shape), scales)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_float_matches_torch_in_one_partition(name: str, tmp_path: Path) -> None:
    lowered, snr = _lower(*_make(name), tmp_path / "a.tflite")
    assert snr > 100
    assert lowered.partitions == 1
    assert lowered.tools["ai-edge-litert"]


@pytest.mark.parametrize(
    ("name", "linear"),
    [("resnet", INT8), ("transformer", INT4), ("transformer", INT4_G32), ("transformer", INT2)],
    ids=str,
)
def test_quantized_matches_the_student(name: str, linear: tuple, tmp_path: Path) -> None:
    module, examples = _make(name)
    lowered, snr = _lower(_quantized(module, linear), examples, tmp_path / "a.tflite")
    assert snr > 38
    assert lowered.partitions == 1


def test_codes_and_scales_are_the_students_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Tokens(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 48, bias=False), nn.Linear(48, 40))
    layers = module.layers
    for i, (grid, group) in {0: INT4, 2: INT4_G32, 3: INT2}.items():
        _quantize(layers[i], grid, group)
    path = tmp_path / "a.tflite"
    lowered, snr = _lower(module.eval(), (torch.randn(1, 16, 64),), path)
    assert snr > 38
    stored = _stored(path)
    assert [stored[f"layers.{i}.weight"][0] for i in (0, 2, 3)] == [4, 4, 2]
    for i in (0, 2, 3):
        _, codes, scales = stored[f"layers.{i}.weight"]
        weight: QuantizedWeight = layers[i].quantized
        np.testing.assert_array_equal(codes, weight.codes)
        if weight.group_size is None:
            assert scales.tobytes() == weight.scales.tobytes()
        else:
            kept = scales.astype(np.float32).reshape(weight.scales.shape)
            np.testing.assert_array_equal(kept, weight.scales)
    assert lowered.notes == ()


def test_other_group_scales_are_rounded_and_noted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Tokens(nn.Linear(64, 32))
    q = round_to_nearest(module.layers[0].weight.detach().numpy(), "int4", 32)
    q = QuantizedWeight("int4", q.codes, q.scales * np.float32(1.001), 32)
    module.layers[0].quantized = q
    module.layers[0].weight = nn.Parameter(torch.from_numpy(q.dequantize()))
    path = tmp_path / "a.tflite"
    lowered, snr = _lower(module.eval(), (torch.randn(1, 16, 64),), path)
    assert snr > 38
    assert len(lowered.notes) == 1 and "layers.0" in lowered.notes[0]
    kept = _stored(path)["layers.0.weight"][2].astype(np.float32)
    assert (np.abs(kept / q.scales.reshape(-1) - 1) <= 2**-8).all()
    assert not (kept.view(np.uint32) & 0xFFFF).any()


def test_convolution_codes_are_transposed_not_rounded(tmp_path: Path) -> None:
    module, examples = _make("resnet")
    module = _quantized(module, INT8)
    path = tmp_path / "a.tflite"
    _lower(module, examples, path)
    stored = _stored(path)
    for name in ("conv1", "conv2", "conv_shortcut"):
        bits, codes, scales = stored[f"module.{name}.weight"]
        weight = getattr(module.module, name).quantized
        assert bits == 8
        np.testing.assert_array_equal(codes.transpose(0, 3, 1, 2), weight.codes)
        assert scales.tobytes() == weight.scales.tobytes()


def test_a_norm_is_not_folded_into_the_codes(tmp_path: Path) -> None:
    module = Tokens(nn.LayerNorm(64), nn.Linear(64, 32))
    module.layers[0].weight.data = torch.rand(64) + 0.5
    _quantize(module.layers[1], "int4")
    path = tmp_path / "a.tflite"
    _, snr = _lower(module.eval(), (torch.randn(1, 16, 64),), path)
    assert snr > 38
    stored = _stored(path)["layers.1.weight"][1]
    np.testing.assert_array_equal(stored, module.layers[1].quantized.codes)


def test_equal_layers_keep_their_own_weights(tmp_path: Path) -> None:
    module = Tokens(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    for layer in (module.layers[0], module.layers[2]):
        nn.init.zeros_(layer.weight)
        _quantize(layer, "int8")
    path = tmp_path / "a.tflite"
    TARGET.lower(_segment(module.eval(), (torch.randn(1, 4, 32),)), path)
    assert sorted(_stored(path)) == ["layers.0.weight", "layers.2.weight"]


def test_a_layer_that_nothing_reads_is_named(tmp_path: Path) -> None:
    class Unused(Tokens):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.layers[0](x),)

    module = Unused(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    with pytest.raises(TargetError, match=r"layers\.1"):
        TARGET.lower(_segment(module, (torch.randn(1, 4, 32),)), tmp_path / "a.tflite")


def test_a_weight_used_otherwise_is_named(tmp_path: Path) -> None:
    class Norm(Tokens):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.layers(x) * self.layers[0].weight.mean(),)

    module = Norm(nn.Linear(32, 32)).eval()
    with pytest.raises(TargetError, match=r"layers\.0.*cannot be grafted"):
        TARGET.lower(_segment(module, (torch.randn(1, 4, 32),)), tmp_path / "a.tflite")


@pytest.mark.parametrize("what", ["codes", "scales"])
def test_a_planted_mismatch_is_found(what: str, tmp_path: Path) -> None:
    module = Tokens(nn.Linear(64, 32), nn.Linear(32, 64))
    for layer in module.layers:
        _quantize(layer, "int4")
    path = tmp_path / "a.tflite"
    TARGET.lower(_segment(module.eval(), (torch.randn(1, 4, 64),)), path)
    layers = tflite.Open(module, 1).layers
    tflite.check(path, layers)
    q = layers[1].quantized
    getattr(q, what).reshape(-1)[5] += 1
    with pytest.raises(TargetError, match=r"layers\.1"):
        tflite.check(path, layers)


@pytest.mark.parametrize("grid", ["int4", "int2"])
@pytest.mark.parametrize("kind", ["downsample", "resnet"])
def test_narrow_convolutions_are_held_as_int8_with_the_same_codes(
    grid: str, kind: str, tmp_path: Path
) -> None:
    module, examples = _make(kind)
    module = _quantized(module, INT8, (grid, None))
    path = tmp_path / "a.tflite"
    lowered, snr = _lower(module, examples, path)
    assert snr > 38
    assert lowered.partitions == 1
    stored = _stored(path)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            bits, codes, scales = next(v for k, v in stored.items() if f"{name}.weight" in k)
            assert bits == 8
            np.testing.assert_array_equal(codes.transpose(0, 3, 1, 2), layer.quantized.codes)
            np.testing.assert_array_equal(scales, layer.quantized.scales)
            assert TARGET.container(layer.quantized) == "int8"


@pytest.mark.parametrize("name", ["resnet", "transformer"])
@pytest.mark.parametrize("linear", [INT8, INT4, INT2], ids=str)
def test_layers_with_float_inputs_keep_their_codes_and_round_nothing(
    name: str, linear: tuple, tmp_path: Path
) -> None:
    module, examples = _make(name)
    module = _quantized(module, linear)
    layers = [x for x in module.modules() if getattr(x, "quantized", None) is not None]
    for layer in layers:
        layer.float_input = True
    path = tmp_path / "a.tflite"
    lowered, snr = _lower(module, examples, path)
    assert snr > 90, "as exact as float"
    assert lowered.partitions == 1, "weights are widened inside XNNPACK"
    assert {bits for bits, *_ in _stored(path).values()} == {8}


def test_groups_with_float_inputs_are_held_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Tokens(nn.Linear(64, 32)).eval()
    _quantize(module.layers[0], *INT4_G32)
    module.layers[0].float_input = True
    _, snr = _lower(module, (torch.randn(1, 16, 64),), tmp_path / "a.tflite")
    assert snr > 90
    assert _stored(tmp_path / "a.tflite")["layers.0.weight"][0] == 32


def test_weights_with_float_inputs_are_shared_by_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = _quantized(Picture(nn.Conv2d(32, 32, 3, padding=1)).eval(), INT8)
    module.module.float_input = True
    paths = {}
    for side in (8, 12):
        paths[f"s.{side}x{side}"] = tmp_path / f"{side}.tflite"
        _lower(module, (torch.randn(1, side, side, 32),), paths[f"s.{side}x{side}"])
    (tmp_path / "out").mkdir()
    made = TARGET.share(paths, "s.weights", tmp_path / "out")
    assert made is not None
    codes = module.module.quantized.codes.transpose(0, 2, 3, 1).tobytes()
    for graph, common in made.values():
        assert codes in common.read_bytes()
        assert codes not in graph.read_bytes()


@pytest.mark.parametrize("float_input", [True, False])
def test_palettes_run_in_float_or_not_at_all(float_input: bool, tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 4, (32, 64)).astype(np.int8)
    book = np.array([-1.5, -0.2, 0.3, 1.0], np.float32)
    weight = QuantizedWeight("palette", codes, np.ones(32, np.float32), None, book)
    module = Tokens(nn.Linear(64, 32)).eval()
    layer = module.layers[0]
    layer.quantized, layer.float_input = weight, float_input
    layer.weight = nn.Parameter(torch.from_numpy(weight.dequantize()), requires_grad=False)
    example = (torch.randn(1, 4, 64),)
    if not float_input:
        with pytest.raises(TargetError, match="palettes do not run"):
            _lower(module, example, tmp_path / "a.tflite")
        return
    assert _lower(module, example, tmp_path / "a.tflite")[1] > 90


@pytest.mark.parametrize("grid", ["int4", "int2"])
@pytest.mark.parametrize("kind", ["downsample", "resnet"])
def test_large_narrow_convolutions_are_nine_linear_layers(
    grid: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, examples = _make(kind)
    module = _quantized(module, INT8, (grid, None))
    wide, _ = _lower(module, examples, tmp_path / "wide.tflite")
    monkeypatch.setitem(planning.SLICED, "litert-cpu", 0)
    lowered, snr = _lower(module, examples, tmp_path / "sliced.tflite")
    assert snr > 38
    if kind == "resnet":
        assert lowered.partitions == wide.partitions == 1
    data = (tmp_path / "sliced.tflite").read_bytes()
    graph = schema.ModelT.InitFromPackedBuf(data, 0)
    narrow = {"int4": schema.TensorType.INT4, "int2": schema.TensorType.INT2}[grid]
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            own = [t for t in graph.subgraphs[0].tensors if t.name == f"{name}.weight".encode()]
            assert [t.type for t in own] == [narrow] * 9
            assert TARGET.container(layer.quantized) == grid
            places = []
            for tensor in own:
                buffer = graph.buffers[tensor.buffer]
                raw = np.frombuffer(data, np.uint8, buffer.size, buffer.offset)
                count = layer.weight[:, :, 0, 0].numel()
                places.append(tflite.unpack(raw, int(grid[3:]), count))
                np.testing.assert_array_equal(tensor.quantization.scale, layer.quantized.scales)
            wanted = [layer.quantized.codes[:, :, i, j] for i in range(3) for j in range(3)]
            assert {p.tobytes() for p in places} == {
                np.ascontiguousarray(w).tobytes() for w in wanted
            }


@pytest.mark.parametrize(("grid", "group"), [("int2", 32), ("int8", 32), ("int4", 16)])
def test_groups_that_do_not_run_are_refused(grid: str, group: int, tmp_path: Path) -> None:
    module = Tokens(nn.Linear(64, 32)).eval()
    _quantize(module.layers[0], grid, group)
    with pytest.raises(TargetError, match=r"layers\.0"):
        TARGET.lower(_segment(module, (torch.randn(1, 4, 64),)), tmp_path / "a.tflite")


def test_artifacts_are_reproducible_and_keep_no_paths(tmp_path: Path) -> None:
    module, examples = _make("resnet")
    module = _quantized(module, INT4)
    files = []
    for name in ("a.tflite", "b.tflite"):
        TARGET.lower(_segment(module, examples), tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    assert b"torch.nn" not in files[0]
    assert b".py" not in files[0]


def test_codes_survive_packing() -> None:
    generator = np.random.default_rng(0)
    for bits, low, high in ((2, -2, 1), (4, -7, 7), (8, -127, 127)):
        codes = generator.integers(low, high, (7, 13), dtype=np.int8, endpoint=True)
        packed = tflite.pack(codes, bits)
        assert packed.size == -(-codes.size * bits // 8)
        np.testing.assert_array_equal(
            tflite.unpack(packed, bits, codes.size).reshape(codes.shape), codes
        )


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [1280, 2560])
def test_large_convolutions_need_no_transposition(inputs: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Picture(nn.Conv2d(inputs, 1280, 3, padding=1)).eval()
    _quantize(module.module, "int8")
    path = tmp_path / "a.tflite"
    lowered, snr = _lower(module, (torch.randn(1, 4, 4, inputs),), path)
    assert snr > 38
    assert lowered.partitions == 1
    codes = _stored(path)["module.weight"][1]
    np.testing.assert_array_equal(codes.transpose(0, 3, 1, 2), module.module.quantized.codes)
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    assert len(model.subgraphs[0].operators) == 1


def test_the_artifact_does_not_depend_on_floats_of_coded_layers(tmp_path: Path) -> None:
    module, examples = _make("transformer")
    module = _quantized(module, INT4, INT8)
    TARGET.lower(_segment(module, examples), tmp_path / "a.tflite")
    assert not TARGET.reads_floats
    for layer in module.modules():
        if getattr(layer, "quantized", None) is not None:
            layer.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    TARGET.lower(_segment(module, examples), tmp_path / "b.tflite")
    assert (tmp_path / "a.tflite").read_bytes() == (tmp_path / "b.tflite").read_bytes()


def test_weights_are_taken_out_of_an_opened_module() -> None:
    module = Tokens(nn.Linear(64, 32), nn.Linear(32, 64)).eval()
    x = torch.randn(1, 4, 64)
    (wanted,) = module(x)
    opened = tflite.Open(module, 1)
    assert all(layer.weight.numel() == 1 for layer in module.layers)
    (given,) = opened(x, *(layer.weight for layer in opened.layers))
    assert torch.equal(given, wanted)
