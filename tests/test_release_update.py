from __future__ import annotations

import http.server
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import releases
from handheld import cli
from handheld.bundle import Bundle
from handheld.errors import HandheldError, ReleaseError, TrustError, UsageError
from handheld.release import update as updates
from handheld.release.builder import Options, build
from handheld.release.folder import digest_tree
from handheld.release.publish import publish
from handheld.release.selection import Phone
from handheld.release.signing import Identity, sign

PHONE = Phone(platform="android", ram_bytes=2**33, os=14)
SIZE = 2 * 2**20


def weights(seed=0):
    return np.random.default_rng(seed).integers(0, 256, SIZE, np.uint8)


def layers_changed(data):
    """A tenth of the bytes, all in a row: some layers were trained."""
    new, part = data.copy(), len(data) // 10
    new[part : 2 * part] = np.random.default_rng(9).integers(0, 256, part, np.uint8)
    return new


def codes_changed(data):
    """A tenth of the bytes, all over, by one step of the grid."""
    rng = np.random.default_rng(9)
    places = rng.choice(len(data), len(data) // 10, replace=False)
    new = data.copy()
    new[places] += rng.choice(np.array([1, 255], np.uint8), len(places))
    return new


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Releases 1 to 4: the first, one with new layers, one with new codes, one that is equal."""
    folder = tmp_path_factory.mktemp("updates")
    private, public = releases.keys(folder)
    contents = [weights(), layers_changed(weights()), codes_changed(weights()), weights()]
    paths = {}
    for version, content in enumerate(contents, 1):
        bundle = releases.bundle(folder / f"b{version}", data=content.tobytes())
        path = folder / f"r{version}"
        options = Options("sample", version)
        build([bundle], [releases.record(bundle)], path, options, Identity(key=private))
        paths[version] = path
    return paths, Identity(key=public), private


def site_of(tmp_path, made, *versions, older=()):
    site = tmp_path / "site"
    for version in versions:
        publish(made[0][version], site, [made[0][o] for o in older if o < version])
    return site


def go(tmp_path, made, url, **options):
    return updates.update(tmp_path / "device", str(url), made[1], PHONE, **options)


def check(device):
    """Return the version in use, after checking that it is whole."""
    state = updates.state(device)
    assert state is not None
    Bundle.open(updates.bundle_path(device, state.current))
    return state.current.version


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; can break off after a number of bytes."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.left = None
        self.length = None
        self.sent = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send_header(self, keyword, value):
        if keyword == "Content-Length" and self.server.length is not None:
            value = self.server.length
        super().send_header(keyword, value)

    def copyfile(self, source, outputfile):
        data = source.read()
        if self.server.left is not None:
            allowed = max(0, min(len(data), self.server.left))
            self.server.left -= allowed
            if allowed < len(data):
                outputfile.write(data[:allowed])
                outputfile.flush()
                self.connection.close()
                raise ConnectionError("cut off")
        self.server.sent += len(data)
        outputfile.write(data)


@pytest.fixture
def fast(monkeypatch):
    """No waiting between tries."""
    monkeypatch.setattr(updates, "_TRIES", 1)


def test_installs_over_http(tmp_path, made):
    server = Server(site_of(tmp_path, made, 1))
    result = go(tmp_path, made, server.url)
    server.shutdown()
    assert result.changed
    assert check(tmp_path / "device") == 1
    assert result.fetched_bytes == server.sent
    assert not (tmp_path / "device/pieces").exists()


def test_new_layers_cost_little_more_than_themselves(tmp_path, made):
    site = site_of(tmp_path, made, 1)
    full = go(tmp_path, made, site).fetched_bytes
    publish(made[0][2], site)
    result = go(tmp_path, made, site)
    assert check(tmp_path / "device") == 2
    # Of 2 MB, the ends of pieces count more than of 1 GB.
    assert result.fetched_bytes <= 0.5 * full


def test_new_codes_all_over_are_sent_as_differences(tmp_path, made):
    site = site_of(tmp_path, made, 1)
    full = go(tmp_path, made, site).fetched_bytes
    publish(made[0][3], site, [made[0][1]])
    result = go(tmp_path, made, site)
    assert check(tmp_path / "device") == 3
    assert result.fetched_bytes <= 0.15 * full


def test_without_differences_pieces_do(tmp_path, made):
    site = site_of(tmp_path, made, 1)
    go(tmp_path, made, site)
    publish(made[0][3], site)
    assert go(tmp_path, made, site).changed
    assert check(tmp_path / "device") == 3


def test_an_equal_release_costs_next_to_nothing(tmp_path, made):
    site = site_of(tmp_path, made, 1)
    go(tmp_path, made, site)
    publish(made[0][4], site)
    result = go(tmp_path, made, site)
    assert check(tmp_path / "device") == 4
    assert result.fetched_bytes < 100_000
    assert not go(tmp_path, made, site).changed


def test_the_version_before_stays_until_the_new_one_has_run(tmp_path, made):
    device, site = tmp_path / "device", site_of(tmp_path, made, 1)
    go(tmp_path, made, site)
    updates.confirm(device)
    publish(made[0][2], site)
    go(tmp_path, made, site)
    assert len(list((device / "versions").iterdir())) == 2
    state = updates.revert(device)
    assert check(device) == state.current.version == 1
    with pytest.raises(ReleaseError, match="no version before"):
        updates.revert(device)
    assert not go(tmp_path, made, site).changed, "what was reverted does not come straight back"
    assert check(device) == 1
    assert go(tmp_path, made, site, retry=True).changed
    updates.revert(device)
    publish(made[0][3], site)
    assert check(device) == 1
    go(tmp_path, made, site)
    updates.confirm(device)
    assert check(device) == 3
    assert len(list((device / "versions").iterdir())) == 1


@pytest.mark.parametrize("offset", [0, SIZE // 2, SIZE - 1])
def test_a_damaged_version_is_repaired_and_holds_up_no_update(tmp_path, made, offset):
    device, site = tmp_path / "device", site_of(tmp_path, made, 1)

    def damage():
        state = updates.state(device)
        path = updates.bundle_path(device, state.current) / "artifacts/unet.0.tflite"
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)

    go(tmp_path, made, site)
    updates.confirm(device)
    assert not go(tmp_path, made, site, repair=True).changed
    damage()
    assert not go(tmp_path, made, site).changed
    with pytest.raises(HandheldError):
        check(device)
    repaired = go(tmp_path, made, site, repair=True)
    assert repaired.changed and 0 < repaired.fetched_bytes < SIZE / 2
    assert check(device) == 1 and updates.state(device).confirmed
    damage()
    for version in (2, 3, 4):
        publish(made[0][version], site, [made[0][v] for v in range(1, version)])
        go(tmp_path, made, site)
        assert check(device) == version
        updates.confirm(device)
        damage()


@pytest.mark.parametrize("name", ["release.json", "model.sig", "chunks.json"])
def test_repair_sees_to_what_the_version_was_installed_with(tmp_path, made, name):
    device, site = tmp_path / "device", site_of(tmp_path, made, 1)
    go(tmp_path, made, site)
    updates.confirm(device)
    path = updates.bundle_path(device, updates.state(device).current).parent / name
    before = path.read_bytes()
    path.write_bytes(before.replace(b"1", b"2", 1))
    assert go(tmp_path, made, site, repair=True).changed
    path = updates.bundle_path(device, updates.state(device).current).parent / name
    assert path.read_bytes() == before and updates.state(device).confirmed
    assert not go(tmp_path, made, site, repair=True).changed


def test_repair_after_going_back_says_what_it_takes(tmp_path, made):
    device, site = tmp_path / "device", site_of(tmp_path, made, 1)
    go(tmp_path, made, site)
    updates.confirm(device)
    publish(made[0][2], site)
    go(tmp_path, made, site)
    updates.revert(device)
    assert not go(tmp_path, made, site, repair=True).changed, "it is whole"
    path = updates.bundle_path(device, updates.state(device).current) / "artifacts/unet.0.tflite"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ReleaseError, match=r"is damaged.*--retry"):
        go(tmp_path, made, site, repair=True)
    assert go(tmp_path, made, site, repair=True, retry=True).changed and check(device) == 2


@pytest.mark.parametrize("seen", ['{"version": 1}', None])
def test_the_name_is_known_without_the_file_of_what_was_seen(tmp_path, made, seen):
    go(tmp_path, made, site_of(tmp_path, made, 1))
    path = tmp_path / "device" / "seen.json"
    path.unlink()
    if seen is not None:
        path.write_text(seen)
    bundle = releases.bundle(tmp_path / "b", data=b"other")
    options = Options("other", 7)
    build([bundle], [releases.record(bundle)], tmp_path / "r", options, Identity(key=made[2]))
    publish(tmp_path / "r", tmp_path / "elsewhere")
    with pytest.raises(TrustError, match="this folder holds 'sample'"):
        go(tmp_path, made, tmp_path / "elsewhere")


@pytest.mark.parametrize("length", ["9" * 5000, "abc", "-1", "٣".encode().decode("latin-1")])
def test_lengths_that_are_none(tmp_path, made, length, fast):
    site = site_of(tmp_path, made, 1)
    server = Server(site)
    server.length = length
    with pytest.raises(ReleaseError, match=r"no sensible length|cannot be fetched"):
        go(tmp_path, made, server.url)
    server.shutdown()


def test_another_products_release_is_not_taken(tmp_path, made):
    go(tmp_path, made, site_of(tmp_path, made, 1))
    bundle = releases.bundle(tmp_path / "b", data=b"other")
    options = Options("other", 7)
    build([bundle], [releases.record(bundle)], tmp_path / "r", options, Identity(key=made[2]))
    with pytest.raises(UsageError, match="the site has those of 'sample'"):
        publish(tmp_path / "r", tmp_path / "site")
    publish(tmp_path / "r", tmp_path / "elsewhere")
    with pytest.raises(TrustError, match="this folder holds 'sample'"):
        go(tmp_path, made, tmp_path / "elsewhere")
    assert check(tmp_path / "device") == 1


@pytest.mark.parametrize("url", ["http://[::1", "https://a b", "ftp://x"])
def test_addresses_that_are_none(tmp_path, made, url):
    with pytest.raises(HandheldError):
        go(tmp_path, made, url)


def test_a_third_version_keeps_the_one_that_has_run(tmp_path, made):
    device, site = tmp_path / "device", site_of(tmp_path, made, 1)
    go(tmp_path, made, site)
    updates.confirm(device)
    for version in (2, 3):
        publish(made[0][version], site)
        state = go(tmp_path, made, site).state
    assert (state.current.version, state.previous.version) == (3, 1)


def test_old_releases_are_not_taken(tmp_path, made):
    site = site_of(tmp_path, made, 2)
    go(tmp_path, made, site)
    shutil.rmtree(site)
    publish(made[0][1], site)
    with pytest.raises(TrustError, match="offers version 1, after 2"):
        go(tmp_path, made, site)
    assert check(tmp_path / "device") == 2


def test_a_renamed_old_release_is_not_taken(tmp_path, made):
    site = site_of(tmp_path, made, 2)
    go(tmp_path, made, site)
    publish_old = tmp_path / "old"
    publish(made[0][1], publish_old)
    (publish_old / "1").rename(publish_old / "9")
    (publish_old / "latest.json").write_text('{"name": "sample", "version": 9}')
    with pytest.raises(TrustError, match="is version 1, not 9"):
        go(tmp_path, made, publish_old)
    assert check(tmp_path / "device") == 2


def test_another_key_is_not_trusted(tmp_path, made):
    _, public = releases.keys(tmp_path)
    site = site_of(tmp_path, made, 1)
    with pytest.raises(TrustError, match="does not hold"):
        updates.update(tmp_path / "device", str(site), Identity(key=public), PHONE)
    assert updates.state(tmp_path / "device") is None


def test_releases_that_phones_would_not_take_are_not_published(tmp_path, made):
    source, site = tmp_path / "r", tmp_path / "site"
    shutil.copytree(made[0][1], source)
    publish(source, site, identity=made[1])
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    _, other = releases.keys(stranger)
    with pytest.raises(TrustError, match="signature"):
        publish(source, tmp_path / "other", identity=Identity(key=other))
    (source / "model.sig").write_bytes(b"{}")
    with pytest.raises(TrustError, match="signature"):
        publish(source, tmp_path / "other", identity=made[1])
    assert not (tmp_path / "other").exists()


def test_publishing_again_mends_damaged_objects(tmp_path, made):
    site = site_of(tmp_path, made, 1)
    for victim in list((site / "objects").rglob("*.zst"))[:2]:
        victim.write_bytes(victim.read_bytes()[:-3])
    with pytest.raises(ReleaseError):
        go(tmp_path, made, site)
    publish(made[0][1], site)
    assert go(tmp_path, made, site).changed and check(tmp_path / "device") == 1


def test_unsigned_releases_are_not_published(tmp_path, made):
    bundle = releases.bundle(tmp_path / "b")
    build([bundle], [releases.record(bundle)], tmp_path / "r", Options("s", 1))
    with pytest.raises(UsageError, match="not signed"):
        publish(tmp_path / "r", tmp_path / "site")
    site_of(tmp_path, made, 2)
    with pytest.raises(UsageError, match="older than 2"):
        publish(made[0][1], tmp_path / "site")


@pytest.mark.slow
def test_damaged_sites_change_nothing(tmp_path, made, fast):
    site = site_of(tmp_path, made, 1)
    go(tmp_path, made, site)
    publish(made[0][2], site)
    rng = random.Random(0)
    files = sorted(p for p in site.rglob("*") if p.is_file())
    for _ in range(30):
        file = rng.choice(files)
        data = file.read_bytes()
        new = bytearray(data)
        new[rng.randrange(len(new))] ^= rng.randrange(1, 256)
        file.write_bytes(new)
        try:
            go(tmp_path, made, site)
        except HandheldError:
            assert check(tmp_path / "device") == 1
        else:
            # What was damaged was not needed.
            assert check(tmp_path / "device") == 2
            shutil.rmtree(tmp_path / "device")
            publish(made[0][1], tmp_path / "site1")
            go(tmp_path, made, tmp_path / "site1")
        file.write_bytes(data)


def test_bombs_are_refused(tmp_path, made):
    import zstandard

    site = site_of(tmp_path, made, 1)
    victim = next((site / "objects").rglob("*.zst"))
    # No size in the header: only the limit can stop it.
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**30 // 4))
    victim.write_bytes(bomb)
    with pytest.raises(ReleaseError):
        go(tmp_path, made, site)
    shutil.rmtree(tmp_path / "device")
    (site / "1/release.json.zst").write_bytes(zstandard.ZstdCompressor().compress(bytes(2**29)))
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        import numpy, pydantic, zstandard
        from handheld.errors import ReleaseError
        from handheld.release import update as updates
        from handheld.release.selection import Phone
        from handheld.release.signing import Identity

        def peak():
            status = Path("/proc/self/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0])

        before = peak()
        try:
            updates.update(*sys.argv[1:3], Identity(key=Path(sys.argv[3])), Phone(platform="host"))
        except ReleaseError as error:
            print(error, peak() - before)
    """)
    child = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "device", site, made[1].key],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "more than it may" in child.stdout, child.stderr
    assert int(child.stdout.split()[-1]) < 100_000, "kilobytes"


