"""Bundles on disk: reading them is a trust boundary, writing them is atomic."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from handheld.archive import Kind, check_replaceable, pack, unpack, walk
from handheld.documents import json_bytes, parse_object
from handheld.errors import BundleError, UsageError
from handheld.files import (
    cache_root,
    describe_os_error,
    fsync_folder,
    output_errors,
    replaced_folder,
    sha256_file,
)
from handheld.manifest import (
    CONTINUED,
    SCHEMA_VERSION,
    Artifact,
    FileRef,
    Manifest,
    Reference,
    Size,
)
from handheld.program import TensorSpec, check

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_TENSOR_BYTES = 4 * 2**30

_AGAIN = "fetch or export the bundle again"
KIND = Kind("bundle", MANIFEST, frozenset({"model", "artifacts"}), BundleError, _AGAIN)
_DTYPES = {"F32": "float32", "F16": "float16", "U8": "uint8", "I8": "int8", "I32": "int32"}
Array = NDArray[Any]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, all of whose checks have passed."""

    path: Path
    """Folder that holds the files."""
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, verify_hashes: bool = True) -> Bundle:
        """Open a bundle and check everything in it.

        Parameters
        ----------
        path : path-like
            A folder, or a zip file, which is unpacked into the cache first.
        verify_hashes : bool
            Also compare every file's sha256 with the manifest.

        Raises
        ------
        BundleError
            For the first thing that is wrong, naming the file and the field.
        """
        root = Path(path)
        try:
            if root.is_file():
                return cls._open_zip(root, verify_hashes)
            if not root.is_dir():
                raise BundleError("no such bundle", path=root, remedy="check the path")
            bundle = cls(root, _read_manifest(root / MANIFEST))
            bundle._check(verify_hashes)
        except OSError as error:
            message, remedy = describe_os_error(error)
            where = error.filename if isinstance(error.filename, str) else root
            raise BundleError(f"cannot read: {message}", path=where, remedy=remedy) from error
        return bundle

    @classmethod
    def _open_zip(cls, path: Path, verify_hashes: bool) -> Bundle:
        folder = cache_root() / "unpacked" / sha256_file(path)
        if folder.is_dir():
            try:
                return cls.open(folder, verify_hashes)
            except BundleError:
                # Somebody touched the cache; the archive is what counts.
                shutil.rmtree(folder, ignore_errors=True)
        unpack(path, folder, KIND)
        return cls.open(folder, verify_hashes)

    @property
    def sha256(self) -> str:
        """The bundle's hash."""
        return self.manifest.sha256

    @property
    def nbytes(self) -> int:
        """Bytes of all files that the manifest names."""
        return sum({ref.path: ref.bytes for _, ref in references(self.manifest)}.values())

    def file(self, ref: FileRef) -> Path:
        """Return where a file of the manifest is."""
        return self.path / ref.path

    def artifact(self, artifact_id: str) -> Artifact:
        """Return an artifact by its id."""
        for artifact in self.manifest.artifacts:
            if artifact.id == artifact_id:
                return artifact
        raise BundleError(f"there is no artifact '{artifact_id}'", path=self.path)

    def size(self, name: str | None = None) -> tuple[str, Size]:
        """Return a size by its key; without a key the reference's or else the first one."""
        sizes = self.manifest.sizes
        if name is None:
            name = self.manifest.default_size
        if name not in sizes:
            raise UsageError(
                f"the bundle has no size '{name}'", path=self.path, remedy=f"it has {_list(sizes)}"
            )
        return name, sizes[name]

    def constants(self) -> dict[str, Array]:
        """Read the constants."""
        ref = self.manifest.constants
        return load_tensors(self.file(ref)) if ref else {}

    def reference(self, size: str | None = None) -> dict[str, Array]:
        """Read inputs, picture and calls of a size's reference; of the default size without one."""
        ref = self.manifest.reference_of(self.size(size)[0])
        if ref is None:
            of = "" if size is None else f" for {size}"
            raise BundleError(f"the bundle has no reference{of}", path=self.path, remedy=_AGAIN)
        return load_tensors(self.file(ref.file))

    def prefetched(self, prompt: str) -> tuple[Array, Array | None] | None:
        """Return the embeddings of a prompt that ships with the bundle.

        Returns
        -------
        None, or (prompt_embeds ``[tokens, width]``, pooled ``[pooled_width]`` or None)
        """
        info = self.manifest.text.prefetched
        if info is None or prompt not in info.prompts:
            return None
        i = info.prompts.index(prompt)
        pooled = None
        with safe_open(self.file(info.file), framework="numpy") as f:
            embeds = np.asarray(f.get_tensor(f"{i}.prompt_embeds"))
            if self.manifest.text.pooled_width is not None:
                pooled = np.asarray(f.get_tensor(f"{i}.pooled"))
        return embeds, pooled

    def _fail(self, message: str, field: str, path: Path | None = None) -> NoReturn:
        raise BundleError(message, path=path or self.path / MANIFEST, field=field, remedy=_AGAIN)

    def _check(self, verify_hashes: bool) -> None:
        manifest = self.manifest
        for name, n in Counter(a.id for a in manifest.artifacts).items():
            if n > 1:
                index = [i for i, a in enumerate(manifest.artifacts) if a.id == name][1]
                self._fail(f"a second artifact has the id '{name}'", f"artifacts[{index}].id")
        for i, artifact in enumerate(manifest.artifacts):
            if artifact.engine in CONTINUED and len(artifact.parts) > 1:
                self._fail(
                    f"a file of {artifact.engine} is continued by one part", f"artifacts[{i}].parts"
                )
        self._check_files(verify_hashes)
        self._check_specs()
        ports = {a.id: a.ports for a in manifest.artifacts}
        for name, size in manifest.sizes.items():
            where = f"sizes.{name}"
            if name != f"{size.width}x{size.height}":
                self._fail(f"the size is {size.width}x{size.height}", where)
            try:
                check(size.program, ports, manifest.constant_specs, field=f"{where}.program")
            except BundleError as error:
                self._fail(error.message, error.field or where)
            self._check_program(name, size)
        self._check_constants()
        self._check_prefetched()
        self._check_references()

    def _check_files(self, verify_hashes: bool) -> None:
        seen: dict[str, tuple[str, FileRef]] = {}
        for field, ref in references(self.manifest):
            folded = ref.path.casefold()
            if folded == MANIFEST:
                self._fail("names the manifest itself", f"{field}.path")
            first_field, first = seen.setdefault(folded, (field, ref))
            if first != ref:
                self._fail(f"contradicts {first_field} about '{ref.path}'", field)
        for field, ref in seen.values():
            self._check_file(field, ref, verify_hashes)
        known = {ref.path for _, ref in references(self.manifest)}
        folder = self.path / "artifacts"
        for path in walk(folder) if folder.is_dir() else ():
            relative = path.relative_to(self.path).as_posix()
            if relative not in known:
                raise BundleError(
                    "the manifest does not name this file", path=path, remedy="remove it"
                )

    def _check_file(self, field: str, ref: FileRef, verify_hashes: bool) -> None:
        path = self.path
        for part in PurePosixPath(ref.path).parts:
            path = path / part
            if path.is_symlink():
                self._fail("symbolic links are not allowed in a bundle", f"{field}.path", path)
        if not path.is_file():
            self._fail("the file is missing", f"{field}.path", path)
        size = path.stat().st_size
        if size != ref.bytes:
            self._fail(f"has {size} bytes, the manifest says {ref.bytes}", f"{field}.bytes", path)
        if verify_hashes and (have := sha256_file(path)) != ref.sha256:
            self._fail(
                f"has the sha256 {have}, the manifest says {ref.sha256}", f"{field}.sha256", path
            )

    def _check_specs(self) -> None:
        for field, spec in _specs(self.manifest):
            if spec.nbytes > MAX_TENSOR_BYTES:
                self._fail(f"a tensor of {spec.nbytes} bytes is over the limit", field)

    def _check_program(self, name: str, size: Size) -> None:
        program, text = size.program, self.manifest.text
        where = f"sizes.{name}.program"
        if (picture := program.outputs.get("picture")) is not None:
            spec = program.tensors.get(picture) or self.manifest.constant_specs[picture]
            wanted = TensorSpec(shape=(1, size.height, size.width, 3), dtype="uint8")
            if spec != wanted:
                self._fail(f"the picture is {_say(spec)}, not {_say(wanted)}", where)
        for i, item in enumerate(program.inputs):
            spec = program.tensors[item.name]
            if item.role == "prompt_embeds" and spec.elements != text.tokens * text.width:
                self._fail(
                    f"'{item.name}' is {_say(spec)}, text says {text.tokens} x {text.width}",
                    f"{where}.inputs[{i}]",
                )
            if item.role == "pooled" and spec.elements != text.pooled_width:
                self._fail(
                    f"'{item.name}' is {_say(spec)}, text.pooled_width is {text.pooled_width}",
                    f"{where}.inputs[{i}]",
                )

    def _check_constants(self) -> None:
        specs, ref = self.manifest.constant_specs, self.manifest.constants
        if ref is None:
            if specs:
                self._fail("declares constants, but there is no file of them", "constant_specs")
            return
        self._compare(self.file(ref), dict(specs), {}, "constant_specs")

    def _check_prefetched(self) -> None:
        text = self.manifest.text
        if text.prefetched is None:
            return
        wanted: dict[str, TensorSpec] = {}
        for i in range(len(text.prefetched.prompts)):
            wanted[f"{i}.prompt_embeds"] = TensorSpec(shape=(text.tokens, text.width))
            if text.pooled_width is not None:
                wanted[f"{i}.pooled"] = TensorSpec(shape=(text.pooled_width,))
        self._compare(self.file(text.prefetched.file), wanted, {}, "text.prefetched")

    def _check_references(self) -> None:
        seen: dict[str, str] = {}
        for field, reference in _references(self.manifest):
            if reference.size not in self.manifest.sizes:
                self._fail(f"there is no size '{reference.size}'", f"{field}.size")
            if first := seen.get(reference.size):
                self._fail(f"{first} is of size '{reference.size}', too", f"{field}.size")
            seen[reference.size] = field
            self._check_reference(field, reference)

    def _check_reference(self, field: str, reference: Reference) -> None:
        program = self.manifest.sizes[reference.size].program
        ports = {a.id: a.ports for a in self.manifest.artifacts}
        wanted: dict[str, TensorSpec] = {}
        allowed: dict[str, TensorSpec] = {}
        for item in program.inputs:
            kind = allowed if item.role == "noise" else wanted
            kind[f"input.{item.name}"] = program.tensors[item.name]
        for role, name in program.outputs.items():
            spec = program.tensors.get(name) or self.manifest.constant_specs[name]
            (wanted if role == "picture" else allowed)[role] = spec
        calls = (op for op in program.ops if op.op == "call")
        for i, op in enumerate(calls):
            for port, spec in ports[op.artifact].outputs.items():
                allowed[f"call.{i}.{port}"] = spec
        self._compare(self.file(reference.file), wanted, allowed, f"{field}.file")

    def _compare(
        self,
        path: Path,
        wanted: Mapping[str, TensorSpec],
        allowed: Mapping[str, TensorSpec],
        field: str,
    ) -> None:
        have = tensor_specs(path)
        for name, spec in {**wanted, **allowed}.items():
            if name not in have:
                if name in wanted:
                    self._fail(f"tensor '{name}' is missing", field, path)
            elif have[name] != spec:
                self._fail(
                    f"tensor '{name}' is {_say(have[name])}, the manifest says {_say(spec)}",
                    field,
                    path,
                )
        if extra := sorted(set(have) - set(wanted) - set(allowed)):
            self._fail(f"the manifest does not name tensor '{extra[0]}'", field, path)


