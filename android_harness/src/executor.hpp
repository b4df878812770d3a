// A program made ready to run: every tensor has an address, every operation its pointers.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <variant>
#include <vector>

#include "arena.hpp"
#include "kernels.hpp"
#include "manifest.hpp"
#include "safetensors.hpp"

namespace hh {

// Copies of contiguous rows, from one tensor to another.
struct CopyStep {
  struct Part {
    const std::byte* from;
    std::byte* to;
    size_t bytes, from_stride, to_stride, rows;
  };
  std::vector<Part> parts;
};
struct FillStep {
  DType dtype;
  float value;
  struct Part {
    std::byte* to;
    size_t elements, stride, rows;
  };
  std::vector<Part> parts;
  CopyStep copy;
};
struct AffineStep {
  std::vector<ScaledTensor> terms;
  float bias;
  DType dtype;
  void* out;
  size_t count;
};
struct MomentsStep {
  const float* x;
  size_t positions, channels, groups;
  float* out;
};
struct NormalizerStep {
  std::vector<const float*> moments;
  size_t groups;
  double eps;
  size_t channels;
  float *mean, *rstd;
};
struct CallStep {
  size_t call;      // index among the calls
  size_t artifact;  // index in the manifest
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
};
using Step =
    std::variant<CallStep, CopyStep, FillStep, AffineStep, MomentsStep, NormalizerStep>;

class Executor {
 public:
  struct View {
    TensorSpec spec;
    std::byte* data = nullptr;
  };

  // `constants` may be null where the bundle has none.
  Executor(const Manifest&, const Program&, const SafeTensors* constants);

  uint64_t bytes() const { return arena_->size(); }
  std::span<const Step> steps() const { return steps_; }
  std::vector<size_t> call_order() const;  // artifact of every call
  View tensor(const std::string& name) const;
  void compute(const Step&) const;  // anything but a call

 private:
  struct Placed {
    TensorSpec spec;
    size_t root = 0;      // the tensor whose memory this one lies in; itself, or a root
    uint64_t offset = 0;  // in the root
    uint64_t bytes = 0;
    int64_t first = 0, last = 0;
    bool pinned = false;     // inputs and constants: written from outside, kept between runs
    bool call_reads = false; // an engine reads it: must be aligned
  };
  struct Layout {
    size_t outer = 1, extent = 1, inner_bytes = 1;
  };

  void declare(const std::string& name, const TensorSpec& spec, int64_t first, bool pinned);
  Placed& placed(const std::string& name) { return tensors_[index_.at(name)]; }
  const Placed& placed(const std::string& name) const { return tensors_[index_.at(name)]; }
  std::byte* address(const std::string& name) const;
  static Layout layout(const TensorSpec&, int64_t axis);
  bool host(const std::string& part, const std::string& whole, uint64_t offset);
  std::unordered_set<std::string> joined(const Program&) const;
  void share_memory(const Program&);
  void place();
  void build(const Manifest&, const Program&);

  std::unordered_map<std::string, size_t> index_;
  std::vector<Placed> tensors_;
  std::vector<Step> steps_;
  std::unique_ptr<Arena> arena_;
  mutable std::vector<double> sums_, shift_;
};

}  // namespace hh
