// The manifest of a bundle. Reading it is a trust boundary.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "program.hpp"

namespace hh {

struct FileRef {
  std::string path;  // relative to the bundle
  std::string sha256;
  uint64_t bytes = 0;
};

struct Artifact {
  std::string id;
  std::string engine;
  FileRef file;
  std::vector<FileRef> parts;  // which the engine finds from `file`
  std::map<std::string, std::string> options;  // what the engine must be told
  Ports ports;
  std::optional<uint64_t> workspace;  // that the engine wants while it runs
  std::string field;  // "artifacts[3]"

  // Whether its file is continued by its part, rather than finding it by name.
  bool continued() const { return (engine == "litert" || engine == "executorch") && !parts.empty(); }
};

struct Size {
  int64_t width = 0, height = 0;
  Program program;
};

struct Manifest {
  std::string folder;
  std::map<std::string, Size> sizes;
  std::vector<Artifact> artifacts;
  std::optional<FileRef> constants;
  Specs constant_specs;

  const Artifact* artifact(const std::string& id) const;
  // By which an artifact's packed weights are known: its file, or what it shares weights with.
  std::string packed_sha256(const Artifact&) const;
};

// Reads a field that names a file.
FileRef read_ref(const json::Node&);

// Reads and checks manifest.json; the files that it names are checked by check_file.
Manifest read_manifest(const std::string& folder);

// Checks that a file is inside the bundle, reached without symbolic links, and as the manifest
// says. Returns its path.
std::string check_file(const Manifest&, const FileRef&, const std::string& field, bool verify_hash);

}  // namespace hh
