// Gaussian noise, equal to runtime/handheld/noise.py to the bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hh {
void draw_noise(uint64_t seed, uint32_t stream, float* out, size_t count);
}
