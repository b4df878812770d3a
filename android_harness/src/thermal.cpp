#include "thermal.hpp"

#if defined(__ANDROID__)
#include <dlfcn.h>
#endif

namespace hh {

#if defined(__ANDROID__)

// Looked up at run time: Android has it since version 11.
std::optional<uint64_t> thermal_status() {
  struct Api {
    void* manager = nullptr;
    int (*status)(void*) = nullptr;
  };
  static const Api api = [] {
    Api found;
    void* library = ::dlopen("libandroid.so", RTLD_NOW | RTLD_LOCAL);
    if (!library) return found;
    auto acquire = reinterpret_cast<void* (*)()>(::dlsym(library, "AThermal_acquireManager"));
    found.status =
        reinterpret_cast<int (*)(void*)>(::dlsym(library, "AThermal_getCurrentThermalStatus"));
    if (acquire && found.status) found.manager = acquire();
    return found;
  }();
  if (!api.manager) return std::nullopt;
  int status = api.status(api.manager);
  if (status < 0 || status > 6) return std::nullopt;
  return static_cast<uint64_t>(status);
}

#else

std::optional<uint64_t> thermal_status() { return std::nullopt; }

#endif

}  // namespace hh
