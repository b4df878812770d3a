"""LoRA files, fused into a checkpoint before anything else sees it.

Low-rank adaptation (Hu et al., arXiv 2106.09685) keeps the change of a weight as a product of two
thin matrices, ``W + strength * alpha / rank * up @ down``. Files name the layers in diffusers' way
or in kohya's, which flattens dots to underscores; those are looked up in a table made from the
checkpoint's own names, never guessed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from handheld.errors import CheckpointError, UsageError
from handheld.files import cache_root, replaced_folder, sha256_file
from handheld_export.checkpoint import Checkpoint, TensorStore, component_files

SHARD_BYTES = 1_000_000_000
_PEFT = "lora_adapter_metadata"
_HALF = re.compile(
    r"(?P<layer>.+?)[._](?P<half>lora_A|lora_B|lora\.down|lora\.up|lora_down|lora_up)"
    r"(?:\.[A-Za-z0-9_-]+)?\.weight"
)
_OLD = re.compile(
    r"(?P<head>.+)\.processor\.(?P<name>to_[qkv]|to_out)_lora\.(?P<half>down|up)\.weight"
)
_KINDS = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
_KOHYA = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te1_", "lora_te_"),
    "text_encoder_2": ("lora_te2_",),
}


@dataclass(frozen=True)
class Lora:
    """A LoRA file and how strongly it is applied.

    Parameters
    ----------
    path : Path
    strength : float
    """

    path: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Read ``FILE`` or ``FILE:STRENGTH``.

        Raises
        ------
        UsageError
            If the strength is not finite.
        """
        head, colon, tail = text.rpartition(":")
        if colon and head:
            try:
                strength = float(tail)
            except ValueError:
                return cls(Path(text))
            if not math.isfinite(strength):
                raise UsageError(f"--lora {text}: the strength is not finite")
            return cls(Path(head), strength)
        return cls(Path(text))


@dataclass
class _Delta:
    """What a file says of one layer."""

    path: Path
    key: str
    strength: float
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None

    def refuse(self, what: str, remedy: str = "take another LoRA file") -> CheckpointError:
        return CheckpointError(what, path=self.path, field=self.key, remedy=remedy)

    def of(self, shape: tuple[int, ...]) -> Tensor:
        """Return the change of a weight, float32 in its shape."""
        if self.down is None or self.up is None:
            raise self.refuse(f"the {'down' if self.down is None else 'up'} half is missing")
        down, up = self.down.float(), self.up.float()
        rank = down.shape[0]
        scale = self.strength * (rank if self.alpha is None else self.alpha) / rank
        fits = up.shape[0] == shape[0] and up[0].numel() == rank
        if not fits or rank * math.prod(shape[1:]) != down.numel():
            raise self.refuse(
                f"{tuple(up.shape)} and {tuple(down.shape)} do not fit a weight of {shape}",
                "it was made for another model",
            )
        return scale * (up.reshape(shape[0], rank) @ down.reshape(rank, -1)).reshape(shape)


