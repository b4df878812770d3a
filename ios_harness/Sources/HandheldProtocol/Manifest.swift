import Foundation

/// The part of a bundle's manifest.json that a runtime needs. Fields that only tools read
/// (text, reference, verification, provenance, ...) are passed over.
public struct Manifest: Decodable, Equatable, Sendable {
    /// The newest that is read; what its versions add is in docs/bundle.md.
    public static let schemaVersion = 3

    public struct FileRef: Decodable, Equatable, Sendable {
        public var path: String
        public var sha256: String
        public var bytes: Int

        enum CodingKeys: String, CodingKey, CaseIterable { case path, sha256, bytes }

        public init(from decoder: Decoder) throws {
            try decoder.refuseUnknownFields(CodingKeys.self)
            let values = try decoder.container(keyedBy: CodingKeys.self)
            path = try values.decode(String.self, forKey: .path)
            sha256 = try values.decode(String.self, forKey: .sha256)
            bytes = try values.decode(Int.self, forKey: .bytes)
            try decoder.require(isInside(path), "path '\(path)' leaves the bundle")
            try decoder.require(isSHA256(sha256), "'sha256' is malformed")
            try decoder.require(bytes >= 0, "'bytes' is negative")
        }
    }

    public struct Ports: Decodable, Equatable, Sendable {
        public var inputs: [String: TensorSpec]
        public var outputs: [String: TensorSpec]
        /// Names in the manifest's order, for engines that know positions alone; nil unless it was
        /// read by `Manifest.read`.
        public var inputOrder: [String]?
        public var outputOrder: [String]?

        enum CodingKeys: String, CodingKey, CaseIterable { case inputs, outputs }

        public init(from decoder: Decoder) throws {
            try decoder.refuseUnknownFields(CodingKeys.self)
            let values = try decoder.container(keyedBy: CodingKeys.self)
            inputs = try values.decode([String: TensorSpec].self, forKey: .inputs)
            outputs = try values.decode([String: TensorSpec].self, forKey: .outputs)
            try decoder.require(
                inputs.keys.allSatisfy(isName) && outputs.keys.allSatisfy(isName),
                "a port's name is malformed")
        }
    }

    public struct Artifact: Decodable, Equatable, Sendable {
        public enum Engine: String, Decodable, Sendable {
            case litert, executorch, coreml, qnn, onnx

            /// Whether its files are whole, or continued by one part.
            public var isContinued: Bool { self == .litert || self == .executorch }
        }
        public var id: String
        public var engine: Engine
        public var file: FileRef
        /// Further files that the engine finds from the first one, or the one that continues it.
        public var parts: [FileRef]
        public var ports: Ports
        /// What the engine must be told.
        public var options: [String: String]

        /// All files, the one that the engine opens first.
        public var files: [FileRef] { [file] + parts }

        enum CodingKeys: String, CodingKey, CaseIterable {
            case id, engine, file, parts, ports, options
            case target, engineVersion = "engine_version", units, component, weights, held, macs
            case partitions, workspace, tools, verification
        }

        public init(from decoder: Decoder) throws {
            try decoder.refuseUnknownFields(CodingKeys.self)
            let values = try decoder.container(keyedBy: CodingKeys.self)
            id = try values.decode(String.self, forKey: .id)
            engine = try values.decode(Engine.self, forKey: .engine)
            file = try values.decode(FileRef.self, forKey: .file)
            parts = try values.decodeIfPresent([FileRef].self, forKey: .parts) ?? []
            ports = try values.decode(Ports.self, forKey: .ports)
            options = try values.decodeIfPresent([String: String].self, forKey: .options) ?? [:]
            try decoder.require(isName(id), "'id' is no name")
            try decoder.require(
                !engine.isContinued || parts.count <= 1,
                "a file of \(engine.rawValue) is continued by one part")
        }
    }

    public struct Size: Decodable, Equatable, Sendable {
        public var width: Int
        public var height: Int
        public var program: Program

