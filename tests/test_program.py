from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import samples
from handheld.errors import BundleError
from handheld.execute import activation_bytes, execute
from handheld.program import (
    DTYPE_BYTES,
    Affine,
    Call,
    Concat,
    Input,
    Moments,
    Normalizer,
    Op,
    Pad,
    Ports,
    Program,
    Slice,
    TensorSpec,
    Term,
    check,
    reads,
    writes,
)
from samples import spec

SAMPLE = samples.program()
OP = TypeAdapter(Op)


def checked(program, constants=None):
    constants = {"time": spec(1, 1, 1, 3)} if constants is None else constants
    check(program, {"unet.0": samples.ports()}, constants)


def changed(**changes):
    return SAMPLE.model_copy(update=changes)


def with_op(index, **changes):
    ops = list(SAMPLE.ops)
    ops[index] = ops[index].model_copy(update=changes)
    return changed(ops=tuple(ops))


def test_the_sample_is_well_formed():
    checked(SAMPLE)


@pytest.mark.parametrize(
    ("program", "field", "message"),
    [
        (changed(inputs=(*SAMPLE.inputs, Input(name="x", role="other"))), "inputs[3]", "declared"),
        (changed(inputs=(*SAMPLE.inputs, SAMPLE.inputs[0])), "inputs[3]", "twice"),
        (with_op(0, x="nobody"), "ops[0]", "nothing has written"),
        (with_op(0, out="undeclared"), "ops[0]", "not declared"),
        (with_op(1, out="top"), "ops[1]", "second time"),
        (with_op(4, rstd="mean"), "ops[4]", "second time"),
        (with_op(0, length=9), "ops[0]", "slice leaves"),
        (with_op(0, axis=4), "ops[0]", "slice leaves"),
        (with_op(5, axis=5), "ops[5]", "axis 5"),
        (with_op(5, after=2**31), "ops[5]", "too large"),
        (with_op(5, after=1), "ops[5]", "declared float32[1, 5, 16, 3]"),
        (with_op(7, axis=2), "ops[7]", "declared"),
        (with_op(7, xs=("top", "mean")), "ops[7]", "does not fit"),
        (with_op(7, xs=("top", "top.m")), "ops[7]", "does not fit"),
        (with_op(8, terms=(Term(x="top", scale=1),)), "ops[8]", "result's shape"),
        (with_op(2, groups=2), "ops[2]", "does not divide"),
        (with_op(2, x="pooled"), "ops[2]", "is not [1, h, W, C]"),
        (with_op(4, moments=("top.m", "top")), "ops[4]", "does not hold moments"),
        (with_op(4, mean="picture"), "ops[4]", ""),
        (with_op(9, artifact="x"), "ops[9]", "does not have"),
        (with_op(9, args={}), "ops[9]", "lacks argument 'mean'"),
        (with_op(9, results={}), "ops[9]", "lacks result 'y'"),
        (with_op(9, results={"y": "drawn", "z": "mixed2"}), "ops[9]", "mixed2"),
        (changed(outputs={"picture": "nobody"}), "outputs.picture", "never written"),
        (changed(tensors={**SAMPLE.tensors, "idle": spec(1)}), "tensors.idle", "never written"),
        (changed(tensors={**SAMPLE.tensors, "time": spec(1)}), "tensors.time", "never written"),
        (
            changed(tensors={**SAMPLE.tensors, "noise": spec(1, 8, 16, 3, dtype="float16")}),
            "inputs[0]",
            "float16",
        ),
    ],
)
def test_every_fault_is_named(program, field, message):
    with pytest.raises(BundleError) as e:
        checked(program)
    assert e.value.field == f"program.{field}"
    assert message in e.value.message


def test_arguments_of_calls():
    args = SAMPLE.ops[9].args
    with pytest.raises(BundleError, match="unknown argument 'more'"):
        checked(with_op(9, args={**args, "more": "noise"}))
    with pytest.raises(BundleError, match=r"argument 'x' of 'unet\.0' wants"):
        checked(with_op(9, args={**args, "x": "top"}))
    with pytest.raises(BundleError, match=r"argument 'time' .* wants"):
        checked(SAMPLE, {"time": spec(3)})
    with pytest.raises(BundleError, match="nothing has written"):
        checked(SAMPLE, {})


