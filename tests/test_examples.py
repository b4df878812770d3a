"""Examples that people copy: they compile, and give the right answers."""

from __future__ import annotations

import re
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


@pytest.mark.slow
def test_swift_selects_what_python_selects(tmp_path):
    if shutil.which("swiftc") is None:
        pytest.skip("there is no Swift toolchain")
    module = tmp_path / "CHandheld"
    module.mkdir()
    header = ROOT / "android_harness/include/handheld.h"
    (module / "module.modulemap").write_text(f'module CHandheld {{ header "{header}" export * }}\n')
    out = tmp_path / "selection"
    sources = [str(ROOT / "examples/ios" / n) for n in ("Release.swift", "SelectionTest.swift")]
    # Selection alone is run; the library that draws is an empty one.
    names = set(re.findall(r"\bhh_\w+(?=\()", Path(sources[0]).read_text()))
    empty = tmp_path / "empty.c"
    empty.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(names)))
    library = tmp_path / "empty.o"
    subprocess.run(["cc", "-c", str(empty), "-o", str(library)], check=True, timeout=60)
    subprocess.run(
        ["swiftc", "-parse-as-library", *sources, str(library), "-I", str(module), "-o", str(out)],
        check=True,
        timeout=600,
    )
    done = subprocess.run(
        [str(out), str(ROOT / "tests/golden/selection")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong" in done.stdout


@pytest.mark.slow
def test_the_swift_package_passes_its_tests(tmp_path):
    if shutil.which("swift") is None:
        pytest.skip("there is no Swift toolchain")
    # Its build folder must not lie among the sources.
    command = ["swift", "test", "--package-path", str(ROOT / "ios_harness"),
               "--scratch-path", str(tmp_path / "build")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "with 0 failures" in done.stdout + done.stderr


def has_org_json(jar):
    import zipfile

    with zipfile.ZipFile(jar) as archive:
        return "org/json/JSONObject.class" in archive.namelist()
