from __future__ import annotations

import numpy as np
import pytest

import samples
from handheld import noise
from handheld.errors import BundleError, UsageError
from handheld.execute import activation_bytes, execute
from handheld.program import (
    Affine,
    Call,
    Concat,
    Input,
    Moments,
    Normalizer,
    Pad,
    Ports,
    Program,
    Slice,
    Term,
    check,
)
from samples import spec

SAMPLE = samples.program()
CONSTANTS = {"time": np.array([[[[0.1, 0.2, 0.3]]]], np.float32)}


def no_calls(artifact_id, args):
    raise AssertionError


def one_op(op, inputs, tensors, output):
    """Run a program of one operation on float32 inputs."""
    program = Program(
        inputs=tuple(Input(name=n, role="other") for n in inputs),
        tensors={
            **{n: spec(*v.shape, dtype=str(v.dtype)) for n, v in inputs.items()},
            **tensors,
        },
        ops=(op,),
        outputs={"out": output},
    )
    check(program, {}, {})
    return execute(program, {}, inputs, no_calls)["out"]


def sample_inputs():
    return {k: v[None] for k, v in samples.embeddings().items()}


def test_sample_program():
    check(SAMPLE, {"unet.0": samples.ports()}, {"time": spec(1, 1, 1, 3)})
    first = execute(SAMPLE, CONSTANTS, sample_inputs(), samples.call, seed=5)["picture"]
    drawn = noise.normal(5, (1, 8, 16, 3), 7)
    second = execute(SAMPLE, CONSTANTS, {**sample_inputs(), "noise": drawn}, samples.call)
    assert first.dtype == np.uint8
    assert (first == second["picture"]).all()
    assert first.std() > 10


def test_affine_is_binary32_term_by_term():
    x = np.array([1e8, 1.0, 3.0], np.float32)
    y = np.array([1.0, 1e-8, 0.1], np.float32)
    op = Affine(terms=(Term(x="x", scale=0.1), Term(x="y", scale=-0.3)), bias=1e-3, out="o")
    got = one_op(op, {"x": x, "y": y}, {"o": spec(3)}, "o")
    f = np.float32
    want = [f(f(f(0.1) * a) + f(f(-0.3) * b)) + f(1e-3) for a, b in zip(x, y, strict=True)]
    assert got.tobytes() == np.array(want, np.float32).tobytes()


def test_affine_to_uint8_rounds_half_to_even_and_saturates():
    x = np.array([0.5, 1.5, 2.5, -3, 255.5, 1e9, np.inf, -np.inf, np.nan], np.float32)
    op = Affine(terms=(Term(x="x", scale=1.0),), out="o")
    got = one_op(op, {"x": x}, {"o": spec(9, dtype="uint8")}, "o")
    assert got.tolist() == [0, 2, 2, 0, 255, 255, 255, 0, 0]


def test_affine_always_adds_the_bias():
    op = Affine(terms=(Term(x="x", scale=1.0),), out="o")
    got = one_op(op, {"x": np.array([-0.0], np.float32)}, {"o": spec(1)}, "o")
    assert not np.signbit(got[0])


@pytest.mark.parametrize(
    ("dtype", "value", "want"),
    [("float32", 0.1, 0.1), ("float16", 0.1, 0.1), ("uint8", 300, 255), ("int8", -200, -128),
     ("uint8", 2.5, 2), ("int32", 3.5, 4), ("float16", 1e30, np.inf)],
)  # fmt: skip
def test_pad(dtype, value, want):
    x = np.ones((2, 3), dtype)
    op = Pad(x="x", axis=1, before=1, after=2, value=value, out="o")
    got = one_op(op, {"x": x}, {"o": spec(2, 6, dtype=dtype)}, "o")
    assert got[:, 1:4].tolist() == x.tolist()
    assert (got[:, [0, 4, 5]] == np.array(want).astype(dtype)).all()


def test_slice_and_concat():
    x = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    got = one_op(Slice(x="x", axis=2, start=1, length=2, out="o"), {"x": x},
                 {"o": spec(2, 3, 2, dtype="int32")}, "o")  # fmt: skip
    assert (got == x[:, :, 1:3]).all()
    got = one_op(Concat(xs=("x", "y", "x"), axis=1, out="o"), {"x": x, "y": -x[:, :1]},
                 {"o": spec(2, 7, 4, dtype="int32")}, "o")  # fmt: skip
    assert (got == np.concatenate([x, -x[:, :1], x], 1)).all()


def scalar_moments(x, groups):
    """What the specification says, one number at a time."""
    _, h, w, c = x.shape
    per = c // groups
    out = np.zeros((1, 3, groups), np.float32)
    values = x.astype(np.float64).reshape(h * w, c).tolist()
    for g in range(groups):
        channels = range(g * per, (g + 1) * per)
        n = float(h * w * per)
        total = 0.0
        for k in channels:
            part = 0.0
            for row in values:
                part += row[k]
            total += part
        mean = total / n
        squares = 0.0
        for k in channels:
            part = 0.0
            for row in values:
                d = row[k] - mean
                part += d * d
            squares += part
        out[0, :, g] = n, mean, squares
    return out


