import Foundation
import HandheldProtocol

/// Runs one artifact.
public protocol Model: AnyObject {
    func run(_ args: [String: Tensor]) throws -> [String: Tensor]
}

/// Loads artifacts of one kind.
public protocol Engine: AnyObject {
    var version: String { get }
    /// Load an artifact. `file` is what the engine opens: a file, or the folder of a package.
    /// `cache` is a folder for what the engine prepares, or nil.
    func load(_ artifact: Manifest.Artifact, file: URL, cache: URL?, threads: Int) throws -> Model
    /// How many operations of an artifact each compute unit gets, or nil if that is unknown.
    func units(_ artifact: Manifest.Artifact, file: URL, cache: URL?) throws -> [String: Int]?
}

extension Engine {
    public func units(
        _ artifact: Manifest.Artifact, file: URL, cache: URL?
    ) throws -> [String: Int]? { nil }
}

/// Does what a job says and tells its events, as the C++ harness does.
public final class Runner {
    private let job: Job
    private let folder: URL
    private let objects: URL?
    private let engines: [String: Engine]
    private let sink: (Event) -> Void
    private let start: UInt64
    private let heat: () -> Thermal
    private let heatSeconds: Double
    private var heatSeen = 0.0
    private let lock = NSLock()
    private var stopped = false

    /// Paths in the job are relative to `folder`. With `objects` the bundle is a manifest alone, and
    /// its files are made of those in there. `heat` is asked at the start, at the end, and after the
    /// first call that ends `heatSeconds` after the last time.
    public init(
        job: Job, folder: URL, objects: URL? = nil, engines: [String: Engine],
        heatSeconds: Double = 2, heat: @escaping () -> Thermal = Probes.thermal,
        sink: @escaping (Event) -> Void
    ) {
        let clock = DispatchTime.now().uptimeNanoseconds
        start = clock - min(clock, Probes.ageNanoseconds())
        self.objects = objects
        self.heat = heat
        self.heatSeconds = heatSeconds
        self.job = job
        self.folder = folder
        self.engines = engines
        self.sink = sink
    }

    /// Ends the run after the current call; from any thread.
    public func cancel() {
        lock.lock()
        stopped = true
        lock.unlock()
    }

    /// Runs everything. A failure is an event, and is thrown as well.
    public func run() throws {
        do {
            try runJob()
        } catch let failure as HarnessFailure {
            emit(.error(Failure(code: failure.code, message: failure.message)))
            throw failure
        } catch {
            let failure = HarnessFailure(.engine, String(describing: error))
            emit(.error(Failure(code: failure.code, message: failure.message)))
            throw failure
        }
    }

