#include "memory.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "file.hpp"

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__linux__)
#include <dirent.h>
#elif defined(__APPLE__)
#include <mach/mach.h>
#endif

namespace hh {

#if defined(__linux__)

namespace {

// A descriptor of a dma-buf says so by its exporter's name.
std::optional<uint64_t> dma_buffers() {
  constexpr const char* kFolder = "/proc/self/fdinfo";
  DIR* folder = ::opendir(kFolder);
  if (!folder) return std::nullopt;
  uint64_t total = 0;
  while (dirent* entry = ::readdir(folder)) {
    if (entry->d_name[0] == '.') continue;
    Fd fd(::open((std::string(kFolder) + "/" + entry->d_name).c_str(), O_RDONLY | O_CLOEXEC));
    char text[1024];
    ssize_t n = fd ? ::read(fd.get(), text, sizeof text - 1) : 0;
    if (n <= 0) continue;
    text[n] = '\0';
    const char* size = std::strstr(text, "size:");
    if (size && std::strstr(text, "exp_name:")) total += std::strtoull(size + 5, nullptr, 10);
  }
  ::closedir(folder);
  return total;
}

}  // namespace

MemoryUse memory_use() {
  MemoryUse use;
  Fd fd(::open("/proc/self/status", O_RDONLY | O_CLOEXEC));
  if (!fd) return use;
  char text[8192];
  ssize_t n = ::read(fd.get(), text, sizeof text - 1);
  if (n <= 0) return use;
  text[n] = '\0';
  auto field = [&](const char* name) -> std::optional<uint64_t> {
    const char* found = std::strstr(text, name);
    if (!found) return std::nullopt;
    return std::strtoull(found + std::strlen(name), nullptr, 10) * 1024;
  };
  use.rss = field("\nVmRSS:");
  use.peak_rss = field("\nVmHWM:");
  use.anon = field("\nRssAnon:");
  use.file = field("\nRssFile:");
  use.swap = field("\nVmSwap:");
  use.dma_buf = dma_buffers();
  return use;
}

bool reset_peak_memory() {
  Fd fd(::open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC));
  return fd && ::write(fd.get(), "5", 1) == 1;
}

#elif defined(__APPLE__)

MemoryUse memory_use() {
  MemoryUse use;
  task_vm_info_data_t info{};
  mach_msg_type_number_t count = TASK_VM_INFO_COUNT;
  auto* out = reinterpret_cast<task_info_t>(&info);
  if (::task_info(mach_task_self(), TASK_VM_INFO, out, &count) != KERN_SUCCESS) return use;
  use.rss = info.resident_size;
  use.peak_rss = info.resident_size_peak;
  use.anon = info.internal;
  use.file = info.external;
  use.swap = info.compressed;
  use.phys_footprint = info.phys_footprint;
  use.phys_footprint_peak = static_cast<uint64_t>(info.ledger_phys_footprint_peak);
  return use;
}

bool reset_peak_memory() { return false; }

#else

MemoryUse memory_use() { return {}; }
bool reset_peak_memory() { return false; }

#endif

void trim_heap() {
#if defined(__GLIBC__)
  ::malloc_trim(0);
#endif
}

}  // namespace hh
