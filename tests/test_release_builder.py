from __future__ import annotations

import hashlib
import json
import zipfile

import pytest

import releases
import samples
from handheld.bundle import Bundle
from handheld.errors import BundleError, GateError, OutputError, UsageError
from handheld.manifest import Verification
from handheld.release import sbom
from handheld.release.builder import Options, build, examine, modes
from handheld.release.folder import Release, digest_tree
from handheld.release.signing import Identity
from handheld.release.trust import verify

TARGETS = (("a", "litert-cpu"), ("b", "executorch-xnnpack"))
OPTIONS = Options(name="sample", version=1)


def tree(path):
    return {k: v[0] for k, v in digest_tree(path).items()}


def test_variants_stand_in_order_of_preference(tmp_path):
    found = releases.release(tmp_path).manifest
    assert [v.id for v in found.variants] == [
        "big-litert-cpu-int8",
        "big-executorch-xnnpack-int8",
        "small-litert-cpu-int8",
        "small-executorch-xnnpack-int8",
    ]
    first = found.variants[0]
    assert [m.residency for m in first.modes] == ["resident", "stream"]
    assert first.modes[0].memory_bytes == 80_000_000
    assert first.modes[0].median_ms == 31.0
    assert first.modes[0].device == "host-1"
    assert first.modes[0].record.startswith("20260102")
    assert first.needs.engines == ("litert",)
    assert first.gate.end_to_end_db == 30
    assert not first.forced


def test_same_input_gives_same_bytes(tmp_path):
    private, public = releases.keys(tmp_path)
    one = releases.release(tmp_path / "one", private).path
    two = releases.release(tmp_path / "elsewhere", private).path
    assert tree(one) == tree(two)
    assert (one / "model.sig").read_bytes() == (two / "model.sig").read_bytes()
    bundles = [releases.bundle(tmp_path / "b")]
    record = releases.record(bundles[0])
    for name in ("a.zip", "b.zip"):
        build(bundles, [record], tmp_path / name, OPTIONS, Identity(key=private), zipped=True)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert verify(tmp_path / "a.zip", Identity(key=public)).manifest.name == "sample"


def test_records_and_documents_travel_along(tmp_path):
    made = releases.bundle(tmp_path / "b")
    card = tmp_path / "critter" / "README.md"
    card.parent.mkdir()
    card.write_text("what it was trained on")
    options = Options(name="sample", version=1, documents=(card,))
    build([made], [releases.record(made)], tmp_path / "r", options)
    found = Release.open(tmp_path / "r")
    assert [d.path for d in found.manifest.documents] == [
        "documents/critter-README.md",
        "documents/sbom.cdx.json",
    ]
    lines = (tmp_path / "r/records/sample-litert-cpu-int8.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["bundle"]["sha256"] == made.sha256
    assert found.manifest.sources[0].checkpoint_sha256 == "a" * 64
    assert found.manifest.sources[0].licence == "Apache-2.0"


def test_bill_of_materials_is_cyclonedx(tmp_path):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    made = releases.bundle(tmp_path / "b")
    build([made], [releases.record(made)], tmp_path / "r", OPTIONS)
    text = (tmp_path / "r/documents/sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    names = {c["name"] for c in json.loads(text)["components"]}
    assert names == {"sample", "torch"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verification": Verification()}, "not verified"),
        ({"verification": Verification(snr_db=10.0)}, "10.0 dB, the gate asks 30"),
        ({"precision": "int3"}, "no gate for the precision int3"),
    ],
)
def test_unverified_bundles_are_refused_unless_forced(tmp_path, changes, message):
    made = releases.bundle(tmp_path / "b", **changes)
    name = f"sample-litert-cpu-{made.manifest.precision}"
    records = [releases.record(made)]
    with pytest.raises(GateError, match=message) as caught:
        build([made], records, tmp_path / "r", OPTIONS)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "r").exists()
    forced = Options(name="sample", version=1, force=frozenset({name}))
    build([made], records, tmp_path / "r", forced)
    assert message in Release.open(tmp_path / "r").manifest.variants[0].forced[0]


def test_bundles_without_a_good_run_are_refused(tmp_path):
    made = releases.bundle(tmp_path / "b")
    with pytest.raises(GateError, match="no run record"):
        build([made], [], tmp_path / "r", OPTIONS)
    failed = releases.record(made, status="failed", error="the picture is wrong")
    with pytest.raises(GateError, match="the picture is wrong"):
        build([made], [failed], tmp_path / "r", OPTIONS)


