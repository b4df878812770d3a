/// What is wrong with a program, and where in it.
public struct ProgramFault: Error, Equatable {
    public var field: String
    public var message: String
}

extension Program {
    /// Checks that a program is well formed, as runtime/handheld/program.py does: every tensor is
    /// written once and before it is read, and all shapes and types fit.
    public func check(
        artifacts: [String: Manifest.Ports], constants: [String: TensorSpec]
    ) throws {
        var known = constants
        for (index, input) in inputs.enumerated() {
            func fail(_ message: String) -> ProgramFault {
                ProgramFault(field: "inputs[\(index)]", message: message)
            }
            guard let spec = tensors[input.name] else {
                throw fail("tensor '\(input.name)' is not declared")
            }
            guard known.updateValue(spec, forKey: input.name) == nil else {
                throw fail("tensor '\(input.name)' is defined twice")
            }
            guard input.role != .noise || spec.dtype == .float32 else {
                throw fail("noise '\(input.name)' is not float32")
            }
        }
        for (index, operation) in ops.enumerated() {
            let results: [(String, TensorSpec)]
            do {
                results = try self.results(of: operation, known, artifacts)
            } catch let mismatch as Mismatch {
                throw ProgramFault(field: "ops[\(index)]", message: mismatch.message)
            }
            for (name, spec) in results {
                func fail(_ message: String) -> ProgramFault {
                    ProgramFault(field: "ops[\(index)]", message: message)
                }
                guard let declared = tensors[name] else {
                    throw fail("tensor '\(name)' is not declared")
                }
                guard declared == spec else {
                    throw fail("tensor '\(name)' is \(declared.text), but computed as \(spec.text)")
                }
                guard known.updateValue(spec, forKey: name) == nil else {
                    throw fail("writes tensor '\(name)' a second time")
                }
            }
        }
        for (role, name) in outputs where known[name] == nil {
            throw ProgramFault(field: "outputs.\(role)", message: "tensor '\(name)' is never written")
        }
        for name in tensors.keys where known[name] == nil || constants[name] != nil {
            throw ProgramFault(field: "tensors.\(name)", message: "declared but never written")
        }
    }

    private struct Mismatch: Error {
        var message: String
    }

    /// The tensors that an operation writes, as they follow from what it reads.
    private func results(
        of operation: Operation, _ known: [String: TensorSpec], _ artifacts: [String: Manifest.Ports]
    ) throws -> [(String, TensorSpec)] {
        func require(_ condition: Bool, _ message: @autoclosure () -> String) throws {
            if !condition { throw Mismatch(message: message()) }
        }
        func read(_ name: String) throws -> TensorSpec {
            guard let spec = known[name] else {
                throw Mismatch(message: "reads tensor '\(name)', which nothing has written")
            }
            return spec
        }
        func declared(_ name: String) throws -> TensorSpec {
            guard let spec = tensors[name] else {
                throw Mismatch(message: "tensor '\(name)' is not declared")
            }
            return spec
        }
        func resized(_ spec: TensorSpec, _ axis: Int, _ extent: Int) throws -> TensorSpec {
            try require(axis < spec.shape.count, "axis \(axis) is not one of \(spec.text)")
            try require(extent <= TensorSpec.mostExtent, "extent \(extent) is too large")
            var out = spec
            out.shape[axis] = extent
            return out
        }
        switch operation {
        case let .call(artifact, args, results):
            guard let ports = artifacts[artifact] else {
                throw Mismatch(message: "calls artifact '\(artifact)', which the bundle does not have")
            }
            try require(
                Set(args.keys) == Set(ports.inputs.keys),
                "the arguments of '\(artifact)' are not those that it has")
            try require(
                Set(results.keys) == Set(ports.outputs.keys),
                "the results of '\(artifact)' are not those that it has")
            for (port, name) in args {
                let (have, want) = (try read(name), ports.inputs[port]!)
                try require(
                    have == want,
                    "argument '\(port)' of '\(artifact)' wants \(want.text), '\(name)' is \(have.text)")
            }
            return results.map { ($1, ports.outputs[$0]!) }
        case let .slice(x, axis, start, length, out):
            let spec = try read(x)
            try require(
                axis < spec.shape.count && start + length <= spec.shape[axis],
                "slice leaves tensor '\(x)', which is \(spec.text)")
            return [(out, try resized(spec, axis, length))]
        case let .pad(x, axis, before, after, _, out):
            let spec = try read(x)
            try require(axis < spec.shape.count, "axis \(axis) is not one of tensor '\(x)'")
            return [(out, try resized(spec, axis, spec.shape[axis] + before + after))]
        case let .concat(xs, axis, out):
            let specs = try xs.map(read)
            guard let first = specs.first else { throw Mismatch(message: "nothing to join") }
            var total = 0
            for (name, spec) in zip(xs, specs) {
                let fits =
                    try spec.shape.count == first.shape.count
                    && resized(spec, axis, 1) == resized(first, axis, 1)
                try require(fits, "tensor '\(name)' does not fit the concatenation")
                total += spec.shape[axis]
            }
            return [(out, try resized(first, axis, total))]
        case let .affine(terms, _, out):
            let spec = try declared(out)
            try require(
                [.float32, .float16, .uint8].contains(spec.dtype),
                "an affine result is float32, float16 or uint8")
            for term in terms {
                let x = try read(term.x)
                try require(
                    x.shape == spec.shape && [.float32, .float16].contains(x.dtype),
                    "term '\(term.x)' does not have the result's shape in float32 or float16")
            }
            return [(out, spec)]
        case let .moments(x, groups, out):
            let spec = try read(x)
            try require(
                spec.shape.count == 4 && spec.shape[0] == 1 && spec.dtype == .float32,
                "tensor '\(x)' is not [1, h, W, C] in float32")
            try require(
                spec.shape[3] % groups == 0, "tensor '\(x)' does not divide into \(groups) groups")
            return [(out, TensorSpec(shape: [1, 3, groups]))]
        case let .normalizer(moments, _, mean, rstd):
            let channels = try declared(mean).shape.last ?? 0
            let specs = try moments.map(read)
            for (name, spec) in zip(moments, specs) {
                try require(
                    spec.shape.count == 3 && spec.shape[..<2] == [1, 3] && spec.dtype == .float32
                        && channels % spec.shape[2] == 0,
                    "tensor '\(name)' does not hold moments for '\(mean)'")
                try require(spec == specs[0], "tensor '\(name)' has other groups than the first")
            }
            let spec = TensorSpec(shape: [1, 1, 1, channels])
            return [(mean, spec), (rstd, spec)]
        }
    }
}

extension TensorSpec {
    /// As errors say it.
    var text: String { "\(dtype.rawValue)\(shape)" }
}
