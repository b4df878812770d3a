"""Reading checkpoints and students.

Two layouts are read: the diffusers folder (``unet/``, ``vae/``, ... with ``config.json`` and
safetensors, sharded or not) and one safetensors file in the original latent-diffusion
naming of SDXL or SD 1.5. Weights stay in their files and are mapped when asked for, so that
reading a segment costs the memory of that segment.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError, safe_open

from handheld.bundle import describe_validation
from handheld.errors import CheckpointError
from handheld.files import sha256_file
from handheld.program import Model
from handheld_export.quantization import BITS, ActivationRange, QuantizedWeight, pack, unpack

_T = TypeVar("_T", bound=BaseModel)

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)

# Options that change what the network computes, with the values that segments understand.
_UNET_OPTIONS: dict[str, tuple[Any, ...]] = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "attention_type": (None, "default"),
    "resnet_time_scale_shift": (None, "default"),
    "resnet_skip_time_act": (None, False),
    "time_embedding_type": (None, "positional"),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "dual_cross_attention": (None, False),
    "only_cross_attention": (None, False),
    "mid_block_only_cross_attention": (None, False),
    "class_embeddings_concat": (None, False),
    "center_input_sample": (None, False),
    "conv_in_kernel": (None, 3),
    "conv_out_kernel": (None, 3),
    "resnet_out_scale_factor": (None, 1, 1.0),
    "cross_attention_norm": (None,),
    "act_fn": (None, "silu"),
    "downsample_padding": (None, 1),
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    CheckpointError
        If the file is missing, is not JSON or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "file is missing", path=path, remedy="is the folder a diffusers checkpoint?"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(
            f"is not readable JSON: {e}", path=path, remedy="copy the file again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", path=path, remedy="copy the file again")
    return value


def _finite(value: ActivationRange) -> ActivationRange:
    if not all(map(math.isfinite, vars(value).values())):
        raise ValueError("has bounds that are not finite")
    return value


PACKED = ("int4", "int2")
"""Grids of which students hold several codes in a byte."""


class _Layer(Model):
    grid: str
    group_size: Annotated[int, Field(ge=1)] | None = None
    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2)] | None = None
    """Of the weight, where several codes share a byte."""

    @model_validator(mode="after")
    def _packed(self) -> _Layer:
        if self.shape is not None and self.grid not in PACKED:
            raise ValueError(f"codes of grid '{self.grid}' are never packed")
        return self


class _Quantization(Model):
    """A student's ``quantization.json``."""

    schema_version: Literal[1, 2, 3] = 3
    layers: dict[str, _Layer] = {}
    float_inputs: list[str] = []
    activations: dict[str, Annotated[ActivationRange, AfterValidator(_finite)]] = {}


class _Settings(Model):
    """``handheld.json``, as far as exports read it."""

    model_config = ConfigDict(extra="allow")

    name: str | None = None
    size: Annotated[int, Field(ge=8, le=8192)] | None = None
    sampler: str | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    timesteps: list[int] | None = None
    timestep_spacing: str | None = None
    guidance: float | None = None
    prompts: list[str] | None = None
    licence: str | None = None
    history: list[dict[str, Any]] = []


def _validated(model: type[_T], value: object, path: Path, remedy: str) -> _T:
    try:
        return model.model_validate(value)
    except ValidationError as e:
        message, field = describe_validation(e)
        raise CheckpointError(message, path=path, field=field, remedy=remedy) from None


@dataclass(frozen=True)
class Place:
    """Where a tensor is; ``shape`` may drop extents of one that the file has."""

    file: Path
    name: str
    shape: tuple[int, ...]


