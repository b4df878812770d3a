"""The program: a straight line of calls and small arithmetic over named tensors.

A program is data. It names every tensor with its shape and dtype, and lists operations
that run in order, each of which writes tensors that nothing wrote before. The vocabulary
is closed: :class:`Call`, :class:`Slice`, :class:`Pad`, :class:`Concat`, :class:`Affine`,
:class:`Moments` and :class:`Normalizer`. Loops (diffusion steps, decoder bands) are
unrolled when the program is written; what differs between their turns is a constant that
a call takes as an argument, so all turns share artifacts.

Tensors are dense and row-major. Pictures and latents are ``[N, H, W, C]``. Arithmetic is
IEEE-754 binary32, evaluated term by term in the order written and never contracted to
fused multiply-add, so every implementation gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from handheld.errors import BundleError

DType = Literal["float32", "float16", "uint8", "int8", "int32"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "uint8": 1, "int8": 1, "int32": 4}
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@\-]{1,128}$")]
Extent = Annotated[int, Field(ge=1, le=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Offset = Annotated[int, Field(ge=0, le=2**31)]
Axis = Annotated[int, Field(ge=0, le=5)]
Binary32 = Annotated[float, Field(ge=-3.4028234663852886e38, le=3.4028234663852886e38)]
"""A number within the range of binary32, to which it is rounded before use."""
MOST_OPS: Final = 16_384
"""Operations that the harness takes."""


class Model(BaseModel):
    """Base of all persisted models: immutable; unknown fields, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorSpec(Model):
    """Shape and dtype of a tensor."""

    shape: Annotated[tuple[Extent, ...], Field(min_length=1, max_length=6)]
    dtype: DType = "float32"

    @property
    def elements(self) -> int:
        """Number of elements."""
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.elements * DTYPE_BYTES[self.dtype]


class Input(Model):
    """A named input of the program.

    ``noise`` inputs are drawn by :mod:`handheld.noise` from the job's seed and
    ``stream``. The others are given by the caller; ``negative`` marks those that belong to
    the negative prompt of guidance.
    """

    name: Name
    role: Literal["noise", "prompt_embeds", "pooled", "latent", "other"]
    stream: Annotated[int, Field(ge=0, lt=2**32)] = 0
    negative: bool = False


class Call(Model):
    """Run an artifact: ``args`` and ``results`` map its port names to tensor names."""

    op: Literal["call"] = "call"
    artifact: Name
    args: dict[Name, Name]
    results: dict[Name, Name]


class Slice(Model):
    """``out = x[start : start + length]`` along ``axis``."""

    op: Literal["slice"] = "slice"
    x: Name
    axis: Axis
    start: Offset
    length: Extent
    out: Name


class Pad(Model):
    """``out`` is ``x`` with ``before`` and ``after`` elements added along ``axis``.

    The new elements hold ``value``, rounded to binary32 and then to the dtype of ``x``; if
    that is an integer dtype, rounded half to even and saturated.
    """

    op: Literal["pad"] = "pad"
    x: Name
    axis: Axis
    before: Offset = 0
    after: Offset = 0
    value: Binary32 = 0.0
    out: Name


class Concat(Model):
    """Concatenate ``xs`` along ``axis``."""

    op: Literal["concat"] = "concat"
    xs: Annotated[tuple[Name, ...], Field(min_length=1)]
    axis: Axis
    out: Name


class Term(Model):
    """One term of an affine combination."""

    x: Name
    scale: Binary32


class Affine(Model):
    """``out = ((scale0*x0 + scale1*x1) + ...) + bias``, elementwise in binary32.

    All operands have the shape of ``out`` and are float32 or float16, which is widened first.
    Scales and bias are rounded to binary32 first. The bias is always added. If ``out`` is
    float16 the result is rounded half to even, to infinity where it leaves the type. If it is
    uint8 the result is rounded half to even and saturated to 0..255; NaN becomes 0.
    """

    op: Literal["affine"] = "affine"
    terms: Annotated[tuple[Term, ...], Field(min_length=1)]
    bias: Binary32 = 0.0
    out: Name


