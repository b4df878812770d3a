import Foundation

/// Keys of JSON objects in the order of the text, which `JSONDecoder` does not keep.
///
/// For text that `JSONDecoder` has accepted; of other text it gives nil or something arbitrary.
enum KeyOrder {
    indirect enum Node {
        case object([(key: String, value: Node)])
        case array([Node])
        case leaf

        subscript(_ key: String) -> Node? {
            guard case let .object(pairs) = self else { return nil }
            return pairs.first { $0.key == key }?.value
        }

        var keys: [String]? {
            guard case let .object(pairs) = self else { return nil }
            return pairs.map(\.key)
        }
    }

    static func parse(_ data: Data) -> Node? {
        var scanner = Scanner(bytes: Array(data))
        return scanner.value(depth: 0)
    }

    private struct Scanner {
        var bytes: [UInt8]
        var at = 0

        mutating func peek() -> UInt8? {
            while at < bytes.count, [0x20, 0x09, 0x0A, 0x0D].contains(bytes[at]) { at += 1 }
            return at < bytes.count ? bytes[at] : nil
        }

        mutating func take(_ byte: UInt8) -> Bool {
            guard peek() == byte else { return false }
            at += 1
            return true
        }

        mutating func value(depth: Int) -> Node? {
            guard depth < 512, let first = peek() else { return nil }
            switch first {
            case UInt8(ascii: "{"):
                at += 1
                var pairs: [(key: String, value: Node)] = []
                if take(UInt8(ascii: "}")) { return .object([]) }
                repeat {
                    guard let key = string(), take(UInt8(ascii: ":")),
                        let value = value(depth: depth + 1)
                    else { return nil }
                    pairs.append((key, value))
                } while take(UInt8(ascii: ","))
                return take(UInt8(ascii: "}")) ? .object(pairs) : nil
            case UInt8(ascii: "["):
                at += 1
                var items: [Node] = []
                if take(UInt8(ascii: "]")) { return .array([]) }
                repeat {
                    guard let item = value(depth: depth + 1) else { return nil }
                    items.append(item)
                } while take(UInt8(ascii: ","))
                return take(UInt8(ascii: "]")) ? .array(items) : nil
            case UInt8(ascii: "\""):
                return string() == nil ? nil : .leaf
            default:
                let ends = Array(",]} \t\r\n".utf8)
                while at < bytes.count, !ends.contains(bytes[at]) { at += 1 }
                return .leaf
            }
        }

        mutating func string() -> String? {
            guard take(UInt8(ascii: "\"")) else { return nil }
            let start = at - 1
            while at < bytes.count, bytes[at] != UInt8(ascii: "\"") {
                at += bytes[at] == UInt8(ascii: "\\") ? 2 : 1
            }
            guard at < bytes.count else { return nil }
            at += 1
            // With its quotes and escapes, which the decoder knows.
            return try? JSONDecoder().decode(String.self, from: Data(bytes[start..<at]))
        }
    }
}