def fused(path: Path, loras: Sequence[Lora], root: Path | None = None) -> Path:
    """Return a checkpoint's folder with LoRA files fused in, made once and kept.

    Parameters
    ----------
    path : Path
        A checkpoint in diffusers layout, or a single safetensors file.
    loras : sequence of Lora
        Applied in this order.
    root : Path, optional
        Where fused checkpoints are kept; the cache by default.

    Raises
    ------
    CheckpointError
        Naming file and key: no LoRA, a layer that the checkpoint does not have, a half that is
        missing, a shape that does not fit, values that are not finite, or a kind of adapter that
        is not supported.
    """
    checkpoint = Checkpoint(path)
    if checkpoint.unet.quantized:
        raise CheckpointError(
            "is quantized already", path=path, remedy="fuse into the original checkpoint"
        )
    stores = dict(_stores(checkpoint))
    found = [_read(lora, stores, checkpoint) for lora in loras]
    used = [
        {"name": x.path.name, "sha256": sha256_file(x.path), "strength": x.strength} for x in loras
    ]
    essence = json.dumps([2, checkpoint.sha256, _texts(checkpoint), used], sort_keys=True)
    folder = (root or cache_root() / "fused") / hashlib.sha256(essence.encode()).hexdigest()[:24]
    if (folder / "handheld.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(folder) as work:
        changed = {kind for deltas in found for kind, _ in deltas}
        _link(checkpoint, work, changed)
        for kind, store in stores.items():
            if kind in changed or path.is_file():
                own = [{n: d for (k, n), d in deltas.items() if k == kind} for deltas in found]
                _write(kind, store, own, work / kind)
        settings = checkpoint.settings | {"lora": used}
        (work / "handheld.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def _stores(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorStore]]:
    yield "unet", checkpoint.unet.store
    if checkpoint.path.is_file():
        yield "vae", checkpoint.vae.store
        return
    for kind in ("text_encoder", "text_encoder_2"):
        folder = checkpoint.path / kind
        if (folder / "config.json").is_file():
            yield kind, TensorStore.open(component_files(folder), str(folder))


def _texts(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.path.is_file():
        return []
    from handheld_export.text import encoders_sha256

    return [encoders_sha256(checkpoint.path)]


def _read(
    lora: Lora, stores: Mapping[str, TensorStore], checkpoint: Checkpoint
) -> dict[tuple[str, str], _Delta]:
    """Read a file into changes by component and layer."""
    table = _table(stores, checkpoint.unet.config)
    found: dict[tuple[str, str], _Delta] = {}
    try:
        with safe_open(lora.path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = (file.metadata() or {}).get(_PEFT)
    except FileNotFoundError:
        raise CheckpointError("there is no such LoRA file", path=lora.path) from None
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(
            f"is not a safetensors file: {e}", path=lora.path, remedy="convert it or copy it again"
        ) from None
    for key, tensor in tensors.items():
        layer, half = _parse(key, lora.path)
        if layer not in table:
            raise CheckpointError(
                f"the checkpoint has no layer '{layer}'",
                path=lora.path,
                field=key,
                remedy="it was made for another model, or for a component that is not there",
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise CheckpointError("has values that are not finite", path=lora.path, field=key)
        delta = found.setdefault(table[layer], _Delta(lora.path, key, lora.strength))
        if half == "alpha":
            if tensor.numel() != 1:
                raise CheckpointError("is not one number", path=lora.path, field=key)
            delta.alpha = float(tensor)
        elif tensor.ndim not in (2, 4) or not tensor.numel():
            raise CheckpointError(
                f"has the shape {tuple(tensor.shape)}", path=lora.path, field=key,
                remedy="linear layers and convolutions are supported",
            )  # fmt: skip
        else:
            setattr(delta, half, tensor)
    if not found:
        raise CheckpointError("holds no LoRA", path=lora.path)
    if written is not None:
        _scale(found, written, lora.path)
    for (kind, layer), delta in found.items():
        delta.of(stores[kind].shape(f"{layer}.weight"))
    return found


def _scale(found: Mapping[tuple[str, str], _Delta], written: str, path: Path) -> None:
    """Take alphas from the header, where diffusers keeps PEFT's configuration of each component.

    Without them a file whose alpha is not its rank would be fused too strongly or too weakly.
    """
    try:
        header = json.loads(written)
        for (kind, layer), delta in found.items():
            alpha = header.get(f"{kind}.lora_alpha")
            for pattern, own in (header.get(f"{kind}.alpha_pattern") or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", layer):
                    alpha = own
                    break
            if alpha is None or delta.alpha is not None or delta.down is None:
                continue
            # Rank-stabilised LoRA (arXiv 2312.03732) divides by the rank's root.
            stable = bool(header.get(f"{kind}.use_rslora"))
            delta.alpha = float(alpha) * (delta.down.shape[0] ** 0.5 if stable else 1.0)
    except (ValueError, TypeError, AttributeError, re.error) as e:
        raise CheckpointError(
            f"holds no configuration of LoRA: {e}",
            path=path,
            field=_PEFT,
            remedy="save it again, or take the entry out of the header",
        ) from None
    for delta in found.values():
        if delta.alpha is not None and not math.isfinite(delta.alpha):
            raise delta.refuse(f"alpha is {delta.alpha}")


def _parse(key: str, path: Path) -> tuple[str, str]:
    """Return a key's layer as the file names it, and ``down``, ``up`` or ``alpha``."""
    name = key.removeprefix("base_model.model.")
    if name.endswith(".alpha"):
        layer = name.removesuffix(".alpha").removesuffix(".lora")
        return layer, "alpha"
    if old := _OLD.fullmatch(name):
        inner = "to_out.0" if old["name"] == "to_out" else old["name"]
        return f"{old['head']}.{inner}", old["half"]
    if half := _HALF.fullmatch(name):
        return half["layer"], "down" if half["half"].endswith(("A", "down")) else "up"
    raise CheckpointError(
        "is no part of a LoRA that is supported",
        path=path,
        field=key,
        remedy="plain LoRA in diffusers' or kohya's naming is; DoRA, LoHa, LoKr and CP are not",
    )


def _table(
    stores: Mapping[str, TensorStore], config: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """Map every name that files give to a layer to its component and the checkpoint's name."""
    table: dict[str, tuple[str, str]] = {}
    for kind, prefixes in _KOHYA.items():
        if kind not in stores:
            continue
        for tensor in stores[kind]:
            layer = tensor.removesuffix(".weight")
            if layer == tensor or len(stores[kind].shape(tensor)) < 2:
                continue
            names = [layer]
            if kind == "unet":
                names.append(_ldm_name(layer, config))
            elif layer.startswith("text_model."):
                names.append(layer.removeprefix("text_model."))
            else:
                names.append(f"text_model.{layer}")
            for name in filter(None, names):
                table[f"{kind}.{name}"] = kind, layer
                for prefix in prefixes:
                    table[prefix + name.replace(".", "_")] = kind, layer
    return table


_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_PART = re.compile(
    r"(?:(?P<way>down|up)_blocks\.(?P<stage>\d+)|mid_block)"
    r"\.(?P<what>resnets|attentions|downsamplers|upsamplers)\.(?P<at>\d+)\.(?P<rest>.+)"
)


def _ldm_name(layer: str, config: Mapping[str, Any]) -> str:
    """Return a U-Net layer's name in latent diffusion's own code; empty if it has none."""
    if layer in _ENDS:
        return _ENDS[layer]
    part = _PART.fullmatch(layer)
    if part is None:
        return ""
    what, at, rest = part["what"], int(part["at"]), part["rest"]
    if what == "resnets":
        rest = _RESNET.get(rest, rest)
    if part["way"] is None:
        return f"middle_block.{2 * at if what == 'resnets' else 1}.{rest}"
    given = config.get("layers_per_block", 2)
    count = len(config["block_out_channels"])
    pairs = list(given) if isinstance(given, (list, tuple)) else [given] * count
    stage = int(part["stage"])
    if part["way"] == "down":
        first = 1 + sum(pairs[:stage]) + stage
        if what == "downsamplers":
            return f"input_blocks.{first + pairs[stage]}.0.op"
        return f"input_blocks.{first + at}.{int(what == 'attentions')}.{rest}"
    up = [p + 1 for p in reversed(pairs)]
    first = sum(up[:stage])
    attends = "CrossAttn" in config["up_block_types"][stage]
    if what == "upsamplers":
        return f"output_blocks.{first + up[stage] - 1}.{1 + attends}.conv"
    return f"output_blocks.{first + at}.{int(what == 'attentions')}.{rest}"


def _write(
    kind: str, store: TensorStore, deltas: Sequence[Mapping[str, _Delta]], folder: Path
) -> None:
    """Write a component with its changes, one shard in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = _KINDS.get(kind, "diffusion_pytorch_model")
    shards: list[list[str]] = [[]]
    held = 0
    for name in store:
        nbytes = 4 * math.prod(store.shape(name))
        if held and held + nbytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += nbytes
    index: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"{stem}.safetensors"
        if len(shards) > 1:
            file = f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = store.read(names)
        for name in names:
            layer = name.removesuffix(".weight")
            for changes in deltas:
                if layer in changes and name != layer:
                    own = tensors[name]
                    change = changes[layer].of(tuple(own.shape))
                    tensors[name] = (own.float() + change).to(own.dtype)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / file)
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = {"metadata": {}, "weight_map": index}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content, indent=2))


def _link(checkpoint: Checkpoint, work: Path, changed: set[str]) -> None:
    """Take over what does not change: hard links, or copies where those cannot be."""
    if checkpoint.path.is_file():
        for kind in ("unet", "vae"):
            config = (checkpoint.unet if kind == "unet" else checkpoint.vae).config
            (work / kind).mkdir(parents=True)
            (work / kind / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return

    def place(source: str, target: str) -> str:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
        return target

    for item in sorted(checkpoint.path.iterdir()):
        if item.name == "handheld.json":
            continue
        if item.is_dir():
            weights = shutil.ignore_patterns("*.safetensors", "*.safetensors.index*.json")
            ignore = weights if item.name in changed else None
            shutil.copytree(item, work / item.name, copy_function=place, ignore=ignore)
        else:
            place(str(item), str(work / item.name))
