"""No request makes the server fail: fuzzing by schema and by bytes."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("kserve")

import serving
from handheld.text import oip
from handheld_export.serve.run import Application
from handheld_export.serve.settings import Settings

INFER = "/v2/models/text/infer"
KEPT = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def served(sdxl):
    with serving.running(sdxl, max_body=2**16, max_prompts=4) as found:
        yield found


@pytest.fixture(scope="module")
def http(served):
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client
        good, end = oip.write_request(["a robot"])
        response = client.post(INFER, content=good, headers={oip.JSON_LENGTH: str(end)})
        assert response.status_code == 200, "and it still answers"


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=9,
)


@settings(max_examples=100, deadline=None, suppress_health_check=KEPT)
@given(data=st.data())
def test_no_tree_makes_it_fail(http, data):
    item = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a robot"]}
    tree = {
        "id": "1",
        "inputs": [item],
        "parameters": {"datatype": "FP32"},
        "outputs": [{"name": "pooled"}],
    }
    where = data.draw(st.sampled_from(["top", "input", "output", "parameters"]))
    at = {
        "top": tree, "input": item, "output": tree["outputs"][0], "parameters": tree["parameters"]
    }[where]  # fmt: skip
    key = data.draw(st.sampled_from([*at, "clip_skip", "parameters", "binary_data"]))
    at[key] = data.draw(trees)
    response = http.post(INFER, content=json.dumps(tree))
    assert response.status_code in (200, 400), response.text


@settings(max_examples=100, deadline=None, suppress_health_check=KEPT)
@given(data=st.data())
def test_no_bytes_make_it_fail(http, data):
    good, end = oip.write_request(["a robot", "ü"], ["b", ""])
    cut = data.draw(st.integers(0, len(good)))
    body = (
        good[:cut] + data.draw(st.binary(max_size=8)) + good[cut + data.draw(st.integers(0, 8)) :]
    )
    length = data.draw(st.sampled_from([end, 0, len(body), end - 1, -1, 2**70]) | st.integers())
    response = http.post(INFER, content=body, headers={oip.JSON_LENGTH: str(length)})
    assert response.status_code in (200, 400), response.text


@settings(max_examples=50, deadline=None, suppress_health_check=KEPT)
@given(raw=st.binary(max_size=300))
def test_no_connection_makes_it_fail(served, http, raw):
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as sock:
        sock.sendall(raw + b"\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        found = b""
        while part := sock.recv(4096):
            found += part
    assert not found or found.split()[1][:1] in (b"2", b"4"), found
    assert http.get("/v2/health/ready").status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_that_the_schema_allows_or_forbids_makes_it_fail(sdxl, served, http):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis.errors import Unsatisfiable
    from schemathesis.generation import GenerationMode

    application = Application(Settings(sdxl))()
    tree = application._app.openapi()
    infer = tree["paths"]["/v2/models/{model_name}/infer"]["post"]
    tensor = {
        "type": "object",
        "required": ["name", "shape", "datatype", "data"],
        "properties": {
            "name": {"enum": ["prompt", "prompt_2"]},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "datatype": {"enum": ["BYTES", "FP32", "INT8"]},
            "data": {"type": "array", "items": {"type": "string"}},
        },
    }
    infer["requestBody"]["content"]["application/json"] = {
        "schema": {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": {"type": "string"},
                "inputs": {"type": "array", "items": tensor},
                "parameters": {
                    "type": "object",
                    "properties": {
                        "datatype": {"enum": ["FP32", "FP16", "INT8"]},
                        "clip_skip": {"type": "integer"},
                        "binary_data_output": {"type": "boolean"},
                    },
                },
            },
        }
    }
    for operations in tree["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "model_name":
                    parameter["schema"]["examples"] = ["text"]
    schema = schemathesis.openapi.from_dict(tree)
    statuses = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            strategy = operation.as_strategy(generation_mode=mode)

            @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=strategy)
            def check(case):
                if case.path_parameters and case.path_parameters.get("model_name"):
                    case.path_parameters["model_name"] = "text"
                response = case.call(base_url=served.url, timeout=60)
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                assert response.status_code < 500, (case.as_curl_command(), response.text)

            try:
                check()
            except Unsatisfiable:
                # An operation without parameters has nothing that could be wrong.
                assert mode is GenerationMode.NEGATIVE
    assert sum(statuses.values()) > 300
    assert statuses.get(200) and statuses.get(400)
