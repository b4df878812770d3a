#include "kernels.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

// The wide variants give the same bits: no contraction, and no sum is reordered.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(HANDHELD_SANITIZE)
#define HH_WIDE __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define HH_WIDE
#endif

namespace hh {
namespace {

constexpr size_t kChunk = 2048;

HH_WIDE void scale_to(const float* __restrict x, float scale, float* __restrict out, size_t n) {
  for (size_t i = 0; i < n; ++i) out[i] = scale * x[i];
}

HH_WIDE void scale_add(const float* __restrict x, float scale, float* __restrict out, size_t n) {
  for (size_t i = 0; i < n; ++i) out[i] = out[i] + scale * x[i];
}

HH_WIDE void add(float value, float* out, size_t n) {
  for (size_t i = 0; i < n; ++i) out[i] = out[i] + value;
}

HH_WIDE void widen(const uint16_t* __restrict x, float* __restrict out, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i] & 0x7fff) << 13;
    // Scaling gives subnormals their leading one; infinity and NaN keep the largest exponent.
    const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(bits) * 0x1p112f);
    const uint32_t magnitude = bits >= 0x0f800000 ? bits | 0x7f800000 : finite;
    out[i] = std::bit_cast<float>(magnitude | static_cast<uint32_t>(x[i] & 0x8000) << 16);
  }
}

uint8_t saturated_u8(float v) {
  float r = std::nearbyintf(v);
  return r >= 255.0f ? 255 : r > 0.0f ? static_cast<uint8_t>(r) : 0;  // NaN compares false: 0
}

const float* values(const ScaledTensor& t, size_t start, float* wide, size_t n) {
  if (t.dtype == DType::f32) return static_cast<const float*>(t.x) + start;
  widen(static_cast<const uint16_t*>(t.x) + start, wide, n);
  return wide;
}

void affine_chunk(std::span<const ScaledTensor> terms, float bias, float* out, size_t start,
                  size_t n) {
  float wide[kChunk];
  scale_to(values(terms[0], start, wide, n), terms[0].scale, out, n);
  for (const ScaledTensor& t : terms.subspan(1))
    scale_add(values(t, start, wide, n), t.scale, out, n);
  add(bias, out, n);
}

HH_WIDE void sum_rows(const float* __restrict x, size_t positions, size_t channels,
                      double* __restrict sums) {
  for (size_t p = 0; p < positions; ++p, x += channels)
    for (size_t c = 0; c < channels; ++c) sums[c] = sums[c] + static_cast<double>(x[c]);
}

HH_WIDE void sum_squares(const float* __restrict x, size_t positions, size_t channels,
                         const double* __restrict shift, double* __restrict sums) {
  for (size_t p = 0; p < positions; ++p, x += channels)
    for (size_t c = 0; c < channels; ++c) {
      double d = static_cast<double>(x[c]) - shift[c];
      sums[c] = sums[c] + d * d;
    }
}

// Without branches, so that a loop over it becomes wide.
inline uint16_t half_bits(float value) {
  const uint32_t f = std::bit_cast<uint32_t>(value);
  const uint32_t sign = f >> 16 & 0x8000;
  const uint32_t magnitude = f & 0x7fffffff;
  // Subnormal: adding 0.5 lets the hardware round to multiples of 2**-24.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t bits = magnitude < 0x38800000 ? subnormal : normal;
  bits = magnitude >= 0x477ff000 ? 0x7c00 : bits;
  bits = magnitude > 0x7f800000 ? 0x7e00 : bits;
  return static_cast<uint16_t>(sign | bits);
}

HH_WIDE void narrow(const float* __restrict x, uint16_t* __restrict out, size_t n) {
  for (size_t i = 0; i < n; ++i) out[i] = half_bits(x[i]);
}

template <class T>
T saturated(float value, double least, double most) {
  return static_cast<T>(std::clamp(std::nearbyint(static_cast<double>(value)), least, most));
}

template <class T>
void fill_as(T value, void* out, size_t count) {
  std::fill_n(static_cast<T*>(out), count, value);
}

}  // namespace

void affine(std::span<const ScaledTensor> terms, float bias, DType dtype, void* out, size_t count) {
  float chunk[kChunk];
  for (size_t i = 0; i < count; i += kChunk) {
    const size_t n = std::min(kChunk, count - i);
    if (dtype == DType::f32) {
      affine_chunk(terms, bias, static_cast<float*>(out) + i, i, n);
      continue;
    }
    affine_chunk(terms, bias, chunk, i, n);
    if (dtype == DType::f16) {
      narrow(chunk, static_cast<uint16_t*>(out) + i, n);
    } else {
      auto* bytes = static_cast<uint8_t*>(out) + i;
      for (size_t k = 0; k < n; ++k) bytes[k] = saturated_u8(chunk[k]);
    }
  }
}

void moments(const float* x, size_t positions, size_t channels, size_t groups, double* sums,
             double* shift, float* out) {
  const size_t per_group = channels / groups;
  const double count = static_cast<double>(positions) * static_cast<double>(per_group);
  std::fill_n(sums, channels, 0.0);
  sum_rows(x, positions, channels, sums);
  for (size_t g = 0; g < groups; ++g) {
    double total = 0.0;
    for (size_t c = 0; c < per_group; ++c) total += sums[g * per_group + c];
    double mean = total / count;
    std::fill_n(shift + g * per_group, per_group, mean);
    out[g] = static_cast<float>(count);
    out[groups + g] = static_cast<float>(mean);
  }
  std::fill_n(sums, channels, 0.0);
  sum_squares(x, positions, channels, shift, sums);
  for (size_t g = 0; g < groups; ++g) {
    double total = 0.0;
    for (size_t c = 0; c < per_group; ++c) total += sums[g * per_group + c];
    out[2 * groups + g] = static_cast<float>(total);
  }
}

void normalizer(std::span<const float* const> moments, size_t groups, double eps, size_t channels,
                float* mean_out, float* rstd_out) {
  const size_t per_group = channels / groups;
  for (size_t g = 0; g < groups; ++g) {
    const float* first = moments[0];
    double n = first[g], mean = first[groups + g], m2 = first[2 * groups + g];
    for (const float* next : moments.subspan(1)) {
      double k = next[g], other = next[groups + g], other_m2 = next[2 * groups + g];
      double d = other - mean, t = n + k;
      mean = mean + d * (k / t);
      m2 = (m2 + other_m2) + (d * d) * (n * k / t);
      n = t;
    }
    double rstd = 1.0 / std::sqrt(m2 / n + eps);
    std::fill_n(mean_out + g * per_group, per_group, static_cast<float>(mean));
    std::fill_n(rstd_out + g * per_group, per_group, static_cast<float>(rstd));
  }
}

void fill(DType dtype, float value, void* out, size_t count) {
  switch (dtype) {
    case DType::f32: return fill_as(value, out, count);
    case DType::f16: return fill_as(half_bits(value), out, count);
    case DType::u8: return fill_as(saturated<uint8_t>(value, 0, 255), out, count);
    case DType::i8: return fill_as(saturated<int8_t>(value, -128, 127), out, count);
    case DType::i32: return fill_as(saturated<int32_t>(value, INT32_MIN, INT32_MAX), out, count);
  }
}

}  // namespace hh
