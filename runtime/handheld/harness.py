"""Find and build the native harness: the library and the program of ``android_harness``."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from handheld import kit
from handheld.errors import HarnessError, MissingDependencyError
from handheld.files import cache_root, output_errors, replaced_folder
from handheld.kit import Kit

OVERRIDE = "HANDHELD_HARNESS"
"""Environment variable: a folder with a harness that was built elsewhere, or its program."""

PROGRAM = "handheld-harness"
LIBRARY = "libhandheld.dylib" if sys.platform == "darwin" else "libhandheld.so"
_MARK = "build.json"
_TIMEOUT_S = 1800
_LAST_LINES = 25
_CMAKE_LEAST = (3, 28)


@dataclass(frozen=True)
class HarnessPaths:
    """A built harness."""

    library: Path
    program: Path
    engines: dict[str, str]
    """Engines built in, name to version."""


@dataclass(frozen=True)
class Requirement:
    """Something that building the harness needs, or an engine it can hold."""

    name: str
    found_version: str | None
    remedy: str
    ok: bool
    optional: bool = False
    """True for an engine: the harness builds without it."""


@dataclass(frozen=True)
class _Package:
    """An installed Python package whose files the build uses."""

    version: str
    folder: Path

    def file(self, pattern: str) -> Path:
        """Return the file that fits a pattern."""
        return next(self.folder.glob(pattern))


_ENGINES = {
    "executorch": ("executorch", "executorch", "share/cmake/executorch-config.cmake"),
    "litert": ("ai-edge-litert", "ai_edge_litert", "libLiteRt.so"),
    "onnx": ("onnxruntime", "onnxruntime", "capi/libonnxruntime.so.*"),
}
"""Engine to distribution, module, and a file of it that the build uses."""


def sources() -> Path:
    """Return the folder of the C++ sources, in the installed package or in a checkout.

    Raises
    ------
    HarnessError
        If neither is there.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "native", here.parents[1] / "android_harness"):
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise HarnessError(
        "the harness's C++ sources are missing",
        path=here / "native",
        remedy=f"reinstall handheld, or point {OVERRIDE} at a harness that was built elsewhere",
    )


def requirements() -> list[Requirement]:
    """Return what a build needs, and what of it is here. Nothing is imported."""
    compiler = _compiler()
    cmake, ninja = _tool("cmake"), _tool("ninja")
    cmake_version = _version_of(cmake)
    json_package = _package("nlohmann-json", "nlohmann_json", "include/nlohmann/json.hpp")
    out = [
        Requirement(
            "C++20 compiler",
            _version_of(compiler),
            "apt install g++, or set CXX",
            compiler is not None,
        ),
        Requirement(
            "cmake",
            cmake_version,
            "pip install 'cmake>=3.28'",
            cmake_version is not None and _numbers(cmake_version) >= _CMAKE_LEAST,
        ),
        Requirement("ninja", _version_of(ninja), "pip install ninja", ninja is not None),
        Requirement(
            "nlohmann-json",
            json_package.version if json_package else None,
            "pip install nlohmann-json==3.12.0",
            json_package is not None,
        ),
    ]
    for engine, (distribution, module, file) in _ENGINES.items():
        package = _package(distribution, module, file)
        out.append(
            Requirement(
                f"engine {engine}",
                package.version if package else None,
                f"pip install {distribution}",
                package is not None,
                optional=True,
            )
        )
    return out


def find() -> HarnessPaths | None:
    """Return the harness that fits these sources and engines, or None if there is none yet.

    Raises
    ------
    HarnessError
        If ``HANDHELD_HARNESS`` names something that is no harness.
    """
    if override := os.environ.get(OVERRIDE):
        return _overridden(Path(override))
    try:
        folder = _folder()
    except HarnessError:
        return None
    return _built(folder)


