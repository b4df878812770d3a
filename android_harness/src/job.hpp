// What a harness shall do: the counterpart of protocol.Job.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>

namespace hh {

struct TensorFile {
  std::string path;
  std::string tensor;
};

struct Job {
  std::string bundle;
  std::string size;
  uint64_t seed = 0;
  std::map<std::string, TensorFile> inputs;
  bool stream = false;
  std::map<std::string, bool> stream_by_artifact;
  uint64_t memory_budget = 0;  // bytes; 0: none, residency is as said
  bool prefetch = true;
  int threads = 2;
  std::string cache;  // empty: pack in memory
  int64_t warmup = 1;
  int64_t iterations = 1;
  double min_seconds = 0;
  double precision = 0;    // of the median; 0: not asked for
  double max_seconds = 0;  // for which precision is waited for; 0: for ever
  bool verify_hashes = true;
  bool reset_peak = false;
  std::string output;      // empty: nowhere
  std::optional<TensorFile> expect;  // the picture that must come out
  std::string dump_calls;  // empty: nowhere
};

Job read_job(std::string_view text);

}  // namespace hh
