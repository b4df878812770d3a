"""Checkpoints that several tests share; nobody writes to them."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal

import pytest
from hypothesis import HealthCheck, settings

from handheld.files import cache_root

# Phones that are plugged in are none of the tests' business; those that want one bring it.
os.environ["HANDHELD_ADB"] = os.environ["HANDHELD_XCRUN"] = "/none"

# Tests have caches of their own; QNN's libraries are found where they were laid out.
os.environ.setdefault("HANDHELD_QNN", str(cache_root() / "qnn"))

# A shell starts background jobs deaf to Ctrl-C, and tests and what they start are to hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# pytest --hypothesis-profile full --timeout 0: for fuzzing by hand, minutes long.
settings.register_profile(
    "full", max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("short", max_examples=100, deadline=None)
settings.load_profile("short")

# Files that take longest, in this order: one that is left for the end keeps one core alone busy.
LONGEST = (
    *("test_compress", "test_export", "test_planted_faults", "test_arm64", "test_serve_cli"),
    *("test_bands", "test_partitions", "test_target_executorch_qnn", "test_target_litert_gpu"),
    *("test_full_size", "test_verify", "test_jni", "test_release_update", "test_critter"),
    *("test_target_litert_cpu", "test_target_onnx", "test_harness", "test_golden", "test_half"),
)


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


if importlib.util.find_spec("torch") is not None:
    import torch

    import tiny

    torch.set_num_threads(1)  # models this small only wait for each other


@pytest.fixture(autouse=True)
def _heard_again():
    """A command silences the libraries of its whole process; here other tests are in it, too."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """SDXL's structure, with text encoders."""
    folder = tmp_path_factory.mktemp("checkpoints") / "sdxl"
    return tiny.write_checkpoint(folder, tiny.SDXL, tiny.KL, steps=1, prompts=["a small red robot"])


@pytest.fixture(scope="session")
def smallest(tmp_path_factory):
    """The fewest segments; no text encoders."""
    folder = tmp_path_factory.mktemp("checkpoints") / "smallest"
    return tiny.write_checkpoint(folder, tiny.SMALLEST, tiny.SMALLEST_KL, text=False, steps=1)
