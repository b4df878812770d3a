"""The native program follows the hashes of a release as Python does."""

from __future__ import annotations

import json
import random
import shutil
import subprocess

import pytest

import releases
import samples
from handheld import harness
from handheld.bundle import Bundle
from handheld.release.builder import Options, build

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


def test_references_of_further_sizes_are_followed(program, tmp_path):
    made = releases.bundle(tmp_path / "b")
    samples.add_size(made.path, {"snr_db": 60.0, "psnr_db": 50.0})
    bundle = Bundle.open(made.path)
    wide = releases.record(bundle, number=1)
    wide = wide.model_copy(update={"bundle": wide.bundle.model_copy(update={"size": "24x8"})})
    release = tmp_path / "r"
    build([bundle], [releases.record(bundle), wide], release, Options(name="sample", version=1))
    (folder,) = (release / "variants").iterdir()
    assert check(program, release, folder.name) == (0, None)
    file = folder / "reference.24x8.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert check(program, release, folder.name) == (2, "hash")
    file.unlink()
    assert check(program, release, folder.name)[0] == 2
