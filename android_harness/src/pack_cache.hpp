// Packed weights on disk: one file per artifact, engine build and processor.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>

#include "file.hpp"

namespace hh {

// Files are built under a temporary name, stamped with their size and time of change, and
// renamed. A file that does not match its stamp is as good as absent, so one that was cut off
// or touched is built again. Any number of processes may share a folder.
class PackCache {
 public:
  // An unusable folder gives a cache that never finds and never begins.
  PackCache(std::string folder, const std::string& build);

  std::optional<std::string> find(const std::string& artifact_sha256) const;
  // A temporary path, unless the disk is too full: writing into a mapping of a full disk kills
  // the process.
  std::optional<std::string> begin(const std::string& artifact_sha256, uint64_t bytes);
  // Makes what was written to `temporary` findable; false if there is nothing in it.
  bool publish(const std::string& artifact_sha256, const std::string& temporary);
  void abandon(const std::string& temporary) const;

 private:
  std::string file(const std::string& artifact_sha256) const;
  void remove_leftovers() const;

  std::string folder_, tag_;
  bool usable_ = false;
  std::atomic<unsigned> counter_{0};
  Fd directory_;
};

// Tells this processor from others: packed layouts depend on its instructions.
std::string processor_id();

}  // namespace hh
