// How hot the device says it is.
#pragma once

#include <cstdint>
#include <optional>

namespace hh {

// Android's scale, 0 (none) to 6 (shutdown); nothing where the system does not tell.
std::optional<uint64_t> thermal_status();

}  // namespace hh
