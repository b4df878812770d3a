// Tensor types and shapes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine.hpp"

namespace hh {

inline constexpr uint64_t kMaxTensorBytes = uint64_t{4} << 30;

size_t dtype_bytes(DType);
const char* dtype_name(DType);         // as in manifests: "float32"
const char* safetensors_name(DType);   // "F32"
std::optional<DType> dtype_from_name(std::string_view);
std::optional<DType> dtype_from_safetensors(std::string_view);

struct TensorSpec {
  std::vector<int64_t> shape;
  DType dtype = DType::f32;

  bool operator==(const TensorSpec&) const = default;
  // Saturates at UINT64_MAX.
  uint64_t elements() const;
  uint64_t bytes() const;
  std::string text() const;  // "float32[1, 2, 3]"
};

}  // namespace hh
