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

    /// Gives zeros, after a while.
    final class Slow: Engine, HandheldRuntime.Model {
        let version = "1"
        let seconds: Double
        let counted: [String: Int]?
        private(set) var loads = 0
        private var ports: Manifest.Ports?

        init(seconds: Double = 0, units: [String: Int]? = nil) {
            self.seconds = seconds
            counted = units
        }

        func load(
            _ artifact: Manifest.Artifact, file: URL, cache: URL?, threads: Int
        ) throws -> HandheldRuntime.Model {
            loads += 1
            ports = artifact.ports
            return self
        }

        func units(
            _ artifact: Manifest.Artifact, file: URL, cache: URL?
        ) throws -> [String: Int]? { counted }

        func run(_ args: [String: Tensor]) throws -> [String: Tensor] {
            XCTAssertEqual(Set(args.keys), Set(ports?.inputOrder ?? []))
            Thread.sleep(forTimeInterval: seconds)
            return try (ports?.outputs ?? [:]).mapValues { spec in
                let count = spec.shape.reduce(1, *) * spec.dtype.bytes
                return try Tensor(
                    shape: spec.shape, dtype: spec.dtype, bytes: Array(repeating: 0, count: count))
            }
        }
    }

    func folderWithBundle() throws -> URL {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        addTeardownBlock { try? FileManager.default.removeItem(at: folder) }
        try FileManager.default.copyItem(
            atPath: Self.golden.appendingPathComponent("bundle").path,
            toPath: folder.appendingPathComponent("bundle").path)
        return folder
    }

    func run(
        _ engine: Slow, iterations: Int, heatSeconds: Double = 2, residency: String = "resident",
        heat: @escaping () -> Thermal = Probes.thermal
    ) throws -> [Event] {
        let text = """
            {"bundle": "bundle", "size": "16x8", "seed": 5, "iterations": \(iterations),
             "residency": "\(residency)", "inputs": {
             "prompt_embeds": {"path": "bundle/reference.safetensors", "tensor": "input.prompt_embeds"},
             "pooled": {"path": "bundle/reference.safetensors", "tensor": "input.pooled"}}}
            """
        let job = try JSONDecoder().decode(Job.self, from: Data(text.utf8))
        var events: [Event] = []
        try Runner(
            job: job, folder: try folderWithBundle(), engines: ["litert": engine],
            heatSeconds: heatSeconds, heat: heat
        ) { events.append($0) }.run()
        return events
    }

    func testHeatIsToldWhileAJobRuns() throws {
        var status = 0
        let events = try run(Slow(seconds: 0.05), iterations: 12, heatSeconds: 0.15) {
            status += 1
            return Thermal(status: status)
        }
        let times = events.compactMap { event -> Double? in
            if case .thermal = event.body { return event.milliseconds } else { return nil }
        }
        // The start, every third or so of fourteen runs, the end.
        XCTAssertGreaterThanOrEqual(times.count, 4)
        for (a, b) in zip(times, times.dropFirst().dropLast()) {
            XCTAssertGreaterThanOrEqual(b - a, 150)
        }
        XCTAssertEqual(status, times.count)
        let quick = try run(Slow(), iterations: 3)
        let looks = quick.filter { if case .thermal = $0.body { true } else { false } }
        XCTAssertEqual(looks.count, 2)
    }

    func testUnitsAreToldWhenAllIsMeasured() throws {
        for residency in ["resident", "stream"] {
            let engine = Slow(units: ["npu": 30, "cpu": 2])
            let events = try run(engine, iterations: 2, residency: residency)
            let loads = events.enumerated().compactMap { index, event -> (Int, Load)? in
                if case let .load(load) = event.body { return (index, load) } else { return nil }
            }
            XCTAssertEqual(loads.map(\.1.units), [nil, ["npu": 30, "cpu": 2]])
            XCTAssertEqual(loads.first?.1.ms, loads.last?.1.ms)
            XCTAssertEqual(loads.last?.0, events.count - 2)
            XCTAssertEqual(engine.loads, residency == "stream" ? 4 : 1)
        }
        let untold = try run(Slow(), iterations: 1)
        XCTAssertEqual(untold.filter { if case .load = $0.body { true } else { false } }.count, 1)
    }

    func testAJobRunsAndSaysSo() throws {
        let folder = try folderWithBundle()
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
