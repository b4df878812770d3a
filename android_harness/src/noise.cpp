// Philox4x32-10 (Salmon et al., SC 2011) and the inverse normal distribution AS 241, PPND16
// (Wichura, Applied Statistics 37, 1988). Compiled without contraction to fused multiply-add.
#include "noise.hpp"

#include <algorithm>
#include <cmath>

namespace hh {
namespace {

constexpr double kA[] = {3.3871328727963666080e0,  1.3314166789178437745e2, 1.9715909503065514427e3,
                         1.3731693765509461125e4,  4.5921953931549871457e4, 6.7265770927008700853e4,
                         3.3430575583588128105e4,  2.5090809287301226727e3};
constexpr double kB[] = {1.0,
                         4.2313330701600911252e1,
                         6.8718700749205790830e2,
                         5.3941960214247511077e3,
                         2.1213794301586595867e4,
                         3.9307895800092710610e4,
                         2.8729085735721942674e4,
                         5.2264952788528545610e3};
constexpr double kC[] = {1.42343711074968357734e0,  4.63033784615654529590e0,
                         5.76949722146069140550e0,  3.64784832476320460504e0,
                         1.27045825245236838258e0,  2.41780725177450611770e-1,
                         2.27238449892691845833e-2, 7.74545014278341407640e-4};
constexpr double kD[] = {1.0,
                         2.05319162663775882187e0,
                         1.67638483018380384940e0,
                         6.89767334985100004550e-1,
                         1.48103976427480074590e-1,
                         1.51986665636164571966e-2,
                         5.47593808499534494600e-4,
                         1.05075007164441684324e-9};
constexpr double kE[] = {6.65790464350110377720e0,  5.46378491116411436990e0,
                         1.78482653991729133580e0,  2.96560571828504891230e-1,
                         2.65321895265761230930e-2, 1.24266094738807843860e-3,
                         2.71155556874348757815e-5, 2.01033439929228813265e-7};
constexpr double kF[] = {1.0,
                         5.99832206555887937690e-1,
                         1.36929880922735805310e-1,
                         1.48753612908506148525e-2,
                         7.86869131145613259100e-4,
                         1.84631831751005468180e-5,
                         1.42151175831644588870e-7,
                         2.04426310338993978564e-15};

double horner(const double (&coefficients)[8], double r) {
  double value = coefficients[7];
  for (int i = 6; i >= 0; --i) value = value * r + coefficients[i];
  return value;
}

double natural_log(double x) {
  int e = 0;
  double m = std::frexp(x, &e);
  double t = (m - 1.0) / (m + 1.0);
  double s = t * t;
  double series = 1.0 / 41.0;
  for (int k = 39; k > 0; k -= 2) series = series * s + 1.0 / k;
  return (2.0 * t) * series + static_cast<double>(e) * 0.6931471805599453;
}

double quantile(double u) {
  double q = u - 0.5;
  if (std::fabs(q) <= 0.425) {
    double r = 0.180625 - q * q;
    return q * horner(kA, r) / horner(kB, r);
  }
  double r = std::sqrt(-natural_log(q < 0.0 ? u : 1.0 - u));
  double tail = r <= 5.0 ? horner(kC, r - 1.6) / horner(kD, r - 1.6)
                         : horner(kE, r - 5.0) / horner(kF, r - 5.0);
  return q < 0.0 ? -tail : tail;
}

}  // namespace

void draw_noise(uint64_t seed, uint32_t stream, float* out, size_t count) {
  for (uint64_t block = 0; block * 4 < count; ++block) {
    uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream, 0};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
      uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
                          static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
      std::copy(next, next + 4, c);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    size_t n = std::min<size_t>(4, count - block * 4);
    for (size_t i = 0; i < n; ++i)
      out[block * 4 + i] =
          static_cast<float>(quantile((static_cast<double>(c[i]) + 0.5) * 0x1p-32));
  }
}

}  // namespace hh
