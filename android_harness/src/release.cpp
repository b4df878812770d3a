#include "release.hpp"

#include "file.hpp"
#include "manifest.hpp"

namespace hh {
namespace {

constexpr uint64_t kMaxReleaseBytes = 4 << 20;
constexpr uint64_t kMaxManifestBytes = 64 << 20;

void check_other_files(const std::string& text, const std::string& path, const Manifest& manifest) {
  const json::Value tree = json::parse(text, path, "bundle");
  json::Node root(tree, path, "bundle");
  if (auto prefetched = root.at("text").find("prefetched"))
    check_file(manifest, read_ref(prefetched->at("file")), "text.prefetched.file", true);
  if (auto reference = root.find("reference"))
    check_file(manifest, read_ref(reference->at("file")), "reference.file", true);
  auto references = root.find("references");
  if (!references) return;
  size_t i = 0;
  for (const json::Node& node : references->items())
    check_file(manifest, read_ref(node.at("file")),
               "references[" + std::to_string(i++) + "].file", true);
}

}  // namespace

void check_release(const std::string& release_json, const std::string& variant,
                   const std::string& bundle) {
  const json::Value tree =
      json::parse(read_file(release_json, kMaxReleaseBytes, "bundle"), release_json, "bundle");
  json::Node root(tree, release_json, "bundle");
  int64_t version = root.at("schema_version").integer(INT64_MIN, INT64_MAX);
  if (version != 1)
    root.at("schema_version").fail("unknown version " + std::to_string(version) +
                                   ", this harness reads version 1");
  for (const json::Node& node : root.at("variants").items()) {
    if (node.at("id").string() != variant) continue;
    const FileRef ref = read_ref(node.at("manifest"));
    const std::string path = bundle + "/manifest.json";
    const std::string text = read_file(path, kMaxManifestBytes, "bundle");
    if (text.size() != ref.bytes || sha256_of_file(path, "bundle") != ref.sha256)
      throw Error("hash", path + ": is not the manifest that the release names");
    const Manifest manifest = read_manifest(bundle);
    for (const Artifact& artifact : manifest.artifacts) {
      check_file(manifest, artifact.file, artifact.field + ".file", true);
      for (size_t i = 0; i < artifact.parts.size(); ++i)
        check_file(manifest, artifact.parts[i],
                   artifact.field + ".parts[" + std::to_string(i) + "]", true);
    }
    if (manifest.constants) check_file(manifest, *manifest.constants, "constants", true);
    check_other_files(text, path, manifest);
    return;
  }
  root.at("variants").fail("there is no variant '" + variant.substr(0, 128) + "'");
}

}  // namespace hh
