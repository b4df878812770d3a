from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from handheld import files
from handheld.errors import OutputError


def test_write_file(tmp_path):
    path = tmp_path / "deep/file"
    files.write_file(path, b"one")
    files.write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~files.umask()


def test_write_file_fails_clean(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full") as e:
        files.write_file(tmp_path / "file", b"x")
    assert e.value.remedy == "free some space"
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_or_kept(tmp_path):
    path = tmp_path / "folder"
    for text in ("one", "two"):
        with files.replaced_folder(path) as temporary:
            (temporary / "file").write_text(text)
    assert (path / "file").read_text() == "two"
    with pytest.raises(KeyError), files.replaced_folder(path) as temporary:
        (temporary / "file").write_text("three")
        raise KeyError
    assert (path / "file").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_root() == tmp_path / "handheld"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_root() == tmp_path / "home/.cache/handheld"
    assert files.weights_cache("a" * 64, 3).name == "threads3"


def test_leftovers_of_killed_processes_are_cleared(tmp_path):
    path = tmp_path / "folder"
    script = """
import os, signal, sys
from pathlib import Path
from handheld import files
with files.replaced_folder(Path(sys.argv[1])) as temporary:
    (temporary / "part").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name[:17] for p in tmp_path.iterdir()] == [".folder.handheld-"]
    with files.replaced_folder(path) as temporary:
        (temporary / "file").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_a_killed_process_moved_aside_comes_back(tmp_path):
    path = tmp_path / "folder"
    aside = tmp_path / ".folder.handheld-abcdefgh.old"
    aside.mkdir()
    (aside / "file").write_text("first")
    (tmp_path / ".folder.handheld-abcdefgh").mkdir()
    with pytest.raises(KeyError), files.replaced_folder(path):
        raise KeyError
    assert (path / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_another_is_writing_is_left_alone(tmp_path):
    path = tmp_path / "folder"
    with files.replaced_folder(path) as one:
        (one / "file").write_text("one")
        with files.replaced_folder(path) as two:
            (two / "file").write_text("two")
        assert (one / "file").read_text() == "one"
    assert (path / "file").read_text() == "one"


def test_neighbours_are_left_alone(tmp_path):
    neighbour = tmp_path / ".folder.settings"
    neighbour.mkdir()
    with files.replaced_folder(tmp_path / "folder"):
        pass
    assert neighbour.is_dir()


def test_an_interrupt_between_the_renames_keeps_the_old_folder(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    with files.replaced_folder(path) as temporary:
        (temporary / "file").write_text("first")
    rename = Path.rename

    def interrupted(self, target):
        if target == path and self.suffix != ".old":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt), files.replaced_folder(path):
            pass
    assert (path / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