def references(manifest: Manifest) -> Iterator[tuple[str, FileRef]]:
    """Yield every file that a manifest names, with its field."""
    for i, artifact in enumerate(manifest.artifacts):
        yield f"artifacts[{i}].file", artifact.file
        for j, part in enumerate(artifact.parts):
            yield f"artifacts[{i}].parts[{j}]", part
    if manifest.constants:
        yield "constants", manifest.constants
    if manifest.text.prefetched:
        yield "text.prefetched.file", manifest.text.prefetched.file
    for field, reference in _references(manifest):
        yield f"{field}.file", reference.file


def _references(manifest: Manifest) -> Iterator[tuple[str, Reference]]:
    if manifest.reference:
        yield "reference", manifest.reference
    for i, reference in enumerate(manifest.references):
        yield f"references[{i}]", reference


def parse_manifest(data: bytes, path: str | Path = MANIFEST) -> Manifest:
    """Parse and validate the text of a manifest.

    Raises
    ------
    BundleError
        For broken JSON, an unknown schema version, or up to ten faults of the fields at once.
    """
    tree = parse_object(data, MAX_MANIFEST_BYTES, path, BundleError, _AGAIN)
    version = tree.get("schema_version")
    if type(version) is not int:
        raise BundleError(
            "is not a manifest of handheld: there is no version number",
            path=path,
            field="schema_version",
            remedy="name a bundle that `handheld export` wrote",
        )
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"version {version} was made by a newer handheld, this one reads {SCHEMA_VERSION}",
            path=path,
            field="schema_version",
            remedy="upgrade: pip install --upgrade handheld",
        )
    if version < 1:
        raise BundleError(
            f"unknown version {version}", path=path, field="schema_version", remedy=_AGAIN
        )
    try:
        return Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        message, field = describe_validation(error)
        raise BundleError(message, path=path, field=field, remedy=_AGAIN) from None


