"""Weights into a .tflite file, code for code.

A converter that sees a weight folds constants into it (a norm's scale, the scale of
attention), rounds it by its own rules and transposes it or not depending on its size. So a
module is converted with its weights as *inputs* (:class:`Open`), and :func:`graft` then
fills them in: the converter never sees a weight, a layer is known by the input it reads,
and conversion costs no memory for weights. Weight data lies behind the flatbuffer, aligned,
and is written and read one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ai_edge_litert.schema_py_generated as schema
import flatbuffers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handheld.errors import TargetError
from handheld.program import Ports
from handheld_export.quantization import BITS, QuantizedWeight

ALIGNMENT = 64
_TYPES = {
    "int8": schema.TensorType.INT8,
    "int4": schema.TensorType.INT4,
    "int2": schema.TensorType.INT2,
}
_OPS = schema.BuiltinOperator


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer or convolution whose weight is grafted.

    Parameters
    ----------
    name : str
        Module path, for messages.
    weight : torch.Tensor
        ``[out, in]`` or ``[out, in, kh, kw]``, the dequantized weight.
    quantized : QuantizedWeight or None
        None keeps the weight in float.
    half : bool
        Whether a float weight is kept in float16.
    float_input : bool
        Whether a layer with codes computes in float: its input is not rounded.
    """

    name: str
    weight: Tensor
    quantized: QuantizedWeight | None
    half: bool = False
    float_input: bool = False

    @property
    def widened(self) -> bool:
        """Whether the engine reads the weight through a DEQUANTIZE, once, when it loads."""
        return self.half or (self.float_input and self.quantized is not None)

    @property
    def bits(self) -> int:
        """Bits of one stored weight."""
        if self.quantized is None:
            return 16 if self.half else 32
        return BITS[self.quantized.grid]

    @property
    def floats(self) -> NDArray[Any]:
        """The weight as it is stored where it has no codes."""
        values: NDArray[Any] = self.weight.numpy()
        return values.astype(np.float16) if self.half else values


class Open(nn.Module):
    """A module that takes its weights as inputs, behind its own inputs.

    Parameters
    ----------
    module : torch.nn.Module
        Its weights are taken out of it: the converter would copy them, read or not.
    inputs : int
        Number of the module's own inputs.
    """

    def __init__(self, module: nn.Module, inputs: int) -> None:
        super().__init__()
        self.inner = module
        self.inputs = inputs
        self.layers: list[Layer] = []
        self.paths: list[str] = []
        for name, layer in module.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                continue
            if isinstance(layer, nn.Conv2d) and layer.groups != 1:
                if getattr(layer, "quantized", None) is not None:
                    raise TargetError(f"layer '{name}': grouped convolutions stay in float")
                continue
            source = getattr(layer, "source_name", name)
            self.paths.append(f"{name}.weight")
            self.layers.append(
                Layer(
                    source,
                    layer.weight.detach(),
                    getattr(layer, "quantized", None),
                    float_input=getattr(layer, "float_input", False),
                )
            )
            layer.weight = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, *tensors: Tensor) -> Any:
        """Run the module with the given weights."""
        weights = dict(zip(self.paths, tensors[self.inputs :], strict=True))
        return torch.func.functional_call(self.inner, weights, tensors[: self.inputs])


def pack(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Pack codes, the first of a byte in its lowest bits."""
    flat: NDArray[np.uint8] = codes.reshape(-1).view(np.uint8)
    if bits == 8:
        return flat
    per_byte = 8 // bits
    if flat.size % per_byte:
        flat = np.concatenate([flat, np.zeros(-flat.size % per_byte, np.uint8)])
    mask = np.uint8((1 << bits) - 1)
    packed: NDArray[np.uint8] = flat[0::per_byte] & mask
    for i in range(1, per_byte):
        packed |= (flat[i::per_byte] & mask) << np.uint8(bits * i)
    return packed


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int8]:
    """Undo :func:`pack`."""
    if bits == 8:
        return packed.view(np.int8)[:count]
    per_byte = 8 // bits
    codes = np.empty((packed.size, per_byte), np.int8)
    for i in range(per_byte):
        shifted = (packed << (8 - bits * (i + 1))).astype(np.uint8)
        codes[:, i] = shifted.view(np.int8) >> (8 - bits)
    return codes.reshape(-1)[:count]


def block_scales(scales: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return group scales as the kernels use them: bfloat16 mantissas stored as float16."""
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float16)


