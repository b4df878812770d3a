from __future__ import annotations

import io
import json
import os
import random
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

import samples
from handheld import archive
from handheld import bundle as bundles
from handheld.bundle import Bundle, find, manifest_bytes, parse_manifest, write
from handheld.errors import BundleError, HandheldError, OutputError, UsageError


@pytest.fixture
def folder(tmp_path):
    samples.write_bundle(tmp_path / "sample")
    return tmp_path / "sample"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def edit(folder, change):
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def error_of(path, **kwargs):
    with pytest.raises(BundleError) as e:
        Bundle.open(path, **kwargs)
    assert e.value.path
    assert e.value.remedy
    assert "Traceback" not in str(e.value)
    return e.value


def set_at(path, value):
    def change(tree):
        *most, last = path
        for part in most:
            tree = tree[part]
        if value is KeyError:
            del tree[last]
        else:
            tree[last] = value

    return change


def test_opens_and_reads_everything(folder):
    bundle = Bundle.open(folder)
    assert bundle.sha256 == bundle.manifest.sha256
    assert bundle.constants()["time"].shape == (1, 1, 1, 3)
    assert bundle.reference()["picture"].dtype == np.uint8
    embeds, pooled = bundle.prefetched(samples.PROMPT)
    assert (embeds.shape, pooled.shape) == ((4, 6), (5,))
    assert bundle.prefetched("something else") is None
    assert bundle.size()[0] == "16x8"
    assert bundle.artifact("unet.0").component == "unet"
    assert bundle.nbytes == sum(
        p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"
    )
    with pytest.raises(UsageError, match="'16x8'"):
        bundle.size("32x32")
    with pytest.raises(BundleError):
        bundle.artifact("unet.1")


REPEATED = '{"schema_version": 1, "schema_version": 1}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "broken JSON"),
        ("{", "broken JSON"),
        ("[]", "not a JSON object"),
        ("{}", "not a manifest of handheld"),
        ('{"schema_version": "1"}', "not a manifest of handheld"),
        ('{"schema_version": true}', "not a manifest of handheld"),
        ('{"schema_version": 4}', "newer handheld"),
        ('{"schema_version": 0}', "unknown version 0"),
        ('{"schema_version": 1}', "faults"),
        (REPEATED, "occurs twice"),
        ('{"schema_version": 1, "x": NaN}', "NaN is not"),
        ('{"schema_version": 1' + ', "x": ' + "[" * 100_000, "nested too deeply"),
        ("\ufeff{}", "broken JSON"),
    ],
)
def test_what_is_no_manifest(folder, text, expected):
    (folder / "manifest.json").write_text(text)
    assert expected in str(error_of(folder))


def test_not_utf8(folder):
    (folder / "manifest.json").write_bytes(b'{"schema_version": "\xff"}')
    assert "broken JSON" in str(error_of(folder))