def build(force: bool = False) -> HarnessPaths:
    """Build the harness for the engines that are installed, unless that has been done.

    Parameters
    ----------
    force : bool
        Build again even if there is one.

    Raises
    ------
    MissingDependencyError
        If a tool is missing, or every engine.
    HarnessError
        If it does not compile; the message ends with the compiler's last lines.
    """
    if not force and (found := find()):
        return found
    needed = requirements()
    if lacking := [r for r in needed if not r.ok and not r.optional]:
        raise MissingDependencyError(
            f"building the harness needs {', '.join(r.name for r in lacking)}",
            remedy="; ".join(r.remedy for r in lacking),
        )
    if not any(r.ok for r in needed if r.optional):
        raise MissingDependencyError(
            "no engine is installed, so the harness could run nothing",
            remedy=" or ".join(r.remedy for r in needed if r.optional),
        )
    folder = _folder()
    with output_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_suffix(".lock")):
        # Another process may have built it while this one waited.
        if not force and (built := _built(folder)):
            return built
        _compile(folder, _packages(), [])
    built = _built(folder)
    if built is None:
        raise HarnessError("the build left no harness", path=folder)
    return built


def binary() -> Path:
    """Return the program of the harness, building it if need be."""
    return (find() or build()).program


def library() -> Path:
    """Return the library of the harness, building it if need be."""
    return (find() or build()).library


def engines() -> dict[str, str]:
    """Return the engines of the harness, name to version, building it if need be."""
    return (find() or build()).engines


def build_kit(name: str, force: bool = False) -> Kit:
    """Build the harness that phones of one kind run, with every library that it needs.

    Parameters
    ----------
    name : str
        One of :data:`handheld.kit.NAMES`.
    force : bool
        Build again even if there is one.

    Raises
    ------
    MissingDependencyError
        If a tool is missing.
    HarnessError
        If it does not compile.
    """
    if name == "android-arm64":
        raise MissingDependencyError(
            "building for Android needs Google's NDK, which no package index has",
            remedy=f"follow docs/android.md: cmake --preset android-arm64, in {sources()}",
        )
    native = {"linux-x86_64": "x86_64", "linux-arm64": "aarch64"}[name] == platform.machine()
    if not native and name != "linux-arm64":
        raise HarnessError(f"this machine cannot build for {name}", remedy="build it on such one")
    target = kit.folder(name)
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_suffix(".lock")):
        source = _kit_source(name, native)
        if not force and (found := _fresh(name, source)):
            return found
        if native:
            paths = build(force)
            compiler, packages, folder = _compiler(), _packages(), paths.program.parent
        else:
            compiler = shutil.which(_CROSS)
            if compiler is None:
                raise MissingDependencyError(
                    "there is no compiler for arm64 Linux",
                    remedy="apt install g++-aarch64-linux-gnu",
                )
            packages = {e: _wheel(e) for e in _packages()}
            folder = cache_root() / "harness" / f"{name}-{source}"
            if force or not (folder / PROGRAM).is_file():
                _compile(
                    folder,
                    packages,
                    [
                        "-DCMAKE_SYSTEM_NAME=Linux",
                        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
                        f"-DCMAKE_CXX_COMPILER={compiler}",
                    ],
                )
        assert compiler is not None
        _collect(name, source, folder, packages, compiler)
    made = kit.find(name)
    assert made is not None
    return made


def add_kit(folder: Path) -> Kit:
    """Check a harness that was built with Android's NDK and keep it for phones.

    Parameters
    ----------
    folder : Path
        With the program, its library, and the engines' libraries for Android.

    Raises
    ------
    HarnessError
        If a file is missing or could not be loaded by a phone.
    """
    name = "android-arm64"
    files = sorted(p for p in folder.iterdir() if p.name == PROGRAM or p.suffix == ".so")
    for needed in (PROGRAM, "libhandheld.so"):
        if not any(p.name == needed for p in files):
            raise HarnessError(
                f"there is no {needed}", path=folder, remedy="build it: docs/android.md"
            )
    names = {p.name for p in files}
    for path in files:
        check_android_library(path, names)
    holds = {"litert": "libLiteRt.so", "executorch": "libhandheld_executorch.so"}
    # A library for another processor cannot be asked; every run says the versions.
    engines = {engine: "unknown" for engine, file in holds.items() if file in names}
    if not engines:
        raise HarnessError(
            "it holds no engine", path=folder, remedy="copy the engines' libraries beside it"
        )
    target = kit.folder(name)
    with replaced_folder(target) as temporary:
        for path in files:
            shutil.copyfile(path, temporary / path.name)
            (temporary / path.name).chmod(0o755)
        environment = {"LD_LIBRARY_PATH": ".", "ADSP_LIBRARY_PATH": "."}
        if "litert" in engines:
            environment["HANDHELD_LITERT_LIBRARY"] = "libLiteRt.so"
        kit.write(temporary, name, engines, (f"./{PROGRAM}",), environment)
    made = kit.find(name)
    assert made is not None
    return made


