from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import tiny
from handheld.precision import find as find_precision
from handheld_export import measure
from handheld_export.quantization import round_to_nearest
from handheld_export.segments import decoder_graph, group
from handheld_export.torch_artifacts import TorchArtifacts


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    component = tiny.component(tiny.vae(**tiny.KL), tmp_path_factory.mktemp("decoder"))
    segments = group(decoder_graph(component, (8, 8)), 10**9)
    return [(s, component) for s in segments]


def start(seed=0):
    draw = np.random.default_rng(seed)
    return {"latent": draw.standard_normal((1, 8, 8, 4), dtype=np.float32)}


def run(artifacts, pairs, values):
    for segment, _ in pairs:
        values = values | artifacts(segment.id, {n: values[n] for n in segment.inputs})
    return values


def test_memory_does_not_change_results(decoder):
    kept, dropped = TorchArtifacts(decoder), TorchArtifacts(decoder, keep=0)
    a, b = run(kept, decoder, start()), run(dropped, decoder, start())
    assert all(np.array_equal(a[n], b[n]) for n in a)
    model = decoder[0][0].graph.model
    kept.close()
    assert all(p.is_meta for n, p in model.named_parameters() if n.startswith("decoder"))


def test_weights_leave_after_each_call(decoder):
    artifacts = TorchArtifacts(decoder, keep=0)
    segment = decoder[0][0]
    artifacts(segment.id, start())
    assert all(p.is_meta for p in segment.graph.model.decoder.parameters())


def test_precision_runs_the_student(decoder):
    plain, student = (
        TorchArtifacts(decoder),
        TorchArtifacts(decoder, precision=find_precision("int8")),
    )
    output = decoder[0][0].graph.output
    a = run(plain, decoder, start())[output]
    plain.close()
    b = run(student, decoder, start())[output]
    layer = decoder[0][0].graph.model.get_submodule("decoder.mid_block.resnets.0.conv1")
    stored = decoder[0][1].tensors(["decoder.mid_block.resnets.0.conv1.weight"])
    (weight,) = stored.values()
    assert np.array_equal(
        layer.weight.detach().numpy(), round_to_nearest(weight.numpy(), "int8").dequantize()
    )
    student.close()
    assert 25 < measure.snr_db(a, b) < 80


def test_examples(decoder, tmp_path):
    artifacts = TorchArtifacts(decoder)
    first, second = decoder[0][0], decoder[1][0]
    artifacts.save_examples(tmp_path, {first.id: 1, second.id: 0})
    runs = [run(artifacts, decoder, start(seed)) for seed in range(3)]
    artifacts.stop_examples()
    run(artifacts, decoder, start(9))
    for segment, i in ((first, 1), (second, 0)):
        example = load_file(tmp_path / f"{segment.id}.safetensors")
        assert set(example) == {f"in.{n}" for n in segment.inputs} | {
            f"out.{n}" for n in segment.outputs
        }
        assert all(np.array_equal(v, runs[i][n.split(".", 1)[1]]) for n, v in example.items())
    assert len(list(tmp_path.iterdir())) == 2
    artifacts.close()


def test_ranges_enclose_what_was_seen(decoder):
    for keep in (0, 10**9):
        artifacts = TorchArtifacts(decoder, observe=True, keep=keep)
        seen: dict[str, list[float]] = {}
        for seed in range(2):
            values = run(artifacts, decoder, start(seed))
            out = values["decoder.conv_out"]
            low, high = seen.get("out", [np.inf, -np.inf])
            seen["out"] = [min(low, out.min()), max(high, out.max())]
        ranges = artifacts.ranges
        artifacts.close()
        found = ranges["decoder.conv_out"]
        for value, bound in zip(seen["out"], (found.output_min, found.output_max), strict=True):
            assert abs(bound) >= abs(value)
            assert abs(bound) <= abs(value) * 1.011
        graph = decoder[0][0].graph
        convolutions = {
            n
            for n, m in graph.model.named_modules()
            if isinstance(m, torch.nn.Conv2d) and n.startswith(("decoder", "post_quant"))
        }
        assert set(ranges) == convolutions
        model = graph.model
        # A second observer on the same model must see again.
        for module in model.modules():
            module._forward_hooks.clear()


def test_inputs_of_chosen_calls_are_saved(decoder, tmp_path):
    artifacts = TorchArtifacts(decoder)
    first = decoder[0][0].id
    for run_, calls in enumerate(({0, 2}, {1})):
        artifacts.save_samples(tmp_path, {first: frozenset(calls)})
        for call in range(3):
            run(artifacts, decoder, start(10 * run_ + call))
    assert [p.name for p in tmp_path.iterdir()] == [first]
    saved = [load_file(p)["in.latent"] for p in sorted((tmp_path / first).iterdir())]
    assert len(saved) == 3
    for one, seed in zip(saved, (0, 2, 11), strict=True):
        assert np.array_equal(one, start(seed)["latent"])
