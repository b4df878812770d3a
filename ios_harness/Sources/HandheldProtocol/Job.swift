import Foundation

public enum Residency: String, Codable, Sendable { case resident, stream }

public struct TensorFile: Codable, Equatable, Sendable {
    public var path: String
    public var tensor: String

    enum CodingKeys: String, CodingKey, CaseIterable { case path, tensor }

    public init(from decoder: Decoder) throws {
        try decoder.refuseUnknownFields(CodingKeys.self)
        let values = try decoder.container(keyedBy: CodingKeys.self)
        path = try values.decode(String.self, forKey: .path)
        tensor = try values.decode(String.self, forKey: .tensor)
    }
}

/// What a harness shall do: open a bundle, run it, and report.
public struct Job: Codable, Equatable, Sendable {
    public static let protocolVersion = 1

    public var protocolVersion: Int
    public var bundle: String
    public var size: String
    public var seed: UInt64
    public var inputs: [String: TensorFile]
    public var residency: Residency
    public var residencyByArtifact: [String: Residency]
    public var memoryBudget: Int?
    public var prefetch: Bool
    public var threads: Int
    public var cache: String?
    public var warmup: Int
    public var iterations: Int
    public var minSeconds: Double
    public var precision: Double?
    public var maxSeconds: Double?
    public var verifyHashes: Bool
    public var resetPeak: Bool
    public var output: String?
    public var expect: TensorFile?
    public var dumpCalls: String?

    enum CodingKeys: String, CodingKey, CaseIterable {
        case protocolVersion = "protocol"
        case bundle, size, seed, inputs, residency
        case residencyByArtifact = "residency_by_artifact"
        case memoryBudget = "memory_budget"
        case prefetch, threads, cache, warmup, iterations
        case minSeconds = "min_seconds"
        case precision
        case maxSeconds = "max_seconds"
        case verifyHashes = "verify_hashes"
        case resetPeak = "reset_peak"
        case output, expect
        case dumpCalls = "dump_calls"
    }

    public init(from decoder: Decoder) throws {
        try decoder.refuseUnknownFields(CodingKeys.self)
        let values = try decoder.container(keyedBy: CodingKeys.self)
        func value<T: Decodable>(_ key: CodingKeys, _ fallback: T) throws -> T {
            try values.contains(key) ? values.decode(T.self, forKey: key) : fallback
        }
        protocolVersion = try value(.protocolVersion, Self.protocolVersion)
        bundle = try values.decode(String.self, forKey: .bundle)
        size = try values.decode(String.self, forKey: .size)
        seed = try value(.seed, 0)
        inputs = try value(.inputs, [:])
        residency = try value(.residency, .resident)
        residencyByArtifact = try value(.residencyByArtifact, [:])
        memoryBudget = try values.decodeIfPresent(Int.self, forKey: .memoryBudget)
        prefetch = try value(.prefetch, true)
        threads = try value(.threads, 2)
        cache = try values.decodeIfPresent(String.self, forKey: .cache)
        warmup = try value(.warmup, 1)
        iterations = try value(.iterations, 1)
        minSeconds = try value(.minSeconds, 0)
        precision = try values.decodeIfPresent(Double.self, forKey: .precision)
        maxSeconds = try values.decodeIfPresent(Double.self, forKey: .maxSeconds)
        verifyHashes = try value(.verifyHashes, true)
        resetPeak = try value(.resetPeak, false)
        output = try values.decodeIfPresent(String.self, forKey: .output)
        expect = try values.decodeIfPresent(TensorFile.self, forKey: .expect)
        dumpCalls = try values.decodeIfPresent(String.self, forKey: .dumpCalls)

        try decoder.require(
            protocolVersion == Self.protocolVersion, "unknown protocol \(protocolVersion)")
        try decoder.require(isName(size), "'size' is no name")
        try decoder.require(
            inputs.keys.allSatisfy(isName) && residencyByArtifact.keys.allSatisfy(isName),
            "a name is malformed")
        try decoder.require(memoryBudget.map { $0 >= 1 } ?? true, "'memory_budget' is not positive")
        try decoder.require(
            memoryBudget == nil || residencyByArtifact.isEmpty,
            "'memory_budget' and 'residency_by_artifact' exclude each other")
        try decoder.require((1...256).contains(threads), "'threads' is not in 1 to 256")
        try decoder.require(warmup >= 0, "'warmup' is negative")
        try decoder.require(iterations >= 1, "'iterations' is not positive")
        try decoder.require((0...1e9).contains(minSeconds), "'min_seconds' is not in 0 to 1e9")
        try decoder.require(
            precision.map { $0 > 0 && $0 <= 1 } ?? true, "'precision' is not in 0 to 1")
        try decoder.require(
            maxSeconds.map { $0 > 0 && $0 <= 1e9 } ?? true, "'max_seconds' is not in 0 to 1e9")
    }
}