PAGE_BYTES = 16384
_ANDROID_OWN = {"libc.so", "libm.so", "libdl.so", "liblog.so", "libandroid.so", "libEGL.so",
                "libGLESv2.so", "libGLESv3.so", "libvulkan.so", "libnativewindow.so",
                "libcdsprpc.so", "libOpenCL.so"}  # fmt: skip
_FUNCTIONS = {
    "libhandheld.so": ("hh_open", "hh_run_job", "hh_memory_warning"),
    "libLiteRt.so": ("LiteRtCreateEnvironment", "LiteRtCreateCompiledModel"),
    "libhandheld_executorch.so": ("hh_make_executorch",),
}


def check_android_library(path: Path, beside: set[str]) -> None:
    """Check that a phone can load a library or program.

    Raises
    ------
    HarnessError
        Naming the first thing that is wrong: another processor, glibc, too little alignment,
        a library or function that is missing.
    """
    if path.name.startswith("libQnnHtp") and path.name.endswith("Skel.so"):
        return  # runs on the signal processor, not on Android

    def fail(what: str, remedy: str) -> HarnessError:
        return HarnessError(what, path=path, remedy=remedy)

    text = _readelf(path, "-hlWd")
    rebuild = "build or fetch it for Android, arm64-v8a"
    if not re.search(r"Machine:\s+AArch64", text):
        raise fail("is not for arm64", rebuild)
    needed = re.findall(r"\(NEEDED\)\s+Shared library: \[([^\]]+)\]", text)
    if glibc := [n for n in needed if re.search(r"\.so\.\d", n) or n.startswith("ld-linux")]:
        raise fail(f"is made for glibc ({glibc[0]}), which Android lacks", rebuild)
    align = [int(a, 16) for a in re.findall(r"^\s+LOAD\s.*(0x[0-9a-f]+)$", text, re.MULTILINE)]
    if not align or min(align) < PAGE_BYTES:
        raise fail(
            "is aligned to pages of less than 16 KB, which newer phones do not load",
            "link it with -Wl,-z,max-page-size=16384, or fetch a newer one",
        )
    if missing := sorted(set(needed) - beside - _ANDROID_OWN):
        raise fail(f"needs {missing[0]}, which is not beside it", "copy it there")
    wanted = _FUNCTIONS.get(path.name, ())
    symbols = set(re.findall(r"\s(\w+)(?:@\S*)?$", _readelf(path, "-sW", "--dyn-syms"), re.M))
    if lacking := [f for f in wanted if f not in symbols]:
        raise fail(f"lacks the function {lacking[0]}", "use the version that docs/android.md names")


