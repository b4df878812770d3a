"""Harnesses for phones: what makes one, and what is refused."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from handheld import harness, kit
from handheld.errors import HarnessError, MissingDependencyError

CROSS = "aarch64-linux-gnu-gcc"
needs_cross = pytest.mark.skipif(
    shutil.which(CROSS) is None, reason="apt install g++-aarch64-linux-gnu"
)
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="apt install binutils")


@pytest.fixture(autouse=True)
def kits(tmp_path, monkeypatch):
    monkeypatch.setenv("HANDHELD_KITS", str(tmp_path / "kits"))


def library(path, source="", page=16384, *, program=False, needs=()):
    code = path.with_suffix(".c")
    code.write_text(source + ("\nvoid _start(void) {}\n" if program else ""))
    kind = [] if program else ["-shared", "-fPIC"]
    subprocess.run(
        [CROSS, "-nostdlib", *kind, f"-Wl,-z,max-page-size={page}", "-Wl,--no-as-needed",
         "-o", path, code, *needs],
        check=True, timeout=60,
    )  # fmt: skip
    return path


HANDHELD = "void hh_open(void) {} void hh_run_job(void) {} void hh_memory_warning(void) {}"
LITERT = "void LiteRtCreateEnvironment(void) {} void LiteRtCreateCompiledModel(void) {}"


@pytest.fixture
def built(tmp_path):
    folder = tmp_path / "built"
    folder.mkdir()
    library(folder / "libhandheld.so", HANDHELD)
    library(folder / "libLiteRt.so", LITERT)
    library(folder / "handheld-harness", program=True)
    return folder


@pytest.mark.system
@needs_cross
def test_a_harness_for_android_is_kept(built):
    made = harness.add_kit(built)
    assert set(made.info.files) == {"handheld-harness", "libhandheld.so", "libLiteRt.so"}
    assert made.info.engines == {"litert": "unknown"}
    assert made.info.environment["HANDHELD_LITERT_LIBRARY"] == "libLiteRt.so"
    assert kit.find("android-arm64", "linux-arm64") == made
    assert made.label.startswith("android-arm64")
    before = made.sha256
    library(built / "libLiteRt.so", LITERT + " int more = 1;")
    assert harness.add_kit(built).sha256 != before


@pytest.mark.system
@needs_cross
def test_what_a_phone_would_not_load_is_refused(built, tmp_path):
    def refused(message):
        with pytest.raises(HarnessError, match=message) as e:
            harness.add_kit(built)
        assert e.value.path
        assert e.value.remedy
        assert kit.find("android-arm64") is None

    library(built / "libLiteRt.so", LITERT, page=4096)
    refused("less than 16 KB")
    library(built / "libLiteRt.so", "void LiteRtCreateEnvironment(void) {}")
    refused("lacks the function LiteRtCreateCompiledModel")
    library(tmp_path / "libelse.so")
    library(built / "libLiteRt.so", LITERT, needs=[str(tmp_path / "libelse.so")])
    refused("needs .*libelse.so, which is not beside it")
    shutil.copy(sys.executable, built / "libLiteRt.so")
    refused("is not for arm64")
    (built / "libLiteRt.so").write_text("no library")
    refused("is no program or library|is not for arm64")
    (built / "libLiteRt.so").unlink()
    refused("holds no engine")
    (built / "libhandheld.so").unlink()
    refused("there is no libhandheld.so")


@pytest.mark.system
@needs_cross
def test_glibc_is_not_android(built):
    (built / "libc.so.6").write_bytes(b"")
    path = built / "libglibc.c"
    path.write_text('int puts(const char*); int f(void) { return puts(""); }')
    subprocess.run(
        [CROSS, "-shared", "-fPIC", "-o", built / "libLiteRt.so", path], check=True, timeout=60
    )
    with pytest.raises(HarnessError, match=r"glibc \(libc\.so\.6\)"):
        harness.add_kit(built)


def test_the_ndk_is_not_in_an_index():
    with pytest.raises(MissingDependencyError, match="NDK"):
        harness.build_kit("android-arm64")


@needs_readelf
def test_what_a_program_is_linked_to():
    found = harness._needed(Path(shutil.which("readelf")))
    assert any(n.startswith("ld-linux") for n in found)
    assert "libc.so.6" in found


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine needs no cross-compiler")
def test_a_missing_cross_compiler_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingDependencyError, match="no compiler for arm64") as error:
        harness.build_kit("linux-arm64", force=True)
    assert error.value.remedy == "apt install g++-aarch64-linux-gnu"
