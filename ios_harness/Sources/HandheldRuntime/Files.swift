import Foundation
import HandheldProtocol

/// A bundle's files where an iPhone has them: in one folder, each under its sha256.
public enum Objects {
    /// Lays what a runtime opens of a bundle below `bundle` under the paths of its manifest. These
    /// are links, so they take no space, and nobody can tell them from files.
    public static func lay(_ manifest: Manifest, from objects: URL, into bundle: URL) throws {
        let files = FileManager.default
        var laid: [String: String] = [:]
        let constants = manifest.constants.map { [$0] } ?? []
        for ref in manifest.artifacts.flatMap(\.files) + constants {
            if let known = laid.updateValue(ref.sha256, forKey: ref.path) {
                guard known == ref.sha256 else {
                    throw HarnessFailure(.bundle, "\(ref.path): is two files")
                }
                continue
            }
            let target = bundle.appendingPathComponent(ref.path)
            do {
                try files.createDirectory(
                    at: target.deletingLastPathComponent(), withIntermediateDirectories: true)
                try files.linkItem(at: objects.appendingPathComponent(ref.sha256), to: target)
            } catch {
                throw HarnessFailure(.bundle, "\(ref.path): is not among what was sent: \(error)")
            }
        }
    }
}

extension Manifest.Artifact {
    /// The folder that its files make up, such as `artifacts/unet.0.mlpackage`; nil where they lie
    /// in none.
    public var package: String? {
        let names = file.path.split(separator: "/").map(String.init)
        guard
            let last = names.dropLast().lastIndex(where: {
                $0.hasSuffix(".mlpackage") || $0.hasSuffix(".mlmodelc")
            })
        else { return nil }
        let folder = names[...last].joined(separator: "/")
        return files.allSatisfy { $0.path.hasPrefix(folder + "/") } ? folder : nil
    }

    /// A hash of all its files and of where they lie, to know by it what was made of them.
    public var contents: String {
        SHA256.hex(files.map { "\($0.sha256) \($0.path)\n" }.joined().utf8)
    }

    /// Compares its files with the manifest, and with their hashes if `hashes` says so.
    func check(in bundle: URL, hashes: Bool) throws {
        for ref in files {
            let file = bundle.appendingPathComponent(ref.path)
            let known = try? file.resourceValues(forKeys: [.isRegularFileKey, .fileSizeKey])
            guard let known, known.isRegularFile == true else {
                throw HarnessFailure(.bundle, "\(ref.path): the file is missing")
            }
            guard known.fileSize == ref.bytes else {
                throw HarnessFailure(.bundle, "\(ref.path): has not \(ref.bytes) bytes")
            }
            guard hashes else { continue }
            guard let data = try? Data(contentsOf: file, options: .mappedIfSafe),
                SHA256.hex(data) == ref.sha256
            else { throw HarnessFailure(.hash, "\(ref.path): has another sha256") }
        }
    }

    /// What its engine opens: its package, or its first file, or what that and the part behind it
    /// are together, which is written to `folder` unless it is there.
    func opened(in bundle: URL, joined folder: URL) throws -> URL {
        let first = bundle.appendingPathComponent(file.path)
        if engine == .coreml {
            guard let package else {
                throw HarnessFailure(.bundle, "the files of '\(id)' make up no package")
            }
            return bundle.appendingPathComponent(package, isDirectory: true)
        }
        guard engine.isContinued, let part = parts.first else { return first }
        let whole = folder.appendingPathComponent("\(contents).whole")
        let files = FileManager.default
        if files.fileExists(atPath: whole.path) { return whole }
        try files.createDirectory(at: folder, withIntermediateDirectories: true)
        let fresh = folder.appendingPathComponent(UUID().uuidString)
        defer { try? files.removeItem(at: fresh) }
        try files.copyItem(at: first, to: fresh)
        let out = try FileHandle(forWritingTo: fresh)
        defer { try? out.close() }
        try out.seekToEnd()
        let rest = try FileHandle(forReadingFrom: bundle.appendingPathComponent(part.path))
        defer { try? rest.close() }
        while let data = try rest.read(upToCount: 1 << 22), !data.isEmpty {
            try out.write(contentsOf: data)
        }
        try files.moveItem(at: fresh, to: whole)
        return whole
    }
}

/// What handheld's packages call their tensors: `in0`, `in1`, ... and `out0`, ..., by position.
public struct Features {
    private let inputs: [String]
    private let outputs: [(name: String, spec: TensorSpec)]

    public init(_ artifact: Manifest.Artifact) throws {
        let ports = artifact.ports
        guard let inputs = ports.inputOrder, let order = ports.outputOrder else {
            throw HarnessFailure(.bundle, "the order of the ports of '\(artifact.id)' is unknown")
        }
        self.inputs = inputs
        outputs = try order.map { name in
            guard let spec = ports.outputs[name] else {
                throw HarnessFailure(.bundle, "'\(artifact.id)' has no port '\(name)'")
            }
            return (name, spec)
        }
    }

    /// The tensors of a call by the package's names.
    public func given(_ args: [String: Tensor]) throws -> [String: Tensor] {
        var out: [String: Tensor] = [:]
        for (index, name) in inputs.enumerated() {
            guard let value = args[name] else {
                throw HarnessFailure(.bundle, "the call gives no '\(name)'")
            }
            out["in\(index)"] = value
        }
        return out
    }

    /// The results by the ports' names; `read` finds one by the package's name for it.
    public func results(
        _ read: (_ feature: String, _ spec: TensorSpec) throws -> Tensor?
    ) throws -> [String: Tensor] {
        var out: [String: Tensor] = [:]
        for (index, (name, spec)) in outputs.enumerated() {
            guard let value = try read("out\(index)", spec) else {
                throw HarnessFailure(.engine, "the model gave no 'out\(index)'")
            }
            out[name] = value
        }
        return out
    }
}