@pytest.mark.parametrize(("shape", "groups"), [((1, 5, 7, 8), 4), ((1, 30, 9, 1), 1),
                                               ((1, 3, 1, 6), 6), ((1, 1, 1, 4), 2)])  # fmt: skip
def test_moments_to_the_bit(shape, groups, monkeypatch):
    x = noise.normal(3, shape) * np.float32(100) + np.float32(1000)
    want = scalar_moments(x, groups)
    op = Moments(x="x", groups=groups, out="o")
    for chunk in (1 << 16, 4):
        monkeypatch.setattr("handheld.execute._CHUNK", chunk)
        got = one_op(op, {"x": x}, {"o": spec(1, 3, groups)}, "o")
        assert got.tobytes() == want.tobytes()


def test_bands_give_the_group_norm_of_the_whole():
    torch = pytest.importorskip("torch")
    x = noise.normal(9, (1, 16, 6, 32)) * np.float32(3) + np.float32(5)
    bands = np.split(x, 4, axis=1)
    parts = [one_op(Moments(x="x", groups=8, out="o"), {"x": b}, {"o": spec(1, 3, 8)}, "o")
             for b in bands]  # fmt: skip
    names = tuple("abcd")
    tensors = {"mean": spec(1, 1, 1, 32), "rstd": spec(1, 1, 1, 32)}
    op = Normalizer(moments=names, eps=1e-5, mean="mean", rstd="rstd")
    mean, rstd = (
        one_op(op, dict(zip(names, parts, strict=True)), tensors, name) for name in ("mean", "rstd")
    )
    want = torch.nn.functional.group_norm(torch.from_numpy(x).permute(0, 3, 1, 2), 8, eps=1e-5)
    got = (x - mean) * rstd
    assert np.abs(got - want.permute(0, 2, 3, 1).numpy()).max() < 1e-5


def test_inputs_are_checked():
    good = sample_inputs()

    def run(inputs, seed=5):
        return execute(SAMPLE, CONSTANTS, inputs, samples.call, seed=seed)

    with pytest.raises(UsageError, match="no input 'x'"):
        run({**good, "x": good["pooled"]})
    with pytest.raises(UsageError, match="'pooled' is missing"):
        run({"prompt_embeds": good["prompt_embeds"]})
    with pytest.raises(UsageError, match="'noise' is missing"):
        run(good, seed=None)
    with pytest.raises(UsageError, match=r"float64\[1, 5\]"):
        run({**good, "pooled": good["pooled"].astype(np.float64)})
    with pytest.raises(UsageError, match=r"float32\[5\]"):
        run({**good, "pooled": good["pooled"][0]})


@pytest.mark.parametrize(
    "results",
    [{}, {"z": np.zeros(1)}, {"y": np.zeros((1, 8, 16, 4), np.float32)}, {"y": np.zeros(1)}],
)
def test_results_of_calls_are_checked(results):
    with pytest.raises(BundleError):
        execute(SAMPLE, CONSTANTS, sample_inputs(), lambda a, b: results, seed=1)


def test_args_of_calls_are_contiguous():
    program = Program(
        inputs=(Input(name="x", role="other"),),
        tensors={"x": spec(4, 4), "s": spec(4, 2), "y": spec(4, 2)},
        ops=(
            Slice(x="x", axis=1, start=1, length=2, out="s"),
            Call(artifact="a", args={"p": "s"}, results={"q": "y"}),
        ),
        outputs={"latent": "y"},
    )
    check(program, {"a": Ports(inputs={"p": spec(4, 2)}, outputs={"q": spec(4, 2)})}, {})

    def call(artifact_id, args):
        assert args["p"].flags.c_contiguous
        return {"q": args["p"]}

    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert (execute(program, {}, {"x": x}, call)["latent"] == x[:, 1:3]).all()


def test_activation_bytes():
    program = Program(
        inputs=(Input(name="a", role="other"),),
        tensors={"a": spec(10), "b": spec(20), "c": spec(30), "unused": spec(100)},
        ops=(
            Concat(xs=("a", "a"), axis=0, out="b"),
            Pad(x="a", axis=0, after=90, out="unused"),
            Concat(xs=("a", "b"), axis=0, out="c"),
        ),
        outputs={"latent": "c"},
    )
    assert activation_bytes(program) == 4 * (10 + 20 + 100)
    check(program, {}, {})
    x = np.ones(10, np.float32)
    assert execute(program, {}, {"a": x}, no_calls)["latent"].sum() == 30