def graft(
    flatbuffer: bytes,
    layers: Sequence[Layer],
    ports: Ports,
    path: Path,
    edit: Callable[[Any], None] | None = None,
) -> None:
    """Write a converted :class:`Open` module with its weights filled in.

    Parameters
    ----------
    flatbuffer : bytes
        What the converter made, inputs in order: ``ports.inputs``, then one per layer.
    layers : sequence of Layer
    ports : Ports
        Names of the signature's inputs and outputs.
    path : Path
        Where to write.
    edit : callable, optional
        Changes the grafted model in place before it is written.

    Raises
    ------
    TargetError
        If a layer's weight is not read by exactly such operators as it can be grafted to.
    """
    model = schema.ModelT.InitFromPackedBuf(flatbuffer, 0)
    if len(model.subgraphs) != 1 or len(model.signatureDefs or ()) != 1:
        raise TargetError(f"the converter made {len(model.subgraphs)} subgraphs instead of one")
    graph = model.subgraphs[0]
    inputs = [t.tensorIndex for t in _in_order(model.signatureDefs[0].inputs, "args_")]
    outputs = [t.tensorIndex for t in _in_order(model.signatureDefs[0].outputs, "output_")]
    if len(inputs) != len(ports.inputs) + len(layers) or len(outputs) != len(ports.outputs):
        raise TargetError(
            f"the converter kept {len(inputs) - len(layers)} inputs and {len(outputs)} outputs "
            f"of {len(ports.inputs)} and {len(ports.outputs)}"
        )
    own, weights = inputs[: len(ports.inputs)], inputs[len(ports.inputs) :]
    surgery = _Surgery(model)
    stored = [surgery.fill(t, layer) for t, layer in zip(weights, layers, strict=True)]
    graph.inputs = own
    graph.outputs = outputs
    _sign(model, own, outputs, ports)
    surgery.products()
    surgery.widen()
    surgery.compact()
    if edit is not None:
        edit(model)
        surgery.compact()
    _write(model, [s for group in stored for s in group], path)


def code_of(model: Any, op: Any) -> int:
    """Return which builtin operator an operator is."""
    entry = model.operatorCodes[op.opcodeIndex]
    return int(max(entry.builtinCode, entry.deprecatedBuiltinCode))


def operator_code(model: Any, builtin: int) -> int:
    """Return where a model's list of operators has a builtin one, which is added if need be."""
    for index, entry in enumerate(model.operatorCodes):
        if max(entry.builtinCode, entry.deprecatedBuiltinCode) == builtin:
            return index
    entry = schema.OperatorCodeT()
    entry.builtinCode = entry.deprecatedBuiltinCode = builtin
    entry.version = 1
    model.operatorCodes.append(entry)
    return len(model.operatorCodes) - 1


def _in_order(maps: Sequence[Any], prefix: str) -> list[Any]:
    return sorted(maps, key=lambda m: int(m.name.decode().removeprefix(prefix)))


