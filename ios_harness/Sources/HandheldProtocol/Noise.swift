/// Gaussian noise that every language draws to the bit; runtime/handheld/noise.py specifies it:
/// Philox4x32-10 words, Wichura's AS 241 quantile in binary64, a logarithm of basic operations.
public enum Noise {
    /// Draw `count` numbers of a stream under a seed.
    public static func normal(seed: UInt64, count: Int, stream: UInt32 = 0) -> [Float] {
        var out: [Float] = []
        out.reserveCapacity(count + 3)
        var block: UInt64 = 0
        while out.count < count {
            let words = philox(
                counter: (UInt32(truncatingIfNeeded: block), UInt32(truncatingIfNeeded: block >> 32), stream, 0),
                key: (UInt32(truncatingIfNeeded: seed), UInt32(truncatingIfNeeded: seed >> 32)))
            for word in [words.0, words.1, words.2, words.3] {
                let u = (Double(word) + 0.5) * 0x1p-32
                out.append(Float(quantile(u)))
            }
            block += 1
        }
        out.removeLast(out.count - count)
        return out
    }

    typealias Block = (UInt32, UInt32, UInt32, UInt32)

    static func philox(counter: Block, key: (UInt32, UInt32)) -> Block {
        var c = counter
        var k = key
        for _ in 0..<10 {
            let p0 = (0xD251_1F53 as UInt32).multipliedFullWidth(by: c.0)
            let p1 = (0xCD9E_8D57 as UInt32).multipliedFullWidth(by: c.2)
            c = (p1.high ^ c.1 ^ k.0, p1.low, p0.high ^ c.3 ^ k.1, p0.low)
            k = (k.0 &+ 0x9E37_79B9, k.1 &+ 0xBB67_AE85)
        }
        return c
    }

    /// Horner's rule without fused multiply-add.
    private static func horner(_ coefficients: [Double], _ r: Double) -> Double {
        var value = coefficients[coefficients.count - 1]
        for c in coefficients.dropLast().reversed() {
            let product = value * r
            value = product + c
        }
        return value
    }

    static func log(_ x: Double) -> Double {
        // Swift's significand lies in [1, 2), the specification's in [0.5, 1).
        let m = x.significand * 0.5
        let e = Double(x.exponent + 1)
        let t = (m - 1.0) / (m + 1.0)
        let s = t * t
        var series = 1.0 / 41.0
        var k = 39
        while k > 0 {
            let product = series * s
            series = product + 1.0 / Double(k)
            k -= 2
        }
        let near = (2.0 * t) * series
        return near + e * 0.6931471805599453
    }

    static func quantile(_ u: Double) -> Double {
        let q = u - 0.5
        if abs(q) <= 0.425 {
            let square = q * q
            let r = 0.180625 - square
            return q * horner(a, r) / horner(b, r)
        }
        let r = (-log(q < 0 ? u : 1.0 - u)).squareRoot()
        let tail =
            r <= 5.0
            ? horner(c, r - 1.6) / horner(d, r - 1.6)
            : horner(e, r - 5.0) / horner(f, r - 5.0)
        return q < 0 ? -tail : tail
    }

    private static let a = [
        3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
        1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
        3.3430575583588128105e4, 2.5090809287301226727e3,
    ]
    private static let b = [
        1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
        2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
        5.2264952788528545610e3,
    ]
    private static let c = [
        1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
        3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
        2.27238449892691845833e-2, 7.74545014278341407640e-4,
    ]
    private static let d = [
        1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
        1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ]
    private static let e = [
        6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0,
        2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
        2.71155556874348757815e-5, 2.01033439929228813265e-7,
    ]
    private static let f = [
        1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
        7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ]
}
