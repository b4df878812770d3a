import Foundation
import HandheldProtocol

#if canImport(Darwin)
import Darwin
#else
import Glibc
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

    /// How long ago this process was started, which is before anything of it could look; 0 where the
    /// system does not tell.
    public static func ageNanoseconds() -> UInt64 {
        let seconds: Double?
        #if canImport(Darwin)
        var info = kinfo_proc()
        var size = MemoryLayout<kinfo_proc>.stride
        var name = [CTL_KERN, KERN_PROC, KERN_PROC_PID, getpid()]
        if sysctl(&name, UInt32(name.count), &info, &size, nil, 0) == 0 {
            let started = info.kp_proc.p_un.__p_starttime
            let then = Double(started.tv_sec) + Double(started.tv_usec) / 1e6
            seconds = Date().timeIntervalSince1970 - then
        } else {
            seconds = nil
        }
        #else
        let stat = try? String(contentsOfFile: "/proc/self/stat", encoding: .utf8)
        let uptime = try? String(contentsOfFile: "/proc/uptime", encoding: .utf8)
        seconds = started(stat ?? "", ticks: Double(sysconf(Int32(_SC_CLK_TCK)))).flatMap { started in
            uptime.flatMap { $0.split(separator: " ").first }.flatMap { Double($0) }.map { $0 - started }
        }
        #endif
        // The clock of the system may have been set meanwhile.
        guard let seconds, (0..<3600).contains(seconds) else { return 0 }
        return UInt64(seconds * 1e9)
    }

    /// The seconds after boot at which a process was started, of its `/proc/PID/stat`.
    static func started(_ stat: String, ticks: Double) -> Double? {
        // The name in parentheses may hold anything, parentheses too.
        guard let end = stat.lastIndex(of: ")") else { return nil }
        let fields = stat[stat.index(after: end)...].split(separator: " ")
        return fields.count > 19 ? Double(fields[19]).map { $0 / ticks } : nil
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
