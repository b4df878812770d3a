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
        struct Packages: Decodable {
            var folder: String
            var package: String
            var features: String
            var seed: UInt64
        }
        struct Manifest: Decodable {
            var file: String
            var runs: Bool
        }
        var manifests: [Manifest]
        var sizes_manifests: [Manifest]
        var programs: [Program]
        var half_programs: [Program]
        var packages: Packages
    }

    func index() throws -> Index {
        try JSONDecoder().decode(Index.self, from: data("index.json"))
    }

    func data(_ path: String) throws -> Data {
        try Data(contentsOf: Self.golden.appendingPathComponent(path))
    }

    func testProgramsGiveTheSameBits() throws {
        let index = try self.index()
        XCTAssertFalse(index.programs.isEmpty)
        XCTAssertFalse(index.half_programs.isEmpty)
        for item in index.programs + index.half_programs {
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
        for bits in UInt16.min...UInt16.max {
            let value = Kernels.float(bits)
            if bits & 0x7C00 == 0x7C00, bits & 0x3FF != 0 {
                XCTAssertTrue(value.isNaN)
            } else {
                XCTAssertEqual(Kernels.half(value), bits)
            }
        }
        XCTAssertEqual(Kernels.float(0x2E66), 0.0999755859375)
        XCTAssertEqual(Kernels.float(0x8001), -0x1p-24)
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

    func testWhatIsWrongWithAManifestReachesNoEngine() throws {
        let index = try self.index()
        let folder = try folderWithBundle()
        let place = folder.appendingPathComponent("bundle/manifest.json")
        let text = """
            {"bundle": "bundle", "size": "16x8", "warmup": 0, "inputs": {
             "prompt_embeds": {"path": "bundle/reference.safetensors", "tensor": "input.prompt_embeds"},
             "pooled": {"path": "bundle/reference.safetensors", "tensor": "input.pooled"}}}
            """
        let job = try JSONDecoder().decode(Job.self, from: Data(text.utf8))
        for item in index.manifests + index.sizes_manifests {
            // An engine that opens files in place wants the first one to end with a page; this harness
            // writes them to one.
            let runs = item.runs || item.file == "manifests/valid-sizes-with-parts.json"
            try data(item.file).write(to: place)
            let engine = Slow()
            let runner = Runner(job: job, folder: folder, engines: ["litert": engine]) { _ in }
            do {
                try runner.run()
                XCTAssertTrue(runs, item.file)
            } catch let failure as HarnessFailure {
                XCTAssertFalse(runs, "\(item.file): \(failure)")
                XCTAssertTrue([.bundle, .hash].contains(failure.code), "\(item.file): \(failure)")
            }
            XCTAssertEqual(engine.loads, runs ? 1 : 0, item.file)
        }
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

    /// Answers what the golden files say, if it is given what they say.
    final class Packages: Engine, HandheldRuntime.Model {
        let version = "1"
        let wanted: [String: Tensor]
        private(set) var opened: [String: String] = [:]
        private(set) var contents: [String] = []
        private(set) var asked: [URL] = []
        private var features: Features?
        var fault: Float = 0

        init(_ wanted: [String: Tensor]) {
            self.wanted = wanted
        }

        func load(
            _ artifact: Manifest.Artifact, file: URL, cache: URL?, threads: Int
        ) throws -> HandheldRuntime.Model {
            features = try Features(artifact)
            contents.append(artifact.contents)
            XCTAssertEqual(file.lastPathComponent, "unet.0.mlpackage")
            let found = try XCTUnwrap(FileManager.default.enumerator(atPath: file.path))
            opened = [:]
            for case let path as String in found {
                let place = file.appendingPathComponent(path)
                guard let data = try? Data(contentsOf: place) else { continue }
                let kind = try FileManager.default.attributesOfItem(atPath: place.path)[.type]
                XCTAssertEqual(kind as? FileAttributeType, .typeRegular, path)
                opened[path] = SHA256.hex(data)
            }
            return self
        }

        func units(
            _ artifact: Manifest.Artifact, file: URL, cache: URL?
        ) throws -> [String: Int]? {
            asked.append(file)
            return nil
        }

        func run(_ args: [String: Tensor]) throws -> [String: Tensor] {
            let features = try XCTUnwrap(self.features)
            let given = try features.given(args)
            XCTAssertEqual(Set(given.keys), Set(wanted.keys).subtracting(["out0"]))
            for (name, value) in given { XCTAssertEqual(value, wanted[name], name) }
            return try features.results { name, spec in
                guard let value = wanted[name] else { return nil }
                XCTAssertEqual(value.shape, spec.shape)
                return try Tensor(shape: value.shape, floats: value.floats().map { $0 + fault })
            }
        }
    }

    /// A folder as an iPhone has it: a manifest, and files by their hashes.
    func folderWithObjects(_ bundle: String) throws -> URL {
        let files = FileManager.default
        let folder = files.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        for name in ["objects", "bundle"] {
            try files.createDirectory(
                at: folder.appendingPathComponent(name), withIntermediateDirectories: true)
        }
        addTeardownBlock { try? files.removeItem(at: folder) }
        let source = Self.golden.appendingPathComponent(bundle)
        try files.copyItem(
            at: source.appendingPathComponent("manifest.json"),
            to: folder.appendingPathComponent("bundle/manifest.json"))
        for case let path as String in try XCTUnwrap(files.enumerator(atPath: source.path)) {
            guard let data = try? Data(contentsOf: source.appendingPathComponent(path)) else { continue }
            try data.write(to: folder.appendingPathComponent("objects/\(SHA256.hex(data))"))
        }
        return folder
    }

    /// Runs the golden bundle with a package in a folder as an iPhone has it.
    func runPackages(
        _ engine: Packages, _ folder: URL, more: String = ""
    ) throws -> [Event] {
        let manifest = try Manifest.read(
            Data(contentsOf: folder.appendingPathComponent("bundle/manifest.json")))
        let reference = "objects/" + SHA256.hex(try data("packages/reference.safetensors"))
        let (size, seed) = (try XCTUnwrap(manifest.sizes.keys.first), try index().packages.seed)
        let text = """
            {"bundle": "bundle", "size": "\(size)", "seed": \(seed)\(more), "inputs": {
             "prompt_embeds": {"path": "\(reference)", "tensor": "input.prompt_embeds"},
             "pooled": {"path": "\(reference)", "tensor": "input.pooled"}},
             "expect": {"path": "\(reference)", "tensor": "picture"}}
            """
        let job = try JSONDecoder().decode(Job.self, from: Data(text.utf8))
        var events: [Event] = []
        try Runner(
            job: job, folder: folder, objects: folder.appendingPathComponent("objects"),
            engines: ["coreml": engine]
        ) { events.append($0) }.run()
        return events
    }

    func psnr(_ events: [Event]) -> Double? {
        for case let .output(output) in events.map(\.body) where output.role == "picture" {
            return output.psnr_db
        }
        return nil
    }

    func testAPackageIsRebuiltAndFedByPosition() throws {
        let golden = try index().packages
        let wanted = try SafeTensors.read(data(golden.features))
        XCTAssertEqual(wanted.count, 7)
        let folder = try folderWithObjects(golden.folder)
        let engine = Packages(wanted)
        XCTAssertEqual(psnr(try runPackages(engine, folder)), 999)
        let manifest = try Manifest.read(data("\(golden.folder)/manifest.json"))
        let artifact = try XCTUnwrap(manifest.artifacts.first)
        XCTAssertEqual(artifact.package, golden.package)
        XCTAssertEqual(artifact.files.count, 4)
        var files: [String: String] = [:]
        for ref in artifact.files {
            files[String(ref.path.dropFirst(golden.package.count + 1))] = ref.sha256
        }
        XCTAssertEqual(engine.opened, files)
        XCTAssertEqual(engine.asked.map(\.lastPathComponent), ["unet.0.mlpackage"])
        // What was compiled of it is known by all of its files.
        var other = artifact
        XCTAssertEqual(engine.contents, [other.contents])
        other.parts[1].sha256 = String(repeating: "0", count: 64)
        XCTAssertNotEqual(other.contents, artifact.contents)
    }

    func testAPackageThatIsNotWholeIsRefused() throws {
        let golden = try index().packages
        let engine = Packages(try SafeTensors.read(data(golden.features)))
        let artifact = try XCTUnwrap(
            try Manifest.read(data("\(golden.folder)/manifest.json")).artifacts.first)
        let faults: [(String, Failure.Code)] = [
            ("gone", .bundle), ("short", .bundle), ("changed", .hash),
        ]
        for (what, code) in faults {
            for ref in artifact.files {
                let folder = try folderWithObjects(golden.folder)
                let object = folder.appendingPathComponent("objects/\(ref.sha256)")
                var bytes = try Data(contentsOf: object)
                try FileManager.default.removeItem(at: object)
                if what == "short" { bytes.removeLast() } else { bytes[0] ^= 1 }
                if what != "gone" { try bytes.write(to: object) }
                XCTAssertThrowsError(try runPackages(engine, folder), "\(what) \(ref.path)") { error in
                    let failure = error as? HarnessFailure
                    XCTAssertEqual(failure?.code, code, "\(what) \(ref.path)")
                    // Of two paths to the same content, either is told.
                    let same = artifact.files.filter { $0.sha256 == ref.sha256 }
                    XCTAssertTrue(same.contains { failure?.message.contains($0.path) ?? false })
                }
            }
        }
        XCTAssertTrue(engine.contents.isEmpty)
        let folder = try folderWithObjects(golden.folder)
        let place = folder.appendingPathComponent("bundle/manifest.json")
        let text = String(decoding: try Data(contentsOf: place), as: UTF8.self)
        try Data(text.replacingOccurrences(of: "unet.0.mlpackage/Data", with: "elsewhere").utf8)
            .write(to: place)
        XCTAssertThrowsError(try runPackages(engine, folder)) { error in
            XCTAssertEqual((error as? HarnessFailure)?.message, "the files of 'unet.0' make up no package")
        }
    }

    func testTheResultsOfEveryCallAreWritten() throws {
        let golden = try index().packages
        let wanted = try SafeTensors.read(data(golden.features))
        let dump = #", "dump_calls": "calls.safetensors", "warmup": 0"#
        for fault in [0, 1] as [Float] {
            let folder = try folderWithObjects(golden.folder)
            let engine = Packages(wanted)
            engine.fault = fault
            let events = try runPackages(engine, folder, more: dump)
            // That pass is outside of what is measured.
            let runs = events.filter { if case .iteration = $0.body { true } else { false } }
            XCTAssertEqual(runs.count, 2)
            XCTAssertEqual(psnr(events) == 999, fault == 0)
            let found = try SafeTensors.read(path: folder.appendingPathComponent("calls.safetensors").path)
            let right = try XCTUnwrap(wanted["out0"])
            let floats = try right.floats().map { $0 + fault }
            let value = try Tensor(shape: right.shape, floats: floats)
            XCTAssertEqual(found, ["call.0.y": value])
            let left = try FileManager.default.contentsOfDirectory(atPath: folder.path)
            XCTAssertEqual(Set(left), ["objects", "bundle", "calls.safetensors"])
        }
    }

    func testTensorsAreWrittenInOrderOrNotAtAll() throws {
        let folder = try folderWithBundle()
        let path = folder.appendingPathComponent("x.safetensors")
        let specs = [
            (name: "a", spec: TensorSpec(shape: [3], dtype: .uint8)),
            (name: "b", spec: TensorSpec(shape: [2, 1])),
        ]
        let a = try Tensor(shape: [3], dtype: .uint8, bytes: [1, 2, 3])
        let b = try Tensor(shape: [2, 1], floats: [0.5, -1])
        let before = Set(try FileManager.default.contentsOfDirectory(atPath: folder.path))
        try { () throws -> Void in
            let file = try SafeTensorsWriter(path, specs)
            XCTAssertThrowsError(try file.write(b))
            try file.write(a)
            XCTAssertThrowsError(try file.commit())
        }()
        XCTAssertEqual(Set(try FileManager.default.contentsOfDirectory(atPath: folder.path)), before)
        for _ in 0..<2 {
            let file = try SafeTensorsWriter(path, specs)
            try file.write(a)
            try file.write(b)
            XCTAssertThrowsError(try file.write(b))
            try file.commit()
            XCTAssertEqual(try SafeTensors.read(path: path.path), ["a": a, "b": b])
        }
    }

    /// Remembers what it was to open.
    final class Whole: Engine {
        let version = "1"
        private(set) var seen: [Data] = []
        private(set) var place: URL?
        private let model = Slow()

        func load(
            _ artifact: Manifest.Artifact, file: URL, cache: URL?, threads: Int
        ) throws -> HandheldRuntime.Model {
            seen.append(try Data(contentsOf: file))
            place = file
            return try model.load(artifact, file: file, cache: cache, threads: threads)
        }
    }

    func testAFileAndWhatContinuesItAreOpenedAsOne() throws {
        let folder = try folderWithBundle()
        let place = folder.appendingPathComponent("bundle/manifest.json")
        try FileManager.default.removeItem(at: place)
        try data("manifests/valid-sizes-with-parts.json").write(to: place)
        let file = try data("bundle/artifacts/unet.0.tflite")
        for (cache, loads) in [("null", 1), (#""kept""#, 1), (#""kept""#, 2)] {
            let text = """
                {"bundle": "bundle", "size": "16x8", "cache": \(cache), "inputs": {
                 "prompt_embeds": {"path": "bundle/reference.safetensors", "tensor": "input.prompt_embeds"},
                 "pooled": {"path": "bundle/reference.safetensors", "tensor": "input.pooled"}},
                 "residency": "\(loads == 1 ? "resident" : "stream")", "warmup": 0}
                """
            let job = try JSONDecoder().decode(Job.self, from: Data(text.utf8))
            let engine = Whole()
            try Runner(job: job, folder: folder, engines: ["litert": engine]) { _ in }.run()
            XCTAssertEqual(engine.seen, Array(repeating: file + file, count: loads))
            // Without a folder to keep it in, nothing is left.
            let left = FileManager.default.fileExists(atPath: try XCTUnwrap(engine.place).path)
            XCTAssertEqual(left, cache != "null")
        }
    }

    func testTimesCountFromTheStartOfTheProcess() throws {
        let stat = "7 (a) b (c)) S " + (4...21).map(String.init).joined(separator: " ") + " 250 23 24"
        XCTAssertEqual(Probes.started(stat, ticks: 100), 2.5)
        XCTAssertNil(Probes.started("", ticks: 100))
        let age = Probes.ageNanoseconds()
        XCTAssertGreaterThan(age, 0)
        let hello = try XCTUnwrap(try run(Slow(), iterations: 1).first).milliseconds
        XCTAssertGreaterThanOrEqual(hello, Double(age) / 1e6)
        XCTAssertLessThan(hello, Double(Probes.ageNanoseconds()) / 1e6 + 1000)
    }

    func testAnOptionThatNoEngineKnowsIsRefused() throws {
        let folder = try folderWithObjects(try index().packages.folder)
        let place = folder.appendingPathComponent("bundle/manifest.json")
        let text = String(decoding: try Data(contentsOf: place), as: UTF8.self)
        // The artifacts' come before the provenance's.
        let none = try XCTUnwrap(text.range(of: #""options": {}"#))
        let changed = text.replacingCharacters(in: none, with: #""options": {"accelerator": "gpu"}"#)
        try Data(changed.utf8).write(to: place)
        XCTAssertThrowsError(try runPackages(Packages([:]), folder)) { error in
            XCTAssertEqual((error as? HarnessFailure)?.code, .engineMissing)
        }
    }

    func testWhatThisHarnessCannotDoIsRefused() throws {
        let folder = try folderWithObjects(try index().packages.folder)
        for wish in [#""memory_budget": 600000000"#, #""reset_peak": true"#] {
            XCTAssertThrowsError(try runPackages(Packages([:]), folder, more: ", " + wish)) { error in
                XCTAssertEqual((error as? HarnessFailure)?.code, .job, wish)
            }
        }
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
