// Packed weights on disk: one file per artifact, engine build and processor.
#pragma once

#include <sys/stat.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "file.hpp"

namespace hh {

// A file of packed weights that a model uses. Kept open, so that a change is noticed even after
// another file has taken its name.
class PackedFile {
 public:
  PackedFile() = default;
  PackedFile(std::string path, Fd fd);
  const std::string& path() const { return path_; }
  // False once anyone wrote to the file or cut it off.
  bool intact() const;
  // Whether this process has it mapped; true where the system does not tell.
  bool mapped() const;
  // Asks for its pages without waiting for them.
  void prefetch() const;

 private:
  std::string path_;
  Fd fd_;
  struct stat then_ {};
};

// Files are built under a temporary name, one process at a time, stamped with what they are for,
// size, time of change and content, and renamed. A file that does not match its stamp is as good as
// absent: one that was cut off, changed, or made for another engine or artifact is built again.
// Once it is, what another build of the engine packed of the same artifact for this processor goes.
// Any number of processes and threads may share a folder.
class PackCache {
 public:
  // `build` is what besides artifact and processor decides how packed weights look. With `verify`,
  // files are read whole when the process first uses them, otherwise samples of them. An unusable
  // folder gives a cache that is not usable.
  PackCache(std::string folder, const std::string& build, bool verify);

  bool usable() const { return usable_; }
  // What is found will be used: its pages are fetched.
  std::optional<PackedFile> find(const std::string& artifact_sha256);
  // Asked of all artifacts at the start, when most of them will be used much later, if at all.
  bool has(const std::string& artifact_sha256) { return look(artifact_sha256).has_value(); }

  // Only one process packs an artifact; the others wait, and then find it. Held until destroyed.
  class Turn {
   public:
    Turn() = default;

   private:
    friend class PackCache;
    Fd fd_;
  };
  Turn wait(const std::string& artifact_sha256) const;
  // A temporary path. Throws Error("io") if the disk is too full: writing into a mapping of a full
  // disk kills the process.
  std::string begin(const std::string& artifact_sha256, const std::string& artifact, uint64_t bytes);
  // Makes what was written to `temporary` findable, durably; nothing if it is no packed file.
  std::optional<PackedFile> publish(const std::string& artifact_sha256, const std::string& temporary);
  void abandon(const std::string& temporary) const;

 private:
  std::string key(const std::string& artifact_sha256) const;
  std::string file(const std::string& artifact_sha256) const;
  std::optional<PackedFile> look(const std::string& artifact_sha256);
  void remove_leftovers() const;
  void remove_others(const std::string& artifact_sha256) const;

  std::string folder_, tag_;
  bool usable_ = false, verify_ = false;
  std::atomic<unsigned> counter_{0};
  Fd directory_;
  std::mutex mutex_;
  std::map<std::string, std::string> verified_;  // path to the stamp that was true
};

}  // namespace hh