def test_headers_of_compressed_files_may_lie(tmp_path, made):
    site = site_of(tmp_path, made, 1)
    path = site / "1/release.json.zst"
    for size in (2**50, 3):
        # Magic, a descriptor with eight bytes of size, a window, the size, and one raw block.
        header = b"\x28\xb5\x2f\xfd" + b"\xc0" + b"\x50" + size.to_bytes(8, "little")
        path.write_bytes(header + b"\x29\x00\x00" + b"hello")
        with pytest.raises(ReleaseError):
            go(tmp_path, made, site)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_repair_that_is_killed_leaves_a_version(tmp_path, made, monkeypatch, moment):
    device, site = tmp_path / "device", site_of(tmp_path, made, 1)
    go(tmp_path, made, site)
    updates.confirm(device)
    path = updates.bundle_path(device, updates.state(device).current) / "artifacts/unet.0.tflite"
    path.write_bytes(path.read_bytes()[:-1])
    write = updates._write

    def killed(path, value):
        if path.name == updates.CURRENT:
            if moment == "after":
                write(path, value)
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(updates, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, made, site, repair=True)
    monkeypatch.setattr(updates, "_write", write)
    assert updates.bundle_path(device, updates.state(device).current).is_dir()
    go(tmp_path, made, site, repair=True)
    assert check(device) == 1 and updates.state(device).confirmed
    assert len(list((device / "versions").iterdir())) == 1