class Moments(Model):
    """Group statistics of one band.

    ``x`` is ``[1, h, W, C]``; ``out`` is ``[1, 3, groups]`` float32 and holds the number of
    elements ``n``, the mean and the sum of squared deviations of each group of
    ``C / groups`` neighbouring channels. Sums are binary64 and start at 0: first every
    channel by itself over the positions in row-major order, then the group's channels in
    order. ``mean = sum(x) / n``, then ``sum(d * d)`` of ``d = x - mean`` with the mean in
    binary64. The three results are rounded to binary32.
    """

    op: Literal["moments"] = "moments"
    x: Name
    groups: Extent
    out: Name


class Normalizer(Model):
    """Combine the :class:`Moments` of bands into what GroupNorm needs.

    ``mean`` and ``rstd`` are ``[1, 1, 1, C]`` float32 with the group's mean and
    ``1 / sqrt(m2 / n + eps)`` repeated for its channels. Moments combine in order (Chan,
    Golub and LeVeque, 1979), in binary64: from ``(n, mean, m2)`` and the next
    ``(k, mean', m2')``, with ``d = mean' - mean`` and ``t = n + k``, come
    ``(t, mean + d * (k / t), (m2 + m2') + (d * d) * (n * k / t))``.
    """

    op: Literal["normalizer"] = "normalizer"
    moments: Annotated[tuple[Name, ...], Field(min_length=1)]
    eps: Annotated[float, Field(gt=0, le=1)]
    mean: Name
    rstd: Name


Op = Annotated[
    Call | Slice | Pad | Concat | Affine | Moments | Normalizer, Field(discriminator="op")
]


class Program(Model):
    """A straight-line program from inputs to outputs."""

    inputs: tuple[Input, ...]
    tensors: dict[Name, TensorSpec]
    ops: tuple[Op, ...]
    outputs: Annotated[dict[Name, Name], Field(min_length=1)]
    """Output role (``picture``, ``latent``) to tensor name."""


class Ports(Model):
    """What an artifact takes and gives, in the order of its engine's signature."""

    inputs: dict[Name, TensorSpec]
    outputs: dict[Name, TensorSpec]


def reads(op: Op) -> tuple[str, ...]:
    """Names of the tensors that ``op`` reads."""
    match op:
        case Call():
            return tuple(op.args.values())
        case Slice() | Pad() | Moments():
            return (op.x,)
        case Concat():
            return op.xs
        case Affine():
            return tuple(t.x for t in op.terms)
        case Normalizer():
            return op.moments


def writes(op: Op) -> tuple[str, ...]:
    """Names of the tensors that ``op`` writes."""
    match op:
        case Call():
            return tuple(op.results.values())
        case Normalizer():
            return (op.mean, op.rstd)
        case _:
            return (op.out,)


def renamed(
    program: Program, *, artifacts: Mapping[str, str], tensors: Mapping[str, str]
) -> Program:
    """Return a program that calls artifacts and reads constants by other names.

    Parameters
    ----------
    program : Program
    artifacts, tensors : mapping of old to new name
        What is not there keeps its name. The tensors are constants.
    """

    def one(name: str) -> str:
        return tensors.get(name, name)

    ops: list[Op] = []
    for op in program.ops:
        match op:
            case Call():
                artifact = artifacts.get(op.artifact, op.artifact)
                args = {port: one(name) for port, name in op.args.items()}
                ops.append(op.model_copy(update={"artifact": artifact, "args": args}))
            case Slice() | Pad() | Moments():
                ops.append(op.model_copy(update={"x": one(op.x)}))
            case Concat():
                ops.append(op.model_copy(update={"xs": tuple(map(one, op.xs))}))
            case Affine():
                terms = tuple(t.model_copy(update={"x": one(t.x)}) for t in op.terms)
                ops.append(op.model_copy(update={"terms": terms}))
            case Normalizer():
                ops.append(op.model_copy(update={"moments": tuple(map(one, op.moments))}))
    outputs = {role: one(name) for role, name in program.outputs.items()}
    return program.model_copy(update={"ops": tuple(ops), "outputs": outputs})


