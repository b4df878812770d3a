import HandheldProtocol

/// The arithmetic of programs. Sums go one by one in order, and no product is fused with a sum, so
/// that every language gives the same bits.
enum Kernels {
    /// The bytes of a value in a type: rounded half to even and clamped for integers.
    static func cast(_ value: Float, _ dtype: DType) -> [UInt8] {
        func bytes<T>(_ x: T) -> [UInt8] { withUnsafeBytes(of: x) { Array($0) } }
        let rounded = value.isNaN ? 0 : Double(value.rounded(.toNearestOrEven))
        return switch dtype {
        case .float32: bytes(value)
        case .float16: bytes(half(value))
        case .uint8: bytes(UInt8(min(max(rounded, 0), 255)))
        case .int8: bytes(Int8(min(max(rounded, -128), 127)))
        case .int32: bytes(Int32(min(max(rounded, -2_147_483_648), 2_147_483_647)))
        }
    }

    /// The bits of the nearest binary16, half to even. Swift's Float16 is not on every platform.
    static func half(_ value: Float) -> UInt16 {
        let bits = value.bitPattern
        let sign = UInt16(bits >> 16) & 0x8000
        let exponent = Int((bits >> 23) & 0xFF)
        let fraction = bits & 0x7F_FFFF
        if exponent == 255 { return sign | (fraction == 0 ? 0x7C00 : 0x7E00) }
        let e = exponent - 127 + 15
        if e >= 31 { return sign | 0x7C00 }
        // Below the smallest normal number the leading one is part of the fraction.
        let mantissa = e > 0 ? fraction : (exponent == 0 ? fraction : fraction | 0x80_0000)
        let shift = e > 0 ? 13 : 14 - e
        if shift > 24 { return sign }
        let base = (e > 0 ? UInt32(e) << 10 : 0) + (mantissa >> UInt32(shift))
        let rest = mantissa & ((1 << UInt32(shift)) - 1)
        let middle: UInt32 = 1 << UInt32(shift - 1)
        let up = rest > middle || (rest == middle && base & 1 == 1)
        return sign | UInt16(base + (up ? 1 : 0))
    }

    /// The value of a binary16.
    static func float(_ bits: UInt16) -> Float {
        let sign = UInt32(bits & 0x8000) << 16
        let exponent = UInt32(bits >> 10 & 0x1F)
        let fraction = UInt32(bits & 0x3FF)
        switch exponent {
        case 0:
            let size = Float(fraction) * 0x1p-24
            return sign == 0 ? size : -size
        case 31: return Float(bitPattern: sign | 0x7F80_0000 | fraction << 13)
        default: return Float(bitPattern: sign | (exponent + 112) << 23 | fraction << 13)
        }
    }

    static func affine(
        _ terms: [(scale: Float, x: [Float])], _ bias: Float, _ spec: TensorSpec
    ) throws -> Tensor {
        let count = spec.shape.reduce(1, *)
        guard terms.allSatisfy({ $0.x.count == count }) else {
            throw HarnessFailure(.bundle, "terms do not fit")
        }
        var sums = [Float](repeating: 0, count: count)
        for i in 0..<count {
            var total = terms[0].scale * terms[0].x[i]
            for term in terms.dropFirst() {
                let product = term.scale * term.x[i]
                total = total + product
            }
            sums[i] = total + bias
        }
        let bytes: [UInt8]
        switch spec.dtype {
        case .float32: return try Tensor(shape: spec.shape, floats: sums)
        case .float16: bytes = sums.map(half).withUnsafeBytes { Array($0) }
        case .uint8:
            bytes = sums.map { $0.isNaN ? 0 : UInt8(min(max($0.rounded(.toNearestOrEven), 0), 255)) }
        default: throw HarnessFailure(.bundle, "a sum has a wrong type")
        }
        return try Tensor(shape: spec.shape, dtype: spec.dtype, bytes: bytes)
    }

    /// Per group: how many values, their mean, and the sum of squared deviations; `[1, 3, groups]`.
    static func moments(_ x: Tensor, _ groups: Int) throws -> Tensor {
        guard x.shape.count == 4, x.shape[3] % groups == 0 else {
            throw HarnessFailure(.bundle, "groups do not divide the channels")
        }
        let channels = x.shape[3]
        let values = try x.floats().map(Double.init)
        let positions = values.count / channels
        let width = channels / groups
        func sums(_ value: (Int, Int) -> Double) -> [Double] {
            var byChannel = [Double](repeating: 0, count: channels)
            for p in 0..<positions { for c in 0..<channels { byChannel[c] += value(p, c) } }
            return (0..<groups).map { g in
                var total = 0.0
                for c in 0..<width { total += byChannel[g * width + c] }
                return total
            }
        }
        let n = Double(values.count / groups)
        let mean = sums { values[$0 * channels + $1] }.map { $0 / n }
        let squares = sums { p, c in
            let d = values[p * channels + c] - mean[c / width]
            return d * d
        }
        let count = [Float](repeating: Float(n), count: groups)
        return try Tensor(
            shape: [1, 3, groups], floats: count + mean.map(Float.init) + squares.map(Float.init))
    }

    static func normalizer(
        _ moments: [Tensor], _ eps: Double, _ channels: Int
    ) throws -> (mean: Tensor, rstd: Tensor) {
        let parts = try moments.map { try $0.floats().map(Double.init) }
        guard let first = parts.first, first.count % 3 == 0,
            parts.allSatisfy({ $0.count == first.count })
        else { throw HarnessFailure(.bundle, "moments do not fit") }
        let groups = first.count / 3
        guard groups > 0, channels % groups == 0 else {
            throw HarnessFailure(.bundle, "groups do not divide the channels")
        }
        let width = channels / groups
        var means: [Float] = []
        var rstds: [Float] = []
        for g in 0..<groups {
            var (n, mean, m2) = (first[g], first[groups + g], first[2 * groups + g])
            for part in parts.dropFirst() {
                let (k, other, otherM2) = (part[g], part[groups + g], part[2 * groups + g])
                let d = other - mean
                let t = n + k
                let shift = d * (k / t)
                mean = mean + shift
                let between = (d * d) * (n * k / t)
                m2 = (m2 + otherM2) + between
                n = t
            }
            let rstd = 1.0 / (m2 / n + eps).squareRoot()
            means += [Float](repeating: Float(mean), count: width)
            rstds += [Float](repeating: Float(rstd), count: width)
        }
        let shape = [1, 1, 1, channels]
        return (try Tensor(shape: shape, floats: means), try Tensor(shape: shape, floats: rstds))
    }
}