def describe_validation(error: ValidationError, limit: int = 10) -> tuple[str, str | None]:
    """Return a readable message for a pydantic error, and the field if there is just one."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    # A list with a faulty item is said to be too short as well.
    lines = [
        (field_path(f["loc"]), f["msg"].removeprefix("Value error, "))
        for f in faults
        if f["type"] != "too_short" or not any(_below(g["loc"], f["loc"]) for g in faults)
    ]
    if len(lines) == 1:
        field, message = lines[0]
        return message, field or None
    shown = "".join(f"\n  {field}: {message}" for field, message in lines[:limit])
    rest = f"\n  and {len(lines) - limit} more" if len(lines) > limit else ""
    return f"{len(lines)} faults:{shown}{rest}\n ", None


def _below(location: tuple[int | str, ...], parent: tuple[int | str, ...]) -> bool:
    return len(location) > len(parent) and location[: len(parent)] == parent


def field_path(location: Iterable[int | str]) -> str:
    """Return a pydantic location as ``artifacts[2].file.sha256``."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def tensor_specs(path: Path) -> dict[str, TensorSpec]:
    """Read the names, shapes and dtypes of a safetensors file.

    Raises
    ------
    BundleError
        If it is none, or holds a dtype that programs do not have.
    """
    specs: dict[str, TensorSpec] = {}
    try:
        with safe_open(path, framework="numpy") as f:
            for name in f.keys():  # noqa: SIM118
                part = f.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise BundleError(
                        f"tensor '{name}' has the dtype {part.get_dtype()}",
                        path=path,
                        remedy=_AGAIN,
                    )
                specs[name] = TensorSpec.model_validate(
                    {"shape": tuple(part.get_shape()), "dtype": dtype}
                )
    except SafetensorError as error:
        raise BundleError(f"is not safetensors: {error}", path=path, remedy=_AGAIN) from None
    except ValidationError as error:
        raise BundleError(
            f"tensor '{name}': {describe_validation(error)[0]}", path=path, remedy=_AGAIN
        ) from None
    return specs