def test_a_version_that_is_gone_is_put_back(tmp_path, made):
    device, site = tmp_path / "device", site_of(tmp_path, made, 1)
    go(tmp_path, made, site)
    shutil.rmtree(device / "versions")
    assert go(tmp_path, made, site).changed and check(device) == 1
    assert not go(tmp_path, made, site, repair=True).changed


def test_a_manifest_written_in_another_form_is_kept_as_it_was_signed(tmp_path, made):
    source = tmp_path / "other"
    shutil.copytree(made[0][1], source)
    text = (source / "release.json").read_text().replace('"label": null,', "", 1)
    assert text != (made[0][1] / "release.json").read_text()
    (source / "release.json").write_text(text)
    (source / "model.sig").unlink()
    sign(source, digest_tree(source), "sample-1", Identity(key=made[2]))
    site = tmp_path / "site"
    for _ in range(2):
        publish(source, site)
    go(tmp_path, made, site)
    assert not go(tmp_path, made, site, repair=True).changed


def test_pieces_that_did_not_survive_are_fetched_in_one_go(tmp_path, made, fast):
    server = Server(site_of(tmp_path, made, 1))
    server.left = SIZE // 2
    with pytest.raises(ReleaseError):
        go(tmp_path, made, server.url)
    kept = [p for p in (tmp_path / "device/pieces").iterdir() if not p.name.startswith(".")]
    assert len(kept) > 1
    for path in kept:
        path.write_bytes(b"")
    server.left = None
    assert go(tmp_path, made, server.url).changed and check(tmp_path / "device") == 1
    server.shutdown()


