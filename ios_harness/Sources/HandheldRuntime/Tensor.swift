import Foundation
import HandheldProtocol

/// What went wrong, with a code of the harness protocol.
public struct HarnessFailure: Error, Equatable {
    public var code: Failure.Code
    public var message: String

    public init(_ code: Failure.Code, _ message: String) {
        self.code = code
        self.message = message
    }
}

/// A tensor in memory, row by row, little-endian.
public struct Tensor: Equatable, Sendable {
    public var shape: [Int]
    public var dtype: DType
    public var bytes: [UInt8]

    public init(shape: [Int], dtype: DType, bytes: [UInt8]) throws {
        let wanted = shape.reduce(1, *) * dtype.bytes
        guard bytes.count == wanted else {
            throw HarnessFailure(.input, "\(bytes.count) bytes are no \(dtype) of \(shape)")
        }
        self.shape = shape
        self.dtype = dtype
        self.bytes = bytes
    }

    public init(shape: [Int], floats: [Float]) throws {
        try self.init(
            shape: shape, dtype: .float32, bytes: floats.withUnsafeBytes { Array($0) })
    }

    public var count: Int { shape.reduce(1, *) }

    public func floats() throws -> [Float] {
        guard dtype == .float32 else { throw HarnessFailure(.bundle, "a tensor is not float32") }
        return bytes.withUnsafeBytes { raw in
            (0..<count).map { raw.loadUnaligned(fromByteOffset: 4 * $0, as: Float.self) }
        }
    }

    /// The values of float32, and those of float16 widened.
    func widened() throws -> [Float] {
        guard dtype == .float16 else { return try floats() }
        return bytes.withUnsafeBytes { raw in
            (0..<count).map {
                Kernels.float(raw.loadUnaligned(fromByteOffset: 2 * $0, as: UInt16.self))
            }
        }
    }
}

/// Reads safetensors files; every offset is checked against the file.
public enum SafeTensors {
    static let mostHeaderBytes = 100 << 20

    fileprivate struct Entry: Codable {
        var dtype: String
        var shape: [Int]
        var data_offsets: [Int]
    }

    fileprivate static let dtypes: [String: DType] = [
        "F32": .float32, "F16": .float16, "U8": .uint8, "I8": .int8, "I32": .int32,
    ]

    public static func read(_ data: Data, code: Failure.Code = .bundle) throws -> [String: Tensor] {
        func fail(_ what: String) -> HarnessFailure { HarnessFailure(code, "safetensors: \(what)") }
        let data = Data(data)  // indices from 0
        guard data.count >= 8 else { throw fail("is too short") }
        let length = data.prefix(8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        guard length <= UInt64(mostHeaderBytes), 8 + Int(length) <= data.count else {
            throw fail("its header is longer than the file")
        }
        let start = 8 + Int(length)
        guard
            let header = try? JSONSerialization.jsonObject(with: data[8..<start]) as? [String: Any]
        else { throw fail("its header is not JSON") }
        var out: [String: Tensor] = [:]
        for (name, value) in header where name != "__metadata__" {
            guard let json = try? JSONSerialization.data(withJSONObject: value),
                let entry = try? JSONDecoder().decode(Entry.self, from: json),
                let dtype = dtypes[entry.dtype], entry.data_offsets.count == 2
            else { throw fail("tensor '\(name)' is malformed") }
            let (first, last) = (entry.data_offsets[0], entry.data_offsets[1])
            guard first >= 0, first <= last, last <= data.count - start,
                entry.shape.allSatisfy({ $0 >= 0 }), entry.shape.count <= 8
            else { throw fail("tensor '\(name)' lies outside of the file") }
            var size = dtype.bytes
            for extent in entry.shape {
                let (product, overflow) = size.multipliedReportingOverflow(by: extent)
                guard !overflow else { throw fail("tensor '\(name)' is too large") }
                size = product
            }
            guard size == last - first else { throw fail("tensor '\(name)' has other bytes") }
            out[name] = try Tensor(
                shape: entry.shape, dtype: dtype, bytes: Array(data[(start + first)..<(start + last)]))
        }
        return out
    }

    public static func read(path: String, code: Failure.Code = .bundle) throws -> [String: Tensor] {
        guard let data = try? Data(contentsOf: URL(fileURLWithPath: path), options: .mappedIfSafe)
        else { throw HarnessFailure(code, "\(path): cannot be read") }
        return try read(data, code: code)
    }
}

/// Writes a safetensors file, tensor by tensor; it is there once all of it is.
final class SafeTensorsWriter {
    private let path: URL
    private let part: URL
    private let out: FileHandle
    private var missing: ArraySlice<(name: String, spec: TensorSpec)>

    /// `tensors` are in the order in which they will be written.
    init(_ path: URL, _ tensors: [(name: String, spec: TensorSpec)]) throws {
        let names = Dictionary(uniqueKeysWithValues: SafeTensors.dtypes.map { ($1, $0) })
        var header: [String: SafeTensors.Entry] = [:]
        var end = 0
        for (name, spec) in tensors {
            let start = end
            end += spec.shape.reduce(1, *) * spec.dtype.bytes
            header[name] = SafeTensors.Entry(
                dtype: names[spec.dtype]!, shape: spec.shape, data_offsets: [start, end])
        }
        var text = try JSONEncoder().encode(header)
        // So that tensors begin where their values are aligned.
        text.append(contentsOf: [UInt8](repeating: 0x20, count: (8 - text.count % 8) % 8))
        self.path = path
        part = path.appendingPathExtension("part")
        missing = tensors[...]
        let length = withUnsafeBytes(of: UInt64(text.count).littleEndian) { Data($0) }
        try (length + text).write(to: part)
        out = try FileHandle(forWritingTo: part)
        try out.seekToEnd()
    }

    deinit {
        try? out.close()
        if !missing.isEmpty { try? FileManager.default.removeItem(at: part) }
    }

    /// Writes the next tensor.
    func write(_ tensor: Tensor) throws {
        guard let (name, spec) = missing.first, tensor.shape == spec.shape, tensor.dtype == spec.dtype
        else {
            let what = missing.first.map { "\($0.name) is \($0.spec.dtype) \($0.spec.shape)" }
            throw HarnessFailure(
                .engine, "a result is \(tensor.dtype) \(tensor.shape), \(what ?? "none is missing")")
        }
        do {
            try out.write(contentsOf: tensor.bytes)
        } catch {
            throw HarnessFailure(.io, "\(name): cannot be written: \(error)")
        }
        missing.removeFirst()
    }

    /// Puts the file in its place.
    func commit() throws {
        if let (name, _) = missing.first { throw HarnessFailure(.engine, "\(name) was not written") }
        try out.close()
        try? FileManager.default.removeItem(at: path)
        try FileManager.default.moveItem(at: part, to: path)
    }
}