    private func runJob() throws {
        emit(
            .hello(
                Hello(
                    protocol: Job.protocolVersion, harness: "0.1.0",
                    pid: Int(ProcessInfo.processInfo.processIdentifier),
                    engines: engines.mapValues(\.version), platform: Self.platform,
                    base_rss_bytes: Probes.memory(.start).rss)))
        emit(.memory(Probes.memory(.start)))
        tellHeat()
        guard job.memoryBudget == nil else {
            throw HarnessFailure(
                .job, "this harness plans no memory (choose a residency instead of a memory budget)")
        }
        guard !job.resetPeak else {
            throw HarnessFailure(.job, "the high-water mark of memory cannot be reset here")
        }
        let bundle = folder.appendingPathComponent(job.bundle)
        let manifest = try readManifest(bundle)
        guard let size = manifest.sizes[job.size] else {
            throw HarnessFailure(.job, "the bundle has no size '\(job.size)'")
        }
        if let objects { try Objects.lay(manifest, from: objects, into: bundle) }
        var constants: [String: Tensor] = [:]
        if let file = manifest.constants {
            constants = try SafeTensors.read(path: path(bundle, file))
            let specs = constants.mapValues { TensorSpec(shape: $0.shape, dtype: $0.dtype) }
            guard specs == manifest.constantSpecs else {
                throw HarnessFailure(.bundle, "\(file.path): holds other constants than the manifest")
            }
        }
        var inputs: [String: Tensor] = [:]
        for (name, source) in job.inputs { inputs[name] = try tensor(source, size.program, name) }
        let models = Models(
            manifest: manifest, bundle: bundle, job: job, folder: folder, engines: engines
        ) { [unowned self] load in self.emit(.load(load)) }
        try models.check(size.program)
        try models.loadResidents(size.program)
        emit(.memory(Probes.memory(.loaded)))

        let executor = Executor(program: size.program, constants: constants)
        var outputs: [String: Tensor] = [:]
        var timed: [Double] = []
        var index = 0
        func pass(_ told: (String, [String: Tensor]) throws -> Void = { _, _ in }) throws -> [Double] {
            var calls: [Double] = []
            models.waited = 0
            outputs = try executor.run(inputs: inputs, seed: job.seed) { artifact, args in
                if self.isStopped { throw HarnessFailure(.cancelled, "cancelled") }
                let model = try models.model(artifact)
                let before = self.now()
                let results = try model.run(args)
                calls.append(self.now() - before)
                models.release(artifact)
                if self.now() - self.heatSeen >= self.heatSeconds * 1000 { self.tellHeat() }
                try told(artifact, results)
                return results
            }
            return calls
        }
        func iterate(_ kind: Iteration.Kind) throws -> Double {
            let begin = now()
            let calls = try pass()
            let total = now() - begin
            emit(
                .iteration(
                    Iteration(
                        index: index, kind: kind, total_ms: total, engine_ms: calls.reduce(0, +),
                        load_ms: models.waited, calls_ms: calls)))
            if index == 0 { emit(.memory(Probes.memory(.first))) }
            index += 1
            return total
        }
        _ = try iterate(.first)
        for _ in 0..<job.warmup { _ = try iterate(.warmup) }
        let begin = now()
        repeat { timed.append(try iterate(.timed)) } while !StopRule.enough(timed, now() - begin, job)
        emit(.memory(Probes.memory(.end)))
        tellHeat()
        if let target = job.dumpCalls {
            // Outside of the measurements: writing would spoil them, and every pass gives the same.
            let dump = try CallDump(
                folder.appendingPathComponent(target), manifest, size.program)
            _ = try pass(dump.write)
            try dump.commit()
        }
        try tell(outputs, size.program)
        // Last of all: it may take as long as to load, and memory.
        models.tellUnits(size.program)
        emit(.done(Done(iterations: timed.count)))
    }

    private func tellHeat() {
        heatSeen = now()
        emit(.thermal(heat()))
    }

    private func tell(_ outputs: [String: Tensor], _ program: Program) throws {
        for (role, value) in outputs.sorted(by: { $0.key < $1.key }) {
            var event = Output(
                role: role, sha256: SHA256.hex(value.bytes), shape: value.shape,
                dtype: value.dtype.rawValue)
            if role == "picture", let target = job.output {
                try Data(value.bytes).write(
                    to: folder.appendingPathComponent(target), options: .atomic)
                event.file = target
            }
            if role == "picture", let expect = job.expect {
                let file = folder.appendingPathComponent(expect.path).path
                guard let wanted = try SafeTensors.read(path: file, code: .input)[expect.tensor],
                    wanted.bytes.count == value.bytes.count, wanted.dtype == .uint8
                else { throw HarnessFailure(.input, "'expect' is no picture of this size") }
                event.psnr_db = Self.psnr(value.bytes, wanted.bytes)
            }
            emit(.output(event))
        }
    }

    /// Peak 255; 999 where all is equal.
    static func psnr(_ a: [UInt8], _ b: [UInt8]) -> Double {
        var squares = 0
        for (x, y) in zip(a, b) {
            let d = Int(x) - Int(y)
            squares += d * d
        }
        if squares == 0 { return 999 }
        return min(999, 10 * log10(255.0 * 255.0 * Double(a.count) / Double(squares)))
    }

    private func readManifest(_ bundle: URL) throws -> Manifest {
        let file = bundle.appendingPathComponent("manifest.json")
        do {
            return try Manifest.read(Data(contentsOf: file))
        } catch {
            throw HarnessFailure(.bundle, "\(file.lastPathComponent): \(error)")
        }
    }

