import HandheldProtocol

/// Runs a program as runtime/handheld/execute.py does, to the bit.
public struct Executor {
    public typealias Call = (_ artifact: String, _ args: [String: Tensor]) throws -> [String: Tensor]

    public let program: Program
    public let constants: [String: Tensor]

    public init(program: Program, constants: [String: Tensor]) {
        self.program = program
        self.constants = constants
    }

    /// Draws the noise inputs that are not given, runs every operation, and returns the outputs by
    /// role. Tensors are let go after their last use.
    public func run(
        inputs: [String: Tensor], seed: UInt64?, call: Call
    ) throws -> [String: Tensor] {
        var tensors = constants
        for input in program.inputs {
            let spec = try self.spec(input.name)
            if let given = inputs[input.name] {
                tensors[input.name] = try checked(given, input.name, .input)
            } else if input.role == .noise, let seed {
                let count = spec.shape.reduce(1, *)
                let noise = Noise.normal(seed: seed, count: count, stream: input.stream)
                tensors[input.name] = try Tensor(shape: spec.shape, floats: noise)
            } else {
                throw HarnessFailure(.input, "input '\(input.name)' is missing")
            }
        }
        let last = lastReads()
        for (index, operation) in program.ops.enumerated() {
            for (name, value) in try run(operation, tensors, call) {
                tensors[name] = try checked(value, name, .bundle)
            }
            for name in operation.reads + operation.writes
            where last[name, default: -1] <= index && constants[name] == nil {
                tensors[name] = nil
            }
        }
        return try program.outputs.mapValues { try read(tensors, $0) }
    }

    private func spec(_ name: String) throws -> TensorSpec {
        guard let spec = program.tensors[name] else {
            throw HarnessFailure(.bundle, "tensor '\(name)' is not declared")
        }
        return spec
    }

    private func checked(_ value: Tensor, _ name: String, _ code: Failure.Code) throws -> Tensor {
        let spec = try self.spec(name)
        guard value.shape == spec.shape, value.dtype == spec.dtype else {
            throw HarnessFailure(
                code, "'\(name)' is \(value.dtype) \(value.shape), not \(spec.dtype) \(spec.shape)")
        }
        return value
    }

    private func lastReads() -> [String: Int] {
        var last: [String: Int] = [:]
        for (index, operation) in program.ops.enumerated() {
            for name in operation.reads { last[name] = index }
        }
        for name in program.outputs.values { last[name] = program.ops.count }
        return last
    }

    private func read(_ tensors: [String: Tensor], _ name: String) throws -> Tensor {
        guard let value = tensors[name] else {
            throw HarnessFailure(.bundle, "tensor '\(name)' is read before it is written")
        }
        return value
    }

    private func run(
        _ operation: Operation, _ tensors: [String: Tensor], _ call: Call
    ) throws -> [String: Tensor] {
        switch operation {
        case let .call(artifact, args, results):
            let found = try call(artifact, args.mapValues { try read(tensors, $0) })
            var out: [String: Tensor] = [:]
            for (port, name) in results {
                guard let value = found[port] else {
                    throw HarnessFailure(.engine, "artifact '\(artifact)' gave no '\(port)'")
                }
                out[name] = value
            }
            return out
        case let .slice(x, axis, start, length, out):
            let x = try read(tensors, x)
            let l = try Layout(x, axis)
            guard start + length <= l.extent else { throw HarnessFailure(.bundle, "a slice is outside") }
            var bytes: [UInt8] = []
            bytes.reserveCapacity(l.outer * length * l.inner)
            for i in 0..<l.outer {
                let from = (i * l.extent + start) * l.inner
                bytes += x.bytes[from..<(from + length * l.inner)]
            }
            return [out: try x.with(axis, length, bytes)]
        case let .pad(x, axis, before, after, value, out):
            let x = try read(tensors, x)
            let l = try Layout(x, axis)
            let one = Kernels.cast(Float(value), x.dtype)
            func fill(_ rows: Int) -> [UInt8] {
                Array(repeatElement(one, count: rows * l.inner / x.dtype.bytes).joined())
            }
            let (head, tail) = (fill(before), fill(after))
            var bytes: [UInt8] = []
            for i in 0..<l.outer {
                let from = i * l.extent * l.inner
                bytes += head
                bytes += x.bytes[from..<(from + l.extent * l.inner)]
                bytes += tail
            }
            return [out: try x.with(axis, before + l.extent + after, bytes)]
        case let .concat(names, axis, out):
            let xs = try names.map { try read(tensors, $0) }
            let layouts = try xs.map { try Layout($0, axis) }
            guard let first = layouts.first,
                layouts.allSatisfy({ $0.outer == first.outer && $0.inner == first.inner })
            else { throw HarnessFailure(.bundle, "tensors to join do not fit") }
            var bytes: [UInt8] = []
            for i in 0..<first.outer {
                for (x, l) in zip(xs, layouts) {
                    let from = i * l.extent * l.inner
                    bytes += x.bytes[from..<(from + l.extent * l.inner)]
                }
            }
            return [out: try xs[0].with(axis, layouts.reduce(0) { $0 + $1.extent }, bytes)]
        case let .affine(terms, bias, out):
            let read = try terms.map { (Float($0.scale), try self.read(tensors, $0.x).widened()) }
            let spec = try self.spec(out)
            return [out: try Kernels.affine(read, Float(bias), spec)]
        case let .moments(x, groups, out):
            let x = try read(tensors, x)
            return [out: try Kernels.moments(x, groups)]
        case let .normalizer(moments, eps, mean, rstd):
            guard let channels = try spec(mean).shape.last else {
                throw HarnessFailure(.bundle, "'\(mean)' has no axes")
            }
            let parts = try moments.map { try read(tensors, $0) }
            let (m, r) = try Kernels.normalizer(parts, eps, channels)
            return [mean: m, rstd: r]
        }
    }
}

/// A tensor seen from one axis: `outer` times `extent` rows of `inner` bytes.
private struct Layout {
    var outer: Int, extent: Int, inner: Int

    init(_ x: Tensor, _ axis: Int) throws {
        guard axis < x.shape.count else { throw HarnessFailure(.bundle, "an axis is outside") }
        outer = x.shape[..<axis].reduce(1, *)
        extent = x.shape[axis]
        inner = x.shape[(axis + 1)...].reduce(1, *) * x.dtype.bytes
    }
}

extension Tensor {
    fileprivate func with(_ axis: Int, _ extent: Int, _ bytes: [UInt8]) throws -> Tensor {
        var shape = self.shape
        shape[axis] = extent
        return try Tensor(shape: shape, dtype: dtype, bytes: bytes)
    }
}

extension Operation {
    /// Names of the tensors that it reads.
    public var reads: [String] {
        switch self {
        case let .call(_, args, _): Array(args.values)
        case let .slice(x, _, _, _, _): [x]
        case let .pad(x, _, _, _, _, _): [x]
        case let .concat(xs, _, _): xs
        case let .affine(terms, _, _): terms.map(\.x)
        case let .moments(x, _, _): [x]
        case let .normalizer(moments, _, _, _): moments
        }
    }

    /// Names of the tensors that it writes.
    public var writes: [String] {
        switch self {
        case let .call(_, _, results): Array(results.values)
        case let .slice(_, _, _, _, out): [out]
        case let .pad(_, _, _, _, _, out): [out]
        case let .concat(_, _, out): [out]
        case let .affine(_, _, out): [out]
        case let .moments(_, _, out): [out]
        case let .normalizer(_, _, mean, rstd): [mean, rstd]
        }
    }
}