def test_forcing_what_is_not_there(tmp_path):
    made = releases.bundle(tmp_path / "b")
    options = Options(name="sample", version=1, force=frozenset({"other"}))
    with pytest.raises(UsageError, match="no 'other' to force"):
        examine([made], [], options)
    with pytest.raises(UsageError, match="2 bundles are"):
        examine([made, made], [], OPTIONS)
    with pytest.raises(UsageError, match="another bundle"):
        examine([made], [releases.record()], OPTIONS)


def test_unknown_targets_need_a_rule(tmp_path):
    made = releases.bundle(tmp_path / "b", target="mlx")
    with pytest.raises(UsageError, match=r"\[targets.mlx\]"):
        build([made], [releases.record(made)], tmp_path / "r", OPTIONS)
    assert not (tmp_path / "r").exists()
    rules = tmp_path / "rules.toml"
    rules.write_text('[targets.mlx]\nunit = "gpu"\nplatforms = ["ios"]\n')
    options = Options(name="sample", version=1, rules=rules)
    runs = [releases.record(made, device=releases.IPHONE)]
    build([made], runs, tmp_path / "r", options)
    assert Release.open(tmp_path / "r").manifest.variants[0].unit == "gpu"


def test_a_target_for_one_soc(tmp_path):
    made = releases.bundle(tmp_path / "b", target="executorch-qnn:SM8650")
    with pytest.raises(GateError, match="it ran on host only, and is for android"):
        build([made], [releases.record(made)], tmp_path / "r", OPTIONS)
    build([made], [releases.record(made, device=releases.PIXEL)], tmp_path / "r", OPTIONS)
    needs = Release.open(tmp_path / "r").manifest.variants[0].needs
    assert needs.soc == ("SM8650",)
    assert needs.platforms == ("android",)


def test_runs_that_compared_no_picture_are_not_enough(tmp_path):
    made = releases.bundle(tmp_path / "b")
    with pytest.raises(GateError, match="no run compared its picture"):
        build([made], [releases.record(made, check=None)], tmp_path / "r", OPTIONS)


def test_records_of_one_name_that_differ_are_refused(tmp_path):
    made = releases.bundle(tmp_path / "b")
    runs = [releases.record(made), releases.record(made, peak=1)]
    with pytest.raises(UsageError, match="two different records"):
        build([made], runs, tmp_path / "r", OPTIONS)
    build([made], runs[:1] * 2, tmp_path / "r", OPTIONS)


def test_names_that_no_release_has_are_refused(tmp_path):
    made = releases.bundle(tmp_path / "b")
    with pytest.raises(UsageError, match="name"):
        build([made], [releases.record(made)], tmp_path / "r", Options("a b", 1))
    assert not (tmp_path / "r").exists()


def test_times_of_different_devices_are_not_compared(tmp_path):
    one, two = (releases.bundle(tmp_path / n, target=t) for n, t in TARGETS)
    phone = releases.HOST.model_copy(update={"id": "phone-1"})

    def order(*records):
        path = tmp_path / "r"
        build([one, two], records, path, OPTIONS)
        return [v.target for v in Release.open(path).manifest.variants]

    slow, fast = (90.0,) * 3, (10.0,) * 3
    given, turned = [t for _, t in TARGETS], [t for _, t in reversed(TARGETS)]
    ours = releases.record(one, number=1, times=slow)
    assert order(ours, releases.record(two, number=2, times=fast)) == turned
    elsewhere = releases.record(two, number=2, times=fast, device=phone)
    assert order(ours, elsewhere) == given
    threads = ours.settings.model_copy(update={"threads": 8})
    assert order(ours, releases.record(two, number=2, times=fast, settings=threads)) == given
    here = releases.record(two, number=3, times=(50.0,) * 3)
    assert order(ours, elsewhere, here) == turned


def test_runs_within_a_budget_show_no_mode(tmp_path):
    made = releases.bundle(tmp_path / "b")
    record = releases.record(made)
    within = record.settings.model_copy(update={"memory_budget": 60_000_000})
    with pytest.raises(GateError, match="no good run, resident or streamed"):
        build([made], [releases.record(made, settings=within)], tmp_path / "r", OPTIONS)


