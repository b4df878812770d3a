"""The evaluator of ML programs: every operation against torch, damaged packages refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

pytest.importorskip("coremltools")

import coremltools as ct
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813
from torch.nn import functional as F

from handheld.errors import TargetError
from handheld_export.coreml import mil
from handheld_export.measure import snr_db

RNG = np.random.default_rng(5)


def array(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


X = array(1, 4, 6, 8)
Y = array(1, 4, 6, 8)
KERNEL, BIAS = array(6, 4, 3, 3), array(6)
DEEP = array(8, 1, 3, 3)
MATRIX = array(5, 8)
GAMMA, BETA = array(8), array(8)
CHANNEL = [np.abs(array(4)) + 0.5 for _ in range(4)]
CODES = RNG.integers(0, 16, (6, 8)).astype(np.uint8)


def positive(x):
    return mb.add(x=mb.abs(x=x), y=np.float32(0.5))


CASES = {
    "add": (lambda x, y: mb.add(x=x, y=y), lambda x, y: x + y),
    "sub": (lambda x, y: mb.sub(x=x, y=y), lambda x, y: x - y),
    "mul": (lambda x, y: mb.mul(x=x, y=y), lambda x, y: x * y),
    "real_div": (lambda x, y: mb.real_div(x=x, y=y), lambda x, y: x / y),
    "maximum": (lambda x, y: mb.maximum(x=x, y=y), torch.maximum),
    "minimum": (lambda x, y: mb.minimum(x=x, y=y), torch.minimum),
    "pow": (lambda x, y: mb.pow(x=x, y=np.float32(2)), lambda x, y: x**2),
    "sqrt": (lambda x, y: mb.sqrt(x=positive(x)), lambda x, y: (x.abs() + 0.5).sqrt()),
    "rsqrt": (
        lambda x, y: mb.rsqrt(x=positive(x), epsilon=0.25),
        lambda x, y: (x.abs() + 0.75) ** -0.5,
    ),
    "inverse": (
        lambda x, y: mb.inverse(x=positive(x), epsilon=0.25),
        lambda x, y: 1 / (x.abs() + 0.75),
    ),
    "exp": (lambda x, y: mb.exp(x=x), lambda x, y: x.exp()),
    "tanh": (lambda x, y: mb.tanh(x=x), lambda x, y: x.tanh()),
    "sigmoid": (lambda x, y: mb.sigmoid(x=x), lambda x, y: x.sigmoid()),
    "silu": (lambda x, y: mb.silu(x=x), lambda x, y: x * x.sigmoid()),
    "relu": (lambda x, y: mb.relu(x=x), lambda x, y: x.clamp(min=0)),
    "leaky_relu": (
        lambda x, y: mb.leaky_relu(x=x, alpha=0.3),
        lambda x, y: torch.where(x > 0, x, 0.3 * x),
    ),
    "square": (lambda x, y: mb.square(x=x), lambda x, y: x * x),
    "erf": (lambda x, y: mb.erf(x=x), lambda x, y: x.erf()),
    "abs": (lambda x, y: mb.abs(x=x), lambda x, y: x.abs()),
    "sin": (lambda x, y: mb.sin(x=x), lambda x, y: x.sin()),
    "cos": (lambda x, y: mb.cos(x=x), lambda x, y: x.cos()),
    "identity": (lambda x, y: mb.identity(x=x), lambda x, y: x),
    "gelu": (
        lambda x, y: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        lambda x, y: F.gelu(x, approximate="tanh"),
    ),
    "gelu exact": (lambda x, y: mb.gelu(x=x), lambda x, y: F.gelu(x)),
    "gelu sigmoid": (
        lambda x, y: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        lambda x, y: x * (1.702 * x).sigmoid(),
    ),
    "clip": (lambda x, y: mb.clip(x=x, alpha=-0.5, beta=0.7), lambda x, y: x.clamp(-0.5, 0.7)),
    "softmax": (lambda x, y: mb.softmax(x=x, axis=1), lambda x, y: x.softmax(1)),
    "linear": (
        lambda x, y: mb.linear(x=x, weight=MATRIX, bias=BIAS[:5]),
        lambda x, y: x @ torch.from_numpy(MATRIX).T + torch.from_numpy(BIAS[:5]),
    ),
    "matmul": (
        lambda x, y: mb.matmul(x=x, y=y, transpose_y=True),
        lambda x, y: x @ y.transpose(-1, -2),
    ),
    "matmul x": (
        lambda x, y: mb.matmul(x=x, y=y, transpose_x=True),
        lambda x, y: x.transpose(-1, -2) @ y,
    ),
    "einsum": (
        lambda x, y: mb.einsum(
            values=(x, mb.transpose(x=y, perm=[0, 3, 2, 1])), equation="nchw,nwhu->nchu"
        ),
        lambda x, y: torch.einsum("nchw,nuhw->nchu", x, y),
    ),
    "scaled_dot_product_attention": (
        lambda x, y: mb.scaled_dot_product_attention(query=x, key=y, value=y),
        lambda x, y: torch.softmax(x @ y.transpose(-1, -2) / 8**0.5, -1) @ y,
    ),
    "conv": (
        lambda x, y: mb.conv(
            x=x, weight=KERNEL, bias=BIAS, pad_type="custom", pad=[1, 0, 2, 1], strides=[2, 1]
        ),
        lambda x, y: F.conv2d(
            F.pad(x, (2, 1, 1, 0)), torch.from_numpy(KERNEL), torch.from_numpy(BIAS), (2, 1)
        ),
    ),
    "conv same": (
        lambda x, y: mb.conv(x=x, weight=DEEP, pad_type="same", groups=4, strides=[2, 2]),
        lambda x, y: F.conv2d(F.pad(x, (0, 1, 0, 1)), torch.from_numpy(DEEP), None, 2, groups=4),
    ),
    "conv valid": (
        lambda x, y: mb.conv(x=x, weight=KERNEL, pad_type="valid", dilations=[2, 1]),
        lambda x, y: F.conv2d(x, torch.from_numpy(KERNEL), dilation=(2, 1)),
    ),
    "upsample_nearest_neighbor": (
        lambda x, y: mb.upsample_nearest_neighbor(
            x=x, scale_factor_height=2.0, scale_factor_width=3.0
        ),
        lambda x, y: F.interpolate(x, scale_factor=(2.0, 3.0)),
    ),
    "pad": (
        lambda x, y: mb.pad(x=x, pad=[1, 2, 0, 3], mode="constant", constant_val=0.5),
        lambda x, y: F.pad(x, (0, 3, 1, 2), value=0.5),
    ),
    "pad reflect": (
        lambda x, y: mb.pad(x=x, pad=[1, 2, 0, 3], mode="reflect"),
        lambda x, y: F.pad(x, (0, 3, 1, 2), mode="reflect"),
    ),
    "reduce_mean": (
        lambda x, y: mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True),
        lambda x, y: x.mean((2, 3), keepdim=True),
    ),
    "reduce_sum": (lambda x, y: mb.reduce_sum(x=x, axes=[-1]), lambda x, y: x.sum(-1)),
    "reduce_max": (lambda x, y: mb.reduce_max(x=x, axes=[1]), lambda x, y: x.amax(1)),
    "reduce_min": (lambda x, y: mb.reduce_min(x=x, axes=[1]), lambda x, y: x.amin(1)),
    "layer_norm": (
        lambda x, y: mb.layer_norm(x=x, axes=[-1], gamma=GAMMA, beta=BETA, epsilon=1e-3),
        lambda x, y: F.layer_norm(
            x, (8,), torch.from_numpy(GAMMA), torch.from_numpy(BETA), eps=1e-3
        ),
    ),
    "batch_norm": (
        lambda x, y: mb.batch_norm(
            x=x, mean=CHANNEL[0], variance=CHANNEL[1], gamma=CHANNEL[2], beta=CHANNEL[3]
        ),
        lambda x, y: F.batch_norm(x, *map(torch.from_numpy, CHANNEL)),
    ),
    "instance_norm": (lambda x, y: mb.instance_norm(x=x), lambda x, y: F.instance_norm(x)),
    "reshape": (
        lambda x, y: mb.reshape(x=x, shape=[1, 24, -1]),
        lambda x, y: x.reshape(1, 24, 8),
    ),
    "transpose": (
        lambda x, y: mb.transpose(x=x, perm=[0, 3, 1, 2]),
        lambda x, y: x.permute(0, 3, 1, 2),
    ),
    "expand_dims": (
        lambda x, y: mb.expand_dims(x=mb.reshape(x=x, shape=[4, 48]), axes=[0, -1]),
        lambda x, y: x.reshape(1, 4, 48, 1),
    ),
    "squeeze": (lambda x, y: mb.squeeze(x=x, axes=[0]), lambda x, y: x[0]),
    "concat": (lambda x, y: mb.concat(values=(x, y), axis=-1), lambda x, y: torch.cat([x, y], -1)),
    "stack": (lambda x, y: mb.stack(values=(x, y), axis=1), lambda x, y: torch.stack([x, y], 1)),
    "split": (
        lambda x, y: mb.split(x=x, split_sizes=[3, 5], axis=3)[1],
        lambda x, y: x[..., 3:],
    ),
    "split equally": (
        lambda x, y: mb.split(x=x, num_splits=2, axis=1)[0],
        lambda x, y: x[:, :2],
    ),
    "tile": (lambda x, y: mb.tile(x=x, reps=[1, 2, 1, 3]), lambda x, y: x.repeat(1, 2, 1, 3)),
    "slice_by_size": (
        lambda x, y: mb.slice_by_size(x=x, begin=[0, 1, 2, 3], size=[1, 2, -1, 4]),
        lambda x, y: x[:, 1:3, 2:, 3:7],
    ),
    "slice_by_index": (
        lambda x, y: mb.slice_by_index(
            x=x,
            begin=[0, 1, 0, 2],
            end=[1, 4, 0, 8],
            stride=[1, 2, 1, 3],
            end_mask=[False, False, True, False],
            squeeze_mask=[True, False, False, False],
        ),
        lambda x, y: x[0, 1:4:2, :, 2:8:3],
    ),
    "cast": (
        lambda x, y: mb.cast(
            x=mb.cast(x=mb.mul(x=x, y=np.float32(9)), dtype="int32"), dtype="fp32"
        ),
        lambda x, y: (x * 9).to(torch.int32).float(),
    ),
    "constexpr_lut_to_dense": (
        lambda x, y: mb.linear(
            x=x,
            weight=mb.constexpr_lut_to_dense(
                indices=CODES.astype(ct.converters.mil.mil.types.np_uint4_dtype),
                lut=LUT.reshape(6, 1, 16, 1),
            ),
        ),
        lambda x, y: x @ torch.from_numpy(np.take_along_axis(LUT, CODES.astype(int), 1)).T,
    ),
    "constexpr_blockwise_shift_scale": (
        lambda x, y: mb.linear(
            x=x,
            weight=mb.constexpr_blockwise_shift_scale(
                data=CODES.astype(np.int8), scale=SCALES, offset=OFFSETS
            ),
        ),
        lambda x, y: (
            x
            @ torch.from_numpy(
                (CODES.astype(np.float32) - OFFSETS.repeat(4, 1)) * SCALES.repeat(4, 1)
            ).T
        ),
    ),
}
LUT = array(6, 16)
SCALES, OFFSETS = np.abs(array(6, 2)), RNG.integers(-3, 4, (6, 2)).astype(np.int8)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """One fp32 program with every operation, each result an output."""
    shapes = [mb.TensorSpec(shape=v.shape) for v in (X, Y)]

    @mb.program(input_specs=shapes, opset_version=ct.target.iOS18)
    def program(x, y):
        made = [build(x, y) for build, _ in CASES.values()]
        return tuple(mb.identity(x=v, name=f"out{i}") for i, v in enumerate(made))

    model = ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    path = tmp_path_factory.mktemp("mil") / "all.mlpackage"
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def results(package):
    opened = mil.Package(package)
    return opened.run(dict(zip(opened.inputs, (X, Y), strict=True)))


@pytest.mark.parametrize("name", CASES)
def test_an_operation_computes_what_torch_computes(name, results):
    wanted = CASES[name][1](torch.from_numpy(X), torch.from_numpy(Y))
    found = results[f"out{list(CASES).index(name)}"]
    assert found.shape == tuple(wanted.shape)
    assert snr_db(wanted.numpy(), found) >= 100


def test_every_operation_that_is_understood_is_compared(package):
    assert {name.split()[0] for name in CASES} == set(mil.OPERATIONS)
    assert set(mil.Package(package).operations) - {"const"} == set(mil.OPERATIONS)


def test_results_are_rounded_to_the_declared_type(tmp_path):
    @mb.program(input_specs=[mb.TensorSpec(shape=(4,))], opset_version=ct.target.iOS18)
    def program(x):
        return mb.mul(x=x, y=np.float32(300.0))

    model = ct.convert(
        program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
        compute_precision=ct.precision.FLOAT16,
    )  # fmt: skip
    model.save(str(tmp_path / "half.mlpackage"))
    opened = mil.Package(tmp_path / "half.mlpackage")
    x = np.array([1 / 3, 2.0, 200.0, 300.0], np.float32)
    (found,) = opened.run({opened.inputs[0]: x}).values()
    half = (x.astype(np.float16).astype(np.float32) * 300).astype(np.float16)
    assert np.array_equal(found, half.astype(np.float32))
    assert np.isinf(found[-1])  # 90,000 is more than fp16 holds


def test_unknown_operations_are_refused_by_name(package, monkeypatch):
    monkeypatch.delitem(mil.OPERATIONS, "conv")
    opened = mil.Package(package)
    with pytest.raises(TargetError, match="operations conv are not understood"):
        opened.run(dict(zip(opened.inputs, (X, Y), strict=True)))


def damaged(package, tmp_path):
    copy = tmp_path / "damaged.mlpackage"
    shutil.copytree(package, copy)
    return copy, copy / mil.DATA / "weights" / "weight.bin"


def test_a_truncated_weight_file_is_named(package, tmp_path):
    copy, weights = damaged(package, tmp_path)
    weights.write_bytes(weights.read_bytes()[:-200])
    opened = mil.Package(copy)
    with pytest.raises(TargetError, match=r"weight\.bin.*damaged"):
        opened.run(dict(zip(opened.inputs, (X, Y), strict=True)))


@pytest.mark.parametrize("content", [None, b"", b"\0" * 400])
def test_a_weight_file_of_something_else_is_named(package, tmp_path, content):
    copy, weights = damaged(package, tmp_path)
    weights.unlink() if content is None else weights.write_bytes(content)
    opened = mil.Package(copy)
    with pytest.raises(TargetError, match=r"weight\.bin.*damaged"):
        opened.run(dict(zip(opened.inputs, (X, Y), strict=True)))


def test_what_is_no_package_is_refused(tmp_path):
    with pytest.raises(TargetError, match="is no ML program"):
        mil.Package(tmp_path)


def test_inputs_must_be_those_of_the_program(package):
    with pytest.raises(TargetError, match="takes"):
        mil.Package(package).run({"z": X})
