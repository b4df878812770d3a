"""Qualcomm's QNN libraries, laid out from pip wheels as the SDK that converters look for.

Qualcomm's SDK is no pip package, but the wheels of ``onnxruntime-qnn`` bring its libraries for
x86-64: the compiler for Hexagon NPUs and their simulation. Each converter takes one version of
them only, so every user has a release of its own. QNN ends the process where it cannot load its
parts; so whatever loads it runs in a process of its own, with :meth:`Sdk.environment`.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from handheld.errors import HandheldError, MissingDependencyError, UsageError
from handheld.files import cache_root, replaced_folder, sha256_file

LIBRARIES: Final = "lib/x86_64-linux-clang"
"""Where converters look for libraries, below the SDK's root."""
_PLACES: Final = {"onnxruntime_qnn": LIBRARIES, "onnxruntime_qnn.libs": "lib/onnxruntime_qnn.libs"}
_LAYOUT: Final = "layout.json"
_PACKAGE: Final = "onnxruntime-qnn"
_PYTHON, _PLATFORM = "3.11", "manylinux_2_35_x86_64"


@dataclass(frozen=True)
class Release:
    """A wheel that holds QNN.

    Parameters
    ----------
    version : str
        Of the package.
    qnn : str
        Version of QNN inside.
    sha256 : str
        Of the wheel for Python 3.11 and Linux on x86-64; the libraries do not depend on Python.
    """

    version: str
    qnn: str
    sha256: str


RELEASES: Mapping[str, Release] = {
    "executorch": Release(
        "2.5.0", "2.49.40", "6a6a8db1e36584b4ac2e5ba356f4943b1916303b7f1fd44e27f4ca056f145dfe"
    ),
    "litert": Release(
        "2.7.0", "2.51.0", "c56c01562b8534fe8980cfea4601408d950c065f8251fb862ce82101c52c9849"
    ),
}
"""The one release that each user takes: ExecuTorch 1.5.1 and LiteRT 2.3.0 refuse the other's."""


