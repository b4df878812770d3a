"""Captioned pictures, and what is computed from them once: latents, embeddings, teacher pairs.

A dataset gives (picture, caption) by index. `prepare` encodes the first n of them with the
checkpoint's own VAE and text encoders and keeps the result on disk, memory-mapped when read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from handheld.errors import UsageError
from handheld.files import replaced_folder
from handheld_export.autocast import autocast
from handheld_export.checkpoint import Checkpoint, read_json
from handheld_export.compress.diffusion import Condition
from handheld_export.compress.engine import Watch
from handheld_export.text import LocalTextEncoder, encoders_sha256

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class Dataset(Protocol):
    """Captioned pictures."""

    @property
    def name(self) -> str:
        """A short name for folders."""
        ...

    @property
    def about(self) -> str:
        """What it is, where from and under which licence, for cards."""
        ...

    def key(self) -> str:
        """Return what names the contents, for caches."""
        ...

    def items(self, n: int, size: int) -> Iterator[tuple[Tensor, str]]:
        """Give n pictures, uint8 [3, size, size], with their captions."""
        ...


@dataclass(frozen=True)
class Creatures:
    """robohash monsters of the training split, composed while they are read."""

    seed: int = 0
    empty_rate: float = 0.0
    name: str = "creatures"

    @property
    def about(self) -> str:
        """Say whose pictures these are."""
        return (
            "robohash 2.0's monsters (artwork by Hrvoje Novakovic, CC-BY-3.0), combinations of "
            f"the training split, seed {self.seed}"
        )

    def key(self) -> str:
        """Return seed and split."""
        return f"creatures train seed={self.seed} empty={self.empty_rate}"

    def items(self, n: int, size: int) -> Iterator[tuple[Tensor, str]]:
        """Give n creatures."""
        import random

        from handheld_export.critter import data

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 17)
        rng = random.Random(self.seed)  # noqa: S311
        for chunk in torch.split(data.sample_creatures(n, "train", generator), 64):
            for creature, picture in zip(chunk.tolist(), data.compose(chunk, size), strict=True):
                yield picture, data.caption(creature, rng, empty_rate=self.empty_rate)[0]


def _fit(picture: Image.Image, size: int) -> Tensor:
    """Scale the shorter side to ``size`` and cut out the middle."""
    picture = picture.convert("RGB")
    scale = size / min(picture.size)
    width, height = (max(size, round(s * scale)) for s in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    cut = picture.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous()


def _opened(source: Any, path: str | Path, size: int) -> Tensor:
    try:
        with Image.open(source) as picture:
            return _fit(picture, size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UsageError(
            f"is not a picture that can be decoded: {e}",
            path=path,
            remedy="replace it or remove it together with its caption",
        ) from None


@dataclass(frozen=True)
class Folder:
    """Pictures with a ``.txt`` caption of the same name beside each, in any depth of folders.

    Tar files among them (webdataset shards: ``0001.jpg`` followed by ``0001.txt``) are read as
    streams.
    """

    path: Path
    name: str = "folder"

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            raise UsageError(
                "is not a folder", path=self.path, remedy="name a folder of captioned pictures"
            )
        files = sorted(self.path.rglob("*"))
        kept = [f for f in files if f.suffix.lower() in (*PICTURES, ".tar") and f.is_file()]
        if not kept:
            raise UsageError(
                "holds no pictures",
                path=self.path,
                remedy=f"put {', '.join(PICTURES)} files with .txt captions there, or .tar shards",
            )
        return kept

    @property
    def about(self) -> str:
        """Count the folder's files."""
        return f"a folder of captioned pictures ({len(self._files())} pictures and shards)"

    def key(self) -> str:
        """Return a hash of names, sizes and times of change."""
        h = hashlib.sha256()
        for file in self._files():
            for one in (file, file.with_suffix(".txt")):
                if one.exists():
                    at = one.stat()
                    name = one.relative_to(self.path).as_posix()
                    h.update(f"{name} {at.st_size} {at.st_mtime_ns}\n".encode())
        return f"folder {h.hexdigest()}"

    def items(self, n: int, size: int) -> Iterator[tuple[Tensor, str]]:
        """Give the first n pictures, or all if there are fewer."""
        yield from itertools.islice(self._all(size), n)

    def _all(self, size: int) -> Iterator[tuple[Tensor, str]]:
        files = self._files()
        for file in files:
            words = file.with_suffix(".txt")
            if not _is_shard(file) and not words.is_file():
                raise UsageError(
                    f"has no caption: {words.name} is missing",
                    path=file,
                    remedy="write the caption into a .txt file beside the picture",
                )
        for file in files:
            if _is_shard(file):
                yield from self._shard(file, size)
                continue
            words = file.with_suffix(".txt")
            yield _opened(file, file, size), _caption(words.read_bytes(), words)

    def _shard(self, file: Path, size: int) -> Iterator[tuple[Tensor, str]]:
        waiting: dict[str, dict[str, bytes]] = {}
        try:
            with tarfile.open(file, "r|") as shard:
                for member in shard:
                    stem, _, suffix = member.name.rpartition(".")
                    suffix = suffix.lower()
                    if not member.isfile() or f".{suffix}" not in (*PICTURES, ".txt"):
                        continue
                    part = shard.extractfile(member)
                    kind = "txt" if suffix == "txt" else "picture"
                    waiting.setdefault(stem, {})[kind] = part.read() if part else b""
                    if len(waiting[stem]) == 2:
                        import io

                        both = waiting.pop(stem)
                        at = f"{file}:{stem}"
                        words = _caption(both["txt"], at)
                        yield _opened(io.BytesIO(both["picture"]), at, size), words
        except tarfile.TarError as e:
            raise UsageError(f"is not a readable tar file: {e}", path=file) from None
        if waiting:
            stem, parts = next(iter(waiting.items()))
            missing = "caption" if "picture" in parts else "picture"
            raise UsageError(
                f"'{stem}' has no {missing}", path=file, remedy="write the shard again"
            )


