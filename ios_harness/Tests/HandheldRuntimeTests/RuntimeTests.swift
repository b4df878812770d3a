import Foundation
import HandheldProtocol
import XCTest

@testable import HandheldRuntime

/// Runs the golden programs, as the Python and C++ tests do.
final class RuntimeTests: XCTestCase {
    static let golden = URL(fileURLWithPath: #filePath)
        .deletingLastPathComponent()  // HandheldRuntimeTests
        .deletingLastPathComponent()  // Tests
        .deletingLastPathComponent()  // ios_harness
        .deletingLastPathComponent()
        .appendingPathComponent("tests/golden")

    struct Index: Decodable {
        struct Program: Decodable {
            var file: String
            var tensors: String
            var seed: UInt64
        }
        var programs: [Program]
    }

    func data(_ path: String) throws -> Data {
        try Data(contentsOf: Self.golden.appendingPathComponent(path))
    }

    func testProgramsGiveTheSameBits() throws {
        let index = try JSONDecoder().decode(Index.self, from: data("index.json"))
        XCTAssertFalse(index.programs.isEmpty)
        for item in index.programs {
            let program = try JSONDecoder().decode(Program.self, from: data(item.file))
            let tensors = try SafeTensors.read(data(item.tensors))
            func part(_ prefix: String) -> [String: Tensor] {
                var out: [String: Tensor] = [:]
                for (name, value) in tensors where name.hasPrefix(prefix) {
                    out[String(name.dropFirst(prefix.count))] = value
                }
                return out
            }
            let executor = Executor(program: program, constants: part("constant."))
            let results = try executor.run(inputs: part("input."), seed: item.seed) { name, _ in
                XCTFail("\(item.file) calls \(name)")
                return [:]
            }
            let wanted = part("output.")
            XCTAssertEqual(Set(results.keys), Set(wanted.keys), item.file)
            for (role, value) in wanted {
                XCTAssertEqual(results[role], value, "\(item.file): \(role)")
            }
        }
    }

    func testMalformedTensorsAreRefused() {
        for bytes in [[], [1, 0, 0, 0, 0, 0, 0], [255, 255, 255, 255, 255, 255, 255, 255]] as [[UInt8]] {
            XCTAssertThrowsError(try SafeTensors.read(Data(bytes)))
        }
        let header = #"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#
        var file = Data(withUnsafeBytes(of: UInt64(header.utf8.count).littleEndian) { Array($0) })
        file += Data(header.utf8)
        XCTAssertThrowsError(try SafeTensors.read(file))
        file += Data(count: 8)
        XCTAssertEqual(try SafeTensors.read(file)["a"]?.shape, [2])
    }

    func testHashes() {
        XCTAssertEqual(
            SHA256.hex([UInt8]()),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
        XCTAssertEqual(
            SHA256.hex(Array("abc".utf8)),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    }

    func testHalfPrecision() {
        XCTAssertEqual(Kernels.half(1), 0x3C00)
        XCTAssertEqual(Kernels.half(0.1), 0x2E66)
        XCTAssertEqual(Kernels.half(-2.5), 0xC100)
        XCTAssertEqual(Kernels.half(65520), 0x7C00)
        XCTAssertEqual(Kernels.half(0x1p-24), 0x0001)
        XCTAssertEqual(Kernels.half(0x1p-26), 0x0000)
    }

    func testTheStopRule() {
        XCTAssertNil(StopRule.uncertainty([1, 1, 1, 1, 1]))
        XCTAssertEqual(StopRule.uncertainty([1, 1, 1, 1, 1, 1]), 0)
        XCTAssertEqual(StopRule.uncertainty([1, 1, 1, 2, 2, 2])!, 1.0 / 3, accuracy: 1e-12)
    }

    func testMemoryOfThisProcess() {
        let use = Probes.memory(.start)
        XCTAssertGreaterThan(use.rss ?? 0, 1 << 20)
        XCTAssertGreaterThanOrEqual(use.peak_rss ?? 0, use.rss ?? 0)
        XCTAssertEqual(Probes.procStatus("VmRSS:\t   12 kB\nName:\tx\n"), ["VmRSS": 12 * 1024])
    }

    func testAJobRunsAndSaysSo() throws {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(at: folder) }
        let bundle = Self.golden.appendingPathComponent("bundle").path
        try FileManager.default.copyItem(
            atPath: bundle, toPath: folder.appendingPathComponent("bundle").path)
        let job = try JSONDecoder().decode(
            Job.self, from: Data(#"{"bundle": "bundle", "size": "16x8"}"#.utf8))
        var events: [Event] = []
        let runner = Runner(job: job, folder: folder, engines: [:]) { events.append($0) }
        XCTAssertThrowsError(try runner.run())
        guard case .hello = events.first?.body else { return XCTFail("no hello") }
        guard case let .error(failure) = events.last?.body else { return XCTFail("no error") }
        XCTAssertEqual(failure.code, .engineMissing)
    }
}
