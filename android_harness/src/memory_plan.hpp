// Which artifacts stay in memory within a budget: the rule of handheld/memory_plan.py.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "manifest.hpp"

namespace hh {

struct Weights {
  std::string id;
  uint64_t bytes = 0;      // of its files; packed weights take as much
  // That the engine wants while it runs. It goes with a streamed artifact, and stays with one that
  // stays, for all that run later.
  uint64_t workspace = 0;
};

struct MemoryPlan {
  std::vector<bool> resident;  // by artifact
  bool prefetch = true;
  uint64_t peak_bytes = 0;
};

// `artifacts` in the order of their first calls, `calls` by index into them. Throws Error("job")
// with the least budget that would do, if this one does not.
MemoryPlan plan_memory(uint64_t budget, uint64_t activations, bool packed,
                       const std::vector<Weights>& artifacts, const std::vector<size_t>& calls);

// Ids, as JSON, of what stays or of the others.
std::string artifact_list(const std::vector<Weights>& artifacts, const std::vector<bool>& resident,
                          bool stays);

// The most bytes that tensors of the program occupy at once, counted as Python does.
uint64_t activation_bytes(const Program&);

// Answers a case of tests/golden/memory_plans.json, as JSON.
std::string answer_plan_case(std::string_view text);

}  // namespace hh
