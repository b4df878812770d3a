from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handheld.devices import adb
from handheld.devices.adb import Listed, Phone, Server
from handheld.errors import DeviceError

LISTING = """* daemon not running; starting now at tcp:5037
* daemon started successfully
List of devices attached
R5CX1234567            device usb:1-1 product:e1qxxx model:SM_S921B device:e1q transport_id:3
emulator-5554          offline transport_id:1
10.0.0.7:5555          unauthorized transport_id:2
0123456789ABCDEF       no permissions (user in plugdev group; are your udev rules wrong?); see x
$(touch x);`id`        device model:evil
"""


def test_what_adb_lists():
    assert adb.parse_devices(LISTING) == [
        Listed("R5CX1234567", "device", "SM_S921B"),
        Listed("emulator-5554", "offline"),
        Listed("10.0.0.7:5555", "unauthorized"),
        Listed("0123456789ABCDEF", "no permissions"),
        Listed("$(touch", "x);`id`", "evil"),
    ]


@given(st.text(max_size=300))
def test_any_listing_is_read(text):
    for listed in adb.parse_devices(text):
        assert listed.serial


def test_there_is_no_adb(monkeypatch):
    monkeypatch.setenv("HANDHELD_ADB", "/nowhere/adb")
    with pytest.raises(DeviceError, match="no adb program"):
        Server().devices()


def test_servers_are_named(monkeypatch):
    monkeypatch.delenv(adb.SERVERS, raising=False)
    assert adb.servers() == [None]
    monkeypatch.setenv(adb.SERVERS, "tcp:lab-1:5037, tcp:lab-2:5037")
    assert adb.servers() == ["tcp:lab-1:5037", "tcp:lab-2:5037"]


def stand_in(tmp_path, monkeypatch, script):
    program = tmp_path / "adb"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("HANDHELD_ADB", str(program))


def test_serials_and_paths_reach_no_shell(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, f'printf "%s\\n" "$@" > {tmp_path}/arguments')
    evil = "a b;touch owned;$(touch owned)`touch owned`'\""
    phone = Phone(Server("tcp:lab:5037"), evil)
    phone.push([tmp_path / evil], f"/data/{adb.quote(evil)}", 1)
    said = (tmp_path / "arguments").read_text().splitlines()
    assert said[:4] == ["-L", "tcp:lab:5037", "-s", evil]
    assert said[5] == str(tmp_path / evil)
    assert not (tmp_path / "owned").exists()


def test_an_adb_of_another_version(tmp_path, monkeypatch):
    said = "adb server version (39) doesn't match this client (41); killing..."
    stand_in(tmp_path, monkeypatch, f'echo "{said}" >&2')
    with pytest.raises(DeviceError, match="another version of adb"):
        Server().devices()


def test_an_adb_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(adb, "CALL_S", 0.5)
    stand_in(tmp_path, monkeypatch, "exec sleep 60")
    with pytest.raises(DeviceError, match="did not answer within"):
        Server().call("devices", timeout_s=adb.CALL_S)


def test_a_broken_connection_is_no_success(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "echo half of the answ; exit 0")
    with pytest.raises(DeviceError, match="does not answer"):
        Phone(Server(), "x").shell("true")


def test_a_full_phone(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch,
             "echo 'adb: error: failed to copy: remote write failed: No space left on device' >&2"
             "; exit 1")  # fmt: skip
    with pytest.raises(DeviceError, match="storage is full"):
        Phone(Server(), "x").push([tmp_path / "a"], "/data/a", 1)