def load_tensors(path: Path) -> dict[str, Array]:
    """Read all tensors of a safetensors file."""
    try:
        with safe_open(path, framework="numpy") as f:
            return {name: np.asarray(f.get_tensor(name)) for name in f.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise BundleError(f"is not safetensors: {error}", path=path, remedy=_AGAIN) from None


def write(
    manifest: Manifest, files: Mapping[str, Path | bytes], path: str | Path, *, zipped: bool = False
) -> Bundle | None:
    """Write a bundle atomically.

    What was written is opened and checked before it takes its place, so a bundle that
    exists is a bundle that opens.

    Parameters
    ----------
    manifest : Manifest
    files : mapping of path inside the bundle to file or content
        Every file that the manifest names, and any others outside ``artifacts/``.
    path : path-like
        The bundle. A bundle that is there already is replaced.
    zipped : bool
        Write one uncompressed zip file instead of a folder.

    Returns
    -------
    Bundle
        The bundle; None if zipped.

    Raises
    ------
    OutputError
        If something that is no bundle is in the way, or the place cannot be written.
    BundleError
        If manifest and files do not fit together.
    """
    target = Path(path)
    check_replaceable(target, KIND, zipped)
    if not zipped:
        with replaced_folder(target) as temporary:
            _fill(temporary, manifest, files, target)
        return Bundle(target, manifest)
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
            folder = Path(name) / "bundle"
            folder.mkdir()
            _fill(folder, manifest, files, target)
            archive = Path(name) / "bundle.zip"
            pack(folder, archive)
            _fsync(archive)
            archive.replace(target)
        fsync_folder(target.parent)
    return None


def _fill(
    folder: Path, manifest: Manifest, files: Mapping[str, Path | bytes], target: Path
) -> None:
    for name, source in sorted(files.items()):
        destination = folder / name
        if not destination.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"path '{name}' leaves the bundle", path=target)
        destination.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            destination.write_bytes(source)
        else:
            shutil.copyfile(source, destination)
    (folder / MANIFEST).write_bytes(manifest_bytes(manifest))
    try:
        Bundle.open(folder)
    except BundleError as error:
        where = (error.path or "").replace(str(folder), str(target))
        raise BundleError(error.message, path=where, field=error.field) from None
    for file in walk(folder):
        _fsync(file)


