import Foundation
import XCTest

@testable import HandheldProtocol

/// Reads tests/golden of the repository, as the Python and C++ tests do.
final class GoldenTests: XCTestCase {
    static let folder = URL(fileURLWithPath: #filePath)
        .deletingLastPathComponent()  // HandheldProtocolTests
        .deletingLastPathComponent()  // Tests
        .deletingLastPathComponent()  // ios_harness
        .deletingLastPathComponent()
        .appendingPathComponent("tests/golden")

    struct Index: Decodable {
        struct Case: Decodable {
            var file: String
            var valid: Bool
            /// Of manifests: whether a runtime may go by it.
            var runs: Bool?
        }
        struct Program: Decodable { var file: String }
        var manifests: [Case]
        var sizes_manifests: [Case]
        var jobs: [Case]
        var events: [Case]
        var programs: [Program]
        var half_programs: [Program]
        var noise: String
    }

    /// Faults that lie between a manifest and the bundle's files; RuntimeTests finds these as well.
    static let files: Set = [
        "file-missing", "bytes-wrong", "sha256-wrong", "constant-missing", "sizes-part-missing",
    ]

    func data(_ path: String) throws -> Data {
        try Data(contentsOf: Self.folder.appendingPathComponent(path))
    }

    func index() throws -> Index {
        try JSONDecoder().decode(Index.self, from: data("index.json"))
    }

    func name(_ path: String) -> String {
        URL(fileURLWithPath: path).deletingPathExtension().lastPathComponent
    }

    func testManifests() throws {
        let index = try self.index()
        XCTAssertFalse(index.sizes_manifests.isEmpty)
        let items = index.manifests + index.sizes_manifests
        XCTAssertEqual(Self.files.subtracting(items.map { name($0.file) }), [])
        for item in items {
            let text = try data(item.file)
            if item.valid || item.runs == true || Self.files.contains(name(item.file)) {
                XCTAssertNoThrow(try JSONDecoder().decode(Manifest.self, from: text), item.file)
            } else {
                XCTAssertThrowsError(try JSONDecoder().decode(Manifest.self, from: text), item.file)
            }
        }
    }

    func testPortsKeepTheirOrder() throws {
        let manifest = try Manifest.read(data("bundle/manifest.json"))
        let ports = try XCTUnwrap(manifest.artifacts.first).ports
        XCTAssertEqual(ports.inputOrder, ["x", "mean", "rstd", "time", "text", "pooled"])
        XCTAssertEqual(ports.outputOrder, ["y"])
        let index = try self.index()
        for item in index.manifests + index.sizes_manifests where item.valid {
            let read = try Manifest.read(data(item.file))
            for ports in read.artifacts.map(\.ports) {
                XCTAssertEqual(ports.inputOrder.map(Set.init), Set(ports.inputs.keys), item.file)
                XCTAssertEqual(ports.outputOrder.map(Set.init), Set(ports.outputs.keys), item.file)
            }
        }
    }

    func testSeveralSizesAndParts() throws {
        let manifest = try Manifest.read(data("manifests/valid-sizes-with-parts.json"))
        XCTAssertEqual(Set(manifest.sizes.keys), ["16x8", "24x8"])
        XCTAssertEqual(manifest.artifacts.map(\.files.count), [2, 2])
        // Before version 3 nothing continued a file.
        let text = String(decoding: try data("manifests/valid-sizes-with-parts.json"), as: UTF8.self)
        let older = text.replacingOccurrences(of: #""schema_version": 3"#, with: #""schema_version": 2"#)
        XCTAssertNotEqual(older, text)
        XCTAssertThrowsError(try Manifest.read(Data(older.utf8)))
    }

    func testKeysInTheOrderOfTheText() {
        let text = #"{"b": [1, {"z\"\\": "]}", "\u0061": -1.5e3}, []], "a": {}, "c": null}"#
        let found = KeyOrder.parse(Data(text.utf8))
        XCTAssertEqual(found?.keys, ["b", "a", "c"])
        guard case let .array(items) = found?["b"] else { return XCTFail("no list") }
        XCTAssertEqual(items.count, 3)
        XCTAssertEqual(items[1].keys, ["z\"\\", "a"])
        XCTAssertEqual(found?["a"]?.keys, [])
        for length in 0..<text.utf8.count {
            XCTAssertNil(KeyOrder.parse(Data(text.utf8.prefix(length))), "\(length)")
        }
        XCTAssertNil(KeyOrder.parse(Data(String(repeating: "[", count: 10_000).utf8)))
    }

    func testJobs() throws {
        for item in try index().jobs {
            let text = try data(item.file)
            if item.valid {
                let job = try JSONDecoder().decode(Job.self, from: text)
                let again = try JSONDecoder().decode(Job.self, from: JSONEncoder().encode(job))
                XCTAssertEqual(job, again, item.file)
            } else {
                XCTAssertThrowsError(try JSONDecoder().decode(Job.self, from: text), item.file)
            }
        }
    }

    func testEvents() throws {
        for item in try index().events {
            let text = try data(item.file)
            if item.valid {
                let event = try JSONDecoder().decode(Event.self, from: text)
                let again = try JSONDecoder().decode(Event.self, from: JSONEncoder().encode(event))
                XCTAssertEqual(event, again, item.file)
            } else {
                XCTAssertThrowsError(try JSONDecoder().decode(Event.self, from: text), item.file)
            }
        }
    }

    func testPrograms() throws {
        let index = try self.index()
        for item in index.programs + index.half_programs {
            let program = try JSONDecoder().decode(Program.self, from: data(item.file))
            let again = try JSONDecoder().decode(Program.self, from: JSONEncoder().encode(program))
            XCTAssertEqual(program, again, item.file)
        }
    }

    func testNoise() throws {
        struct Vector: Decodable {
            var seed: UInt64
            var stream: UInt32
            var first: [String]
            var count: Int
        }
        for vector in try JSONDecoder().decode([Vector].self, from: data(try index().noise)) {
            let values = Noise.normal(seed: vector.seed, count: vector.count, stream: vector.stream)
            XCTAssertEqual(values.count, vector.count)
            let bits = values.prefix(8).map { value -> String in
                let text = String(value.bitPattern, radix: 16)
                return String(repeating: "0", count: 8 - text.count) + text
            }
            XCTAssertEqual(bits, vector.first)
        }
    }
}