        enum CodingKeys: String, CodingKey, CaseIterable { case width, height, program }

        public init(from decoder: Decoder) throws {
            try decoder.refuseUnknownFields(CodingKeys.self)
            let values = try decoder.container(keyedBy: CodingKeys.self)
            width = try values.decode(Int.self, forKey: .width)
            height = try values.decode(Int.self, forKey: .height)
            program = try values.decode(Program.self, forKey: .program)
            try decoder.require(
                (8...8192).contains(width) && (8...8192).contains(height), "the size is out of range")
        }
    }

    public var sizes: [String: Size]
    public var artifacts: [Artifact]
    public var constants: FileRef?
    public var constantSpecs: [String: TensorSpec]

    enum CodingKeys: String, CodingKey, CaseIterable {
        case schemaVersion = "schema_version"
        case sizes, artifacts, constants
        case constantSpecs = "constant_specs"
        case model, target, precision, text, reference, references, verification, licence, provenance
    }

    /// Reads a manifest with the order of its artifacts' ports.
    public static func read(_ data: Data) throws -> Manifest {
        var manifest = try JSONDecoder().decode(Manifest.self, from: data)
        guard case let .array(items) = KeyOrder.parse(data)?["artifacts"],
            items.count == manifest.artifacts.count
        else { return manifest }
        for (index, item) in items.enumerated() {
            manifest.artifacts[index].ports.inputOrder = item["ports"]?["inputs"]?.keys
            manifest.artifacts[index].ports.outputOrder = item["ports"]?["outputs"]?.keys
        }
        return manifest
    }

    public init(from decoder: Decoder) throws {
        let values = try decoder.container(keyedBy: CodingKeys.self)
        let version = try values.decode(Int.self, forKey: .schemaVersion)
        try decoder.require(
            (1...Self.schemaVersion).contains(version),
            "version \(version) was made by another handheld, this one reads up to "
                + "\(Self.schemaVersion)")
        try decoder.refuseUnknownFields(CodingKeys.self)
        for key in [CodingKeys.model, .target, .precision, .text] {
            try decoder.require(values.contains(key), "there is no '\(key.stringValue)'")
        }
        sizes = try values.decode([String: Size].self, forKey: .sizes)
        artifacts = try values.decode([Artifact].self, forKey: .artifacts)
        constants = try values.decodeIfPresent(FileRef.self, forKey: .constants)
        constantSpecs =
            try values.decodeIfPresent([String: TensorSpec].self, forKey: .constantSpecs) ?? [:]
        try decoder.require(!sizes.isEmpty, "there are no sizes")
        try decoder.require(!artifacts.isEmpty, "there are no artifacts")
        try decoder.require(
            Set(artifacts.map(\.id)).count == artifacts.count, "two artifacts have one id")
        try decoder.require(
            constants != nil || constantSpecs.isEmpty, "there is no file of the constants")
        let ports = Dictionary(uniqueKeysWithValues: artifacts.map { ($0.id, $0.ports) })
        for (name, size) in sizes {
            let fits = name == "\(size.width)x\(size.height)"
            try decoder.require(fits, "size '\(name)' is \(size.width)x\(size.height)")
            let program = size.program
            do {
                try program.check(artifacts: ports, constants: constantSpecs)
            } catch let fault as ProgramFault {
                throw decoder.malformed("sizes.\(name).program.\(fault.field): \(fault.message)")
            }
            guard let picture = program.outputs["picture"] else { continue }
            let wanted = TensorSpec(shape: [1, size.height, size.width, 3], dtype: .uint8)
            let found = program.tensors[picture] ?? constantSpecs[picture]
            try decoder.require(found == wanted, "the picture of '\(name)' is not \(wanted.text)")
        }
        try decoder.require(
            version >= 3 || artifacts.allSatisfy { !$0.engine.isContinued || $0.parts.isEmpty },
            "version \(version) has no parts of LiteRT and ExecuTorch")
    }
}