def test_only_a_zipped_release_is_replaced(tmp_path):
    made, target = releases.bundle(tmp_path / "b"), tmp_path / "r.zip"
    for name, content in (
        ("thesis.txt", "mine"),
        ("release.json", '{"version": "1.2.0"}'),
        ("release.json", "not JSON"),
        ("a/b/release.json", '{"version": 1, "variants": []}'),
    ):
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr(name, content)
        with pytest.raises(OutputError, match="not a release"):
            build([made], [releases.record(made)], target, OPTIONS, zipped=True)
    target.unlink()
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "release.json").write_text('{"branches": ["main"]}')
    with pytest.raises(OutputError, match="not a release"):
        build([made], [releases.record(made)], folder, OPTIONS)
    for _ in range(2):
        build([made], [releases.record(made)], target, OPTIONS, zipped=True)


def test_the_bill_of_materials_has_every_version(tmp_path):
    one, two = (releases.bundle(tmp_path / n, model=n) for n in ("a", "b"))
    artifact = two.manifest.artifacts[0].model_copy(update={"tools": {"torch": "2.14.0"}})
    other = two.manifest.model_copy(update={"artifacts": (artifact,)})
    tree = json.loads(sbom.make([one.manifest, other], "x"))
    found = [c["version"] for c in tree["components"] if c["name"] == "torch"]
    assert found == ["2.13.0+cpu", "2.14.0"]


def test_a_changed_bundle_is_noticed_while_copying(tmp_path):
    made = releases.bundle(tmp_path / "b")
    file = made.path / "artifacts/unet.0.tflite"
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(BundleError, match="not the file"):
        build([made], [releases.record(made)], tmp_path / "r", OPTIONS)
    assert not (tmp_path / "r").exists()


def test_estimates_without_records(tmp_path):
    found = modes(releases.bundle(tmp_path / "b"), [])
    assert {m.basis for m in found} == {"estimated"}
    assert {m.median_ms for m in found} == {None}


def test_what_is_in_the_way_stays(tmp_path):
    made = releases.bundle(tmp_path / "b")
    (tmp_path / "r").mkdir()
    (tmp_path / "r/mine").write_text("x")
    with pytest.raises(OutputError, match="not a release"):
        build([made], [releases.record(made)], tmp_path / "r", OPTIONS)
    assert (tmp_path / "r/mine").read_text() == "x"


def test_hashes_are_those_of_the_files(tmp_path):
    opened = releases.release(tmp_path)
    for variant in opened.manifest.variants:
        data = (opened.path / variant.manifest.path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == variant.manifest.sha256
        assert opened.bundle(variant).sha256 == variant.bundle_sha256


@pytest.fixture
def sized(tmp_path):
    made = releases.bundle(tmp_path / "sized")
    samples.add_size(made.path, {"snr_db": 60.0, "psnr_db": 50.0})
    return Bundle.open(made.path)


def of_size(record, size):
    return record.model_copy(update={"bundle": record.bundle.model_copy(update={"size": size})})


def test_every_size_must_have_run(sized, tmp_path):
    first = releases.record(sized, peak=50_000_000)
    with pytest.raises(GateError, match="no good run drew 24x8"):
        build([sized], [first], tmp_path / "r", OPTIONS)
    wide = of_size(releases.record(sized, number=1, peak=90_000_000, times=(80.0,) * 3), "24x8")
    build([sized], [first, wide], tmp_path / "r", OPTIONS)
    (mode,) = Release.open(tmp_path / "r").manifest.variants[0].modes
    # The memory of the size that takes most, and its time, not one between the two.
    assert (mode.memory_bytes, mode.median_ms) == (90_000_000, 80.0)


def test_times_of_different_sizes_are_not_compared(sized, tmp_path):
    other = releases.bundle(tmp_path / "other", target="executorch-xnnpack")
    slow = of_size(releases.record(other, number=1, times=(90.0,) * 3), "24x8")
    records = [
        releases.record(sized, number=2, times=(10.0,) * 3),
        of_size(releases.record(sized, number=3, times=(95.0,) * 3), "24x8"),
        slow,
    ]
    build([sized, other], records, tmp_path / "r", OPTIONS)
    found = Release.open(tmp_path / "r").manifest.variants
    assert [v.target for v in found] == ["executorch-xnnpack", "litert-cpu"]


def test_an_iphone_is_offered_several_sizes(sized, tmp_path):
    records = [
        releases.record(sized),
        of_size(releases.record(sized, number=1), "24x8"),
    ]
    build([sized], records, tmp_path / "r", OPTIONS)
    (variant,) = Release.open(tmp_path / "r").manifest.variants
    assert variant.needs.platforms == ("android", "ios", "host")