@dataclass(frozen=True)
class Sdk:
    """A laid-out SDK.

    Parameters
    ----------
    root : Path
        What ``QNN_SDK_ROOT`` names.
    release : Release
    build : str
        QNN's version with its build, as the libraries themselves say it.
    """

    root: Path
    release: Release
    build: str

    @property
    def libraries(self) -> Path:
        """Folder of the libraries."""
        return self.root / LIBRARIES

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that is to load QNN."""
        paths = [str(self.root / place) for place in _PLACES.values()]
        paths += filter(None, [os.environ.get("LD_LIBRARY_PATH")])
        return {
            **os.environ,
            "QNN_SDK_ROOT": str(self.root),
            "LD_LIBRARY_PATH": os.pathsep.join(paths),
        }


def place(user: str) -> Path:
    """Return where a user's SDK lies: in ``$HANDHELD_QNN``, else in the cache folder.

    Raises
    ------
    UsageError
        If there is no such user.
    """
    if user not in RELEASES:
        raise UsageError(
            f"no QNN is known for '{user}'", remedy=f"choose from {', '.join(RELEASES)}"
        )
    base = os.environ.get("HANDHELD_QNN")
    return (Path(base) if base else cache_root() / "qnn") / RELEASES[user].version


def find(user: str) -> Sdk | None:
    """Return a user's SDK if it is laid out and none of its files is missing or cut off."""
    root = place(user)
    try:
        layout = json.loads((root / _LAYOUT).read_text(encoding="utf-8"))
        whole = all((root / n).stat().st_size == size for n, (size, _) in layout["files"].items())
        if layout["sha256"] == RELEASES[user].sha256 and whole:
            return Sdk(root, RELEASES[user], layout["build"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def missing(user: str) -> str | None:
    """Return one line that says how to get a user's SDK, or None if it is there."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "use Linux on x86-64: QNN's compiler and simulation exist there only"
    return None if find(user) else f"handheld qnn install --for {user}"


def install(user: str, wheel: Path | None = None) -> Sdk:
    """Lay out a user's SDK, or check the one that is there.

    Parameters
    ----------
    user : str
        Of :data:`RELEASES`.
    wheel : Path, optional
        The wheel, where it was downloaded already; by default pip does.

    Raises
    ------
    UsageError
        If the wheel is another one than this user takes.
    MissingDependencyError
        If it cannot be downloaded.
    HandheldError
        If the libraries do not load here, or say another version.
    """
    root, release = place(user), RELEASES[user]
    if (there := find(user)) is not None and _damaged(root) is None:
        return there
    with tempfile.TemporaryDirectory(prefix="handheld-qnn-") as folder:
        path = wheel or _download(release, Path(folder))
        if not path.is_file() or (found := sha256_file(path)) != release.sha256:
            what = f"sha256 {found}" if path.is_file() else "no such file"
            raise UsageError(
                f"is not the wheel of {_PACKAGE} {release.version} for Python {_PYTHON}: {what}",
                path=path,
                remedy=f"expected sha256 {release.sha256}",
            )
        with replaced_folder(root) as fresh:
            files = _unpack(path, fresh)
            build = _build(fresh, release)
            layout = {"sha256": release.sha256, "build": build, "files": files}
            (fresh / _LAYOUT).write_text(json.dumps(layout, indent=2), encoding="utf-8")
    return Sdk(root, release, build)


def _damaged(root: Path) -> str | None:
    files = json.loads((root / _LAYOUT).read_text(encoding="utf-8"))["files"]
    return next((n for n, (_, digest) in files.items() if sha256_file(root / n) != digest), None)


def _download(release: Release, folder: Path) -> Path:
    command = [
        *(sys.executable, "-m", "pip", "download", f"{_PACKAGE}=={release.version}"),
        *("--no-deps", "--only-binary=:all:", "--python-version", _PYTHON),
        *("--platform", _PLATFORM, "--dest", str(folder), "--quiet"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stderr.strip().splitlines() or ["no wheel came"]
        raise MissingDependencyError(
            f"pip cannot download {_PACKAGE} {release.version}: {said[-1]}",
            remedy="download that wheel elsewhere and give it with --wheel",
        )
    return wheels[0]


def _unpack(wheel: Path, root: Path) -> dict[str, tuple[int, str]]:
    files: dict[str, tuple[int, str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            package, _, name = entry.filename.partition("/")
            if package not in _PLACES or not name or "/" in name or name.endswith(".py"):
                continue
            target = root / _PLACES[package] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(entry))
            files[str(target.relative_to(root))] = (target.stat().st_size, sha256_file(target))
    return files


def _build(root: Path, release: Release) -> str:
    """Load the libraries in a process of their own and return the version that they say."""
    sdk = Sdk(root, release, "")
    command = [sys.executable, "-m", "handheld.qnn", str(sdk.libraries)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=sdk.environment()
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise HandheldError(
            f"QNN {release.qnn} does not load here: {said[-1]}",
            path=sdk.libraries,
            remedy="install what it names; libatomic.so.1 is Debian's libatomic1",
        )
    build = done.stdout.split()[-1]
    if not build.removeprefix("v").startswith(f"{release.qnn}."):
        raise HandheldError(
            f"the libraries say version {build}, not {release.qnn}", path=sdk.libraries
        )
    return build.removeprefix("v")


class _Interface(ctypes.Structure):
    """The head of ``QnnInterface_t``; ``functions`` begins its table."""

    _fields_ = (
        ("backend", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("api", ctypes.c_uint32 * 6),
        ("functions", ctypes.c_void_p * 5),
    )


_BUILD_ID: Final = 4
"""Where ``QnnBackend_getBuildId`` stands in the table."""


def _say_build(libraries: Path) -> str:
    """Return what the HTP backend says its build is.

    Raises
    ------
    OSError
        If a library does not load or answer.
    """
    for name in ("libQnnSystem.so", "libHtpPrepare.so"):
        ctypes.CDLL(str(libraries / name))
    library = ctypes.CDLL(str(libraries / "libQnnHtp.so"))
    providers = ctypes.POINTER(ctypes.POINTER(_Interface))()
    count = ctypes.c_uint32()
    if library.QnnInterface_getProviders(ctypes.byref(providers), ctypes.byref(count)):
        raise OSError("QnnInterface_getProviders fails")
    kind = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.POINTER(ctypes.c_char_p))
    said = ctypes.c_char_p()
    if not count.value or kind(providers[0][0].functions[_BUILD_ID])(ctypes.byref(said)):
        raise OSError("QnnBackend_getBuildId fails")
    return (said.value or b"").decode()


if __name__ == "__main__":
    sys.stdout.write(f"{_say_build(Path(sys.argv[1]))}\n")