def test_groups_must_agree():
    program = Program(
        inputs=(Input(name="x", role="other"),),
        tensors={"x": spec(1, 2, 2, 6), "a": spec(1, 3, 2), "b": spec(1, 3, 3),
                 "mean": spec(1, 1, 1, 6), "rstd": spec(1, 1, 1, 6)},
        ops=(
            Moments(x="x", groups=2, out="a"),
            Moments(x="x", groups=3, out="b"),
            Normalizer(moments=("a", "b"), eps=1e-5, mean="mean", rstd="rstd"),
        ),
        outputs={"mean": "mean"},
    )  # fmt: skip
    with pytest.raises(BundleError, match="other groups"):
        check(program, {}, {})


@pytest.mark.parametrize(
    "text",
    [
        '{"op": "jump"}',
        '{"op": "slice", "x": "a", "axis": 6, "start": 0, "length": 1, "out": "b"}',
        '{"op": "slice", "x": "a", "axis": 0, "start": -1, "length": 1, "out": "b"}',
        '{"op": "slice", "x": "a", "axis": 0, "start": 0, "length": 0, "out": "b"}',
        '{"op": "slice", "x": "a/b", "axis": 0, "start": 0, "length": 1, "out": "b"}',
        '{"op": "pad", "x": "a", "axis": 0, "value": 1e39, "out": "b"}',
        '{"op": "pad", "x": "a", "axis": 0, "value": NaN, "out": "b"}',
        '{"op": "concat", "xs": [], "axis": 0, "out": "b"}',
        '{"op": "affine", "terms": [], "out": "b"}',
        '{"op": "affine", "terms": [{"x": "a", "scale": -1e39}], "out": "b"}',
        '{"op": "normalizer", "moments": ["a"], "eps": 0, "mean": "m", "rstd": "r"}',
        '{"op": "call", "artifact": "a", "args": {"a b": "c"}, "results": {}}',
        '{"op": "call", "artifact": "a", "args": {}, "results": {}, "when": 1}',
    ],
)
def test_malformed_operations(text):
    with pytest.raises(ValidationError):
        OP.validate_json(text, strict=True)


def test_tensor_sizes():
    assert TensorSpec(shape=(2, 3), dtype="float16").nbytes == 12
    assert spec(5).elements == 5
    for dtype, size in DTYPE_BYTES.items():
        assert np.dtype(dtype).itemsize == size
    for shape in ((), (0,), (1,) * 7, (2**31 + 1,)):
        with pytest.raises(ValidationError):
            TensorSpec(shape=shape)


def test_programs_are_immutable():
    with pytest.raises(ValidationError):
        SAMPLE.ops = ()


# Random well-formed programs