    private func path(_ bundle: URL, _ ref: Manifest.FileRef) -> String {
        bundle.appendingPathComponent(ref.path).path
    }

    private func tensor(_ source: TensorFile, _ program: Program, _ name: String) throws -> Tensor {
        let file = folder.appendingPathComponent(source.path).path
        guard let found = try SafeTensors.read(path: file, code: .input)[source.tensor] else {
            throw HarnessFailure(.input, "\(source.path): there is no tensor '\(source.tensor)'")
        }
        guard let spec = program.tensors[name] else {
            throw HarnessFailure(.input, "the program has no input '\(name)'")
        }
        func core(_ shape: [Int]) -> [Int] { Array(shape.drop { $0 == 1 }) }
        guard core(spec.shape) == core(found.shape) else {
            throw HarnessFailure(.input, "'\(name)' is \(found.shape), not \(spec.shape)")
        }
        return try Tensor(shape: spec.shape, dtype: found.dtype, bytes: found.bytes)
    }

    private var isStopped: Bool {
        lock.lock()
        defer { lock.unlock() }
        return stopped
    }

    private func now() -> Double {
        Double(DispatchTime.now().uptimeNanoseconds - start) / 1e6
    }

    private func emit(_ body: Event.Body) {
        sink(Event(milliseconds: now(), body: body))
    }

    static var platform: String {
        #if os(iOS)
        return "ios-arm64"
        #elseif os(macOS)
        return "macos"
        #else
        return "linux"
        #endif
    }
}

/// When there are enough timed runs; runtime/handheld/records.py has the rule of the interval.
public enum StopRule {
    public static func enough(_ timed: [Double], _ elapsed: Double, _ job: Job) -> Bool {
        if timed.count < job.iterations || elapsed < job.minSeconds * 1000 { return false }
        guard let precision = job.precision else { return true }
        if let most = job.maxSeconds, elapsed >= most * 1000 { return true }
        guard let found = uncertainty(timed) else { return false }
        return found <= precision
    }

    /// Half the width of the median's 95 % confidence interval, as part of it; nil below six values.
    public static func uncertainty(_ values: [Double]) -> Double? {
        let n = values.count
        guard n >= 6 else { return nil }
        let ordered = values.sorted()
        let spread = 1.959964 * Double(n).squareRoot()
        let low = max(0, Int(((Double(n) - spread) / 2).rounded(.down)))
        let high = min(n - 1, Int(((Double(n) + spread) / 2).rounded(.up)))
        let median = n % 2 == 1 ? ordered[n / 2] : (ordered[n / 2 - 1] + ordered[n / 2]) / 2
        return median > 0 ? max(median - ordered[low], ordered[high] - median) / median : nil
    }
}

/// Which artifacts are loaded: resident ones once, streamed ones around their calls.
final class Models {
    private let manifest: Manifest
    private let bundle: URL
    private let job: Job
    private let folder: URL
    private let engines: [String: Engine]
    private let told: (Load) -> Void
    private var loaded: [String: Model] = [:]
    /// How long each artifact took to load for the first time.
    private var firstLoads: [String: Double] = [:]
    /// Milliseconds waited for artifacts in this run.
    var waited = 0.0
    /// For files made of two, where there is no cache.
    private let joined = FileManager.default.temporaryDirectory.appendingPathComponent(
        "handheld-\(UUID().uuidString)")

    init(
        manifest: Manifest, bundle: URL, job: Job, folder: URL, engines: [String: Engine],
        told: @escaping (Load) -> Void
    ) {
        self.manifest = manifest
        self.bundle = bundle
        self.job = job
        self.folder = folder
        self.engines = engines
        self.told = told
    }

    deinit {
        try? FileManager.default.removeItem(at: joined)
    }

    func loadResidents(_ program: Program) throws {
        for case let .call(artifact, _, _) in program.ops
        where loaded[artifact] == nil && !streams(artifact) {
            _ = try model(artifact)
        }
        waited = 0
    }

