#include "memory.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "file.hpp"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace hh {

#if defined(__linux__)

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
  return use;
}

bool reset_peak_memory() {
  Fd fd(::open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC));
  return fd && ::write(fd.get(), "5", 1) == 1;
}

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
