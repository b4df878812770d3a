"""Runs the ML program inside an .mlpackage without Apple's hardware.

What is read is the package that ships: the specification and its weight file, compressed weights
included. Every operation is computed in float32 and its result rounded to the type that the
program declares: products of fp16 values, summed in more, as the Neural Engine and the GPU have
them. It is a reference, not a simulator of any chip.

Operations and their defaults: the MIL operation reference of coremltools, iOS 18. The layout of the
weight file: the storage format of coremltools' ``MILBlob``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from handheld.errors import TargetError

DATA = "Data/com.apple.CoreML"
_BLOB_MAGIC = 0xDEADBEEF
_FLOATS = {10: torch.float16, 11: torch.float32, 12: torch.float64}
_TYPES: dict[int, tuple[str, int]] = {
    1: ("bool", 8),
    10: ("float16", 16),
    11: ("float32", 32),
    12: ("float64", 64),
    21: ("int8", 8),
    22: ("int16", 16),
    23: ("int32", 32),
    24: ("int64", 64),
    25: ("int4", 4),
    31: ("uint8", 8),
    32: ("uint16", 16),
    33: ("uint32", 32),
    34: ("uint64", 64),
    35: ("uint4", 4),
    36: ("uint2", 2),
    37: ("uint1", 1),
    38: ("uint6", 6),
    39: ("uint3", 3),
}
"""MIL's data types: name and bits."""