def test_no_bundle(tmp_path):
    assert "no such bundle" in str(error_of(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    assert "has no manifest.json" in str(error_of(tmp_path / "empty"))
    (tmp_path / "text").write_text("hello")
    assert "neither a folder nor a zip" in str(error_of(tmp_path / "text"))


def test_manifest_over_the_limit(folder, monkeypatch):
    monkeypatch.setattr(bundles, "MAX_MANIFEST_BYTES", 100)
    assert "over the limit" in str(error_of(folder))


PROGRAM = ("sizes", "16x8", "program")


@pytest.mark.parametrize(
    ("path", "value", "field", "message"),
    [
        (("artifacts", 0, "file", "path"), "../x", "artifacts[0].file.path", "leaves the bundle"),
        (("artifacts", 0, "file", "path"), "/x", "artifacts[0].file.path", "relative path"),
        (("artifacts", 0, "file", "path"), "a\\b", "artifacts[0].file.path", "relative path"),
        (("artifacts", 0, "file", "path"), "artifacts/none", "artifacts[0].file.path", "missing"),
        (("artifacts", 0, "file", "path"), "artifacts", "artifacts[0].file.path", "missing"),
        (("artifacts", 0, "file", "path"), "manifest.json", "artifacts[0].file.path", "itself"),
        (("artifacts", 0, "file", "bytes"), 3, "artifacts[0].file.bytes", "18 bytes"),
        (("artifacts", 0, "file", "bytes"), "18", "artifacts[0].file.bytes", "integer"),
        (("artifacts", 0, "file", "sha256"), "0" * 64, "artifacts[0].file.sha256", "sha256"),
        (("artifacts", 0, "file", "sha256"), "0", "artifacts[0].file.sha256", "pattern"),
        (("artifacts", 0, "surprise"), 1, "artifacts[0].surprise", "not permitted"),
        (("artifacts", 0, "engine"), "steam", "artifacts[0].engine", "litert"),
        (("artifacts",), [], "artifacts", "at least 1"),
        (("constants",), None, "constant_specs", "no file"),
        (("constants", "path"), "prompts.safetensors", "text.prefetched.file", "contradicts"),
        (
            ("constant_specs", "time", "shape"),
            [1, 1, 1, 4],
            "sizes.16x8.program.ops[9]",
            "argument 'time'",
        ),
        (("constant_specs", "more"), {"shape": [1]}, "constant_specs", "'more' is missing"),
        (("constant_specs",), {}, "sizes.16x8.program.ops[9]", "'time'"),
        (("sizes",), {}, "sizes", "at least 1"),
        (("sizes", "16x8", "width"), 24, "sizes.16x8", "24x8"),
        ((*PROGRAM, "ops", 0, "length"), 99, "sizes.16x8.program.ops[0]", "slice leaves"),
        ((*PROGRAM, "ops", 0, "op"), "jump", "sizes.16x8.program.ops[0]", "jump"),
        ((*PROGRAM, "ops", 9, "artifact"), "x", "sizes.16x8.program.ops[9]", "calls artifact 'x'"),
        ((*PROGRAM, "outputs"), {}, "sizes.16x8.program.outputs", "at least 1"),
        (
            (*PROGRAM, "tensors", "noise", "shape"),
            [2**20, 2**20],
            "sizes.16x8.program.tensors.noise",
            "over the limit",
        ),
        (("text", "width"), 7, "sizes.16x8.program.inputs[1]", "4 x 7"),
        (("text", "pooled_width"), 4, "sizes.16x8.program.inputs[2]", "pooled_width"),
        (("text", "prefetched", "prompts"), ["a", "b"], "text.prefetched", "'1.prompt_embeds'"),
        (("text", "prefetched", "prompts"), [], "text.prefetched", "does not name tensor"),
        (("reference", "size"), "1x1", "reference.size", "no size"),
        (("verification", "snr_db"), 1e999, "verification.snr_db", "finite"),
        (("model",), KeyError, "model", "required"),
        (
            ("artifacts", 0, "parts"),
            [{"path": "artifacts/unet.0.tflite", "sha256": "0" * 64, "bytes": 18}],
            None,
            "schema_version 1 has no parts of litert",
        ),
        (
            ("references",),
            [samples.content()[0].reference.model_dump(mode="json")],
            None,
            "schema_version 1 has no references of several sizes",
        ),
    ],
)
def test_each_fault_names_its_field(folder, path, value, field, message):
    edit(folder, set_at(path, value))
    error = error_of(folder)
    if value == 1e999:
        assert "Infinity" in str(error)
        return
    assert error.field == field
    assert message in str(error)


def test_all_faults_at_once(folder):
    def change(tree):
        tree["target"] = 1
        tree["artifacts"][0]["engine"] = 2
        del tree["text"]

    edit(folder, change)
    text = str(error_of(folder))
    assert "3 faults" in text
    for field in ("target", "artifacts[0].engine", "text"):
        assert f"\n  {field}: " in text

    edit(folder, lambda tree: tree.update({f"x{i}": i for i in range(20)}))
    assert "and 13 more" in str(error_of(folder))


@pytest.fixture
def sized(folder):
    samples.add_size(folder, {"psnr_db": 31.0})
    return folder


def test_several_sizes(sized):
    opened = Bundle.open(sized)
    manifest = opened.manifest
    assert opened.size()[0] == manifest.default_size == "16x8"
    assert [a.id for a in manifest.called("24x8")] == ["unet.0.24x8"]
    assert manifest.segment("unet.0.24x8") == manifest.segment("unet.0") == "unet.0"
    assert opened.reference("24x8")["picture"].shape == (1, 8, 24, 3)
    assert opened.reference()["picture"].shape == (1, 8, 16, 3)
    assert manifest.verification_of("24x8").psnr_db == 31.0
    assert manifest.verification_of("16x8") == manifest.verification
    # Files that two artifacts have in common are there once.
    assert manifest.nbytes == 18 + 6
    on_disk = sum(p.stat().st_size for p in sized.rglob("*") if p.is_file())
    assert opened.nbytes == on_disk - (sized / "manifest.json").stat().st_size
    with pytest.raises(UsageError) as e:
        opened.size("64x64")
    assert "no size '64x64'" in str(e.value)
    assert "it has '16x8', '24x8'" in str(e.value)


def test_a_reference_of_another_size(sized):
    edit(sized, set_at(("references", 0, "file", "path"), "reference.safetensors"))
    assert "contradicts reference.file" in str(error_of(sized))

    def other(tree):
        tree["references"][0]["file"] = tree["reference"]["file"]

    edit(sized, other)
    error = error_of(sized)
    assert error.field == "references[0].file"
    assert "tensor 'picture' is uint8[1, 8, 16, 3], the manifest says uint8[1, 8, 24, 3]" in str(
        error
    )


def test_too_many_sizes(folder):
    def change(tree):
        (size,) = tree["sizes"].values()
        tree["sizes"] |= {f"{8 * i + 8}x8": size for i in range(65)}

    edit(folder, change)
    assert "at most 64" in str(error_of(folder))


def test_mutated_manifests_of_several_sizes_never_crash(sized):
    outcomes = fuzzed(sized, 800)
    assert outcomes["refused"] > 400
    assert outcomes["valid"] > 4


def test_two_artifacts_with_one_id(folder):
    edit(folder, lambda tree: tree["artifacts"].append(tree["artifacts"][0]))
    assert error_of(folder).field == "artifacts[1].id"


def test_file_that_changed(folder):
    path = folder / "artifacts/unet.0.tflite"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"!")
    error = error_of(folder)
    assert error.field == "artifacts[0].file.sha256"
    assert error.path == str(path)
    Bundle.open(folder, verify_hashes=False)
    path.write_bytes(data[:-1])
    assert error_of(folder, verify_hashes=False).field == "artifacts[0].file.bytes"


def test_file_that_nobody_named(folder):
    (folder / "README").write_text("fine here")
    Bundle.open(folder)
    (folder / "artifacts/deep").mkdir()
    Bundle.open(folder)
    (folder / "artifacts/deep/extra.bin").write_text("not here")
    error = error_of(folder)
    assert error.path.endswith("artifacts/deep/extra.bin")
    assert "does not name" in str(error)


@pytest.mark.parametrize("name", ["artifacts/unet.0.tflite", "artifacts", "manifest.json"])
def test_symbolic_links(folder, tmp_path, name):
    moved = tmp_path / "elsewhere"
    (folder / name).rename(moved)
    (folder / name).symlink_to(moved)
    assert "symbolic link" in str(error_of(folder)) or name == "manifest.json"


def test_link_among_artifacts(folder):
    (folder / "artifacts/link").symlink_to("/etc/hostname")
    assert "does not name" in str(error_of(folder))


def test_bundle_behind_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    Bundle.open(tmp_path / "link")


def replace_file(folder, name, data):
    """Replace a file and what the manifest says of it."""
    (folder / name).write_bytes(data)
    new = samples.ref(name, data).model_dump(mode="json")

    def change(tree):
        for holder in (tree, tree["reference"], tree["text"]["prefetched"], *tree["artifacts"]):
            for key, value in holder.items():
                if isinstance(value, dict) and value.get("path") == name:
                    holder[key] = new

    edit(folder, change)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "'time' is missing"),
        ({"time": np.zeros((1, 1, 1, 3), np.float16)}, "float16"),
        ({"time": np.zeros((1, 1, 3), np.float32)}, "[1, 1, 3]"),
        (
            {"time": np.zeros((1, 1, 1, 3), np.float32), "x": np.zeros(1, np.float32)},
            "does not name tensor 'x'",
        ),
        ({"time": np.zeros((1, 1, 1, 3), np.float64)}, "dtype F64"),
        ({"time": np.zeros((), np.float32)}, "at least 1"),
    ],
)
def test_constants_that_do_not_fit(folder, tensors, message):
    replace_file(folder, "constants.safetensors", save(tensors))
    assert message in str(error_of(folder))


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\xff" * 8, save({})[:-1] + b"["])
def test_constants_that_are_broken(folder, data):
    replace_file(folder, "constants.safetensors", data)
    assert "safetensors" in str(error_of(folder))


def test_reference_that_does_not_fit(folder):
    tensors = Bundle.open(folder).reference()
    picture = tensors.pop("picture")
    replace_file(folder, "reference.safetensors", save(tensors))
    assert "'picture' is missing" in str(error_of(folder))
    extra = {**tensors, "picture": picture, "call.0.z": np.zeros(1, np.float32)}
    replace_file(folder, "reference.safetensors", save(extra))
    assert "call.0.z" in str(error_of(folder))
    good = {**tensors, "picture": picture, "call.0.y": np.zeros((1, 8, 16, 3), np.float32)}
    replace_file(folder, "reference.safetensors", save(good))
    Bundle.open(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(folder):
    (folder / "manifest.json").chmod(0)
    assert "permission denied" in str(error_of(folder))


def test_hash_covers_what_makes_the_picture(folder):
    manifest, _ = samples.content()
    assert samples.content(licence="MIT", precision="int4")[0].sha256 == manifest.sha256
    artifact = manifest.artifacts[0]
    turned = artifact.model_copy(
        update={
            "ports": artifact.ports.model_copy(
                update={"inputs": dict(reversed(artifact.ports.inputs.items()))}
            )
        }
    )
    assert samples.content(artifacts=(turned,))[0].sha256 != manifest.sha256


def test_manifest_is_deterministic_and_comes_back(folder):
    manifest, _ = samples.content()
    data = manifest_bytes(manifest)
    assert (folder / "manifest.json").read_bytes() == data
    again = parse_manifest(data)
    assert again == manifest
    assert again.sha256 == manifest.sha256
    assert list(again.artifacts[0].ports.inputs) == list(manifest.artifacts[0].ports.inputs)


def test_write_replaces_bundles_only(folder, tmp_path):
    manifest, files = samples.content(licence="MIT")
    (folder / "old").write_text("x")
    write(manifest, files, folder)
    assert not (folder / "old").exists()
    assert Bundle.open(folder).manifest.licence == "MIT"
    (tmp_path / "empty").mkdir()
    write(manifest, files, tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/precious").write_text("x")
    with pytest.raises(OutputError, match="not a bundle"):
        write(manifest, files, tmp_path / "other")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not a bundle"):
        write(manifest, files, tmp_path / "file")
    with pytest.raises(OutputError, match="in the way of a folder"):
        write(manifest, files, tmp_path / "file/below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "other", "sample"]


def test_write_leaves_nothing_when_it_fails(folder, tmp_path):
    before = (folder / "manifest.json").read_bytes()
    manifest, files = samples.content()
    files["artifacts/unet.0.tflite"] += b"!"
    with pytest.raises(BundleError) as e:
        write(manifest, files, folder)
    assert e.value.path == str(folder / "artifacts/unet.0.tflite")
    with pytest.raises(BundleError, match="leaves the bundle"):
        write(manifest, {**files, "../x": b""}, folder)
    del files["artifacts/unet.0.tflite"]
    with pytest.raises(BundleError, match="missing"):
        write(manifest, files, folder)
    assert (folder / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["sample"]


def test_write_copies_files(tmp_path):
    manifest, files = samples.content()
    source = tmp_path / "source"
    source.write_bytes(files["artifacts/unet.0.tflite"])
    write(manifest, {**files, "artifacts/unet.0.tflite": source}, tmp_path / "out")
    assert source.exists()
    mode = (tmp_path / "out").stat().st_mode
    assert stat.S_IMODE(mode) & 0o700 == 0o700


def test_find(folder, tmp_path):
    sha = Bundle.open(folder).sha256
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/manifest.json").write_text("{")
    shutil.copytree(folder, tmp_path / "copy")
    assert find(sha, [tmp_path]).sha256 == sha
    assert find(sha[:8], [tmp_path / "missing", folder]).path == folder
    assert find("0" * 64, [tmp_path]) is None
    with pytest.raises(UsageError, match="too short"):
        find(sha[:3], [tmp_path])


# Zip files


def zipped(tmp_path, entries, name="b.zip"):
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as z:
        for key, data in entries:
            z.writestr(key, data)
    return path


def bundle_entries(prefix=""):
    manifest, files = samples.content()
    files = {"manifest.json": manifest_bytes(manifest), **files}
    return [(prefix + name, data) for name, data in files.items()]


@pytest.mark.parametrize("prefix", ["", "folder/"])
def test_zip(tmp_path, prefix):
    path = zipped(tmp_path, bundle_entries(prefix))
    first, second = Bundle.open(path), Bundle.open(path)
    assert first.path == second.path
    assert first.sha256 == samples.content()[0].sha256


def test_zip_written(tmp_path):
    manifest, files = samples.content()
    for name in ("a.zip", "b.zip", "a.zip"):
        assert write(manifest, files, tmp_path / name, zipped=True) is None
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert Bundle.open(tmp_path / "a.zip").sha256 == manifest.sha256
    (tmp_path / "c.zip").write_text("mine")
    with pytest.raises(OutputError):
        write(manifest, files, tmp_path / "c.zip", zipped=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "b.zip", "c.zip", "cache"]


def test_zip_with_touched_cache(tmp_path):
    path = zipped(tmp_path, bundle_entries())
    (Bundle.open(path).path / "artifacts/unet.0.tflite").write_bytes(b"x")
    assert Bundle.open(path).sha256 == samples.content()[0].sha256


@pytest.mark.parametrize("name", ["../evil", "/evil", "a\\..\\evil", "a//b", "./a", "c:evil"])
def test_zip_that_escapes(tmp_path, name):
    path = zipped(tmp_path, [*bundle_entries(), (name, b"x")])
    assert "leaves the archive" in str(error_of(path))
    assert not (tmp_path / "cache/handheld/unpacked").exists()


@pytest.mark.parametrize("name", ["a/" * 40 + "b", "a\x1b[2Jb", "a\nb"])
def test_zip_with_paths_that_are_none_of_files(tmp_path, name):
    path = zipped(tmp_path, [*bundle_entries(), (name, b"x")])
    assert "not one of files" in str(error_of(path))


def test_zip_with_a_list_that_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_MAX_READ", 100)
    assert "list of entries" in str(error_of(zipped(tmp_path, bundle_entries())))


def test_zip_with_entries_compressed_in_rare_ways(tmp_path):
    path = tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as z:
        for name, data in bundle_entries():
            z.writestr(name, data)
    assert "compressed in another way" in str(error_of(path))


def test_zip_with_a_link(tmp_path):
    info = zipfile.ZipInfo("artifacts/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    assert "neither a file" in str(error_of(zipped(tmp_path, [*bundle_entries(), (info, b"/")])))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["manifest.json", "Manifest.JSON", "constants.safetensors"])
def test_zip_with_duplicates(tmp_path, name):
    assert "twice" in str(error_of(zipped(tmp_path, [*bundle_entries(), (name, b"x")])))


def test_zip_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_ZIP_FREE_BYTES", 1000)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in [*bundle_entries(), ("zeros", bytes(10**7))]:
            z.writestr(name, data)
    assert "bomb" in str(error_of(path))


def test_zip_that_lies_about_sizes(tmp_path):
    path = tmp_path / "lie.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in [*bundle_entries(), ("zeros", bytes(10**6))]:
            z.writestr(name, data)
    data = path.read_bytes()
    assert data.count((10**6).to_bytes(4, "little")) == 2
    path.write_bytes(data.replace((10**6).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    assert "broken zip" in str(error_of(path))


def test_zip_with_too_many_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_ZIP_ENTRIES", 2)
    assert "over the limit" in str(error_of(zipped(tmp_path, bundle_entries())))


def test_zip_without_manifest(tmp_path):
    assert "no manifest.json" in str(error_of(zipped(tmp_path, [("a", b"x")])))
    assert "no manifest.json" in str(error_of(zipped(tmp_path, [], "empty.zip")))
    two = [*bundle_entries("a/"), *bundle_entries("b/")]
    assert "no manifest.json" in str(error_of(zipped(tmp_path, two, "two.zip")))


def test_mutated_zips_never_crash(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in bundle_entries():
            z.writestr(name, data)
    rng = random.Random(1)
    for i in range(150):
        data = bytearray(buffer.getvalue())
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path = tmp_path / f"{i}.zip"
        path.write_bytes(data)
        try:
            Bundle.open(path)
        except HandheldError as error:
            assert error.path


# Fuzzing


ODD = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, "", "x", "a" * 1000,
    "\ud800", "../x", "noise", [], [[]], {}, {"op": "call"}, [1, 2], "1", "float32", "picture",
]  # fmt: skip


def mutate(tree, rng):
    """Change one random place of a JSON tree."""
    places = []

    def visit(node):
        if isinstance(node, dict | list):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            for key in keys:
                places.append((node, key))
                visit(node[key])

    visit(tree)
    node, key = rng.choice(places)
    action = rng.randrange(6)
    if action == 0:
        del node[key]
    elif action == 1:
        other, other_key = rng.choice(places)
        node[key] = (
            json.loads(json.dumps(other[other_key]))
            if other_key in other or isinstance(other, list)
            else None
        )
    elif action == 2 and isinstance(node, dict):
        node[rng.choice(["extra", "shape", "x", ""])] = rng.choice(ODD)
    elif action == 3 and isinstance(node[key], int) and not isinstance(node[key], bool):
        node[key] += rng.choice([-1, 1, 2**31, -(2**31)])
    elif action == 4 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = rng.choice(ODD)


def fuzzed(folder, count):
    """Change a manifest in many ways; return how often it opened and how often not."""
    original = (folder / "manifest.json").read_bytes()
    rng = random.Random(0)
    outcomes = {"valid": 0, "refused": 0}
    for i in range(count):
        if i % 4 == 3:
            data = bytearray(original)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        else:
            tree = json.loads(original)
            for _ in range(rng.randint(1, 3)):
                mutate(tree, rng)
            data = json.dumps(tree).encode()
        (folder / "manifest.json").write_bytes(data)
        try:
            bundle = Bundle.open(folder)
        except BundleError as error:
            assert error.path
            outcomes["refused"] += 1
        else:
            assert len(bundle.sha256) == 64
            outcomes["valid"] += 1
    return outcomes


def test_mutated_manifests_never_crash(folder):
    outcomes = fuzzed(folder, 2000)
    assert outcomes["refused"] > 1000
    assert outcomes["valid"] > 20


def test_safetensors_fuzz(folder):
    original = (folder / "constants.safetensors").read_bytes()
    rng = random.Random(2)
    for _ in range(150):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        replace_file(folder, "constants.safetensors", bytes(data))
        try:
            Bundle.open(folder)
        except BundleError as error:
            assert error.path
    assert Path(folder).is_dir()
