from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from handheld.text.oip import (
    INT8_GROUP,
    AnswerError,
    from_wire,
    read_answer,
    to_wire,
    write_request,
    write_strings,
)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
CASES = json.loads((GOLDEN / "index.json").read_text())["text"]


def answer(outputs, tail=b"", **more):
    head = json.dumps({"model_version": "v", "outputs": outputs, **more}).encode()
    return head + tail, str(len(head))


def tensor(shape, size, name="x", datatype="FP32"):
    parameters = {"binary_data_size": size}
    return {"name": name, "shape": shape, "datatype": datatype, "parameters": parameters}


def test_golden_request():
    body, end = write_request(["a robot"], request_id="7")
    assert (GOLDEN / CASES[0]["file"]).read_bytes() == body
    assert CASES[0]["json_length"] == end


@pytest.mark.parametrize("case", CASES[1:], ids=lambda c: c["file"])
def test_golden_answers(case):
    found = read_answer((GOLDEN / case["file"]).read_bytes(), str(case["json_length"]))
    for name in ("prompt_embeds", "pooled"):
        assert from_wire(name, found.tensors).tolist() == case[name]
    assert found.tensors["tokens"].tolist() == case["tokens"]


def test_the_page_shows_the_golden_bytes():
    text = (ROOT / "docs" / "text-api.md").read_text(encoding="utf-8")
    shown = []
    for block in re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        rows = [line[6:53] for line in block.splitlines()]
        shown.append(bytes.fromhex("".join(rows)))
    files = ("text/request.bin", "text/answer-fp16.bin")
    assert shown == [(GOLDEN / name).read_bytes() for name in files]
    for case in CASES:
        if case["file"] in files:
            assert f"Inference-Header-Content-Length: {case['json_length']}`" in text


def test_request_bytes():
    body, end = write_request(["héllo", ""], datatype="FP32", request_id="7")
    assert json.loads(body[:end]) == {
        "id": "7",
        "inputs": [
            {
                "name": "prompt",
                "shape": [2],
                "datatype": "BYTES",
                "parameters": {"binary_data_size": 14},
            }
        ],
        "parameters": {"binary_data_output": True, "datatype": "FP32"},
    }
    assert (
        body[end:]
        == b"\x06\x00\x00\x00h\xc3\xa9llo\x00\x00\x00\x00"
        == write_strings(["héllo", ""])
    )
    body, end = write_request(["a"], ["b"], clip_skip=1)
    tree = json.loads(body[:end])
    assert [i["name"] for i in tree["inputs"]] == ["prompt", "prompt_2"]
    assert tree["parameters"]["clip_skip"] == 1


def test_answers_with_binary_and_plain_tensors():
    values = np.arange(6, dtype="<f4")
    plain = {"name": "y", "shape": [2], "datatype": "INT32", "data": [3, 4]}
    found = read_answer(*answer([tensor([2, 3], 24), plain], values.tobytes(), parameters={"a": 1}))
    assert (found.tensors["x"] == values.reshape(2, 3)).all()
    assert found.tensors["y"].tolist() == [3, 4]
    assert (found.version, found.parameters) == ("v", {"a": 1})


@pytest.mark.parametrize(
    "bad",
    [
        (b"", None),
        (b"{}", "x"),
        (b"{}", "3"),
        (b"{}", "-1"),
        (b"[" * 100_000, None),
        answer([tensor([2], 4)], b"0000"),
        answer([tensor([1], 4)], b"00"),
        answer([tensor([1], 4)], b"00000"),
        answer([tensor([-1], 4)], b"0000"),
        answer([tensor([1], -4)], b"0000"),
        answer([tensor([True], 4)], b"0000"),
        answer([tensor([1], 8, datatype="FP64")], b"00000000"),
        answer([tensor([1, 1, 1, 1, 1], 4)], b"0000"),
        answer([{"name": "x", "shape": [1], "datatype": "FP32", "data": [None]}]),
        answer([{"name": "x", "shape": [1], "datatype": "FP32", "data": "nonsense"}]),
        answer([3]),
        answer(None),
    ],
)
def test_malformed_answers(bad):
    with pytest.raises(AnswerError):
        read_answer(*bad)


@given(st.binary(max_size=200), st.text(max_size=5) | st.none())
def test_no_answer_breaks_the_reader(body, length):
    try:
        read_answer(body, length)
    except AnswerError as error:
        assert error.exit_code == 2


@given(st.recursive(st.none() | st.integers() | st.text(max_size=9), st.lists, max_leaves=9))
@example([0])
def test_no_tree_breaks_the_reader(value):
    for field in ("shape", "datatype", "data", "parameters", "name"):
        with pytest.raises(AnswerError):
            body, _ = answer([tensor([2], 4) | {field: value}])
            read_answer(body, None)


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_int8_is_within_half_a_step(width, seed):
    rng = np.random.default_rng(seed)
    value = (rng.standard_normal((3, width)) * 10 ** rng.uniform(-3, 3)).astype(np.float32)
    wire = to_wire("x", value, "INT8")
    assert wire["x"].dtype == np.int8 and wire["x"].shape == value.shape
    back = from_wire("x", wire)
    step = np.repeat(wire["x_scale"], INT8_GROUP, axis=-1)[:, :width]
    assert (np.abs(back - value) <= 0.501 * step).all()


def test_wire_of_floats():
    value = np.array([[1.0, 1e-8, 70000.0]], np.float32)
    assert (from_wire("x", to_wire("x", value, "FP32")) == value).all()
    half = to_wire("x", value, "FP16")
    assert half["x"].dtype == np.float16 and np.isinf(half["x"][0, 2])
    assert from_wire("y", half) is None
    assert (from_wire("x", to_wire("x", np.zeros((2, 70), np.float32), "INT8")) == 0).all()
    with pytest.raises(AnswerError):
        from_wire("x", {"x": np.zeros((1, 70), np.int8), "x_scale": np.zeros((1, 1))})
    with pytest.raises(AnswerError):
        from_wire("x", {"x": np.zeros((), np.int8)})