@dataclass(frozen=True)
class Arguments:
    """What an operation is given.

    Parameters
    ----------
    op : str
        Its type.
    values : mapping of str to Tensor, str, or list of both
        By parameter name; optional ones may be absent.
    """

    op: str
    values: Mapping[str, Any]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor parameter; fp16 is held as float32."""
        value = self.values[name]
        if not isinstance(value, Tensor):
            raise TargetError(f"'{self.op}': parameter '{name}' is no tensor")
        return value

    def maybe(self, name: str) -> Tensor | None:
        """Return a tensor parameter, or None if it is not given."""
        return self.tensor(name) if name in self.values else None

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """Return a parameter that is a list of integers."""
        if name not in self.values and default is not None:
            return list(default)
        return [int(v) for v in self.tensor(name).reshape(-1).tolist()]

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a parameter that is an integer."""
        return self.integers(name, None if default is None else [default])[0]

    def number(self, name: str, default: float) -> float:
        """Return a parameter that is a number."""
        return float(self.tensor(name)) if name in self.values else default

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a parameter that is a truth value."""
        return bool(self.tensor(name)) if name in self.values else default

    def text(self, name: str, default: str) -> str:
        """Return a parameter that is a text."""
        return str(self.values.get(name, default))


Operation = Callable[[Arguments], "Tensor | list[Tensor]"]
OPERATIONS: dict[str, Operation] = {}
"""Every operation that is understood, by its type."""


def operation(*names: str) -> Callable[[Operation], Operation]:
    """Register what computes operations of these types."""

    def register(function: Operation) -> Operation:
        for name in names:
            OPERATIONS[name] = function
        return function

    return register


def _elementwise(name: str, function: Any, *parameters: str) -> None:
    OPERATIONS[name] = lambda a: function(*(a.tensor(p) for p in parameters))


for _name, _function in {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "real_div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "pow": torch.pow,
}.items():
    _elementwise(_name, _function, "x", "y")
for _name, _function in {
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "relu": torch.relu,
    "square": torch.square,
    "erf": torch.erf,
    "abs": torch.abs,
    "identity": torch.clone,
    "sin": torch.sin,
    "cos": torch.cos,
}.items():
    _elementwise(_name, _function, "x")


@operation("rsqrt")
def _rsqrt(a: Arguments) -> Tensor:
    return torch.rsqrt(a.tensor("x") + a.number("epsilon", 1e-12))


@operation("inverse")
def _inverse(a: Arguments) -> Tensor:
    return 1 / (a.tensor("x") + a.number("epsilon", 1e-4))


@operation("gelu")
def _gelu(a: Arguments) -> Tensor:
    mode, x = a.text("mode", "EXACT"), a.tensor("x")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


@operation("clip")
def _clip(a: Arguments) -> Tensor:
    return a.tensor("x").clamp(a.number("alpha", -math.inf), a.number("beta", math.inf))


@operation("leaky_relu")
def _leaky_relu(a: Arguments) -> Tensor:
    return functional.leaky_relu(a.tensor("x"), a.number("alpha", 0.01))


@operation("softmax")
def _softmax(a: Arguments) -> Tensor:
    return torch.softmax(a.tensor("x"), a.integer("axis", -1))


@operation("linear")
def _linear(a: Arguments) -> Tensor:
    return functional.linear(a.tensor("x"), a.tensor("weight"), a.maybe("bias"))


@operation("matmul")
def _matmul(a: Arguments) -> Tensor:
    x, y = a.tensor("x"), a.tensor("y")
    x = x.transpose(-1, -2) if a.flag("transpose_x") else x
    y = y.transpose(-1, -2) if a.flag("transpose_y") else y
    return x @ y


@operation("einsum")
def _einsum(a: Arguments) -> Tensor:
    return torch.einsum(a.text("equation", ""), *a.values["values"])


@operation("scaled_dot_product_attention")
def _attention(a: Arguments) -> Tensor:
    return functional.scaled_dot_product_attention(
        a.tensor("query"), a.tensor("key"), a.tensor("value"), a.maybe("attn_mask")
    )


@operation("conv")
def _conv(a: Arguments) -> Tensor:
    x, weight = a.tensor("x"), a.tensor("weight")
    sides = weight.dim() - 2
    strides, dilations = (a.integers(n, [1] * sides) for n in ("strides", "dilations"))
    kind = a.text("pad_type", "valid")
    pads = [0] * (2 * sides)
    if kind == "custom":
        pads = a.integers("pad", pads)
    elif kind in ("same", "same_lower"):
        for i, (n, k, s, d) in enumerate(
            zip(x.shape[2:], weight.shape[2:], strides, dilations, strict=True)
        ):
            total = max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n)
            small, large = total // 2, total - total // 2
            pads[2 * i : 2 * i + 2] = [small, large] if kind == "same" else [large, small]
    elif kind != "valid":
        raise TargetError(f"'conv': pad_type '{kind}' is unknown")
    # torch names the last side first.
    around = [p for i in reversed(range(sides)) for p in pads[2 * i : 2 * i + 2]]
    convolve: Any = {1: functional.conv1d, 2: functional.conv2d}[sides]
    result: Tensor = convolve(
        functional.pad(x, around), weight, a.maybe("bias"), strides, 0, dilations,
        a.integer("groups", 1),
    )  # fmt: skip
    return result


@operation("upsample_nearest_neighbor")
def _upsample(a: Arguments) -> Tensor:
    factors = [a.number(f"scale_factor_{side}", 1.0) for side in ("height", "width")]
    if any(f != int(f) for f in factors):
        raise TargetError(f"'upsample_nearest_neighbor': factors {factors} are not whole")
    x = a.tensor("x")
    for axis, factor in zip((-2, -1), factors, strict=True):
        x = x.repeat_interleave(int(factor), axis)
    return x


@operation("pad")
def _pad(a: Arguments) -> Tensor:
    x, pads = a.tensor("x"), a.integers("pad")
    mode = a.text("mode", "constant")
    around = [p for i in reversed(range(len(pads) // 2)) for p in pads[2 * i : 2 * i + 2]]
    if mode == "constant":
        return functional.pad(x, around, value=a.number("constant_val", 0.0))
    return functional.pad(x, around, mode={"reflect": "reflect", "replicate": "replicate"}[mode])


def _reduced(function: Callable[..., Tensor]) -> Operation:
    def reduce(a: Arguments) -> Tensor:
        x = a.tensor("x")
        axes = a.integers("axes", list(range(x.dim())))
        return function(x, axes, keepdim=a.flag("keep_dims"))

    return reduce


OPERATIONS["reduce_mean"] = _reduced(torch.mean)
OPERATIONS["reduce_sum"] = _reduced(torch.sum)
OPERATIONS["reduce_max"] = _reduced(torch.amax)
OPERATIONS["reduce_min"] = _reduced(torch.amin)


@operation("layer_norm")
def _layer_norm(a: Arguments) -> Tensor:
    x = a.tensor("x")
    axes = a.integers("axes", [-1])
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    y = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + a.number("epsilon", 1e-5))
    gamma, beta = a.maybe("gamma"), a.maybe("beta")
    y = y if gamma is None else y * gamma
    return y if beta is None else y + beta


@operation("batch_norm")
def _batch_norm(a: Arguments) -> Tensor:
    return functional.batch_norm(
        a.tensor("x"), a.tensor("mean"), a.tensor("variance"), a.maybe("gamma"), a.maybe("beta"),
        eps=a.number("epsilon", 1e-5),
    )  # fmt: skip


@operation("instance_norm")
def _instance_norm(a: Arguments) -> Tensor:
    return functional.instance_norm(
        a.tensor("x"), weight=a.maybe("gamma"), bias=a.maybe("beta"),
        eps=a.number("epsilon", 1e-5),
    )  # fmt: skip


@operation("reshape")
def _reshape(a: Arguments) -> Tensor:
    x, shape = a.tensor("x"), a.integers("shape")
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])


@operation("transpose")
def _transpose(a: Arguments) -> Tensor:
    return a.tensor("x").permute(a.integers("perm"))


@operation("expand_dims")
def _expand_dims(a: Arguments) -> Tensor:
    x = a.tensor("x")
    axes = a.integers("axes")
    rank = x.dim() + len(axes)
    for axis in sorted(i % rank for i in axes):
        x = x.unsqueeze(axis)
    return x


@operation("squeeze")
def _squeeze(a: Arguments) -> Tensor:
    x = a.tensor("x")
    axes = a.integers("axes", [i for i, n in enumerate(x.shape) if n == 1])
    for axis in sorted((i % x.dim() for i in axes), reverse=True):
        x = x.squeeze(axis)
    return x


@operation("concat")
def _concat(a: Arguments) -> Tensor:
    if a.flag("interleave"):
        raise TargetError("'concat': interleave is not understood")
    return torch.cat(a.values["values"], a.integer("axis"))


@operation("stack")
def _stack(a: Arguments) -> Tensor:
    return torch.stack(a.values["values"], a.integer("axis"))


@operation("split")
def _split(a: Arguments) -> list[Tensor]:
    x, axis = a.tensor("x"), a.integer("axis")
    if "split_sizes" in a.values:
        return list(torch.split(x, a.integers("split_sizes"), axis))
    return list(torch.chunk(x, a.integer("num_splits"), axis))


@operation("tile")
def _tile(a: Arguments) -> Tensor:
    return a.tensor("x").repeat(a.integers("reps"))


@operation("slice_by_size")
def _slice_by_size(a: Arguments) -> Tensor:
    x = a.tensor("x")
    for axis, (begin, size) in enumerate(zip(a.integers("begin"), a.integers("size"), strict=True)):
        x = x.narrow(axis, begin, x.shape[axis] - begin if size == -1 else size)
    return x


@operation("slice_by_index")
def _slice_by_index(a: Arguments) -> Tensor:
    x = a.tensor("x")
    rank = x.dim()
    begin, end = a.integers("begin"), a.integers("end")
    stride = a.integers("stride", [1] * rank)
    masks = {n: a.integers(n, [0] * rank) for n in ("begin_mask", "end_mask", "squeeze_mask")}
    if any(s < 1 for s in stride):
        raise TargetError("'slice_by_index': negative strides are not understood")
    index: list[slice | int] = []
    for i in range(rank):
        if masks["squeeze_mask"][i]:
            index.append(begin[i])
        else:
            low = None if masks["begin_mask"][i] else begin[i]
            high = None if masks["end_mask"][i] else end[i]
            index.append(slice(low, high, stride[i]))
    return x[tuple(index)]


@operation("cast")
def _cast(a: Arguments) -> Tensor:
    # The declared type of the result says the rest.
    kind = a.text("dtype", "fp32")
    if kind in ("fp16", "fp32"):
        return a.tensor("x").float()
    if kind == "int32":
        return a.tensor("x").to(torch.int32)
    raise TargetError(f"'cast': to '{kind}' is not understood")


def _spread(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat every entry along each axis until the shape is reached."""
    for axis, n in enumerate(shape):
        if values.shape[axis] != n:
            values = values.repeat_interleave(n // values.shape[axis], axis)
    return values


@operation("constexpr_lut_to_dense")
def _lut_to_dense(a: Arguments) -> Tensor:
    indices, lut = a.tensor("indices").long(), a.tensor("lut")
    if lut.shape[-1] != 1:
        raise TargetError("'constexpr_lut_to_dense': palettes of vectors are not understood")
    flat = lut.reshape(-1, lut.shape[-2])
    groups = torch.arange(len(flat)).reshape(lut.shape[:-2])
    return flat[_spread(groups, indices.shape), indices]


@operation("constexpr_blockwise_shift_scale")
def _shift_scale(a: Arguments) -> Tensor:
    data, offset = a.tensor("data").float(), a.maybe("offset")
    if offset is not None:
        data = data - _spread(offset.float(), data.shape)
    return data * _spread(a.tensor("scale"), data.shape)


# --- the package -----------------------------------------------------------------------------


class Package:
    """The ML program of an .mlpackage.

    Parameters
    ----------
    path : Path
        The package's folder.

    Raises
    ------
    TargetError
        If it is no package with an ML program of one function.
    """

    def __init__(self, path: Path) -> None:
        from coremltools.proto import Model_pb2

        self.path = path
        spec = Model_pb2.Model()
        try:
            spec.ParseFromString((path / DATA / "model.mlmodel").read_bytes())
            self.spec: Any = spec
            (function,) = spec.mlProgram.functions.values()
            self._block: Any = function.block_specializations[function.opset]
        except Exception as error:
            raise TargetError(f"is no ML program: {error}", path=path) from None
        self.inputs = [i.name for i in function.inputs]
        self.outputs = list(self._block.outputs)
        self._kept: dict[str, Any] = {}

    @cached_property
    def _weights(self) -> NDArray[np.uint8]:
        return np.memmap(self.path / DATA / "weights" / "weight.bin", np.uint8, "r")

    @property
    def operations(self) -> list[str]:
        """Types of all operations, in order."""
        return [str(op.type) for op in self._block.operations]

    def check(self) -> None:
        """Refuse a program that cannot be run here.

        Raises
        ------
        TargetError
            Naming the operations that are not understood.
        """
        if unknown := sorted(set(self.operations) - OPERATIONS.keys() - {"const"}):
            raise TargetError(f"operations {', '.join(unknown)} are not understood", path=self.path)

    def compressed(self) -> Iterator[tuple[NDArray[Any], NDArray[Any] | None]]:
        """Yield every compressed weight as it lies in the file: codes or palette entries, scales.

        Yields
        ------
        values : float32 ndarray, the weight's shape
            Before scaling; codes are whole numbers.
        scales : float32 ndarray or None
            None if nothing is scaled.
        """
        made = {o.name: op for op in self._block.operations for o in op.outputs}

        def value(argument: Any) -> Tensor:
            (binding,) = argument.arguments
            if not binding.name:
                return _as_tensor(self._value(binding.value))
            op = made[binding.name]
            if op.type == "const":
                return _as_tensor(self._value(op.attributes["val"]))
            return run(op)

        def run(op: Any, **other: Tensor) -> Tensor:
            values = {n: other[n] if n in other else value(a) for n, a in op.inputs.items()}
            return _as_tensor(OPERATIONS[op.type](Arguments(op.type, values)))

        inner: set[str] = set()
        for op in self._block.operations:
            if op.type == "constexpr_lut_to_dense":
                source = made.get(op.inputs["lut"].arguments[0].name)
                if source is None or source.type != "constexpr_blockwise_shift_scale":
                    yield run(op).numpy(), None
                    continue
                # Core ML scales the palette, one copy for each output channel.
                inner.add(source.outputs[0].name)
                entries = value(source.inputs["data"]).float()
                yield run(op, lut=entries).numpy(), value(source.inputs["scale"]).numpy()
        for op in self._block.operations:
            plain = op.type == "constexpr_blockwise_shift_scale"
            if plain and op.outputs[0].name not in inner:
                data, scale = (value(op.inputs[n]) for n in ("data", "scale"))
                yield data.float().numpy(), scale.numpy()

    def run(
        self, inputs: Mapping[str, NDArray[Any]], watch: Callable[[Any, Tensor], None] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run the program.

        Parameters
        ----------
        inputs : mapping of name to float32 ndarray
        watch : callable, optional
            Gets every operation and its result.

        Returns
        -------
        dict of name to float32 ndarray

        Raises
        ------
        TargetError
            For an operation that is not understood, by name; for inputs that do not fit.
        """
        self.check()
        if set(inputs) != set(self.inputs):
            raise TargetError(f"takes {self.inputs}, not {sorted(inputs)}", path=self.path)
        env: dict[str, Any] = {
            n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in inputs.items()
        }
        last = self._last_use()
        with torch.no_grad():
            for index, op in enumerate(self._block.operations):
                self._execute(op, env, watch)
                for name in last.get(index, ()):
                    env.pop(name, None)
        return {n: env[n].float().contiguous().numpy() for n in self.outputs}

    def _last_use(self) -> dict[int, list[str]]:
        at: dict[str, int] = {}
        for index, op in enumerate(self._block.operations):
            for argument in op.inputs.values():
                for binding in argument.arguments:
                    if binding.name:
                        at[binding.name] = index
        ends: dict[int, list[str]] = {}
        for name, index in at.items():
            if name not in self.outputs:
                ends.setdefault(index, []).append(name)
        return ends

    def _execute(
        self, op: Any, env: dict[str, Any], watch: Callable[[Any, Tensor], None] | None
    ) -> None:
        name = op.outputs[0].name
        constant = op.type == "const" or op.type.startswith("constexpr_")
        if constant and name in self._kept:
            env[name] = self._kept[name]
            return
        if op.type == "const":
            env[name] = self._kept[name] = self._value(op.attributes["val"])
            return
        values: dict[str, Any] = {}
        for parameter, argument in op.inputs.items():
            bound = [env[b.name] if b.name else self._value(b.value) for b in argument.arguments]
            values[parameter] = bound if parameter == "values" else bound[0]
        try:
            made = OPERATIONS[op.type](Arguments(op.type, values))
        except (RuntimeError, IndexError, KeyError, ValueError) as error:
            raise TargetError(
                f"operation '{name}' ({op.type}) does not run: {error}", path=self.path
            ) from error
        results = made if isinstance(made, list) else [made]
        for target, result in zip(op.outputs, results, strict=True):
            kind = target.type.tensorType
            shape = tuple(int(d.constant.size) for d in kind.dimensions)
            if tuple(result.shape) != shape:
                raise TargetError(
                    f"operation '{target.name}' ({op.type}) gives {tuple(result.shape)}, "
                    f"the program says {shape}",
                    path=self.path,
                )
            rounded = _rounded(result, kind.dataType)
            env[target.name] = rounded
            if constant:
                self._kept[target.name] = rounded
            if watch is not None:
                watch(op, rounded)

    def _value(self, value: Any) -> Any:
        kind = value.type.tensorType
        shape = [int(d.constant.size) for d in kind.dimensions]
        count = math.prod(shape)
        if value.WhichOneof("value") == "blobFileValue":
            raw = self._blob(int(value.blobFileValue.offset), kind.dataType, count)
            return _tensor(raw, kind.dataType, shape)
        stored = value.immediateValue.tensor
        field = stored.WhichOneof("value")
        if field == "strings":
            return stored.strings.values[0]
        if field == "bytes":
            raw = np.frombuffer(stored.bytes.values, np.uint8)
            return _tensor(raw, kind.dataType, shape)
        numbers = np.array(getattr(stored, field).values)
        made = torch.from_numpy(numbers.reshape(shape))
        return made.float() if kind.dataType in _FLOATS else made

    def _blob(self, offset: int, kind: int, count: int) -> NDArray[np.uint8]:
        def fail(what: str) -> TargetError:
            return TargetError(
                f"the weight file is damaged: {what}",
                path=self.path / DATA / "weights" / "weight.bin",
            )

        try:
            weights = self._weights
        except (OSError, ValueError) as error:
            raise fail(str(error)) from None
        if offset + 64 > len(weights):
            raise fail(f"no entry at {offset}, it has {len(weights)} bytes")
        entry = weights[offset : offset + 64]
        magic = int(entry[:4].view("<u4")[0])
        size, start = (int(v) for v in entry[8:24].view("<u8"))
        if magic != _BLOB_MAGIC:
            raise fail(f"no entry at {offset}")
        bits = _TYPES[kind][1]
        if size != -(-count * bits // 8) or start + size > len(weights):
            raise fail(f"the entry at {offset} has {size} bytes from {start}")
        return weights[start : start + size]


def _as_tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _tensor(raw: NDArray[np.uint8], kind: int, shape: Sequence[int]) -> Tensor:
    if kind not in _TYPES:
        raise TargetError(f"data type {kind} is not understood")
    name, bits = _TYPES[kind]
    count = math.prod(shape)
    if bits < 8 and len(raw) != count:
        spread = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
        codes = spread @ (1 << np.arange(bits)).astype(np.uint8)
        if name.startswith("int"):
            half = 1 << (bits - 1)
            return torch.from_numpy(((codes.astype(np.int16) ^ half) - half).reshape(shape))
        return torch.from_numpy(codes.astype(np.int16).reshape(shape))
    values = np.frombuffer(raw.tobytes(), name if bits >= 8 else "uint8")
    made = torch.from_numpy(values.reshape(shape).copy())
    return made.float() if kind in _FLOATS else made


def _rounded(x: Tensor, kind: int) -> Tensor:
    if kind == 10:
        return x.half().float()
    return x.float() if kind in _FLOATS else x
