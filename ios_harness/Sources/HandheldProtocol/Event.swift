import Foundation

/// What a harness prints, one JSON object a line. Unknown fields are passed over, so that an
/// older reader understands a newer harness.
public struct Event: Codable, Equatable, Sendable {
    /// Milliseconds since the process was started.
    public var milliseconds: Double
    public var body: Body

    public enum Body: Equatable, Sendable {
        case hello(Hello)
        case plan(Plan)
        case load(Load)
        case iteration(Iteration)
        case memory(Memory)
        case thermal(Thermal)
        case output(Output)
        case error(Failure)
        case done(Done)
    }

    public init(milliseconds: Double, body: Body) {
        self.milliseconds = milliseconds
        self.body = body
    }

    private enum CodingKeys: String, CodingKey {
        case event
        case milliseconds = "t_ms"
    }

    private enum Kind: String, Codable {
        case hello, plan, load, iteration, memory, thermal, output, error, done
    }

    public init(from decoder: Decoder) throws {
        let values = try decoder.container(keyedBy: CodingKeys.self)
        milliseconds = try values.decode(Double.self, forKey: .milliseconds)
        body =
            switch try values.decode(Kind.self, forKey: .event) {
            case .hello: .hello(try Hello(from: decoder))
            case .plan: .plan(try Plan(from: decoder))
            case .load: .load(try Load(from: decoder))
            case .iteration: .iteration(try Iteration(from: decoder))
            case .memory: .memory(try Memory(from: decoder))
            case .thermal: .thermal(try Thermal(from: decoder))
            case .output: .output(try Output(from: decoder))
            case .error: .error(try Failure(from: decoder))
            case .done: .done(try Done(from: decoder))
            }
    }

    public func encode(to encoder: Encoder) throws {
        var values = encoder.container(keyedBy: CodingKeys.self)
        try values.encode(milliseconds, forKey: .milliseconds)
        let (kind, part): (Kind, any Encodable) =
            switch body {
            case let .hello(x): (.hello, x)
            case let .plan(x): (.plan, x)
            case let .load(x): (.load, x)
            case let .iteration(x): (.iteration, x)
            case let .memory(x): (.memory, x)
            case let .thermal(x): (.thermal, x)
            case let .output(x): (.output, x)
            case let .error(x): (.error, x)
            case let .done(x): (.done, x)
            }
        try values.encode(kind, forKey: .event)
        try part.encode(to: encoder)
    }
}

public struct Hello: Codable, Equatable, Sendable {
    public var `protocol`: Int
    public var harness: String
    public var pid: Int
    public var engines: [String: String]
    public var platform: String
    public var base_rss_bytes: Int?
    public var engine_library_bytes: Int?

    public init(
        protocol: Int, harness: String, pid: Int, engines: [String: String], platform: String,
        base_rss_bytes: Int? = nil, engine_library_bytes: Int? = nil
    ) {
        self.protocol = `protocol`
        self.harness = harness
        self.pid = pid
        self.engines = engines
        self.platform = platform
        self.base_rss_bytes = base_rss_bytes
        self.engine_library_bytes = engine_library_bytes
    }
}

/// What stays in memory within a budget; this harness plans none, but others tell it.
public struct Plan: Codable, Equatable, Sendable {
    public var resident: [String]
    public var streamed: [String]
    public var prefetch: Bool
    public var peak_bytes: Int
    public var budget_bytes: Int
}

public struct Load: Codable, Equatable, Sendable {
    public enum Cache: String, Codable, Sendable { case none, built, hit }
    public var artifact: String
    public var ms: Double
    public var cache: Cache?
    /// Operations by compute unit, where the engine tells.
    public var units: [String: Int]?

    public init(artifact: String, ms: Double, cache: Cache?, units: [String: Int]? = nil) {
        self.artifact = artifact
        self.ms = ms
        self.cache = cache
        self.units = units
    }
}

public struct Iteration: Codable, Equatable, Sendable {
    public enum Kind: String, Codable, Sendable { case first, warmup, timed }
    public var index: Int
    public var kind: Kind
    public var total_ms: Double
    public var engine_ms: Double
    public var load_ms: Double?
    public var calls_ms: [Double]?

    public init(
        index: Int, kind: Kind, total_ms: Double, engine_ms: Double, load_ms: Double?,
        calls_ms: [Double]?
    ) {
        self.index = index
        self.kind = kind
        self.total_ms = total_ms
        self.engine_ms = engine_ms
        self.load_ms = load_ms
        self.calls_ms = calls_ms
    }
}

public struct Memory: Codable, Equatable, Sendable {
    public enum Phase: String, Codable, Sendable { case start, loaded, first, end, warning }
    public var phase: Phase
    public var rss: Int?
    public var peak_rss: Int?
    public var anon: Int?
    public var file: Int?
    public var swap: Int?
    public var phys_footprint: Int?
    public var phys_footprint_peak: Int?
    public var dma_buf: Int?
    public var activations: Int?

    public init(phase: Phase) {
        self.phase = phase
    }
}

public struct Thermal: Codable, Equatable, Sendable {
    public var status: Int?

    public init(status: Int?) {
        self.status = status
    }
}

public struct Output: Codable, Equatable, Sendable {
    public var role: String
    public var sha256: String
    public var shape: [Int]
    public var dtype: String
    public var file: String?
    public var psnr_db: Double?

    public init(role: String, sha256: String, shape: [Int], dtype: String) {
        self.role = role
        self.sha256 = sha256
        self.shape = shape
        self.dtype = dtype
    }
}

public struct Failure: Codable, Equatable, Sendable {
    public enum Code: String, Codable, Sendable {
        case job, bundle, hash, engineMissing = "engine-missing", engine, input, memory, cancelled, io
    }
    public var code: Code
    public var message: String

    public init(code: Code, message: String) {
        self.code = code
        self.message = message
    }
}

public struct Done: Codable, Equatable, Sendable {
    public var iterations: Int

    public init(iterations: Int) {
        self.iterations = iterations
    }
}
