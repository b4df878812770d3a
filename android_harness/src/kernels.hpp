// The arithmetic of programs, with the bits that runtime/handheld/program.py specifies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "engine.hpp"

namespace hh {

struct ScaledTensor {
  const void* x;
  DType dtype;  // f32 or f16
  float scale;
};

// `out` is of type f32, f16 or u8.
void affine(std::span<const ScaledTensor> terms, float bias, DType dtype, void* out, size_t count);

// `sums` is scratch for `channels` numbers, `shift` as well.
void moments(const float* x, size_t positions, size_t channels, size_t groups, double* sums,
             double* shift, float* out);

void normalizer(std::span<const float* const> moments, size_t groups, double eps, size_t channels,
                float* mean, float* rstd);

// Fills `count` elements with `value` rounded to the type.
void fill(DType dtype, float value, void* out, size_t count);

}  // namespace hh