class TensorStore:
    """Tensors of one component, spread over safetensors files.

    Parameters
    ----------
    places : mapping of tensor name to its file, name there and shape
    label : str
        Component name for errors.
    """

    def __init__(self, places: Mapping[str, Place], label: str) -> None:
        self._places = dict(places)
        self.label = label

    @classmethod
    def open(cls, files: list[Path], label: str) -> TensorStore:
        """Map the headers of safetensors files.

        Raises
        ------
        CheckpointError
            If a file is truncated or malformed, or a name appears in two files.
        """
        places: dict[str, Place] = {}
        for file in files:
            for name, shape in _header(file).items():
                if name in places:
                    raise CheckpointError(
                        f"tensor '{name}' is also in {places[name].file.name}", path=file
                    )
                places[name] = Place(file, name, shape)
        return cls(places, label)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._places[name].shape

    def file(self, name: str) -> Path:
        """File that holds a tensor."""
        return self._places[name].file

    @property
    def places(self) -> Mapping[str, Place]:
        """Where each tensor is."""
        return self._places

    @property
    def files(self) -> list[Path]:
        """All files, sorted."""
        return sorted({p.file for p in self._places.values()})

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Read tensors, in the dtype they are stored in.

        Raises
        ------
        CheckpointError
            If a tensor is missing or unreadable.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self._places:
                raise CheckpointError(
                    f"tensor '{name}' is missing", path=self.label, remedy="is a shard absent?"
                )
            by_file.setdefault(self._places[name].file, []).append(name)
        result = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt") as f:
                    for name in wanted:
                        place = self._places[name]
                        result[name] = f.get_tensor(place.name).reshape(place.shape)
            except (SafetensorError, OSError) as e:
                raise CheckpointError(f"cannot be read: {e}", path=file) from None
        return result


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as f:
            return {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(
            "file is missing", path=file, remedy="download all shards of the checkpoint"
        ) from None
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"is not a complete safetensors file: {e}", path=file, remedy="copy the file again"
        ) from None


def component_files(folder: Path) -> list[Path]:
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                names = read_json(index).get("weight_map")
                if not isinstance(names, dict) or not all(
                    isinstance(v, str) and Path(v).name == v for v in names.values()
                ):
                    raise CheckpointError(
                        "maps no tensors to files of this folder", path=index, field="weight_map"
                    )
                return [folder / n for n in sorted(set(names.values()))]
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [single]
    remedy = "convert .bin weights to safetensors first" if any(folder.glob("*.bin")) else None
    raise CheckpointError(
        "holds no safetensors weights", path=folder, remedy=remedy or "is the folder complete?"
    )


