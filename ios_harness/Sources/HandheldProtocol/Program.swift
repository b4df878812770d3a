import Foundation

/// A straight-line program over named tensors; runtime/handheld/program.py specifies it.
public struct Program: Codable, Equatable, Sendable {
    public var inputs: [Input]
    public var tensors: [String: TensorSpec]
    public var ops: [Operation]
    public var outputs: [String: String]

    enum CodingKeys: String, CodingKey, CaseIterable { case inputs, tensors, ops, outputs }

    public init(from decoder: Decoder) throws {
        try decoder.refuseUnknownFields(CodingKeys.self)
        let values = try decoder.container(keyedBy: CodingKeys.self)
        inputs = try values.decode([Input].self, forKey: .inputs)
        tensors = try values.decode([String: TensorSpec].self, forKey: .tensors)
        ops = try values.decode([Operation].self, forKey: .ops)
        outputs = try values.decode([String: String].self, forKey: .outputs)
        try decoder.require(tensors.keys.allSatisfy(isName), "a tensor's name is malformed")
        try decoder.require(!outputs.isEmpty, "there are no outputs")
    }
}

public enum DType: String, Codable, Sendable {
    case float32, float16, uint8, int8, int32

    public var bytes: Int {
        switch self {
        case .float32, .int32: 4
        case .float16: 2
        case .uint8, .int8: 1
        }
    }
}

public struct TensorSpec: Codable, Equatable, Sendable {
    static let mostExtent = 1 << 31
    static let mostBytes = 4 << 30

    public var shape: [Int]
    public var dtype: DType

    enum CodingKeys: String, CodingKey, CaseIterable { case shape, dtype }

    public init(shape: [Int], dtype: DType = .float32) {
        self.shape = shape
        self.dtype = dtype
    }

    public init(from decoder: Decoder) throws {
        try decoder.refuseUnknownFields(CodingKeys.self)
        let values = try decoder.container(keyedBy: CodingKeys.self)
        shape = try values.decode([Int].self, forKey: .shape)
        dtype = try values.decodeIfPresent(DType.self, forKey: .dtype) ?? .float32
        try decoder.require((1...6).contains(shape.count), "a tensor has 1 to 6 axes")
        try decoder.require(
            shape.allSatisfy { (1...Self.mostExtent).contains($0) }, "an extent is wrong")
        var bytes = dtype.bytes
        for extent in shape {
            try decoder.require(bytes <= Self.mostBytes / extent, "a tensor is over the limit")
            bytes *= extent
        }
    }
}

public struct Input: Codable, Equatable, Sendable {
    public enum Role: String, Codable, Sendable {
        case noise, promptEmbeds = "prompt_embeds", pooled, latent, other
    }
    public var name: String
    public var role: Role
    public var stream: UInt32
    public var negative: Bool

    enum CodingKeys: String, CodingKey, CaseIterable { case name, role, stream, negative }

    public init(from decoder: Decoder) throws {
        try decoder.refuseUnknownFields(CodingKeys.self)
        let values = try decoder.container(keyedBy: CodingKeys.self)
        name = try values.decode(String.self, forKey: .name)
        role = try values.decode(Role.self, forKey: .role)
        stream = try values.decodeIfPresent(UInt32.self, forKey: .stream) ?? 0
        negative = try values.decodeIfPresent(Bool.self, forKey: .negative) ?? false
        try decoder.require(isName(name), "the name is malformed")
    }
}

public struct Term: Codable, Equatable, Sendable {
    public var x: String
    public var scale: Double

    enum CodingKeys: String, CodingKey, CaseIterable { case x, scale }

    public init(from decoder: Decoder) throws {
        try decoder.refuseUnknownFields(CodingKeys.self)
        let values = try decoder.container(keyedBy: CodingKeys.self)
        x = try values.decode(String.self, forKey: .x)
        scale = try values.decode(Double.self, forKey: .scale)
        try decoder.require(isBinary32(scale), "the scale is over binary32")
    }
}

/// One operation. The vocabulary is closed.
public enum Operation: Codable, Equatable, Sendable {
    case call(artifact: String, args: [String: String], results: [String: String])
    case slice(x: String, axis: Int, start: Int, length: Int, out: String)
    case pad(x: String, axis: Int, before: Int, after: Int, value: Double, out: String)
    case concat(xs: [String], axis: Int, out: String)
    case affine(terms: [Term], bias: Double, out: String)
    case moments(x: String, groups: Int, out: String)
    case normalizer(moments: [String], eps: Double, mean: String, rstd: String)

    enum Kind: String, Codable { case call, slice, pad, concat, affine, moments, normalizer }

    enum CodingKeys: String, CodingKey {
        case op, artifact, args, results, x, axis, start, length, before, after, value, xs
        case terms, bias, groups, moments, eps, mean, rstd, out
    }

    private static func fields(_ kind: Kind) -> Set<String> {
        switch kind {
        case .call: ["op", "artifact", "args", "results"]
        case .slice: ["op", "x", "axis", "start", "length", "out"]
        case .pad: ["op", "x", "axis", "before", "after", "value", "out"]
        case .concat: ["op", "xs", "axis", "out"]
        case .affine: ["op", "terms", "bias", "out"]
        case .moments: ["op", "x", "groups", "out"]
        case .normalizer: ["op", "moments", "eps", "mean", "rstd"]
        }
    }

