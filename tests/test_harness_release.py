"""The native program follows the hashes of a release as Python does."""

from __future__ import annotations

import json
import random
import shutil
import subprocess

import pytest

import releases
from handheld import harness

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program():
    return harness.build().program


@pytest.fixture
def copy(tmp_path):
    made = releases.release(tmp_path)
    return made.path, made.manifest.variants[0].id


def check(program, path, variant, bundle=None):
    words = [program, "--check-release", path / "release.json", variant]
    where = bundle or path / "variants" / variant
    done = subprocess.run(
        [*map(str, words), str(where)], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, json.loads(done.stderr)["code"] if done.stderr else None


def test_a_whole_bundle_passes(program, copy):
    assert check(program, *copy) == (0, None)


def test_another_bundle_does_not(program, copy):
    path, variant = copy
    assert check(program, path, variant, path / "variants/small-litert-cpu-int8") == (2, "hash")
    assert check(program, path, "nobody") == (2, "bundle")
    assert check(program, path.parent, variant)[0] == 2


def test_every_changed_byte_is_noticed(program, copy):
    path, variant = copy
    files = sorted(p for p in (path / "variants" / variant).rglob("*") if p.is_file())
    rng = random.Random(0)
    for _ in range(60):
        file = rng.choice(files)
        data = file.read_bytes()
        new = bytearray(data)
        new[rng.randrange(len(new))] ^= rng.randrange(1, 256)
        file.write_bytes(new)
        assert check(program, path, variant)[0] == 2, file
        file.write_bytes(data)
    assert check(program, path, variant) == (0, None)


def test_hostile_releases(program, copy):
    path, variant = copy
    file = path / "release.json"
    data = file.read_bytes()
    for text in (b"", b"[" * 100_000, b"{}", b'{"schema_version": 9}', data[: len(data) // 2]):
        file.write_bytes(text)
        assert check(program, path, variant)[0] == 2
    file.write_bytes(data.replace(b"manifest.json", b"../../../x.js"))
    assert check(program, path, variant)[0] == 2
    shutil.rmtree(path / "variants")
    file.write_bytes(data)
    assert check(program, path, variant)[0] == 2