class Component:
    """U-Net or decoder of a checkpoint: configuration, weights and quantization.

    Attributes
    ----------
    kind : str
        ``unet`` or ``vae``.
    config : dict
        The diffusers configuration.
    store : TensorStore
    """

    def __init__(self, kind: str, config: dict[str, Any], store: TensorStore, origin: Path) -> None:
        self.kind = kind
        self.config = config
        self.store = store
        self.origin = origin

    @cached_property
    def _quantization(self) -> _Quantization:
        path = self.origin.parent / "quantization.json"
        if self.origin.name != "config.json" or not path.exists():
            return _Quantization()
        value = read_json(path)
        if value.get("schema_version") not in (1, 2, 3):
            raise CheckpointError(
                f"is version {value.get('schema_version')!r}, this handheld reads 1 to 3",
                path=path,
                field="schema_version",
                remedy="upgrade handheld or compress the checkpoint again",
            )
        return _validated(_Quantization, value, path, "compress the checkpoint again")

    @cached_property
    def quantized(self) -> frozenset[str]:
        """Layers (module paths) that carry codes."""
        return frozenset(self._quantization.layers)

    @cached_property
    def activation_ranges(self) -> dict[str, ActivationRange]:
        """Calibrated ranges by module path, where the student has them."""
        return self._quantization.activations

    @cached_property
    def float_inputs(self) -> frozenset[str]:
        """Layers whose inputs eight bits do not hold: engines are not to round them."""
        return frozenset(self._quantization.float_inputs)

    def codes(self, layer: str) -> tuple[str, tuple[int, ...] | None]:
        """Return the tensor that holds a layer's codes, and its weight's shape if it is packed."""
        shape = self._quantization.layers[layer].shape
        return f"{layer}.weight.{'codes' if shape is None else 'packed'}", shape

    def bits(self, layer: str) -> tuple[int, int | None]:
        """Return the bits of a layer's codes, and the weights that share a scale."""
        entry = self._quantization.layers[layer]
        if entry.grid == "palette":
            (entries,) = self.store.shape(f"{layer}.weight.codebook")
            return (entries - 1).bit_length(), entry.group_size
        return BITS[entry.grid], entry.group_size

    def quantized_weight(self, layer: str) -> QuantizedWeight:
        """Read the codes of a layer.

        Raises
        ------
        CheckpointError
            If codes, scales and the declared grid do not fit together.
        """
        entry = self._quantization.layers[layer]
        stored, shape = self.codes(layer)
        names = [stored, f"{layer}.weight.scales"]
        if entry.grid == "palette":
            names.append(f"{layer}.weight.codebook")
        tensors = self.store.read(names)
        try:
            codes = tensors[stored].numpy()
            if shape is not None:
                codes = unpack(codes, BITS[entry.grid], shape)
            return QuantizedWeight.checked(
                entry.grid,
                codes,
                tensors[names[1]].numpy(),
                entry.group_size,
                tensors[names[2]].numpy() if len(names) > 2 else None,
            )
        except ValueError as e:
            raise CheckpointError(
                str(e), path=self.store.file(names[0]), field=f"{layer}.weight"
            ) from None

    def tensors(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Read parameters as float32 and check that they are finite.

        Raises
        ------
        CheckpointError
            If a tensor is missing or has NaN or infinite values.
        """
        result = {}
        for name, tensor in self.store.read(names).items():
            value = tensor.to(torch.float32)
            if not torch.isfinite(value).all():
                raise CheckpointError(
                    f"tensor '{name}' has values that are not finite",
                    path=self.store.file(name),
                    remedy="the checkpoint is broken; take an earlier one",
                )
            result[name] = value
        return result


class Checkpoint:
    """A checkpoint or student.

    Parameters
    ----------
    path : path-like
        A folder in diffusers layout or a safetensors file.

    Raises
    ------
    CheckpointError
        If the path is neither.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_file():
            if self.path.suffix != ".safetensors":
                raise CheckpointError(
                    "is not a safetensors file", path=self.path, remedy="convert it first"
                )
        elif not (self.path / "unet" / "config.json").is_file():
            problem = "does not exist" if not self.path.exists() else "is not a checkpoint"
            raise CheckpointError(
                problem,
                path=self.path,
                remedy="give a folder with unet/config.json and vae/config.json, "
                "a .safetensors file, or the name of a model",
            )

    @property
    def name(self) -> str:
        """Short name for ids."""
        return str(self.settings.get("name") or self.path.stem)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The optional ``handheld.json``: sampler, steps, guidance, size, prompts."""
        path = self.path / "handheld.json"
        if not path.is_file():
            return {}
        settings = read_json(path)
        _validated(_Settings, settings, path, "correct it or remove it")
        return settings

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """Configuration of the noise schedule; SDXL's where the checkpoint has none."""
        path = self.path / "scheduler" / "scheduler_config.json"
        return read_json(path) if path.is_file() else dict(SDXL_SCHEDULER)

    @cached_property
    def unet(self) -> Component:
        """The U-Net."""
        component = self._component("unet")
        check_unet(component.config, component.origin)
        return component

    @cached_property
    def vae(self) -> Component:
        """The autoencoder, of which the decoder is used."""
        component = self._component("vae")
        kind = component.config.get("_class_name")
        if kind not in ("AutoencoderKL", "AutoencoderTiny"):
            raise CheckpointError(
                f"'{kind}' is not supported",
                path=component.origin,
                field="_class_name",
                remedy="use AutoencoderKL or AutoencoderTiny",
            )
        return component

    def component(self, name: str) -> Component:
        """``unet`` or ``decoder``, by a program's name for it."""
        return self.unet if name == "unet" else self.vae

    def _component(self, kind: str) -> Component:
        if self.path.is_file():
            from handheld_export.single_file import open_component

            return open_component(self.path, kind)
        folder = self.path / kind
        config = read_json(folder / "config.json")
        store = TensorStore.open(component_files(folder), str(folder))
        if kind == "vae":
            store = TensorStore(dict(map(_modern, store.places.items())), str(folder))
        return Component(kind, config, store, folder / "config.json")

    @cached_property
    def unet_sha256(self) -> str:
        """Hash of the U-Net's weights and configuration."""
        return _hash_files([*self.unet.store.files, self.unet.origin], self.path)

    @cached_property
    def vae_sha256(self) -> str:
        """Hash of the autoencoder's weights and configuration."""
        return _hash_files([*self.vae.store.files, self.vae.origin], self.path)

    @cached_property
    def files(self) -> list[Path]:
        """Every file that U-Net and decoder are made of."""
        files = set(self.unet.store.files) | set(self.vae.store.files)
        for part in (self.unet, self.vae):
            files |= {part.origin, part.origin.parent / "quantization.json"}
        files |= {self.path / "handheld.json", self.path / "scheduler" / "scheduler_config.json"}
        return sorted(f for f in files if f.is_file())

    @cached_property
    def sha256(self) -> str:
        """Hash of the contents of :attr:`files`, with their names."""
        return _hash_files(self.files, self.path)


def _hash_files(files: list[Path], path: Path) -> str:
    root = path if path.is_dir() else path.parent
    h = hashlib.sha256()
    for file in sorted(set(files)):
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
        h.update(f"{name}\n{sha256_file(file)}\n".encode())
    return h.hexdigest()


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _modern(item: tuple[str, Place]) -> tuple[str, Place]:
    """Rename attention as diffusers before 0.17 called it, when it also was a convolution."""
    name, place = item
    head, _, leaf = name.rpartition(".")
    path, _, layer = head.rpartition(".")
    if ".attentions." not in name or layer not in _OLD_ATTENTION:
        return item
    return f"{path}.{_OLD_ATTENTION[layer]}.{leaf}", replace(place, shape=place.shape[:2])


def check_unet(config: Mapping[str, Any], origin: Path) -> None:
    """Check that a U-Net is made of what segments understand.

    Raises
    ------
    CheckpointError
        Naming the first block type or option that is not supported.
    """

    def refuse(field: str, value: object, allowed: object) -> CheckpointError:
        return CheckpointError(
            f"{value!r} is not supported", path=origin, field=field, remedy=f"allowed: {allowed}"
        )

    if config.get("_class_name") != "UNet2DConditionModel":
        raise refuse("_class_name", config.get("_class_name"), "UNet2DConditionModel")
    for field, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        blocks = config.get(field)
        if not isinstance(blocks, list) or not blocks:
            raise refuse(field, blocks, "a list of block types")
        for i, block in enumerate(blocks):
            if block not in allowed:
                raise refuse(f"{field}[{i}]", block, ", ".join(allowed))
    mid = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if mid not in MID_BLOCKS:
        raise refuse("mid_block_type", mid, ", ".join(map(str, MID_BLOCKS)))
    for field, values in _UNET_OPTIONS.items():
        value = config.get(field)
        if value not in values and not (
            isinstance(value, list) and all(v in values for v in value)
        ):
            raise refuse(field, value, ", ".join(map(str, values)))


SDXL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def write_student_component(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    quantized: Mapping[str, QuantizedWeight],
    activations: Mapping[str, ActivationRange] | None = None,
    float_inputs: Iterable[str] = (),
) -> None:
    """Write one component of a student.

    Parameters
    ----------
    folder : Path
        ``unet/`` or ``vae/`` of the student; created.
    config : mapping
        Written as ``config.json``.
    tensors : mapping of name to tensor
        What is not quantized.
    quantized : mapping of layer to QuantizedWeight
    activations : mapping of layer to ActivationRange, optional
    float_inputs : iterable of str
        Layers whose inputs are not to be rounded.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    everything = {k: v.contiguous() for k, v in tensors.items()}
    layers = {}
    for layer, weight in quantized.items():
        entry: dict[str, Any] = {"grid": weight.grid, "group_size": weight.group_size}
        if weight.grid in PACKED:
            entry["shape"] = list(weight.codes.shape)
            everything[f"{layer}.weight.packed"] = torch.from_numpy(
                pack(weight.codes, BITS[weight.grid])
            )
        else:
            codes = np.ascontiguousarray(weight.codes)
            everything[f"{layer}.weight.codes"] = torch.from_numpy(codes)
        everything[f"{layer}.weight.scales"] = torch.from_numpy(np.ascontiguousarray(weight.scales))
        layers[layer] = entry
        if weight.codebook is not None:
            everything[f"{layer}.weight.codebook"] = torch.from_numpy(weight.codebook)
    save_file(everything, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    (folder / "quantization.json").write_text(
        json.dumps(
            {
                "schema_version": 3,
                "layers": layers,
                "float_inputs": sorted(float_inputs),
                "activations": {k: vars(v) for k, v in (activations or {}).items()},
            },
            indent=2,
        )
        + "\n"
    )
