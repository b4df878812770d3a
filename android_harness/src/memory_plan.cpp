#include "memory_plan.hpp"

#include <algorithm>
#include <numeric>
#include <unordered_map>

#include "engine.hpp"

namespace hh {
namespace {

constexpr uint64_t kProcess = 18'000'000;  // the harness itself and the engines' libraries
constexpr uint64_t kLoaded = 1'250'000;      // of a loaded artifact besides its weights
constexpr uint64_t kMega = 1'000'000;

}  // namespace

std::string artifact_list(const std::vector<Weights>& artifacts, const std::vector<bool>& resident,
                          bool stays) {
  std::string text;
  for (size_t i = 0; i < artifacts.size(); ++i) {
    if (resident[i] != stays) continue;
    if (!text.empty()) text += ',';
    json::append_string(text, artifacts[i].id);
  }
  return "[" + text + "]";
}

MemoryPlan plan_memory(uint64_t budget, uint64_t activations, bool packed,
                       const std::vector<Weights>& artifacts, const std::vector<size_t>& calls) {
  uint64_t largest = 0;
  for (const Weights& a : artifacts) largest = std::max(largest, a.bytes);
  // The first run ever packs one artifact after the other, before there is anything else.
  const uint64_t packing = packed ? 2 * largest : 0;
  // What is packed is only mapped until it runs. Else a load sees the original and its copy.
  auto ahead = [&](size_t i) { return packed ? 0 : 2 * artifacts[i].bytes; };

  auto peak = [&](const std::vector<bool>& stays, bool prefetch) {
    constexpr size_t kNone = SIZE_MAX;
    uint64_t held = 0, kept = 0, spare = 0;
    for (size_t i = 0; i < artifacts.size(); ++i)
      if (stays[i]) {
        held += artifacts[i].bytes + kLoaded;
        kept = std::max(kept, artifacts[i].workspace);
        if (!packed) spare = std::max(spare, artifacts[i].bytes);
      }
    uint64_t room = kept + spare;
    size_t upcoming = kNone, following = kNone;
    for (size_t k = calls.size(); k-- > 0;) {
      const size_t call = calls[k];
      if (stays[call]) continue;
      if (call != upcoming) {
        following = upcoming;
        upcoming = call;
      }
      const uint64_t running =
          artifacts[call].bytes + std::max(artifacts[call].workspace, kept) + kLoaded;
      room = std::max({room, running, ahead(call) + kept + kLoaded});
      if (prefetch && following != kNone)
        room = std::max(room, running + ahead(following) + kLoaded);
    }
    return std::max(kProcess + activations + held + room, kProcess + packing);
  };

  MemoryPlan plan;
  plan.resident.assign(artifacts.size(), false);
  plan.prefetch = peak(plan.resident, true) <= budget;
  if (uint64_t least = peak(plan.resident, false); least > budget)
    throw Error("job", "memory_budget: " + std::to_string((budget + kMega / 2) / kMega) +
                           " MB are too little: the least that would do is " +
                           std::to_string((least + kMega - 1) / kMega) + " MB");
  std::vector<size_t> loads(artifacts.size()), order(artifacts.size());
  for (size_t k = 0; k < calls.size(); ++k) loads[calls[k]] += k == 0 || calls[k - 1] != calls[k];
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::stable_sort(order, [&](size_t a, size_t b) {
    if (loads[a] != loads[b]) return loads[a] > loads[b];
    return artifacts[a].bytes > artifacts[b].bytes;
  });
  for (size_t i : order) {
    plan.resident[i] = true;
    if (peak(plan.resident, plan.prefetch) > budget) plan.resident[i] = false;
  }
  plan.peak_bytes = peak(plan.resident, plan.prefetch);
  return plan;
}

uint64_t activation_bytes(const Program& program) {
  std::unordered_map<std::string, size_t> last;
  for (size_t i = 0; i < program.ops.size(); ++i)
    for (const std::string& name : reads(program.ops[i])) last[name] = i;
  for (const auto& [role, name] : program.outputs) last[name] = program.ops.size();
  std::unordered_map<std::string, uint64_t> live;
  uint64_t total = 0;
  auto begin = [&](const std::string& name) {
    total += live[name] = program.tensors.at(name).bytes();
  };
  auto end = [&](const std::string& name, size_t op) {
    auto found = last.find(name);
    if (found != last.end() && found->second > op) return;
    if (auto it = live.find(name); it != live.end()) {
      total -= it->second;
      live.erase(it);
    }
  };
  for (const Input& input : program.inputs) begin(input.name);
  uint64_t most = total;
  for (size_t i = 0; i < program.ops.size(); ++i) {
    for (const std::string& name : writes(program.ops[i])) begin(name);
    most = std::max(most, total);
    for (const std::string& name : reads(program.ops[i])) end(name, i);
    for (const std::string& name : writes(program.ops[i])) end(name, i);
  }
  return most;
}

std::string answer_plan_case(std::string_view text) {
  const std::string where = "case";
  const json::Value tree = json::parse(text, where, "job");
  const json::Node root(tree, where, "job");
  std::vector<Weights> artifacts;
  for (const json::Node& node : root.at("artifacts").items())
    artifacts.push_back(
        {node.at("id").string(), node.at("bytes").natural(), node.at("workspace").natural()});
  std::vector<size_t> calls;
  for (const json::Node& node : root.at("calls").items())
    calls.push_back(static_cast<size_t>(
        node.integer(0, static_cast<int64_t>(artifacts.size()) - 1)));
  const MemoryPlan plan = plan_memory(root.at("budget").natural(), root.at("activations").natural(),
                                      root.at("packed").boolean(), artifacts, calls);
  return "{\"resident\":" + artifact_list(artifacts, plan.resident, true) +
         ",\"streamed\":" + artifact_list(artifacts, plan.resident, false) +
         ",\"prefetch\":" + (plan.prefetch ? "true" : "false") +
         ",\"peak_bytes\":" + std::to_string(plan.peak_bytes) + "}";
}

}  // namespace hh
