#if canImport(CoreML)
import CoreML
import Foundation
import HandheldProtocol
import HandheldRuntime

/// Runs packages that `handheld export` made.
public final class CoreMLEngine: Engine {
    public let version: String
    private let units: MLComputeUnits

    public init(units: MLComputeUnits = .all) {
        self.units = units
        version = ProcessInfo.processInfo.operatingSystemVersionString
    }

    public func load(
        _ artifact: Manifest.Artifact, file: URL, cache: URL?, threads: Int
    ) throws -> Model {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        let model = try MLModel(
            contentsOf: try compiled(file, artifact.contents, cache), configuration: configuration)
        return CoreMLModel(model, try Features(artifact))
    }

    /// Compiling takes long, so the result is kept, by the hash of what it was made from.
    private func compiled(_ package: URL, _ contents: String, _ cache: URL?) throws -> URL {
        if package.pathExtension == "mlmodelc" { return package }
        guard let cache else { return try MLModel.compileModel(at: package) }
        let kept = cache.appendingPathComponent("\(contents).mlmodelc")
        if FileManager.default.fileExists(atPath: kept.path) { return kept }
        try FileManager.default.createDirectory(at: cache, withIntermediateDirectories: true)
        try FileManager.default.moveItem(at: try MLModel.compileModel(at: package), to: kept)
        return kept
    }

    public func units(
        _ artifact: Manifest.Artifact, file: URL, cache: URL?
    ) throws -> [String: Int]? {
        guard #available(iOS 17.4, macOS 14.4, *) else { return nil }
        let (compiled, units) = (try compiled(file, artifact.contents, cache), self.units)
        // Core ML answers on a thread of its own; a runner is on one that may wait.
        let answer = Answer()
        let done = DispatchSemaphore(value: 0)
        Task.detached {
            answer.units = try? await Self.placement(of: compiled, units: units)
            done.signal()
        }
        done.wait()
        return answer.units
    }

    private final class Answer: @unchecked Sendable {
        var units: [String: Int]?
    }

    /// How many operations each compute unit was given, by the plan that Core ML makes.
    @available(iOS 17.4, macOS 14.4, *)
    public static func placement(
        of compiled: URL, units: MLComputeUnits = .all
    ) async throws -> [String: Int] {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        let plan = try await MLComputePlan.load(contentsOf: compiled, configuration: configuration)
        guard case let .program(program) = plan.modelStructure,
            let main = program.functions["main"]
        else { return [:] }
        var counts: [String: Int] = [:]
        for operation in main.block.operations {
            guard let usage = plan.deviceUsage(for: operation) else { continue }
            let name =
                switch usage.preferred {
                case .cpu: "cpu"
                case .gpu: "gpu"
                case .neuralEngine: "npu"
                @unknown default: "other"
                }
            counts[name, default: 0] += 1
        }
        return counts
    }
}

private final class CoreMLModel: Model {
    private let model: MLModel
    private let features: Features

    init(_ model: MLModel, _ features: Features) {
        self.model = model
        self.features = features
    }

    func run(_ args: [String: Tensor]) throws -> [String: Tensor] {
        let given = try features.given(args).mapValues { MLFeatureValue(multiArray: try array($0)) }
        let results = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: given))
        return try features.results { name, spec in
            try results.featureValue(for: name)?.multiArrayValue.map { try tensor($0, spec) }
        }
    }

    private func array(_ tensor: Tensor) throws -> MLMultiArray {
        let array = try MLMultiArray(
            shape: tensor.shape.map { NSNumber(value: $0) }, dataType: .float32)
        let values = try tensor.floats()
        array.withUnsafeMutableBufferPointer(ofType: Float.self) { buffer, strides in
            let dense = Self.strides(tensor.shape)
            for i in values.indices { buffer[Self.offset(i, dense, strides)] = values[i] }
        }
        return array
    }

    private func tensor(_ array: MLMultiArray, _ spec: TensorSpec) throws -> Tensor {
        let shape = array.shape.map(\.intValue)
        guard shape == spec.shape else {
            throw HarnessFailure(.engine, "a result is \(shape), not \(spec.shape)")
        }
        // Core ML pads rows, and may answer in half precision.
        let float = try array.dataType == .float32 ? array : MLMultiArray(concatenating: [array], axis: 0, dataType: .float32)
        let dense = Self.strides(shape)
        let strides = float.strides.map(\.intValue)
        let values = float.withUnsafeBufferPointer(ofType: Float.self) { buffer in
            (0..<shape.reduce(1, *)).map { buffer[Self.offset($0, dense, strides)] }
        }
        return try Tensor(shape: shape, floats: values)
    }

    private static func strides(_ shape: [Int]) -> [Int] {
        var out = [Int](repeating: 1, count: shape.count)
        for i in stride(from: shape.count - 2, through: 0, by: -1) { out[i] = out[i + 1] * shape[i + 1] }
        return out
    }

    private static func offset(_ index: Int, _ dense: [Int], _ strides: [Int]) -> Int {
        var rest = index
        var out = 0
        for (d, s) in zip(dense, strides) {
            out += rest / d * s
            rest %= d
        }
        return out
    }
}
#endif