def test_space_that_is_not_needed_is_not_asked_for(tmp_path, made):
    device, site = tmp_path / "device", site_of(tmp_path, made, 1)
    tight = PHONE.model_copy(update={"free_bytes": SIZE // 2})
    with pytest.raises(HandheldError, match="free"):
        updates.update(device, str(site), made[1], tight)
    go(tmp_path, made, site)
    updates.confirm(device)
    publish(made[0][4], site)
    assert updates.update(device, str(site), made[1], tight).changed and check(device) == 4


def test_two_updates_at_once(tmp_path, made):
    from handheld.files import locked

    site = site_of(tmp_path, made, 1)
    (tmp_path / "device").mkdir()
    with locked(tmp_path / "device"), pytest.raises(ReleaseError, match="under way"):
        go(tmp_path, made, site)


def interrupted(tmp_path, made, points):
    """Break off a download at random points; nothing is fetched twice but what was in flight."""
    site = site_of(tmp_path, made, 1)
    server = Server(site)
    rng = random.Random(5)
    go(tmp_path, made, server.url)
    full, biggest = server.sent, 2**20 + 100_000
    for _ in range(points):
        shutil.rmtree(tmp_path / "device")
        server.sent, server.left = 0, rng.randrange(full)
        with pytest.raises(HandheldError):
            go(tmp_path, made, server.url)
        assert updates.state(tmp_path / "device") is None
        got = server.sent
        server.left = None
        go(tmp_path, made, server.url)
        assert check(tmp_path / "device") == 1
        metadata = 40_000
        assert server.sent - got <= full - got + biggest + metadata
        assert server.sent <= full + biggest + metadata
    server.shutdown()


def test_interrupted_downloads_go_on(tmp_path, made, fast):
    interrupted(tmp_path, made, 2)


@pytest.mark.slow
def test_fifty_interrupted_downloads_go_on(tmp_path, made, fast):
    interrupted(tmp_path, made, 50)


LOOP = """
import sys
from pathlib import Path
from handheld.release import update
from handheld.release.selection import Phone
from handheld.release.signing import Identity

device, site, key = sys.argv[1:]
phone, who = Phone(platform="android", ram_bytes=2**33, os=14), Identity(key=Path(key))
from handheld.release import signing
signing._import()
print("ready", flush=True)
sys.stdin.readline()
update.update(device, site, who, phone)
print("done", flush=True)
update.confirm(device)
"""


def killed(tmp_path, made, points):
    """Kill the process at random moments of an update; return how often each version counted."""
    first, second = tmp_path / "site1", tmp_path / "site2"
    publish(made[0][1], first)
    publish(made[0][1], second)
    publish(made[0][2], second)
    device = tmp_path / "device"
    rng, counts, span = random.Random(6), {1: 0, 2: 0}, 1.0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for i in range(points + 1):
        shutil.rmtree(device, ignore_errors=True)
        updates.update(device, str(first), made[1], PHONE)
        updates.confirm(device)
        command = [sys.executable, "-c", textwrap.dedent(LOOP), device, second, made[1].key]
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert process.stdout.readline() == b"ready\n"
        process.stdin.write(b"\n")
        process.stdin.flush()
        start = time.perf_counter()
        if i == 0:
            # The first one runs to its end, to learn how long that takes.
            process.communicate()
            span = time.perf_counter() - start
            assert check(device) == 2
            continue
        time.sleep(rng.uniform(0, span))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        counts[check(device)] += 1
        # The next run goes on from whatever was left.
        updates.update(device, str(second), made[1], PHONE)
        updates.confirm(device)
        assert check(device) == 2
        assert [p.name for p in (device / "versions").iterdir()] == ["2-sample-litert-cpu-int8"]
        assert not (device / "pieces").exists()
    return counts


@pytest.mark.slow
def test_killed_at_fifty_moments(tmp_path, made):
    counts = killed(tmp_path, made, 50)
    assert counts[1] + counts[2] == 50


@pytest.mark.slow
def test_killed_between_any_two_steps_of_the_switch(tmp_path, made, monkeypatch):
    """Every rename, link and removal is made to be the last thing that happens."""
    first, second = tmp_path / "site1", tmp_path / "site2"
    publish(made[0][1], first)
    publish(made[0][1], second)
    publish(made[0][2], second)
    device = tmp_path / "device"

    class Killed(BaseException):
        pass

    def attempt(limit):
        count = 0

        def counting(real):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > limit:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as m:
            for owner, name in (
                (Path, "replace"),
                (Path, "rename"),
                (Path, "unlink"),
                (os, "link"),
                (shutil, "rmtree"),
            ):
                m.setattr(owner, name, counting(getattr(owner, name)))
            try:
                updates.update(device, str(second), made[1], PHONE)
            except Killed:
                return False
        return True

    for limit in range(100):
        shutil.rmtree(device, ignore_errors=True)
        updates.update(device, str(first), made[1], PHONE)
        updates.confirm(device)
        ended = attempt(limit)
        assert check(device) in (1, 2)
        updates.update(device, str(second), made[1], PHONE)
        assert check(device) == 2
        assert not (device / "pieces").exists()
        if ended:
            break
    assert 5 < limit < 99


def test_commands(tmp_path, made, capsys):
    site, device = str(tmp_path / "site"), str(tmp_path / "device")
    key = ["--key", str(made[1].key), "--phone", "Google Pixel 8"]
    assert cli.run(["release", "publish", str(made[0][1]), "-o", site, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 1
    assert cli.run(["release", "update", device, site, *key, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["current"]["version"] == 1
    assert Bundle.open(found["bundle"])
    assert (
        cli.run(["release", "publish", str(made[0][2]), "--from", str(made[0][1]), "-o", site]) == 0
    )
    assert cli.run(["release", "update", device, site, *key]) == 0
    assert "version 1 stays" in capsys.readouterr().out
    assert cli.run(["release", "revert", device]) == 0
    assert cli.run(["release", "confirm", device, "--json"]) == 0
    assert cli.run(["release", "revert", device]) == 2
    assert cli.run(["release", "update", device, site]) == 2
    assert cli.run(["release", "update", device, "ftp://example.org", *key]) == 2
