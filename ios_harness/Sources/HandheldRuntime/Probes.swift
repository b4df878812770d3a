import Foundation
import HandheldProtocol

#if canImport(Darwin)
import Darwin
#endif

/// What the system says about this process and the device; nil where it does not tell.
public enum Probes {
    public static func memory(_ phase: Memory.Phase, activations: Int? = nil) -> Memory {
        var out = Memory(phase: phase)
        out.activations = activations
        #if canImport(Darwin)
        var info = task_vm_info_data_t()
        var count = mach_msg_type_number_t(
            MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<natural_t>.size)
        let status = withUnsafeMutablePointer(to: &info) {
            $0.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
                task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
            }
        }
        if status == KERN_SUCCESS {
            out.rss = Int(info.resident_size)
            out.peak_rss = Int(info.resident_size_peak)
            out.anon = Int(info.internal)
            out.file = Int(info.external)
            out.swap = Int(info.compressed)
            out.phys_footprint = Int(info.phys_footprint)
            out.phys_footprint_peak = Int(info.ledger_phys_footprint_peak)
        }
        #else
        if let text = try? String(contentsOfFile: "/proc/self/status", encoding: .utf8) {
            let fields = procStatus(text)
            out.rss = fields["VmRSS"]
            out.peak_rss = fields["VmHWM"]
            out.anon = fields["RssAnon"]
            out.file = fields["RssFile"]
            out.swap = fields["VmSwap"]
        }
        #endif
        return out
    }

    /// The sizes of `/proc/self/status`, in bytes.
    static func procStatus(_ text: String) -> [String: Int] {
        var out: [String: Int] = [:]
        for line in text.split(separator: "\n") {
            let parts = line.split(whereSeparator: { $0 == ":" || $0 == " " || $0 == "\t" })
            if parts.count == 3, parts[2] == "kB", let value = Int(parts[1]) {
                out[String(parts[0])] = value * 1024
            }
        }
        return out
    }

    /// On Android's scale of 0 to 6: Apple's nominal, fair, serious and critical.
    public static func thermal() -> Thermal {
        #if canImport(Darwin)
        let status: Int? =
            switch ProcessInfo.processInfo.thermalState {
            case .nominal: 0
            case .fair: 1
            case .serious: 3
            case .critical: 4
            @unknown default: nil
            }
        return Thermal(status: status)
        #else
        return Thermal(status: nil)
        #endif
    }
}
