// Memory of this process as the kernel counts it.
#pragma once

#include <cstdint>
#include <optional>

namespace hh {

struct MemoryUse {
  std::optional<uint64_t> rss, peak_rss, anon, file, swap;
};

MemoryUse memory_use();
bool reset_peak_memory();
void trim_heap();  // gives freed heap pages back to the system

}  // namespace hh
