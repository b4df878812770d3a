// Memory of this process as the kernel counts it.
#pragma once

#include <cstdint>
#include <optional>

namespace hh {

struct MemoryUse {
  std::optional<uint64_t> rss, peak_rss, anon, file, swap;
  std::optional<uint64_t> dma_buf;  // buffers shared with accelerators, by open descriptors
  std::optional<uint64_t> phys_footprint, phys_footprint_peak;  // what Apple's limit counts
};

MemoryUse memory_use();
bool reset_peak_memory();
void trim_heap();  // gives freed heap pages back to the system

}  // namespace hh
