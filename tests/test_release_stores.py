from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

import releases
from handheld import cli
from handheld.bundle import Bundle
from handheld.errors import OutputError, ReleaseError, UsageError
from handheld.release import stores
from handheld.release.builder import Options, build
from handheld.release.folder import Release
from handheld.release.selection import Phone, select
from handheld.release.signing import Identity
from handheld.release.stores import base, play
from handheld.release.trust import verify

CONFIG = "{http://schemas.android.com/apk/config}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    private, public = releases.keys(folder)
    return releases.release(folder, private), Identity(key=public)


def groups(path):
    """The device groups of a targeting file: name, RAM, SoCs."""
    root = ET.parse(path).getroot()
    assert root.tag == f"{CONFIG}device-targeting-config"
    found = []
    for group in root.iter(f"{CONFIG}device-group"):
        selectors = list(group.iter(f"{CONFIG}device-selector"))
        assert 1 <= len(selectors) <= 5
        socs = [
            (s.get("manufacturer"), s.get("model")) for s in group.iter(f"{CONFIG}system-on-chip")
        ]
        found.append((group.get("name"), int(selectors[0].get("ram-min-bytes")), socs))
    return found


def test_play_packs(made, tmp_path):
    release, _ = made
    layout = stores.find("play").lay_out(release, tmp_path / "play")
    assert [p.name for p in layout.packs] == ["sample"]
    assert "no split" in layout.notes[0]
    found = groups(tmp_path / "play/device_targeting_config.xml")
    assert len(found) == 4
    # The big variant streams in 40 MB; an app may use half of a phone's RAM.
    assert found[0][1] == 80_000_000
    assets = tmp_path / "play/sample/src/main/assets"
    assert (assets / "release.json").is_file()
    for name, *_ in found:
        assert Bundle.open(assets / f"bundle#group_{name}")
    gradle = (tmp_path / "play/sample/build.gradle.kts").read_text()
    assert 'packName = "sample"' in gradle
    assert '":sample"' in (tmp_path / "play/app.snippet.gradle.kts").read_text()


def test_play_sends_what_selection_chooses(made, tmp_path):
    release, _ = made
    stores.find("play").lay_out(release, tmp_path / "play")
    found = groups(tmp_path / "play/device_targeting_config.xml")
    for ram in (10**7, 5 * 10**7, 8 * 10**7, 10**8, 10**9):
        answer = select(release.manifest, Phone(platform="android", ram_bytes=ram))
        group = next((name for name, least, _ in found if ram >= least), None)
        assert (group is None) == (answer.variant is None)
        if group and answer.variant:
            assert group.endswith(answer.variant.replace("-", "_"))


def test_play_targets_socs(tmp_path):
    bundle = releases.bundle(tmp_path / "b", target="executorch-qnn:SM8650")
    runs = [releases.record(bundle, device=releases.PIXEL)]
    build([bundle], runs, tmp_path / "r", Options("s", 1))
    stores.find("play").lay_out(Release.open(tmp_path / "r"), tmp_path / "play")
    [(_, _, socs)] = groups(tmp_path / "play/device_targeting_config.xml")
    assert socs == [("Qualcomm", "SM8650"), ("QTI", "SM8650")]


def test_names_of_packs_differ():
    assert base.unique("a", {"b"}) == "a"
    assert base.unique("a", {"a", "a-2"}) == "a-3"


def test_play_splits_what_is_too_large(made, tmp_path, monkeypatch):
    release, _ = made
    sizes = [base.files_of(release, v) for v in release.manifest.variants]
    limit = max(max(files.values()) for files in sizes) + 10
    monkeypatch.setattr(play, "MAX_PACK_BYTES", limit)
    layout = stores.find("play").lay_out(release, tmp_path / "play")
    assert len(layout.packs) > 1
    assert all(p.bytes <= limit for p in layout.packs)
    assert "more than one pack" in layout.notes[0]
    [group] = {name for name, *_ in groups(tmp_path / "play/device_targeting_config.xml")[:1]}
    together = tmp_path / "together"
    for pack in layout.packs:
        part = tmp_path / f"play/{pack.name}/src/main/assets/bundle#group_{group}"
        for file in part.rglob("*"):
            if file.is_file():
                target = together / file.relative_to(part)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    assert Bundle.open(together).sha256 == release.manifest.variants[0].bundle_sha256


def test_limits_are_checked_before_upload(made, tmp_path, monkeypatch):
    release, _ = made
    monkeypatch.setattr(play, "MAX_PACK_BYTES", 10)
    with pytest.raises(ReleaseError, match="segment_weights"):
        stores.find("play").lay_out(release, tmp_path / "play")
    assert not (tmp_path / "play").exists()
    monkeypatch.undo()
    monkeypatch.setattr(play, "MAX_APP_BYTES", 10)
    with pytest.raises(ReleaseError, match="4 GB for an app"):
        stores.find("play").lay_out(release, tmp_path / "play")


def test_apple_packs(made, tmp_path):
    release, _ = made
    layout = stores.find("apple").lay_out(release, tmp_path / "apple")
    assert len(layout.packs) == 5
    for pack in layout.packs:
        manifest = json.loads((tmp_path / f"apple/manifests/{pack.name}.json").read_text())
        assert set(manifest) == {"assetPackID", "downloadPolicy", "fileSelectors", "platforms"}
        assert manifest["assetPackID"] == pack.name
        assert manifest["platforms"] == ["iOS"]
        for selector in manifest["fileSelectors"]:
            assert (tmp_path / "apple" / selector["directory"]).is_dir()
    for variant in release.manifest.variants:
        assert Bundle.open(tmp_path / f"apple/variants/{variant.id}")
    assert (tmp_path / "apple/package.sh").stat().st_mode & 0o100


def test_hugging_face(made, tmp_path):
    release, identity = made
    stores.find("huggingface").lay_out(release, tmp_path / "hf")
    assert verify(tmp_path / "hf/release", identity)
    card = (tmp_path / "hf/README.md").read_text()
    assert card.startswith("---\nlicense: other\n")
    assert 'license_name: "Apache-2.0"' in card
    assert "big-litert-cpu-int8" in card
    assert "*.tflite filter=lfs" in (tmp_path / "hf/.gitattributes").read_text()


def test_what_is_in_the_way_stays(made, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(OutputError, match="no store's layout"):
        stores.find("play").lay_out(made[0], tmp_path)
    assert (tmp_path / "mine").read_text() == "x"
    stores.find("play").lay_out(made[0], tmp_path / "out")
    stores.find("apple").lay_out(made[0], tmp_path / "out")
    assert not (tmp_path / "out/device_targeting_config.xml").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="no store's layout"):
        stores.find("play").lay_out(made[0], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_unknown_stores():
    assert set(stores.names()) >= {"play", "apple", "huggingface"}
    with pytest.raises(UsageError, match="choose one of"):
        stores.find("f-droid")


def test_command(made, tmp_path, capsys):
    path = str(made[0].path)
    assert (
        cli.run(["release", "pack", path, "--store", "play", "-o", str(tmp_path / "p"), "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["packs"][0]["name"] == "sample"
    assert cli.run(["release", "pack", path, "--store", "x", "-o", str(tmp_path / "x")]) == 2