@dataclass(eq=False)
class _Stored:
    """A tensor whose data goes behind the flatbuffer."""

    buffer: Any
    layer: Layer
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return -(-int(np.prod(self.shape)) * self.layer.bits // 8)

    def data(self) -> bytes:
        quantized = self.layer.quantized
        values: NDArray[Any] = self.layer.floats if quantized is None else quantized.codes
        if values.ndim == 4:
            values = values.transpose(0, 2, 3, 1)
        values = np.ascontiguousarray(values)
        if quantized is not None:
            values = pack(values, self.layer.bits)
        return values.tobytes()


class _Surgery:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.graph = model.subgraphs[0]
        self.own: set[int] = set()
        """Buffers whose data lies behind the flatbuffer."""
        self.widening: list[Any] = []

    def code(self, op: Any) -> int:
        return code_of(self.model, op)

    def fill(self, index: int, layer: Layer) -> list[_Stored]:
        """Put a layer's weight where the graph reads input ``index``."""
        stored = []
        for tensor, operators in self._kernels(index, layer):
            shape = tuple(layer.weight.shape)
            if self.code(operators[0]) == _OPS.CONV_2D:
                shape = (shape[0], shape[2], shape[3], shape[1])
            item = _Stored(schema.BufferT(), layer, shape)
            self.model.buffers.append(item.buffer)
            new = self._widened(tensor, shape) if layer.widened else self.graph.tensors[tensor]
            new.name = f"{layer.name}.weight"
            new.shape = list(shape)
            new.shapeSignature = None
            new.buffer = len(self.model.buffers) - 1
            self.own.add(new.buffer)
            if layer.quantized is not None:
                self._quantize(new, layer)
                for op in operators:
                    if self.code(op) == _OPS.FULLY_CONNECTED and not layer.widened:
                        op.builtinOptions.asymmetricQuantizeInputs = True
            stored.append(item)
        if not stored:
            raise TargetError(f"layer '{layer.name}': nothing in the converted graph reads it")
        return stored

    def _widened(self, tensor: int, shape: tuple[int, ...]) -> Any:
        """Put a DEQUANTIZE before a tensor and return the narrow tensor that it reads."""
        wide, narrow = self.graph.tensors[tensor], schema.TensorT()
        wide.shape, wide.shapeSignature = list(shape), None
        narrow.type = schema.TensorType.FLOAT16
        self.graph.tensors.append(narrow)
        op = schema.OperatorT()
        op.opcodeIndex = operator_code(self.model, _OPS.DEQUANTIZE)
        op.inputs, op.outputs = [len(self.graph.tensors) - 1], [tensor]
        op.builtinOptionsType = schema.BuiltinOptions.DequantizeOptions
        op.builtinOptions = schema.DequantizeOptionsT()
        self.widening.append(op)
        return narrow

    def widen(self) -> None:
        """Put the operators that widen weights before all others."""
        self.graph.operators = [*self.widening, *self.graph.operators]

    def _kernels(self, index: int, layer: Layer) -> list[tuple[int, list[Any]]]:
        linear = layer.weight.dim() == 2
        found: list[tuple[int, list[Any]]] = []
        direct: list[Any] = []
        for op in self._readers(index):
            code = self.code(op)
            if linear and code == _OPS.FULLY_CONNECTED and op.inputs[1] == index:
                direct.append(op)
            elif not linear and code in (_OPS.TRANSPOSE, _OPS.RESHAPE):
                out = int(op.outputs[0])
                shape = [int(d) for d in self.graph.tensors[out].shape]
                o, i, h, w = layer.weight.shape
                readers = self._readers(out)
                kernels = all(
                    self.code(r) == _OPS.CONV_2D and int(r.inputs[1]) == out for r in readers
                )
                if shape != [o, h, w, i] or not readers or not kernels:
                    raise self._unexpected(layer, op)
                if code == _OPS.RESHAPE and (h, w) != (1, 1):
                    raise self._unexpected(layer, op)
                self.graph.operators = [x for x in self.graph.operators if x is not op]
                found.append((out, readers))
            else:
                raise self._unexpected(layer, op)
        if direct:
            found.append((index, direct))
        return found

    def _unexpected(self, layer: Layer, op: Any) -> TargetError:
        names = {v: k for k, v in vars(_OPS).items() if not k.startswith("_")}
        return TargetError(
            f"layer '{layer.name}': the converter reads its weight with "
            f"{names[self.code(op)]}, which cannot be grafted"
        )

    def _readers(self, index: int) -> list[Any]:
        return [op for op in self.graph.operators if index in [int(i) for i in op.inputs]]

    def _quantize(self, tensor: Any, layer: Layer) -> None:
        weight = layer.quantized
        assert weight is not None
        tensor.type = _TYPES[weight.grid]
        q = schema.QuantizationParametersT()
        q.quantizedDimension = 0
        if weight.group_size is None:
            q.scale = weight.scales
            q.zeroPoint = np.zeros(len(weight.scales), np.int64)
        else:
            scales = schema.TensorT()
            scales.name = f"{layer.name}.scales"
            scales.type = schema.TensorType.FLOAT16
            scales.shape = list(weight.scales.shape)
            scales.buffer = len(self.model.buffers)
            data = schema.BufferT()
            data.data = block_scales(weight.scales).reshape(-1).view(np.uint8)
            self.model.buffers.append(data)
            self.graph.tensors.append(scales)
            details = schema.BlockwiseQuantizationT()
            details.scales = len(self.graph.tensors) - 1
            details.zeroPoints = -1
            details.blockSize = weight.group_size
            q.detailsType = schema.QuantizationDetails.BlockwiseQuantization
            q.details = details
        tensor.quantization = q

    def products(self) -> None:
        """Make products of two computed matrices what they are.

        The converter writes them as FULLY_CONNECTED where the batch is one, and XNNPACK
        takes that with a constant weight only.
        """
        wide = {op.outputs[0] for op in self.widening}
        for op in self.graph.operators:
            if self.code(op) != _OPS.FULLY_CONNECTED:
                continue
            right = self.graph.tensors[int(op.inputs[1])]
            constant = self.model.buffers[right.buffer].data is not None or right.buffer in self.own
            constant = constant or int(op.inputs[1]) in wide
            biased = len(op.inputs) > 2 and int(op.inputs[2]) >= 0
            if constant or biased or op.builtinOptions.fusedActivationFunction:
                continue
            options = schema.BatchMatMulOptionsT()
            options.adjY = True
            op.inputs = [int(i) for i in op.inputs[:2]]
            op.builtinOptions = options
            op.builtinOptionsType = schema.BuiltinOptions.BatchMatMulOptions
            op.opcodeIndex = operator_code(self.model, _OPS.BATCH_MATMUL)

    def compact(self) -> None:
        """Drop tensors, buffers and operator codes that nothing uses any more."""
        graph, model = self.graph, self.model
        used = {int(i) for op in graph.operators for i in (*op.inputs, *op.outputs)}
        used |= {int(i) for i in (*graph.inputs, *graph.outputs)}
        for i in list(used):
            q = graph.tensors[i].quantization if i >= 0 else None
            if q is not None and isinstance(q.details, schema.BlockwiseQuantizationT):
                used.add(q.details.scales)
        keep = sorted(i for i in used if i >= 0)
        place = {old: new for new, old in enumerate(keep)} | {-1: -1}
        graph.tensors = [graph.tensors[i] for i in keep]
        graph.inputs = [place[int(i)] for i in graph.inputs]
        graph.outputs = [place[int(i)] for i in graph.outputs]
        for op in graph.operators:
            op.inputs = [place[int(i)] for i in op.inputs]
            op.outputs = [place[int(i)] for i in op.outputs]
        for signature in model.signatureDefs:
            for item in (*signature.inputs, *signature.outputs):
                item.tensorIndex = place[item.tensorIndex]
        empty = schema.BufferT()
        buffers = [empty]
        for n, tensor in enumerate(graph.tensors):
            q = tensor.quantization
            if q is not None and isinstance(q.details, schema.BlockwiseQuantizationT):
                q.details.scales = place[q.details.scales]
            buffer = model.buffers[tensor.buffer]
            if tensor.buffer and buffer is not empty:
                if not any(b is buffer for b in buffers):
                    buffers.append(buffer)
                tensor.buffer = next(i for i, b in enumerate(buffers) if b is buffer)
            else:
                tensor.buffer = 0
            if not str(tensor.name).endswith((".weight", ".scales")):
                tensor.name = f"t{n}"
        model.buffers = buffers
        codes = sorted({op.opcodeIndex for op in graph.operators})
        model.operatorCodes = [model.operatorCodes[c] for c in codes]
        for op in graph.operators:
            op.opcodeIndex = codes.index(op.opcodeIndex)
        # Names and source locations of the exporting machine have no place in an artifact.
        model.metadata = None
        model.metadataBuffer = None
        model.description = "handheld"


def _sign(model: Any, inputs: Sequence[int], outputs: Sequence[int], ports: Ports) -> None:
    def maps(names: Iterable[str], tensors: Sequence[int]) -> list[Any]:
        result = []
        for name, tensor in zip(names, tensors, strict=True):
            item = schema.TensorMapT()
            item.name = name
            item.tensorIndex = tensor
            result.append(item)
        return result

    signature = model.signatureDefs[0]
    signature.inputs = maps(ports.inputs, inputs)
    signature.outputs = maps(ports.outputs, outputs)


def _write(model: Any, stored: Sequence[_Stored], path: Path) -> None:
    for item in stored:
        item.buffer.offset = item.buffer.size = 2
    at = _aligned(len(packed(model)))
    for item in stored:
        item.buffer.offset, item.buffer.size = at, item.nbytes
        at = _aligned(at + item.nbytes)
    with path.open("wb") as file:
        file.write(packed(model))
        for item in stored:
            _skip(file, item.buffer.offset)
            file.write(item.data())


def packed(model: Any) -> bytearray:
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return builder.Output()  # type: ignore[no-any-return]


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _skip(file: BinaryIO, offset: int) -> None:
    file.write(bytes(offset - file.tell()))


def check(path: Path, layers: Sequence[Layer]) -> None:
    """Read a file back and compare every layer's codes and scales with the student's.

    Raises
    ------
    TargetError
        Naming the first layer that differs.
    """
    data = np.memmap(path, np.uint8, "r")
    model = schema.ModelT.InitFromPackedBuf(data.data, 0)
    for layer in layers:
        if not _same(model, data, layer):
            raise TargetError(
                f"layer '{layer.name}': the file does not hold the student's weight", path=path
            )


def _same(model: Any, data: NDArray[np.uint8], layer: Layer) -> bool:
    graph = model.subgraphs[0]
    name = f"{layer.name}.weight".encode()
    shape = tuple(layer.weight.shape)
    matches = 0
    for tensor in graph.tensors:
        if tensor.name != name or not _values_match(model, data, tensor, layer, shape):
            continue
        if not _scales_match(model, graph, tensor, layer.quantized):
            return False
        matches += 1
    return matches > 0


def _values_match(
    model: Any, data: NDArray[np.uint8], tensor: Any, layer: Layer, shape: tuple[int, ...]
) -> bool:
    buffer = model.buffers[tensor.buffer]
    raw = data[buffer.offset : buffer.offset + buffer.size]
    wanted: NDArray[Any]
    if layer.quantized is None:
        wanted = layer.floats
        values: NDArray[Any] = raw.view(wanted.dtype)
    else:
        wanted = layer.quantized.codes
        if tensor.type != _TYPES[layer.quantized.grid]:
            return False
        values = unpack(raw, BITS[layer.quantized.grid], wanted.size)
    if values.size != wanted.size:
        return False
    stored = values.reshape([int(d) for d in tensor.shape])
    if stored.ndim == 4:
        stored = stored.transpose(0, 3, 1, 2)
    return stored.shape == shape and bool(np.array_equal(stored, wanted))


def _scales_match(model: Any, graph: Any, tensor: Any, weight: QuantizedWeight | None) -> bool:
    if weight is None:
        return tensor.quantization is None or tensor.quantization.scale is None
    q = tensor.quantization
    if weight.group_size is None:
        zeros = not np.asarray(q.zeroPoint).any()
        return zeros and np.asarray(q.scale, np.float32).tobytes() == weight.scales.tobytes()
    scales = model.buffers[graph.tensors[q.details.scales].buffer].data
    return (
        q.details.blockSize == weight.group_size
        and np.asarray(scales, np.uint8).tobytes() == block_scales(weight.scales).tobytes()
    )


def operators(path: Path) -> tuple[set[str], int]:
    """Return the names of the operators that a file uses, and the most dimensions of a tensor."""
    data = np.memmap(path, np.uint8, "r")
    model = schema.ModelT.InitFromPackedBuf(data.data, 0)
    names = {v: k for k, v in vars(_OPS).items() if not k.startswith("_")}
    codes = [names[int(max(c.builtinCode, c.deprecatedBuiltinCode))] for c in model.operatorCodes]
    used = {codes[op.opcodeIndex] for graph in model.subgraphs for op in graph.operators}
    shapes = [t.shape for graph in model.subgraphs for t in graph.tensors if t.shape is not None]
    return used, max(map(len, shapes), default=0)


def storage(layers: Iterable[Layer]) -> Mapping[str, int]:
    """Count weights by how they are stored."""
    counts: dict[str, int] = {}
    for layer in layers:
        kind = f"float{layer.bits}" if layer.quantized is None else layer.quantized.grid
        counts[kind] = counts.get(kind, 0) + layer.weight.numel()
    return counts
