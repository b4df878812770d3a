#if canImport(ExecuTorch)
import ExecuTorch
import Foundation
import HandheldProtocol
import HandheldRuntime

/// Runs `.pte` artifacts, with the backends that the app links. Not compiled and not run yet.
public final class ExecuTorchEngine: Engine {
    public let version: String

    /// `version` is that of the ExecuTorch package, which does not tell it.
    public init(version: String) {
        self.version = version
    }

    public func load(
        _ artifact: Manifest.Artifact, file: URL, cache: URL?, threads: Int
    ) throws -> HandheldRuntime.Model {
        guard let inputs = artifact.ports.inputOrder, let outputs = artifact.ports.outputOrder else {
            throw HarnessFailure(.bundle, "the order of the ports of '\(artifact.id)' is unknown")
        }
        let module = Module(filePath: file.path)
        try module.load("forward")
        return ExecuTorchModel(module, artifact.ports, inputs, outputs)
    }
}

private final class ExecuTorchModel: HandheldRuntime.Model {
    private let module: Module
    private let ports: Manifest.Ports
    private let inputs: [String]
    private let outputs: [String]

    init(_ module: Module, _ ports: Manifest.Ports, _ inputs: [String], _ outputs: [String]) {
        self.module = module
        self.ports = ports
        self.inputs = inputs
        self.outputs = outputs
    }

    func run(_ args: [String: HandheldRuntime.Tensor]) throws -> [String: HandheldRuntime.Tensor] {
        // By position, and not by name.
        let values: [ValueConvertible] = try inputs.map { name in
            guard let given = args[name] else {
                throw HarnessFailure(.bundle, "the call gives no '\(name)'")
            }
            return ExecuTorch.Tensor<Float>(try given.floats(), shape: given.shape)
        }
        let results = try module.forward(values)
        guard results.count == outputs.count else {
            throw HarnessFailure(.engine, "\(results.count) results, not \(outputs.count)")
        }
        var out: [String: HandheldRuntime.Tensor] = [:]
        for (name, value) in zip(outputs, results) {
            guard let found: ExecuTorch.Tensor<Float> = value.tensor(), let spec = ports.outputs[name],
                found.shape == spec.shape
            else { throw HarnessFailure(.engine, "the result '\(name)' has another shape or type") }
            out[name] = try HandheldRuntime.Tensor(shape: spec.shape, floats: found.scalars())
        }
        return out
    }
}
#endif