def decoded(program: Program) -> str:
    """Return the name of the tensor that the picture is rounded from."""
    rounded = (op for op in program.ops if isinstance(op, Affine))
    return next(op.terms[0].x for op in rounded if op.out == program.outputs["picture"])


def halves(program: Program) -> bool:
    """Return whether a program computes with float16, which version 1 of manifests did not."""

    def half(name: str) -> bool:
        return name in program.tensors and program.tensors[name].dtype == "float16"

    sums = (op for op in program.ops if isinstance(op, Affine))
    return any(half(name) for op in sums for name in (*reads(op), *writes(op)))


def check(
    program: Program,
    artifacts: Mapping[str, Ports],
    constants: Mapping[str, TensorSpec],
    *,
    field: str = "program",
) -> None:
    """Check that a program is well formed.

    Parameters
    ----------
    program : Program
    artifacts : mapping of artifact id to Ports
    constants : mapping of constant name to TensorSpec
    field : str
        Prefix of the field names in errors.

    Raises
    ------
    BundleError
        For an unknown artifact, a missing or extra port, a tensor read before it is
        written, written twice or never declared, and for every shape or dtype mismatch.
    """

    def fail(where: str, message: str) -> BundleError:
        return BundleError(message, field=f"{field}.{where}", remedy="export the bundle again")

    known: dict[str, TensorSpec] = dict(constants)
    for i, item in enumerate(program.inputs):
        spec = program.tensors.get(item.name)
        if spec is None:
            raise fail(f"inputs[{i}]", f"tensor '{item.name}' is not declared")
        if item.name in known:
            raise fail(f"inputs[{i}]", f"tensor '{item.name}' is defined twice")
        if item.role == "noise" and spec.dtype != "float32":
            raise fail(f"inputs[{i}]", f"noise '{item.name}' is {spec.dtype}, not float32")
        known[item.name] = spec

    for i, op in enumerate(program.ops):
        where = f"ops[{i}]"
        for name in reads(op):
            if name not in known:
                raise fail(where, f"reads tensor '{name}', which nothing has written")
        written = writes(op)
        for name in written:
            if name in known or written.count(name) > 1:
                raise fail(where, f"writes tensor '{name}' a second time")
            if name not in program.tensors:
                raise fail(where, f"tensor '{name}' is not declared")
        try:
            expected = _results(op, known, program.tensors, artifacts)
        except _MismatchError as error:
            raise fail(where, str(error)) from None
        for name, spec in expected.items():
            if program.tensors[name] != spec:
                declared = program.tensors[name]
                raise fail(
                    where,
                    f"tensor '{name}' is declared {declared.dtype}{list(declared.shape)} "
                    f"but computed as {spec.dtype}{list(spec.shape)}",
                )
            known[name] = spec

    for role, name in program.outputs.items():
        if name not in known:
            raise fail(f"outputs.{role}", f"tensor '{name}' is never written")
    for name in program.tensors:
        if name not in known or name in constants:
            raise fail(f"tensors.{name}", "declared but never written")


class _MismatchError(Exception):
    """An operation does not fit the tensors it is given."""


