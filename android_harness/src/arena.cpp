#include "arena.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <numeric>

#include "engine.hpp"

namespace hh {
namespace {

// XNNPACK's kernels read, and ignore, up to this many bytes behind a tensor (XNN_EXTRA_BYTES).
constexpr uint64_t kSlack = 128;

uint64_t aligned(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

uint64_t plan_arena(std::vector<Lifetime>& items) {
  std::vector<size_t> order(items.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::stable_sort(order, [&](size_t a, size_t b) { return items[a].bytes > items[b].bytes; });
  std::vector<size_t> placed;  // by offset
  uint64_t total = 0;
  for (size_t index : order) {
    Lifetime& item = items[index];
    const uint64_t size = aligned(item.bytes);
    uint64_t end = 0, best = UINT64_MAX, best_gap = UINT64_MAX;
    for (size_t other : placed) {
      const Lifetime& o = items[other];
      if (o.last < item.first || item.last < o.first) continue;
      if (o.offset > end && o.offset - end >= size && o.offset - end < best_gap) {
        best = end;
        best_gap = o.offset - end;
      }
      end = std::max(end, o.offset + aligned(o.bytes));
    }
    item.offset = best == UINT64_MAX ? end : best;
    total = std::max(total, item.offset + size);
    auto by_offset = [&](size_t a, size_t b) { return items[a].offset < items[b].offset; };
    placed.insert(std::ranges::upper_bound(placed, index, by_offset), index);
  }
  return total;
}

Arena::Arena(uint64_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  void* p = ::mmap(nullptr, bytes + kSlack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED)
    throw Error("memory", "the program's tensors need " + std::to_string(bytes / 1'000'000) + " MB");
  data_ = static_cast<std::byte*>(p);
}

Arena::~Arena() {
  if (data_) ::munmap(data_, size_ + kSlack);
}

}  // namespace hh
