from __future__ import annotations

import json
import os
import random
import resource
import shutil
import stat
import time
import zipfile
from pathlib import Path

import pytest

import releases
from handheld import archive
from handheld.errors import HandheldError, ReleaseError
from handheld.release.folder import Release
from handheld.release.manifest import MAX_MANIFEST_BYTES, SCHEMA_VERSION, parse
from handheld.release.selection import Phone, select
from handheld.release.signing import Identity
from handheld.release.trust import verify
from test_bundle import mutate


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return releases.release(tmp_path_factory.mktemp("release")).path


@pytest.fixture
def copy(good, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(good, tmp_path / "r")
    return tmp_path / "r"


def refusal(path):
    with pytest.raises(ReleaseError) as caught:
        Release.open(path)
    assert caught.value.exit_code == 2
    assert caught.value.path
    return str(caught.value)


def entries(path):
    return [(p.relative_to(path).as_posix(), p.read_bytes()) for p in archive.walk(path)]


def zipped(path, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, data in content:
            z.writestr(name, data)
    return path


def test_opens_as_folder_and_as_zip(copy, tmp_path):
    assert len(Release.open(copy).manifest.variants) == 4
    assert len(Release.open(zipped(tmp_path / "r.zip", entries(copy))).digests) > 10


def test_not_there(tmp_path):
    assert "no such release" in refusal(tmp_path / "none")
    assert "no release.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("extra", "no manifest names"),
        ("variants/big-litert-cpu-int8/extra", "no manifest names"),
        ("variants/big-litert-cpu-int8/artifacts/extra", "manifest does not name"),
        ("Release.JSON", "case only"),
        ("documents/.hidden", "no manifest names"),
    ],
)
def test_files_that_nobody_named(copy, name, message):
    (copy / name).write_bytes(b"x")
    assert message in refusal(copy)


def test_links_devices_and_empty_folders(copy):
    (copy / "link").symlink_to("/etc/passwd")
    assert "neither a file nor a folder" in refusal(copy)
    (copy / "link").unlink()
    (copy / "folder").symlink_to(copy / "variants", target_is_directory=True)
    assert "neither a file nor a folder" in refusal(copy)
    (copy / "folder").unlink()
    os.mkfifo(copy / "pipe")
    assert "neither a file nor a folder" in refusal(copy)
    (copy / "pipe").unlink()
    (copy / "empty").mkdir()
    assert "empty folder" in refusal(copy)


def test_deep_folders(copy):
    (copy / "/".join("d" * 40)).mkdir(parents=True)
    assert "nested too deeply" in refusal(copy)


def test_huge_manifest(copy):
    (copy / "release.json").write_bytes(b"[" * (MAX_MANIFEST_BYTES + 10))
    assert "over the limit" in refusal(copy)
    (copy / "release.json").write_bytes(b"[" * 100_000)
    assert "nested too deeply" in refusal(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "newer handheld"),
        ({"schema_version": None}, "no version number"),
        ({"schema_version": True}, "no version number"),
        ({"version": 0}, "greater than or equal to 1"),
        ({"variants": []}, "at least 1"),
        ({"surprise": 1}, "surprise"),
        ({"expires": "tomorrow"}, "datetime"),
    ],
)
def test_manifests_that_are_refused(good, change, message):
    tree = json.loads((good / "release.json").read_text())
    with pytest.raises(ReleaseError, match=message):
        parse(json.dumps({**tree, **change}).encode())


def test_variants_that_differ_in_case_only(good):
    tree = json.loads((good / "release.json").read_text())
    twin = json.loads(json.dumps(tree["variants"][0]).replace("big-", "Big-"))
    with pytest.raises(ReleaseError, match="two variants"):
        parse(json.dumps({**tree, "variants": [*tree["variants"], twin]}).encode())


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a\\b", "C:x", "variants/other/x", "a//b"])
def test_paths_that_escape(good, path):
    tree = json.loads((good / "release.json").read_text())
    tree["variants"][0]["chunks"]["path"] = path
    with pytest.raises(ReleaseError):
        parse(json.dumps(tree).encode())