def _is_shard(file: Path) -> bool:
    return file.suffix.lower() == ".tar"


def _caption(raw: bytes, path: str | Path) -> str:
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError as e:
        raise UsageError(f"is not UTF-8: {e}", path=path, remedy="save it as UTF-8") from None


class Prepared:
    """Latents and embeddings of a dataset, on disk.

    Parameters
    ----------
    folder : Path
        With ``data.safetensors`` and ``meta.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = read_json(folder / "meta.json")
        opener: Any = safe_open
        self._file = opener(folder / "data.safetensors", framework="pt")
        self._slices = {k: self._file.get_slice(k) for k in self._file.keys()}  # noqa: SIM118

    def __len__(self) -> int:
        return int(self.meta["count"])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one picture's latents, [C, h, w]."""
        return tuple(int(s) for s in self._slices["latents"].get_shape()[1:])

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Read rows of a tensor, float32."""
        part = self._slices[name]
        return torch.stack([part[int(i)] for i in index]).float()

    def whole(self, name: str) -> Tensor:
        """Read a whole tensor, in the dtype it is stored in."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def has(self, name: str) -> bool:
        """Tell whether there is a tensor of this name."""
        return name in self._slices

    def condition(self, index: Tensor) -> Condition:
        """Return the conditions of rows, float32 on the CPU."""
        pooled = self.rows("pooled", index) if self.has("pooled") else None
        return Condition(self.rows("states", index), pooled, self.time_ids(len(index)))

    def empty(self) -> Condition:
        """Return the condition of one empty prompt."""
        pooled = self._file.get_tensor("empty.pooled").float() if self.has("pooled") else None
        return Condition(self._file.get_tensor("empty.states").float(), pooled, self.time_ids(1))

    def time_ids(self, n: int) -> Tensor | None:
        """Return picture, crop and target size for n pictures."""
        size = self.meta["size"]
        if not self.has("pooled"):
            return None
        return torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32).expand(n, -1)

    @property
    def captions(self) -> list[str]:
        """All captions."""
        return list(self.meta["captions"])