@st.composite
def programs(draw):
    """Write a random program that is well formed by construction."""
    tensors = {"x0": spec(1, draw(st.integers(1, 5)), draw(st.integers(1, 4)), 4)}
    inputs = [Input(name="x0", role=draw(st.sampled_from(["noise", "other"])))]
    ops, ports = [], {}
    for i in range(draw(st.integers(1, 12))):
        name = draw(st.sampled_from(sorted(tensors)))
        x, out = tensors[name], f"t{i}"
        axis = draw(st.integers(0, len(x.shape) - 1))
        extent = x.shape[axis]
        kind = draw(st.sampled_from(["slice", "pad", "concat", "affine", "moments", "call"]))
        shape = list(x.shape)
        if kind == "slice":
            start = draw(st.integers(0, extent - 1))
            length = draw(st.integers(1, extent - start))
            ops.append(Slice(x=name, axis=axis, start=start, length=length, out=out))
            shape[axis] = length
        elif kind == "pad":
            before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
            value = draw(st.floats(-300, 300))
            ops.append(Pad(x=name, axis=axis, before=before, after=after, value=value, out=out))
            shape[axis] += before + after
        elif kind == "concat":
            count = draw(st.integers(1, 3))
            ops.append(Concat(xs=(name,) * count, axis=axis, out=out))
            shape[axis] *= count
        elif kind == "affine":
            if x.dtype != "float32":
                continue
            scales = draw(st.lists(st.floats(-10, 10), min_size=1, max_size=3))
            dtype = draw(st.sampled_from(["float32", "uint8"]))
            terms = tuple(Term(x=name, scale=s) for s in scales)
            ops.append(Affine(terms=terms, bias=draw(st.floats(-10, 10)), out=out))
            tensors[out] = spec(*shape, dtype=dtype)
            continue
        elif kind == "moments":
            if len(x.shape) != 4 or x.shape[0] != 1 or x.dtype != "float32":
                continue
            groups = draw(st.sampled_from([g for g in range(1, shape[3] + 1) if shape[3] % g == 0]))
            ops.append(Moments(x=name, groups=groups, out=f"{out}.m"))
            tensors[f"{out}.m"] = spec(1, 3, groups)
            ops.append(
                Normalizer(moments=(f"{out}.m",), eps=1e-5, mean=f"{out}.a", rstd=f"{out}.b")
            )
            tensors[f"{out}.a"] = tensors[f"{out}.b"] = spec(1, 1, 1, shape[3])
            continue
        else:
            artifact = f"artifact{i}"
            ports[artifact] = Ports(inputs={"p": x}, outputs={"q": x})
            ops.append(Call(artifact=artifact, args={"p": name}, results={"q": out}))
        tensors[out] = spec(*shape, dtype=x.dtype)
    last = sorted(tensors)[-1]
    program = Program(
        inputs=tuple(inputs), tensors=tensors, ops=tuple(ops), outputs={"latent": last}
    )
    return program, ports


def run_sample(program, ports):
    x = np.linspace(-2, 2, program.tensors["x0"].elements, dtype=np.float32)
    inputs = {"x0": x.reshape(program.tensors["x0"].shape)}
    return execute(program, {}, inputs, lambda artifact, args: {"q": args["p"]})


@settings(max_examples=150, deadline=None)
@given(programs())
def test_well_formed_programs_run_as_declared(case):
    program, ports = case
    check(program, ports, {})
    result = run_sample(program, ports)["latent"]
    declared = program.tensors[program.outputs["latent"]]
    assert (result.shape, result.dtype) == (declared.shape, np.dtype(declared.dtype))
    again = Program.model_validate_json(program.model_dump_json(), strict=True)
    assert again == program
    assert run_sample(again, ports)["latent"].tobytes() == result.tobytes()
    largest = max(s.nbytes for s in program.tensors.values())
    assert largest <= activation_bytes(program) <= sum(s.nbytes for s in program.tensors.values())


@settings(max_examples=150, deadline=None)
@given(programs(), st.data())
def test_programs_without_one_operation_are_refused_or_run(case, data):
    program, ports = case
    if not program.ops:
        return
    index = data.draw(st.integers(0, len(program.ops) - 1))
    ops = program.ops[:index] + program.ops[index + 1 :]
    gone = set(writes(program.ops[index]))
    with pytest.raises(BundleError) as e:
        check(program.model_copy(update={"ops": ops}), ports, {})
    assert e.value.field.startswith("program.")
    used = {n for op in ops for n in reads(op)} | set(program.outputs.values())
    assert gone & used or ".tensors." in e.value.field


@settings(max_examples=200, deadline=None)
@given(programs(), st.data())
def test_changed_numbers_never_crash(case, data):
    program, ports = case
    tree = json.loads(program.model_dump_json())
    numbers = []

    def visit(node):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, dict | list):
                visit(value)
            elif isinstance(value, int):
                numbers.append((node, key))

    visit(tree)
    node, key = data.draw(st.sampled_from(numbers))
    node[key] = data.draw(st.integers(-2, 12) | st.sampled_from([2**31, 2**63, 10**40]))
    try:
        other = Program.model_validate_json(json.dumps(tree), strict=True)
        check(other, ports, {})
    except (ValidationError, BundleError):
        return
    if sum(s.nbytes for s in other.tensors.values()) < 10**7:
        execute(other, {}, {}, lambda a, args: {"q": args["p"]}, seed=0) if other.inputs[
            0
        ].role == "noise" else run_sample(other, ports)
