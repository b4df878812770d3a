"""Examples that people copy: they compile, and give the right answers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
JSON = Path("/usr/share/java/android-json.jar")


@pytest.mark.system
@pytest.mark.slow
def test_kotlin_selects_what_python_selects(tmp_path):
    if shutil.which("kotlinc") is None or shutil.which("java") is None:
        pytest.skip("kotlin is not installed")
    jar = next((p for p in JSON.parent.glob("*json*.jar") if has_org_json(p)), None)
    if jar is None:
        pytest.skip("libandroid-json-java is not installed")
    folder = ROOT / "examples/android"
    out = tmp_path / "selection.jar"
    sources = [str(folder / name) for name in ("Release.kt", "SelectionTest.kt")]
    command = ["kotlinc", *sources, "-cp", str(jar), "-include-runtime", "-d", str(out)]
    subprocess.run(command, check=True, timeout=600)
    classes = f"{out}:{jar}"
    done = subprocess.run(
        ["java", "-cp", classes, "SelectionTestKt", str(ROOT / "tests/golden/selection")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong" in done.stdout


def has_org_json(jar):
    import zipfile

    with zipfile.ZipFile(jar) as archive:
        return "org/json/JSONObject.class" in archive.namelist()
