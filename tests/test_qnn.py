"""QNN's libraries: the right wheel, whole, loaded and asked for its version."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile

import pytest

from handheld import doctor, qnn
from handheld.cli import run
from handheld.errors import HandheldError, UsageError

SAYS = """
static int build(const char** id) { *id = "v2.49.40.1"; return 0; }
static struct { unsigned backend; const char* name; unsigned api[6]; void* functions[5]; }
  interface = {6, "fake", {2, 37, 0, 5, 49, 0}, {0, 0, 0, 0, (void*)build}};
static void* list[] = {&interface};
int QnnInterface_getProviders(void*** providers, unsigned* count) {
  *providers = list; *count = 1; return 0;
}
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Stand-ins for QNN's libraries that load and say a version."""
    folder = tmp_path_factory.mktemp("libraries")
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    (folder / "qnn.c").write_text(SAYS)
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "libQnnHtp.so")]
    subprocess.run([*command, str(folder / "qnn.c")], check=True)
    return folder


@pytest.fixture
def wheel(libraries, tmp_path, monkeypatch):
    """A wheel of them, known as ExecuTorch's; where SDKs go is a folder of the test."""
    path = tmp_path / "onnxruntime_qnn-2.5.0.whl"
    library = (libraries / "libQnnHtp.so").read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("libQnnHtp.so", "libQnnSystem.so", "libHtpPrepare.so"):
            archive.writestr(f"onnxruntime_qnn/{name}", library)
        archive.writestr("onnxruntime_qnn/Qualcomm_LICENSE.pdf", b"licence")
        archive.writestr("onnxruntime_qnn/__init__.py", b"")
        archive.writestr("onnxruntime_qnn.libs/libc++.so", b"c++")
        archive.writestr("onnxruntime_qnn-2.5.0.dist-info/RECORD", b"")
    know(monkeypatch, path, "2.49.40")
    monkeypatch.setenv("HANDHELD_QNN", str(tmp_path / "sdks"))
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return path


def know(monkeypatch, path, version):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(qnn, "RELEASES", {"executorch": qnn.Release("2.5.0", version, digest)})


def test_layout(wheel, tmp_path, capsys):
    assert not doctor._qnn().ok
    assert (
        doctor._qnn().remedy == qnn.missing("executorch") == "handheld qnn install --for executorch"
    )
    assert run(["qnn", "install", "--wheel", str(wheel), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["qnn"] == "2.49.40.1"
    sdk = qnn.find("executorch")
    assert sdk.root == tmp_path / "sdks" / "2.5.0"
    assert sdk.build == "2.49.40.1"
    files = {str(p.relative_to(sdk.root)) for p in sdk.root.rglob("*") if p.is_file()}
    assert files == {
        "layout.json",
        "lib/onnxruntime_qnn.libs/libc++.so",
        "lib/x86_64-linux-clang/Qualcomm_LICENSE.pdf",
        "lib/x86_64-linux-clang/libHtpPrepare.so",
        "lib/x86_64-linux-clang/libQnnHtp.so",
        "lib/x86_64-linux-clang/libQnnSystem.so",
    }
    environment = sdk.environment()
    assert environment["QNN_SDK_ROOT"] == str(sdk.root)
    assert environment["LD_LIBRARY_PATH"].split(":")[0] == str(sdk.libraries)
    assert qnn.missing("executorch") is None
    assert doctor._qnn().found == "2.49.40.1"


def test_another_wheel_is_refused(wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(UsageError, match=r"not the wheel of onnxruntime-qnn 2\.5\.0") as e:
        qnn.install("executorch", wheel)
    assert e.value.path == str(wheel)
    assert not (tmp_path / "sdks").exists()
    with pytest.raises(UsageError, match="no such file"):
        qnn.install("executorch", tmp_path / "none.whl")
    with pytest.raises(UsageError, match=r"'tflite'.*choose from executorch"):
        qnn.install("tflite")


def test_libraries_of_another_version_are_refused(wheel, monkeypatch):
    know(monkeypatch, wheel, "2.51.0")
    with pytest.raises(HandheldError, match=r"say version v2.49.40.1, not 2.51.0"):
        qnn.install("executorch", wheel)
    assert qnn.find("executorch") is None


def test_libraries_that_do_not_load_are_refused(wheel, monkeypatch):
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("onnxruntime_qnn/libQnnSystem.so", b"no library")
    know(monkeypatch, wheel, "2.49.40")
    with pytest.raises(HandheldError, match=r"does not load here: .*libQnnSystem\.so"):
        qnn.install("executorch", wheel)


def test_damage_is_seen_and_repaired(wheel, tmp_path):
    sdk = qnn.install("executorch", wheel)
    library = sdk.libraries / "libQnnHtp.so"
    good = library.read_bytes()
    library.write_bytes(good[:-1])
    assert qnn.find("executorch") is None
    qnn.install("executorch", wheel)
    library.write_bytes(good[:-1] + b"!")
    assert qnn.install("executorch", wheel).root == sdk.root
    assert library.read_bytes() == good


def test_pip_that_fails_is_told(wheel, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    with pytest.raises(HandheldError, match=r"cannot download onnxruntime-qnn 2\.5\.0: ERROR") as e:
        qnn.install("executorch")
    assert "--wheel" in e.value.remedy


def test_other_systems(wheel, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "x86-64" in qnn.missing("executorch")
