#include "job.hpp"

#include "json.hpp"
#include "program.hpp"

namespace hh {
namespace {

bool read_residency(const json::Node& node) {
  const std::string& text = node.string();
  if (text != "resident" && text != "stream") node.fail("is neither 'resident' nor 'stream'");
  return text == "stream";
}

std::string read_path(const json::Node& node) {
  const std::string& path = node.string();
  if (path.empty() || path.find('\0') != std::string::npos) node.fail("is not a path");
  return path;
}

TensorFile read_tensor_file(const json::Node& node) {
  node.only({"path", "tensor"});
  return {read_path(node.at("path")), node.at("tensor").string()};
}

double read_positive(const json::Node& node, double most) {
  double value = node.number(0, most);
  if (value <= 0) node.fail("is not positive");
  return value;
}

}  // namespace

Job read_job(std::string_view text) {
  const std::string where = "job";
  const json::Value tree = json::parse(text, where, "job");
  json::Node root(tree, where, "job");
  if (!root.is_object()) root.fail("is not a JSON object");
  if (auto protocol = root.find("protocol"))
    if (int64_t version = protocol->integer(INT64_MIN, INT64_MAX); version != 1)
      protocol->fail("unknown version " + std::to_string(version) + ", this harness speaks 1");
  root.only({"protocol", "bundle", "size", "seed", "inputs", "residency", "residency_by_artifact", "memory_budget",
             "prefetch", "threads", "cache", "warmup", "iterations", "min_seconds", "precision",
             "max_seconds", "verify_hashes", "reset_peak", "output", "expect", "dump_calls"});
  Job job;
  job.bundle = read_path(root.at("bundle"));
  job.size = read_name(root.at("size"));
  if (auto n = root.find("seed")) job.seed = n->natural();
  if (auto n = root.find("inputs"))
    for (const auto& [name, file] : n->members()) {
      check_name(file, name);
      job.inputs.emplace(name, read_tensor_file(file));
    }
  if (auto n = root.find("residency")) job.stream = read_residency(*n);
  if (auto n = root.find("residency_by_artifact"))
    for (const auto& [id, value] : n->members()) job.stream_by_artifact[id] = read_residency(value);
  if (auto n = root.find("memory_budget")) {
    job.memory_budget = static_cast<uint64_t>(n->integer(1, INT64_MAX));
    if (!job.stream_by_artifact.empty())
      n->fail("and 'residency_by_artifact' exclude each other: the budget decides what stays");
  }
  if (auto n = root.find("prefetch")) job.prefetch = n->boolean();
  if (auto n = root.find("threads")) job.threads = static_cast<int>(n->integer(1, 256));
  if (auto n = root.find("cache")) job.cache = read_path(*n);
  if (auto n = root.find("warmup")) job.warmup = n->integer(0, INT32_MAX);
  if (auto n = root.find("iterations")) job.iterations = n->integer(1, INT32_MAX);
  if (auto n = root.find("min_seconds")) job.min_seconds = n->number(0, 1e9);
  if (auto n = root.find("precision")) job.precision = read_positive(*n, 1);
  if (auto n = root.find("max_seconds")) job.max_seconds = read_positive(*n, 1e9);
  if (auto n = root.find("verify_hashes")) job.verify_hashes = n->boolean();
  if (auto n = root.find("reset_peak")) job.reset_peak = n->boolean();
  if (auto n = root.find("output")) job.output = read_path(*n);
  if (auto n = root.find("expect")) job.expect = read_tensor_file(*n);
  if (auto n = root.find("dump_calls")) job.dump_calls = read_path(*n);
  return job;
}

}  // namespace hh