def test_a_file_that_was_exchanged(copy):
    file = copy / "variants/big-litert-cpu-int8/artifacts/unet.0.tflite"
    file.write_bytes(file.read_bytes()[::-1])
    assert "unet.0.tflite" in refusal(copy)
    file.unlink()
    (file.parent / "other").write_bytes(b"x")
    assert "missing" in refusal(copy)


def test_zip_bombs(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_ZIP_FREE_BYTES", 10**5)
    bomb = [*entries(copy), ("zeros", bytes(10**8))]
    assert "bomb" in refusal(zipped(tmp_path / "bomb.zip", bomb, zipfile.ZIP_DEFLATED))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil", "leaves the archive"),
        ("/evil", "leaves the archive"),
        ("a\\..\\evil", "leaves the archive"),
        ("release.json", "twice"),
        ("RELEASE.json", "twice"),
    ],
)
def test_zip_entries_that_are_refused(copy, tmp_path, name, message):
    path = zipped(tmp_path / "r.zip", [*entries(copy), (name, b"x")])
    assert message in refusal(path)
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "cache/handheld/releases").exists()


def test_zip_with_a_link(copy, tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = zipped(tmp_path / "r.zip", [*entries(copy), (info, b"/etc/passwd")])
    assert "neither a file" in refusal(path)


def mutations(good, count):
    """Parse manifests that were changed at random; return the slowest time and the memory."""
    text = (good / "release.json").read_bytes()
    rng = random.Random(3)
    slowest, refused = 0.0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(count):
        if i % 2:
            tree = json.loads(text)
            for _ in range(rng.randint(1, 3)):
                mutate(tree, rng)
            data = json.dumps(tree).encode("utf-8", "surrogatepass")
        else:
            raw = bytearray(text)
            for _ in range(rng.randint(1, 8)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            data = bytes(raw)
        start = time.perf_counter()
        try:
            parse(data)
        except HandheldError as error:
            refused += 1
            assert error.path
            assert len(str(error)) < 10_000
        slowest = max(slowest, time.perf_counter() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return slowest, grown, refused


def test_mutated_manifests(good):
    _, _, refused = mutations(good, 300)
    assert refused > 200


@pytest.mark.slow
def test_ten_thousand_mutated_manifests(good):
    slowest, grown_kb, refused = mutations(good, 10_000)
    assert refused > 7000
    assert slowest < 5
    assert grown_kb < 200_000


def test_mutated_manifests_on_disk_never_crash(copy):
    text = (copy / "release.json").read_bytes()
    inner = copy / "variants/big-litert-cpu-int8/manifest.json"
    inside = inner.read_bytes()
    rng = random.Random(4)
    for i in range(60):
        file, data = (copy / "release.json", text) if i % 2 else (inner, inside)
        raw = bytearray(data)
        raw[rng.randrange(len(raw))] ^= rng.randrange(1, 256)
        file.write_bytes(raw)
        with pytest.raises(HandheldError):
            Release.open(copy)
            # A change of the release's manifest alone may leave a whole release.
            raise ReleaseError("whole", path=copy)
        file.write_bytes(data)


OLD = sorted((Path(__file__).parent / "golden/releases").glob("v*.zip"))


def test_there_is_a_release_of_every_schema_version():
    assert [p.stem for p in OLD] == [f"v{i}" for i in range(1, SCHEMA_VERSION + 1)]


@pytest.mark.parametrize("path", OLD, ids=lambda p: p.stem)
def test_old_releases_stay_readable(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = verify(path, Identity(key=path.with_suffix(".pub")))
    answer = select(found.manifest, Phone(platform="android", ram_bytes=2**33, os=14))
    assert answer.variant == "big-litert-cpu-int8"
    assert found.bundle(found.manifest.variant(answer.variant)).manifest.model.id == "big"