    /// Checks the files of what a program calls, so that a broken bundle reaches no engine.
    func check(_ program: Program) throws {
        var done: Set<String> = []
        for case let .call(id, _, _) in program.ops where done.insert(id).inserted {
            let (artifact, _) = try find(id)
            try artifact.check(in: bundle, hashes: job.verifyHashes)
        }
    }

    func model(_ id: String) throws -> Model {
        if let model = loaded[id] { return model }
        let (artifact, engine) = try find(id)
        let file = try opened(artifact)
        let begin = DispatchTime.now().uptimeNanoseconds
        let model = try engine.load(artifact, file: file, cache: cache, threads: job.threads)
        let ms = Double(DispatchTime.now().uptimeNanoseconds - begin) / 1e6
        waited += ms
        if firstLoads[id] == nil {
            firstLoads[id] = ms
            told(Load(artifact: id, ms: ms, cache: Load.Cache.none))
        }
        loaded[id] = model
        return model
    }

    /// Tells of every loaded artifact again, with its compute units, where they are known.
    func tellUnits(_ program: Program) {
        var done: Set<String> = []
        for case let .call(id, _, _) in program.ops where done.insert(id).inserted {
            // A run is worth as much without it.
            guard let ms = firstLoads[id], let (artifact, engine) = try? find(id),
                let file = try? opened(artifact), let units = try? engine.units(artifact, file: file, cache: cache)
            else { continue }
            told(Load(artifact: id, ms: ms, cache: Load.Cache.none, units: units))
        }
    }

    private var cache: URL? { job.cache.map { folder.appendingPathComponent($0) } }

    private func opened(_ artifact: Manifest.Artifact) throws -> URL {
        try artifact.opened(in: bundle, joined: cache ?? joined)
    }

    private func find(_ id: String) throws -> (Manifest.Artifact, Engine) {
        let artifact = try manifest.artifact(id)
        guard let engine = engines[artifact.engine.rawValue] else {
            throw HarnessFailure(.engineMissing, "engine '\(artifact.engine.rawValue)' is not built in")
        }
        if let option = artifact.options.keys.min() {
            throw HarnessFailure(.engineMissing, "'\(id)' wants '\(option)', which no engine here knows")
        }
        return (artifact, engine)
    }

    func release(_ id: String) {
        if streams(id) { loaded[id] = nil }
    }

    private func streams(_ id: String) -> Bool {
        (job.residencyByArtifact[id] ?? job.residency) == .stream
    }
}

/// The results of every call of a run, as a safetensors file.
private final class CallDump {
    private let file: SafeTensorsWriter
    private let manifest: Manifest

    init(_ path: URL, _ manifest: Manifest, _ program: Program) throws {
        self.manifest = manifest
        var tensors: [(name: String, spec: TensorSpec)] = []
        var index = 0
        for case let .call(id, _, _) in program.ops {
            for (port, spec) in try Self.outputs(manifest, id) {
                tensors.append(("call.\(index).\(port)", spec))
            }
            index += 1
        }
        do {
            file = try SafeTensorsWriter(path, tensors)
        } catch {
            throw HarnessFailure(.io, "\(path.lastPathComponent): cannot be written: \(error)")
        }
    }

    func write(_ artifact: String, _ results: [String: Tensor]) throws {
        for (port, _) in try Self.outputs(manifest, artifact) {
            guard let value = results[port] else {
                throw HarnessFailure(.engine, "artifact '\(artifact)' gave no '\(port)'")
            }
            try file.write(value)
        }
    }

    func commit() throws {
        try file.commit()
    }

    private static func outputs(_ manifest: Manifest, _ id: String) throws -> [(String, TensorSpec)] {
        try manifest.artifact(id).ports.outputs.sorted { $0.key < $1.key }.map { ($0.key, $0.value) }
    }
}

extension Manifest {
    fileprivate func artifact(_ id: String) throws -> Artifact {
        guard let found = artifacts.first(where: { $0.id == id }) else {
            throw HarnessFailure(.bundle, "there is no artifact '\(id)'")
        }
        return found
    }
}