def _fsync(file: Path) -> None:
    with file.open("rb") as f:
        os.fsync(f.fileno())


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return a manifest as the bytes of ``manifest.json``: the same model, the same bytes."""
    # Those who read older versions only refuse fields that they do not know.
    newer = {"references"} if manifest.schema_version < 3 else None
    return json_bytes(manifest.model_dump(mode="json", exclude=newer))


def find(sha256: str, roots: Iterable[str | Path]) -> Bundle | None:
    """Find a bundle by its hash.

    Parameters
    ----------
    sha256 : str
        The hash, or its first 8 or more digits.
    roots : iterable of path-like
        Folders in which to look, three levels deep. What is no bundle is passed over.

    Raises
    ------
    UsageError
        If the beginning of the hash is too short or fits several bundles.
    """
    if len(sha256) < 8:
        raise UsageError(f"'{sha256}' is too short for a bundle's hash", remedy="give 8 digits")
    found: dict[str, Bundle] = {}
    for root in roots:
        for path in _manifests(Path(root), 3):
            try:
                bundle = Bundle.open(path.parent, verify_hashes=False)
            except BundleError:
                continue
            if bundle.sha256.startswith(sha256.lower()):
                found.setdefault(bundle.sha256, bundle)
    if len(found) > 1:
        raise UsageError(f"'{sha256}' fits {len(found)} bundles", remedy="give more digits")
    return next(iter(found.values()), None)


def _manifests(root: Path, depth: int) -> Iterator[Path]:
    try:
        if (root / MANIFEST).is_file():
            yield root / MANIFEST
        elif depth:
            for child in sorted(root.iterdir()):
                if child.is_dir() and not child.is_symlink():
                    yield from _manifests(child, depth - 1)
    except OSError:
        return


def _read_manifest(path: Path) -> Manifest:
    if path.is_symlink() or not path.is_file():
        raise BundleError(
            f"is not a bundle: it has no {MANIFEST}",
            path=path.parent,
            remedy="name a folder that `handheld export` wrote",
        )
    with path.open("rb") as f:
        data = f.read(MAX_MANIFEST_BYTES + 1)
    return parse_manifest(data, path)


def _specs(manifest: Manifest) -> Iterator[tuple[str, TensorSpec]]:
    for i, artifact in enumerate(manifest.artifacts):
        for name, spec in artifact.ports.inputs.items():
            yield f"artifacts[{i}].ports.inputs.{name}", spec
        for name, spec in artifact.ports.outputs.items():
            yield f"artifacts[{i}].ports.outputs.{name}", spec
    for name, spec in manifest.constant_specs.items():
        yield f"constant_specs.{name}", spec
    for size_name, size in manifest.sizes.items():
        for name, spec in size.program.tensors.items():
            yield f"sizes.{size_name}.program.tensors.{name}", spec


def _say(spec: TensorSpec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"'{n}'" for n in names)
