"""Asks a text server with NVIDIA's tritonclient; a program of its own, see below.

tritonclient and KServe both register the protocol's protobuf messages, under different file
names, which one process does not allow. Run as  triton_text.py URL GRPC; writes JSON.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import tritonclient.grpc as by_grpc
import tritonclient.http as by_http

PROMPTS = ["a small red robot", "", "A  SMALL red\trobot", "ünï🤖"]


def prompts(module):
    tensor = module.InferInput("prompt", [len(PROMPTS)], "BYTES")
    tensor.set_data_from_numpy(np.array(PROMPTS, np.object_))
    return [tensor]


def status(client, **arguments):
    try:
        client.infer("text", **arguments)
    except Exception as error:
        return [error.status(), error.message()]
    return None


def rows(result):
    embeds, pooled = result.as_numpy("prompt_embeds"), result.as_numpy("pooled")
    return [str(embeds.dtype), embeds.astype(float).tolist(), pooled.astype(float).tolist()]


def main(url, address):
    found = {}
    client = by_http.InferenceServerClient(url)
    live = [client.is_server_live(), client.is_server_ready(), client.is_model_ready("text")]
    metadata = client.get_model_metadata("text")
    found["http"] = {"live": live, "metadata": metadata}
    outputs = [
        by_http.InferRequestedOutput(n, binary_data=True) for n in ("prompt_embeds", "pooled")
    ]
    for datatype in ("FP32", "FP16"):
        result = client.infer(
            "text",
            prompts(by_http),
            outputs=outputs,
            parameters={"datatype": datatype},
            request_id="seven",
            model_version=metadata["versions"][0],
        )
        found["http"][datatype] = rows(result)
        found["http"]["id"] = result.get_response()["id"]
    found["http"]["version"] = status(client, inputs=prompts(by_http), model_version="1")
    client.close()

    client = by_grpc.InferenceServerClient(address)
    live = [client.is_server_live(), client.is_server_ready(), client.is_model_ready("text")]
    found["grpc"] = {"live": live}
    for datatype in ("FP32", "FP16"):
        result = client.infer("text", prompts(by_grpc), parameters={"datatype": datatype})
        found["grpc"][datatype] = rows(result)
    numbers = by_grpc.InferInput("prompt", [1], "FP32")
    numbers.set_data_from_numpy(np.ones(1, np.float32))
    huge = by_grpc.InferInput("prompt", [1], "BYTES")
    huge.set_data_from_numpy(np.array(["x" * 2**17], np.object_))
    found["grpc"]["refused"] = {
        "clip_skip": status(client, inputs=prompts(by_grpc), parameters={"clip_skip": 9}),
        "datatype": status(client, inputs=prompts(by_grpc), parameters={"datatype": "BF16"}),
        "version": status(client, inputs=prompts(by_grpc), model_version="1"),
        "numbers": status(client, inputs=[numbers]),
        "huge": status(client, inputs=[huge]),
    }
    try:
        client.unload_model("text")
    except Exception as error:
        found["grpc"]["refused"]["unload"] = [error.status(), error.message()]
    client.close()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
