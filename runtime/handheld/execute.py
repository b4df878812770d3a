"""Run a program with numpy: the reference that every executor must match to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handheld import noise
from handheld.errors import BundleError, UsageError
from handheld.program import (
    Affine,
    Call,
    Concat,
    Moments,
    Normalizer,
    Op,
    Pad,
    Program,
    Slice,
    TensorSpec,
    reads,
    writes,
)

Array = NDArray[Any]
CallFunction = Callable[[str, Mapping[str, Array]], Mapping[str, Array]]
"""Runs an artifact: ``call(artifact_id, args) -> results``, both by port name."""

_CHUNK = 1 << 16


def execute(
    program: Program,
    constants: Mapping[str, Array],
    inputs: Mapping[str, Array],
    call: CallFunction,
    *,
    seed: int | None = None,
) -> dict[str, Array]:
    """Run a program.

    Parameters
    ----------
    program : Program
        Checked with :func:`handheld.program.check`.
    constants : mapping of name to array
    inputs : mapping of name to array
        One array per program input, with the declared shape and dtype.
    call : callable
        Runs an artifact.
    seed : int, optional
        Draws the noise inputs that ``inputs`` lacks.

    Returns
    -------
    dict of output role to array

    Raises
    ------
    UsageError
        If an input is missing, unknown or has the wrong shape or dtype.
    BundleError
        If an artifact returns something else than its ports promise.
    """
    tensors: dict[str, Array] = dict(constants)
    tensors.update(_inputs(program, inputs, seed))
    last = _last_reads(program)
    for i, op in enumerate(program.ops):
        results = _run(op, tensors, call, program.tensors)
        for name, value in results.items():
            if not _fits(value, program.tensors[name]):
                raise BundleError(
                    f"tensor '{name}' came out as {value.dtype}{list(value.shape)}",
                    field=f"program.ops[{i}]",
                    remedy="export the bundle again",
                )
            tensors[name] = value
        for name in {*reads(op), *results}:
            if last.get(name, -1) <= i and name not in constants:
                del tensors[name]
    return {role: tensors[name] for role, name in program.outputs.items()}


def activation_bytes(program: Program) -> int:
    """Return the largest number of bytes that tensors of the program occupy at once.

    Counts program inputs and results from their write to their last read, outputs to the
    end; constants are not counted, and views count as copies.
    """
    last = _last_reads(program)
    live = {item.name: program.tensors[item.name].nbytes for item in program.inputs}
    total = peak = sum(live.values())
    for i, op in enumerate(program.ops):
        for name in writes(op):
            live[name] = program.tensors[name].nbytes
            total += live[name]
        peak = max(peak, total)
        for name in {*reads(op), *writes(op)}:
            if last.get(name, -1) <= i:
                total -= live.pop(name, 0)
    return peak


def _last_reads(program: Program) -> dict[str, int]:
    last = {name: i for i, op in enumerate(program.ops) for name in reads(op)}
    last.update(dict.fromkeys(program.outputs.values(), len(program.ops)))
    return last


def _fits(value: Array, spec: TensorSpec) -> bool:
    return value.shape == spec.shape and value.dtype == np.dtype(spec.dtype)


def _inputs(
    program: Program, given: Mapping[str, Array], seed: int | None
) -> dict[str, NDArray[Any]]:
    wanted = {item.name: item for item in program.inputs}
    if unknown := sorted(set(given) - set(wanted)):
        raise UsageError(
            f"the program has no input '{unknown[0]}'", remedy=f"it has {', '.join(wanted)}"
        )
    out: dict[str, Array] = {}
    for name, item in wanted.items():
        spec = program.tensors[name]
        if name in given:
            out[name] = np.ascontiguousarray(given[name])
        elif item.role == "noise" and seed is not None:
            out[name] = noise.normal(seed, spec.shape, item.stream)
        else:
            raise UsageError(f"input '{name}' is missing")
        if not _fits(out[name], spec):
            raise UsageError(
                f"input '{name}' is {out[name].dtype}{list(out[name].shape)}, "
                f"the program wants {spec.dtype}{list(spec.shape)}"
            )
    return out


def _run(
    op: Op, tensors: Mapping[str, Array], call: CallFunction, declared: Mapping[str, TensorSpec]
) -> dict[str, Array]:
    match op:
        case Call():
            results = call(
                op.artifact, {port: np.ascontiguousarray(tensors[n]) for port, n in op.args.items()}
            )
            if set(results) != set(op.results):
                raise BundleError(
                    f"artifact '{op.artifact}' returned ports {sorted(results)} "
                    f"instead of {sorted(op.results)}"
                )
            return {op.results[port]: value for port, value in results.items()}
        case Slice():
            x = tensors[op.x]
            index = (slice(None),) * op.axis + (slice(op.start, op.start + op.length),)
            return {op.out: x[index]}
        case Pad():
            x = tensors[op.x]
            widths = [(0, 0)] * x.ndim
            widths[op.axis] = (op.before, op.after)
            return {op.out: np.pad(x, widths, constant_values=_cast(op.value, x.dtype))}
        case Concat():
            return {op.out: np.concatenate([tensors[n] for n in op.xs], axis=op.axis)}
        case Affine():
            return {op.out: _affine(op, tensors, declared[op.out])}
        case Moments():
            return {op.out: _moments(tensors[op.x], op.groups)}
        case Normalizer():
            mean, rstd = _normalizer(
                [tensors[n] for n in op.moments], op.eps, declared[op.mean].shape[-1]
            )
            return {op.mean: mean, op.rstd: rstd}


def _cast(value: float, dtype: np.dtype[Any]) -> Any:
    single = np.float32(value)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return dtype.type(single)
    info = np.iinfo(dtype)
    return dtype.type(min(max(int(np.rint(single)), info.min), info.max))


def _affine(op: Affine, tensors: Mapping[str, Array], spec: TensorSpec) -> Array:
    with np.errstate(all="ignore"):
        total = np.float32(op.terms[0].scale) * tensors[op.terms[0].x]
        for term in op.terms[1:]:
            total += np.float32(term.scale) * tensors[term.x]
        total += np.float32(op.bias)
        if spec.dtype == "uint8":
            rounded = np.clip(np.rint(total), 0.0, 255.0)
            return np.where(np.isnan(rounded), np.float32(0), rounded).astype(np.uint8)
        return total.astype(spec.dtype, copy=False)


def _sum(x: NDArray[np.float64], groups: int) -> NDArray[np.float64]:
    """Sum ``[positions, C]`` in order over positions, then over each group's channels.

    ``accumulate`` adds one by one, where ``np.sum`` would add pairwise.
    """
    total = np.zeros(x.shape[1])
    for start in range(0, len(x), _CHUNK):
        chunk = np.concatenate([total[None], x[start : start + _CHUNK]])
        total = np.add.accumulate(chunk, axis=0)[-1]
    by_group = total.reshape(groups, -1)
    padded = np.concatenate([np.zeros((groups, 1)), by_group], axis=1)
    result: NDArray[np.float64] = np.add.accumulate(padded, axis=1)[:, -1]
    return result


def _moments(x: Array, groups: int) -> Array:
    channels = x.shape[3]
    flat = x.reshape(-1, channels).astype(np.float64)
    count = flat.size / groups
    with np.errstate(all="ignore"):
        mean = _sum(flat, groups) / count
        deviation = flat - np.repeat(mean, channels // groups)
        squares = _sum(deviation * deviation, groups)
        return np.stack([np.full(groups, count), mean, squares])[None].astype(np.float32)


def _normalizer(moments: list[Array], eps: float, channels: int) -> tuple[Array, Array]:
    with np.errstate(all="ignore"):
        n, mean, m2 = moments[0][0].astype(np.float64)
        for item in moments[1:]:
            k, other_mean, other_m2 = item[0].astype(np.float64)
            d, t = other_mean - mean, n + k
            mean = mean + d * (k / t)
            m2 = (m2 + other_m2) + (d * d) * (n * k / t)
            n = t
        rstd = 1.0 / np.sqrt(m2 / n + eps)
    shape = (1, 1, 1, channels)
    repeat = channels // len(mean)
    return (
        np.repeat(mean.astype(np.float32), repeat).reshape(shape),
        np.repeat(rstd.astype(np.float32), repeat).reshape(shape),
    )
