#include "dtype.hpp"

#include <array>

namespace hh {
namespace {

struct Row {
  DType dtype;
  const char* name;
  const char* safetensors;
  size_t bytes;
};

constexpr std::array<Row, 5> kRows{{{DType::f32, "float32", "F32", 4},
                                    {DType::f16, "float16", "F16", 2},
                                    {DType::u8, "uint8", "U8", 1},
                                    {DType::i8, "int8", "I8", 1},
                                    {DType::i32, "int32", "I32", 4}}};

const Row& row(DType dtype) { return kRows[static_cast<size_t>(dtype)]; }

uint64_t saturating_mul(uint64_t a, uint64_t b) {
  uint64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? UINT64_MAX : product;
}

}  // namespace

size_t dtype_bytes(DType dtype) { return row(dtype).bytes; }
const char* dtype_name(DType dtype) { return row(dtype).name; }
const char* safetensors_name(DType dtype) { return row(dtype).safetensors; }

std::optional<DType> dtype_from_name(std::string_view name) {
  for (const Row& r : kRows)
    if (name == r.name) return r.dtype;
  return std::nullopt;
}

std::optional<DType> dtype_from_safetensors(std::string_view name) {
  for (const Row& r : kRows)
    if (name == r.safetensors) return r.dtype;
  return std::nullopt;
}

uint64_t TensorSpec::elements() const {
  uint64_t n = 1;
  for (int64_t d : shape) n = saturating_mul(n, static_cast<uint64_t>(d));
  return n;
}

uint64_t TensorSpec::bytes() const { return saturating_mul(elements(), dtype_bytes(dtype)); }

std::string TensorSpec::text() const {
  std::string out = dtype_name(dtype);
  out += '[';
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i) out += ", ";
    out += std::to_string(shape[i]);
  }
  return out + ']';
}

}  // namespace hh