def _readelf(path: Path, *options: str) -> str:
    try:
        return subprocess.run(
            ["readelf", *options, path], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except FileNotFoundError:
        raise MissingDependencyError(
            f"cannot look into {path.name}", remedy="apt install binutils"
        ) from None
    except (OSError, subprocess.SubprocessError):
        raise HarnessError(
            "is no program or library", path=path, remedy="build or fetch it again"
        ) from None


_CROSS = "aarch64-linux-gnu-g++"
_SOURCE = "source.txt"
_LIBRARIES = {"executorch": "lib", "litert": "", "onnx": "capi"}


def _kit_source(name: str, native: bool) -> str:
    versions = sorted(f"{e}={p.version}" for e, p in _packages().items())
    text = f"{name} {_folder().name} {native} {versions}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fresh(name: str, source: str) -> Kit | None:
    try:
        found = kit.find(name)
        fresh = (kit.folder(name) / _SOURCE).read_text() == source
    except (HarnessError, OSError):
        return None
    return found if fresh else None


def _wheel(engine: str) -> _Package:
    """Return an engine's package for arm64 Linux, fetched by pip once."""
    distribution, module, file = _ENGINES[engine]
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependencyError(
            f"{distribution} is not installed, so its version for arm64 is not known",
            remedy=f"pip install {distribution}",
        ) from None
    version = version.partition("+")[0]
    folder = cache_root() / "wheels" / f"{distribution}-{version}-aarch64"
    if not any((folder / module).glob(file)):
        with replaced_folder(folder) as temporary:
            wheels = temporary / "wheels"
            command = [
                sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                "--only-binary=:all:", "--implementation=cp",
                f"--python-version={sys.version_info.major}.{sys.version_info.minor}",
                "--platform=manylinux_2_28_aarch64", "--platform=manylinux_2_27_aarch64",
                "--platform=manylinux2014_aarch64",
                f"--dest={wheels}", f"{distribution}=={version}",
            ]  # fmt: skip
            _step(
                command,
                folder.with_name(f"{folder.name}.log"),
                f"lacks {distribution} for arm64 Linux",
            )
            for wheel in wheels.glob("*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(temporary)
            shutil.rmtree(wheels)
    return _Package(version, folder / module)


def _collect(
    name: str, source: str, built: Path, packages: dict[str, _Package], compiler: str
) -> None:
    """Gather the harness, and all that it is linked to, in one folder."""
    folders = [built, *(p.folder / _LIBRARIES[e] for e, p in packages.items())]
    waiting = [built / PROGRAM, built / LIBRARY]
    environment = {}
    if "executorch" in packages:
        waiting.append(built / "libhandheld_executorch.so")
    if "litert" in packages:
        waiting.append(packages["litert"].folder / "libLiteRt.so")
        environment["HANDHELD_LITERT_LIBRARY"] = "libLiteRt.so"
    if "onnx" in packages:
        library = packages["onnx"].file(_ENGINES["onnx"][2])
        waiting.append(library)
        environment["HANDHELD_ONNX_LIBRARY"] = library.name
    taken: dict[str, Path] = {}
    while waiting:
        path = waiting.pop()
        if path.name in taken:
            continue
        taken[path.name] = path
        waiting += [_locate(needed, folders, compiler) for needed in _needed(path)]
    loader = next(n for n in taken if n.startswith("ld-linux"))
    with replaced_folder(kit.folder(name)) as temporary:
        for file, path in taken.items():
            shutil.copyfile(path.resolve(), temporary / file)
            (temporary / file).chmod(0o755)
        (temporary / _SOURCE).write_text(source)
        kit.write(
            temporary,
            name,
            {e: p.version.partition("+")[0] for e, p in packages.items()},
            (f"./{loader}", "--library-path", ".", f"./{PROGRAM}"),
            environment,
            sources_sha256(),
        )


def _needed(path: Path) -> list[str]:
    """Return the libraries that a program or library is linked to, its loader among them."""
    text = _readelf(path, "-ld", "--wide")
    names = re.findall(r"\(NEEDED\)\s+Shared library: \[([^\]]+)\]", text)
    loader = re.search(r"program interpreter: ([^\]]+)\]", text)
    return [*names, Path(loader[1]).name] if loader else names


def _locate(name: str, folders: list[Path], compiler: str) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    done = subprocess.run(
        [compiler, f"-print-file-name={name}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    path = Path(done.stdout.strip())
    if not path.is_absolute() or not path.is_file():
        raise HarnessError(f"the library {name} is missing", remedy="reinstall the compiler")
    return path


def _overridden(path: Path) -> HarnessPaths:
    folder = path if path.is_dir() else path.parent
    program, library = folder / PROGRAM, folder / LIBRARY
    for file in (program, library):
        if not file.is_file():
            raise HarnessError(
                f"there is no {file.name}", path=folder, remedy=f"correct or unset {OVERRIDE}"
            )
    try:
        result = subprocess.run(
            [program, "--engines"], capture_output=True, text=True, timeout=60, check=True
        )
        found: dict[str, str] = json.loads(result.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise HarnessError(
            f"does not start: {error}", path=program, remedy=f"correct or unset {OVERRIDE}"
        ) from error
    return HarnessPaths(library.resolve(), program.resolve(), found)


def _built(folder: Path) -> HarnessPaths | None:
    try:
        mark = json.loads((folder / _MARK).read_text())
        found: dict[str, str] = dict(mark["engines"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    program, library = folder / PROGRAM, folder / LIBRARY
    if not (program.is_file() and library.is_file()):
        return None
    return HarnessPaths(library, program, found)


def sources_sha256() -> str:
    """Return the hash of the harness's sources."""
    digest = hashlib.sha256()
    root = sources()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        if path.suffix in (".cpp", ".hpp", ".h", ".txt", ".cmake"):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _folder() -> Path:
    """Return where the harness for these sources and engines belongs."""
    digest = hashlib.sha256(sources_sha256().encode())
    digest.update(f"{_compiler()}\0{os.environ.get('CXXFLAGS', '')}\0".encode())
    for engine, package in _packages().items():
        digest.update(f"{engine} {package.version} {package.folder}\0".encode())
    return cache_root() / "harness" / digest.hexdigest()[:16]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with output_errors(path), path.open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _packages() -> dict[str, _Package]:
    """Return the engines that are installed."""
    return {
        engine: package
        for engine, (distribution, module, file) in _ENGINES.items()
        if (package := _package(distribution, module, file))
    }


def _compile(folder: Path, found: dict[str, _Package], options: list[str]) -> None:
    """Compile into ``folder``, with some engines and more options of CMake."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None or ninja is None:
        raise MissingDependencyError("cmake or ninja is missing", remedy="pip install cmake ninja")
    json_package = _package("nlohmann-json", "nlohmann_json", "include/nlohmann/json.hpp")
    if json_package is None:
        raise MissingDependencyError(
            "nlohmann-json is missing", remedy="pip install nlohmann-json==3.12.0"
        )
    log = folder.with_suffix(".log")
    with output_errors(log):
        log.unlink(missing_ok=True)
    with replaced_folder(folder) as temporary:
        work = temporary / "work"
        configure = [
            cmake,
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_INSTALL_PREFIX={temporary}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DHANDHELD_JSON_INCLUDE={json_package.folder / 'include'}",
            f"-DHANDHELD_EXECUTORCH={'ON' if 'executorch' in found else 'OFF'}",
            f"-DHANDHELD_LITERT={'ON' if 'litert' in found else 'OFF'}",
            f"-DHANDHELD_ONNX={'ON' if 'onnx' in found else 'OFF'}",
            "-S",
            str(sources()),
            "-B",
            str(work),
            *options,
        ]
        if package := found.get("executorch"):
            configure.append(f"-DHANDHELD_EXECUTORCH_ROOT={package.folder}")
        if package := found.get("litert"):
            configure.append(f"-DHANDHELD_LITERT_LIBRARY={package.folder / 'libLiteRt.so'}")
            configure.append(f"-DHANDHELD_LITERT_VERSION={package.version}")
        if package := found.get("onnx"):
            configure.append(f"-DHANDHELD_ONNX_LIBRARY={package.file(_ENGINES['onnx'][2])}")
            configure.append(f"-DHANDHELD_ONNX_VERSION={package.version}")
        _step(configure, log, "cannot be configured")
        _step([cmake, "--build", str(work), "--target", "install"], log, "does not compile")
        shutil.rmtree(work)
        mark = {"engines": {name: p.version for name, p in found.items()}}
        (temporary / _MARK).write_text(json.dumps(mark))


def _step(command: list[str], log: Path, what: str) -> None:
    with output_errors(log), log.open("a") as f:
        f.write(f"$ {' '.join(command)}\n")
        f.flush()
        try:
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=subprocess.STDOUT,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise HarnessError(f"the harness {what}: it took too long", path=log) from None
    if result.returncode:
        lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        tail = "\n".join(lines)
        raise HarnessError(
            f"the harness {what}:\n{tail}\n",
            path=log,
            remedy="the log has everything; `handheld doctor` says what is missing",
        )


def _package(distribution: str, module: str, file: str) -> _Package | None:
    """Find an installed package by a file that the build needs, without importing it."""
    try:
        spec = importlib.util.find_spec(module)
        version = importlib.metadata.version(distribution)
    except (ImportError, ValueError, importlib.metadata.PackageNotFoundError):
        return None
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location).resolve()
        if any(folder.glob(file)):
            return _Package(version, folder)
    return None


def _tool(name: str) -> str | None:
    # A wheel's program lies beside this interpreter, which may not be on PATH.
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def _version_of(tool: str | None) -> str | None:
    if tool is None:
        return None
    try:
        result = subprocess.run(
            [tool, "--version"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    words = result.stdout.split("\n", 1)[0].split()
    return next((w for w in reversed(words) if w[:1].isdigit()), None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
