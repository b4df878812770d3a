"""Manifests against the schemas of Kubernetes and the types of KServe's own API."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import yaml

from handheld import cli

kserve = pytest.importorskip("kserve")
kubernetes_validate = pytest.importorskip("kubernetes_validate")
FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "text-server"
KUBERNETES = "1.33"


def documents():
    return {
        f"{path.name}:{i}": tree
        for path in sorted(FOLDER.glob("*.yaml"))
        for i, tree in enumerate(yaml.safe_load_all(path.read_text()))
    }


def service():
    return next(t for t in documents().values() if t["kind"] == "InferenceService")


def check_kserve(tree, kind, where="$"):
    """Compare a tree with KServe's generated types: every key known, every type right."""
    scalars = {"str": str, "bool": bool, "int": int, "float": (int, float), "object": object}
    if kind in scalars:
        assert isinstance(tree, scalars[kind]), f"{where}: {tree!r} is not {kind}"
        assert kind != "int" or type(tree) is int, where
        return
    if match := re.fullmatch(r"list\[(.*)\]", kind):
        assert isinstance(tree, list), where
        for i, item in enumerate(tree):
            check_kserve(item, match[1], f"{where}[{i}]")
        return
    if match := re.fullmatch(r"dict\(str, (.*)\)", kind):
        for key, item in tree.items():
            check_kserve(item, match[1], f"{where}.{key}")
        return
    model = getattr(kserve.models, kind, None)
    if model is None or not hasattr(model, "openapi_types"):
        return  # a type of Kubernetes: its own schema sees to it
    names = {v: k for k, v in model.attribute_map.items()}
    for key, item in tree.items():
        assert key in names, f"{where}: {kind} has no '{key}'"
        check_kserve(item, model.openapi_types[names[key]], f"{where}.{key}")


def check_pod(tree):
    """Check the pod inside an InferenceService with the schema of pods."""
    predictor = tree["spec"]["predictor"]
    model = kserve.V1beta1PredictorSpec
    own = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "timeout"}
    assert own <= set(model.attribute_map.values())
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x"},
        "spec": {k: v for k, v in predictor.items() if k not in own},
    }
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def check(tree):
    if tree["kind"] == "InferenceService":
        assert tree["apiVersion"] == "serving.kserve.io/v1beta1"
        check_kserve(tree, "V1beta1InferenceService")
        check_pod(tree)
    else:
        kubernetes_validate.validate(tree, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", documents())
def test_manifests_fit_their_schemas(name):
    check(documents()[name])


def test_the_check_finds_faults():
    def broken(*path, value):
        tree = copy.deepcopy(service())
        at = tree
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return tree

    container = ("spec", "predictor", "containers", 0)
    for tree in (
        broken("spec", "predictor", "minReplica", value=1),
        broken("spec", "predictor", "minReplicas", value="1"),
        broken("spec", "predictors", value={}),
        broken(*container, "livenessProb", value={}),
        broken(*container, "readinessProbe", "httpGet", "port", value=None),
        broken(*container, "resources", "limits", value=["7Gi"]),
    ):
        with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
            check(tree)


def test_arguments_are_options_of_the_command():
    command = cli.load("serve-text")
    known = {o for p in command.params for o in p.opts}
    (container,) = service()["spec"]["predictor"]["containers"]
    given = [a.partition("=")[0] for a in container["args"] if a.startswith("--")]
    image = (FOLDER / "Containerfile").read_text()
    given += re.findall(r'"(--[a-z-]+)"', image.split("ENTRYPOINT")[1])
    assert len(given) > 5 and set(given) <= known


def test_the_image_copies_what_is_there():
    root = FOLDER.parents[1]
    text = (FOLDER / "Containerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        for name in line.split():
            assert (root / name).exists(), name
    allowed = {x[1:] for x in (root / ".containerignore").read_text().split() if x[0] == "!"}
    assert {"pyproject.toml", "runtime", "export", "android_harness"} <= allowed


def test_probes_are_paths_that_are_open():
    from handheld_export.serve.guard import _OPEN

    (container,) = service()["spec"]["predictor"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in _OPEN
