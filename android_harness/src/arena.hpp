// One block of memory for all tensors of a program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hh {

inline constexpr size_t kAlignment = 64;

// Memory that is used from the operation `first` to the operation `last`, both included.
struct Lifetime {
  uint64_t bytes = 0;
  int64_t first = 0, last = 0;
  uint64_t offset = 0;  // found by plan_arena
};

// Places lifetimes so that those which meet in time do not meet in space: the largest first,
// each into the tightest gap. Returns the size of the arena.
uint64_t plan_arena(std::vector<Lifetime>&);

// Zeroed pages straight from the system; they cost nothing until they are touched.
class Arena {
 public:
  explicit Arena(uint64_t bytes);  // throws Error("memory")
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();
  std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace hh