def conditions(encoder: LocalTextEncoder, captions: Sequence[str]) -> dict[str, Tensor]:
    """Encode captions: ``states`` [n, tokens, width] and ``pooled`` [n, width], float16."""
    states, pooled = [], []
    for start in range(0, len(captions), 64):
        for item in encoder.encode(captions[start : start + 64]):
            states.append(torch.from_numpy(item.prompt_embeds).half())
            if item.pooled is not None:
                pooled.append(torch.from_numpy(item.pooled).half())
    made = {"states": torch.stack(states)}
    return made | ({"pooled": torch.stack(pooled)} if pooled else {})


def empty_conditions(checkpoint: Checkpoint, encoder: LocalTextEncoder) -> dict[str, Tensor]:
    """Encode the empty prompt as guidance has it: ``states`` and ``pooled``, one row each."""
    index = checkpoint.path / "model_index.json"
    made = conditions(encoder, [""])
    # SDXL was trained with zeros for a dropped prompt, and its model_index says so.
    if index.is_file() and read_json(index).get("force_zeros_for_empty_prompt"):
        made = {k: torch.zeros_like(v) for k, v in made.items()}
    return made


@torch.no_grad()
def prepare(
    checkpoint: Checkpoint,
    vae: Any,
    dataset: Dataset,
    n: int,
    root: Path,
    watch: Watch,
) -> Prepared:
    """Encode n captioned pictures, or open what was encoded before.

    Parameters
    ----------
    checkpoint : Checkpoint
        Whose text encoders read the captions.
    vae : AutoencoderKL
        On the device that encodes.
    root : Path
        Cache folder.
    watch : Watch

    Returns
    -------
    Prepared
        Fewer than n if the dataset has fewer.

    Raises
    ------
    UsageError
        If there are no pictures, a caption is missing or a picture cannot be decoded.
    """
    scale = 2 ** (len(checkpoint.vae.config["block_out_channels"]) - 1)
    size = int(checkpoint.settings.get("size") or checkpoint.unet.config["sample_size"] * scale)
    essence = {
        "version": 1,
        "data": dataset.key(),
        "count": n,
        "size": size,
        "encoders": encoders_sha256(checkpoint.path),
        "vae": checkpoint.vae_sha256,
    }
    key = hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()[:24]
    folder = root / f"{dataset.name}-{key}"
    if (folder / "meta.json").is_file():
        return Prepared(folder)
    watch.stage(f"encoding {n} pictures")
    device = next(vae.parameters()).device
    encoder = LocalTextEncoder(checkpoint.path, device=str(device))
    factor = float(vae.config["scaling_factor"])
    captions: list[str] = []
    latents: list[Tensor] = []
    batch: list[Tensor] = []

    def flush() -> None:
        x = torch.stack(batch).to(device).float().div_(127.5).sub_(1)
        with autocast(device):
            latents.append((vae.encode(x).latent_dist.mode().float() * factor).half().cpu())
        batch.clear()

    for picture, words in dataset.items(n, size):
        captions.append(words)
        batch.append(picture)
        if len(batch) == 32:
            flush()
            watch.step("encoding", len(captions), n, {})
    if batch:
        flush()
    if not captions:
        raise UsageError(
            "gives no captioned picture",
            path=dataset.about,
            remedy="put pictures with .txt captions, or webdataset shards, there",
        )
    if len(captions) < n:
        watch.stage(f"there are {len(captions)} pictures, fewer than the recipe's {n}")
    tensors = conditions(encoder, captions)
    tensors |= {f"empty.{k}": v for k, v in empty_conditions(checkpoint, encoder).items()}
    tensors["latents"] = torch.cat(latents).contiguous()
    keep(folder, tensors, essence | {"count": len(captions), "captions": captions})
    return Prepared(folder)


def keep(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a prepared folder whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(folder) as work:
        save_file(dict(tensors), work / "data.safetensors")
        (work / "meta.json").write_text(json.dumps(dict(meta)) + "\n")
