// The benchmark app: started by devicectl with a job, it writes events to its container.
// An Xcode target of its own (see README.md) that links HandheldRuntime and HandheldEngines.
#if os(iOS)
import Foundation
import HandheldEngines
import HandheldProtocol
import HandheldRuntime
import SwiftUI
import UIKit

@main
struct BenchApp: App {
    @State private var text = "waiting for a job"

    var body: some Scene {
        WindowGroup {
            Text(text).padding().task {
                UIApplication.shared.isIdleTimerDisabled = true
                UIDevice.current.isBatteryMonitoringEnabled = true
                text = await Bench(arguments: CommandLine.arguments).run()
            }
        }
    }
}

/// What the app does for its arguments: `--job RUN`, or `--report FILE`, before which
/// `--forget WEIGHTS` removes a folder.
struct Bench {
    var arguments: [String]
    let files = FileManager.default

    var home: URL {
        files.urls(for: .documentDirectory, in: .userDomainMask)[0].appendingPathComponent("handheld")
    }

    @MainActor
    func run() async -> String {
        guard arguments.count >= 3 else { return "started without a job" }
        do {
            try takeIn(keepJob: arguments[1] == "--job")
            switch arguments[1] {
            case "--report":
                if arguments.count == 5, arguments[3] == "--forget" {
                    let weights = home.appendingPathComponent(arguments[4])
                    if files.fileExists(atPath: weights.path) { try files.removeItem(at: weights) }
                }
                try report().write(to: home.appendingPathComponent(arguments[2]), options: .atomic)
            case "--job":
                let (home, run) = (self.home, arguments[2])
                try await Task.detached { try Self.job(home: home, run: run) }.value
            default: return "unknown: \(arguments[1])"
            }
            return "done"
        } catch {
            // Who waits for events that were never told sees that the app has ended.
            if arguments[1] == "--job" { exit(1) }
            return "failed: \(error)"
        }
    }

    /// Keeps files that came in if their sha256 is their name, and clears what earlier runs left.
    private func takeIn(keepJob: Bool) throws {
        for name in ["incoming", "objects", "weights", "runs"] {
            try files.createDirectory(
                at: home.appendingPathComponent(name), withIntermediateDirectories: true)
        }
        let incoming = home.appendingPathComponent("incoming")
        for name in try files.contentsOfDirectory(atPath: incoming.path) where name.count == 64 {
            let source = incoming.appendingPathComponent(name)
            let data = try Data(contentsOf: source, options: .mappedIfSafe)
            if SHA256.hex(data) == name {
                let target = home.appendingPathComponent("objects/\(name)")
                try? files.removeItem(at: target)
                try files.moveItem(at: source, to: target)
            } else {
                try files.removeItem(at: source)
            }
        }
        try files.removeItem(at: home.appendingPathComponent("runs"))
        for name in try files.contentsOfDirectory(atPath: home.path) where name.hasPrefix("report-") {
            try files.removeItem(at: home.appendingPathComponent(name))
        }
        try? files.removeItem(at: home.appendingPathComponent("bundle"))
        if !keepJob { try files.removeItem(at: incoming) }
    }

    private struct Report: Encodable {
        var objects: [String: Int]
        var engines: [String: String]
        var ram_bytes: UInt64
        var free_bytes: Int64?
        var cores: Int
        var thermal: Int
        var battery_percent: Double?
        var charging: Bool?
    }

    @MainActor
    private func report() throws -> Data {
        let objects = home.appendingPathComponent("objects")
        var sizes: [String: Int] = [:]
        for name in try files.contentsOfDirectory(atPath: objects.path) {
            let path = objects.appendingPathComponent(name).path
            sizes[name] = try files.attributesOfItem(atPath: path)[.size] as? Int
        }
        let free = try home.resourceValues(forKeys: [.volumeAvailableCapacityForImportantUsageKey])
        let device = UIDevice.current
        return try JSONEncoder().encode(
            Report(
                objects: sizes, engines: Self.engines.mapValues(\.version),
                ram_bytes: ProcessInfo.processInfo.physicalMemory,
                free_bytes: free.volumeAvailableCapacityForImportantUsage,
                cores: ProcessInfo.processInfo.activeProcessorCount,
                thermal: ProcessInfo.processInfo.thermalState.rawValue,
                battery_percent: device.batteryLevel >= 0 ? Double(device.batteryLevel) * 100 : nil,
                charging: device.batteryState == .unknown ? nil : device.batteryState != .unplugged))
    }

    private static func job(home: URL, run: String) throws {
        let files = FileManager.default
        let folder = home.appendingPathComponent(run)
        try files.createDirectory(at: folder, withIntermediateDirectories: true)
        let bundle = home.appendingPathComponent("bundle")
        try files.createDirectory(at: bundle, withIntermediateDirectories: true)
        try files.moveItem(
            at: home.appendingPathComponent("incoming/manifest.json"),
            to: bundle.appendingPathComponent("manifest.json"))
        let data = try Data(contentsOf: home.appendingPathComponent("incoming/job.json"))
        let events = folder.appendingPathComponent("events.jsonl")
        files.createFile(atPath: events.path, contents: nil)
        let out = try FileHandle(forWritingTo: events)
        defer { try? out.close() }
        // One write a line, so that a copy never sees half of one that is not the last.
        let sink: (Event) -> Void = { event in
            if var line = try? JSONEncoder().encode(event) {
                line.append(0x0A)
                try? out.write(contentsOf: line)
            }
        }
        let job: Job
        do {
            job = try JSONDecoder().decode(Job.self, from: data)
        } catch {
            sink(Event(milliseconds: 0, body: .error(Failure(code: .job, message: "\(error)"))))
            return
        }
        let objects = home.appendingPathComponent("objects")
        try Runner(job: job, folder: home, objects: objects, engines: engines, sink: sink).run()
    }

    private static var engines: [String: Engine] {
        #if canImport(ExecuTorch)
        let version = Bundle.main.infoDictionary?["ExecuTorchVersion"] as? String ?? "unknown"
        return ["coreml": CoreMLEngine(), "executorch": ExecuTorchEngine(version: version)]
        #else
        return ["coreml": CoreMLEngine()]
        #endif
    }
}
#endif