def _results(
    op: Op,
    known: Mapping[str, TensorSpec],
    declared: Mapping[str, TensorSpec],
    artifacts: Mapping[str, Ports],
) -> dict[str, TensorSpec]:
    """Compute the specs of the tensors that ``op`` writes."""
    match op:
        case Call():
            ports = artifacts.get(op.artifact)
            if ports is None:
                raise _MismatchError(
                    f"calls artifact '{op.artifact}', which the bundle does not have"
                )
            for kind, given, wanted in (
                ("argument", op.args, ports.inputs),
                ("result", op.results, ports.outputs),
            ):
                if missing := sorted(set(wanted) - set(given)):
                    raise _MismatchError(f"call of '{op.artifact}' lacks {kind} '{missing[0]}'")
                if extra := sorted(set(given) - set(wanted)):
                    raise _MismatchError(
                        f"call of '{op.artifact}' has an unknown {kind} '{extra[0]}'"
                    )
            for port, name in op.args.items():
                if known[name] != ports.inputs[port]:
                    have, want = known[name], ports.inputs[port]
                    raise _MismatchError(
                        f"argument '{port}' of '{op.artifact}' wants "
                        f"{want.dtype}{list(want.shape)}, tensor '{name}' is "
                        f"{have.dtype}{list(have.shape)}"
                    )
            return {op.results[p]: s for p, s in ports.outputs.items()}
        case Slice():
            x = known[op.x]
            if op.axis >= len(x.shape) or op.start + op.length > x.shape[op.axis]:
                raise _MismatchError(f"slice leaves tensor '{op.x}' of shape {list(x.shape)}")
            return {op.out: _resized(x, op.axis, op.length)}
        case Pad():
            x = known[op.x]
            if op.axis >= len(x.shape):
                raise _MismatchError(f"axis {op.axis} is not one of tensor '{op.x}'")
            return {op.out: _resized(x, op.axis, x.shape[op.axis] + op.before + op.after)}
        case Concat():
            first = known[op.xs[0]]
            if op.axis >= len(first.shape):
                raise _MismatchError(f"axis {op.axis} is not one of tensor '{op.xs[0]}'")
            total = 0
            for name in op.xs:
                x = known[name]
                if len(x.shape) != len(first.shape) or (
                    _resized(x, op.axis, 1) != _resized(first, op.axis, 1)
                ):
                    raise _MismatchError(f"tensor '{name}' does not fit the concatenation")
                total += x.shape[op.axis]
            return {op.out: _resized(first, op.axis, total)}
        case Affine():
            out = declared[op.out]
            if out.dtype not in ("float32", "float16", "uint8"):
                raise _MismatchError("an affine result is float32, float16 or uint8")
            for term in op.terms:
                x = known[term.x]
                if x.shape != out.shape or x.dtype not in ("float32", "float16"):
                    raise _MismatchError(
                        f"term '{term.x}' does not have the result's shape in float32 or float16"
                    )
            return {op.out: out}
        case Moments():
            x = known[op.x]
            if len(x.shape) != 4 or x.shape[0] != 1 or x.dtype != "float32":
                raise _MismatchError(f"tensor '{op.x}' is not [1, h, W, C] in float32")
            if x.shape[3] % op.groups:
                raise _MismatchError(f"tensor '{op.x}' does not divide into {op.groups} groups")
            return {op.out: TensorSpec(shape=(1, 3, op.groups))}
        case Normalizer():
            out = declared[op.mean]
            for name in op.moments:
                x = known[name]
                if len(x.shape) != 3 or x.shape[:2] != (1, 3) or x.dtype != "float32":
                    raise _MismatchError(f"tensor '{name}' does not hold moments")
                if out.shape[-1] % x.shape[2]:
                    raise _MismatchError(f"tensor '{name}' does not hold moments for '{op.mean}'")
                if x != known[op.moments[0]]:
                    raise _MismatchError(f"tensor '{name}' has other groups than '{op.moments[0]}'")
            spec = TensorSpec(shape=(1, 1, 1, out.shape[-1]))
            return {op.mean: spec, op.rstd: spec}


def _resized(spec: TensorSpec, axis: int, extent: int) -> TensorSpec:
    if extent > 2**31:
        raise _MismatchError(f"extent {extent} is too large")
    shape = (*spec.shape[:axis], extent, *spec.shape[axis + 1 :])
    return TensorSpec(shape=shape, dtype=spec.dtype)