    public init(from decoder: Decoder) throws {
        let values = try decoder.container(keyedBy: CodingKeys.self)
        let kind = try values.decode(Kind.self, forKey: .op)
        let known = Self.fields(kind)
        for key in try decoder.container(keyedBy: AnyKey.self).allKeys {
            try decoder.require(known.contains(key.stringValue), "unknown field '\(key.stringValue)'")
        }

        func name(_ key: CodingKeys) throws -> String {
            let text = try values.decode(String.self, forKey: key)
            try decoder.require(isName(text), "'\(key.stringValue)' is no name")
            return text
        }
        func names(_ key: CodingKeys) throws -> [String] {
            let list = try values.decode([String].self, forKey: key)
            try decoder.require(!list.isEmpty && list.allSatisfy(isName), "'\(key.stringValue)' is malformed")
            return list
        }
        func map(_ key: CodingKeys) throws -> [String: String] {
            let map = try values.decode([String: String].self, forKey: key)
            let isFine = map.allSatisfy { isName($0.key) && isName($0.value) }
            try decoder.require(isFine, "'\(key.stringValue)' is malformed")
            return map
        }
        func integer(_ key: CodingKeys, _ range: ClosedRange<Int>, _ fallback: Int? = nil) throws -> Int {
            let found = try values.decodeIfPresent(Int.self, forKey: key) ?? fallback
            guard let found, range.contains(found) else {
                throw decoder.malformed("'\(key.stringValue)' is out of range")
            }
            return found
        }
        func number(_ key: CodingKeys) throws -> Double {
            let found = try values.decodeIfPresent(Double.self, forKey: key) ?? 0
            try decoder.require(isBinary32(found), "'\(key.stringValue)' is over binary32")
            return found
        }

        let most = 1 << 31
        switch kind {
        case .call:
            self = .call(artifact: try name(.artifact), args: try map(.args), results: try map(.results))
        case .slice:
            self = .slice(
                x: try name(.x), axis: try integer(.axis, 0...5), start: try integer(.start, 0...most),
                length: try integer(.length, 1...most), out: try name(.out))
        case .pad:
            self = .pad(
                x: try name(.x), axis: try integer(.axis, 0...5),
                before: try integer(.before, 0...most, 0), after: try integer(.after, 0...most, 0),
                value: try number(.value), out: try name(.out))
        case .concat:
            self = .concat(xs: try names(.xs), axis: try integer(.axis, 0...5), out: try name(.out))
        case .affine:
            let terms = try values.decode([Term].self, forKey: .terms)
            try decoder.require(!terms.isEmpty, "'terms' is empty")
            self = .affine(terms: terms, bias: try number(.bias), out: try name(.out))
        case .moments:
            self = .moments(x: try name(.x), groups: try integer(.groups, 1...most), out: try name(.out))
        case .normalizer:
            let eps = try values.decode(Double.self, forKey: .eps)
            try decoder.require(eps > 0 && eps <= 1, "'eps' is out of range")
            self = .normalizer(
                moments: try names(.moments), eps: eps, mean: try name(.mean), rstd: try name(.rstd))
        }
    }

    public func encode(to encoder: Encoder) throws {
        var values = encoder.container(keyedBy: CodingKeys.self)
        switch self {
        case let .call(artifact, args, results):
            try values.encode(Kind.call, forKey: .op)
            try values.encode(artifact, forKey: .artifact)
            try values.encode(args, forKey: .args)
            try values.encode(results, forKey: .results)
        case let .slice(x, axis, start, length, out):
            try values.encode(Kind.slice, forKey: .op)
            try values.encode(x, forKey: .x)
            try values.encode(axis, forKey: .axis)
            try values.encode(start, forKey: .start)
            try values.encode(length, forKey: .length)
            try values.encode(out, forKey: .out)
        case let .pad(x, axis, before, after, value, out):
            try values.encode(Kind.pad, forKey: .op)
            try values.encode(x, forKey: .x)
            try values.encode(axis, forKey: .axis)
            try values.encode(before, forKey: .before)
            try values.encode(after, forKey: .after)
            try values.encode(value, forKey: .value)
            try values.encode(out, forKey: .out)
        case let .concat(xs, axis, out):
            try values.encode(Kind.concat, forKey: .op)
            try values.encode(xs, forKey: .xs)
            try values.encode(axis, forKey: .axis)
            try values.encode(out, forKey: .out)
        case let .affine(terms, bias, out):
            try values.encode(Kind.affine, forKey: .op)
            try values.encode(terms, forKey: .terms)
            try values.encode(bias, forKey: .bias)
            try values.encode(out, forKey: .out)
        case let .moments(x, groups, out):
            try values.encode(Kind.moments, forKey: .op)
            try values.encode(x, forKey: .x)
            try values.encode(groups, forKey: .groups)
            try values.encode(out, forKey: .out)
        case let .normalizer(moments, eps, mean, rstd):
            try values.encode(Kind.normalizer, forKey: .op)
            try values.encode(moments, forKey: .moments)
            try values.encode(eps, forKey: .eps)
            try values.encode(mean, forKey: .mean)
            try values.encode(rstd, forKey: .rstd)
        }
    }
}

func isBinary32(_ value: Double) -> Bool {
    value.isFinite && abs(value) <= Double(Float.greatestFiniteMagnitude)
}
