#include "manifest.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <set>

#include "file.hpp"
#include "sha256.hpp"

namespace hh {
namespace {

constexpr uint64_t kMaxManifestBytes = 64 << 20;
constexpr size_t kMaxSizes = 64;
constexpr size_t kMaxArtifacts = 4096;
constexpr const char* kManifest = "manifest.json";
constexpr int64_t kSchemaVersion = 3;

std::string manifest_path(const std::string& folder) { return folder + "/" + kManifest; }

void check_inside(const json::Node& node, const std::string& path) {
  if (path.size() > 512) node.fail("path is too long");
  bool plain = path.find('\\') == std::string::npos && path.find(':') == std::string::npos &&
               path.find('\0') == std::string::npos && !path.starts_with('/');
  if (!plain) node.fail("path '" + path + "' is not a relative path with forward slashes");
  size_t start = 0;
  while (start <= path.size()) {
    size_t end = std::min(path.find('/', start), path.size());
    std::string part = path.substr(start, end - start);
    if (part.empty() || part == "." || part == "..")
      node.fail("path '" + path + "' leaves the bundle");
    start = end + 1;
  }
}

std::vector<std::pair<std::string, TensorSpec>> read_port_list(const json::Node& node) {
  std::vector<std::pair<std::string, TensorSpec>> out;
  for (const auto& [name, spec] : node.members()) {
    check_name(spec, name);
    out.emplace_back(name, read_spec(spec));
  }
  return out;
}

Artifact read_artifact(const json::Node& node) {
  node.only({"id", "target", "engine", "engine_version", "file", "parts", "ports", "units",
             "component", "weights", "held", "macs", "partitions", "workspace", "tools",
             "options", "verification"});
  Artifact artifact;
  artifact.field = node.path();
  artifact.id = read_name(node.at("id"));
  artifact.engine = node.at("engine").string();
  constexpr const char* engines[] = {"litert", "executorch", "coreml", "qnn", "onnx"};
  if (std::ranges::none_of(engines, [&](const char* e) { return artifact.engine == e; }))
    node.at("engine").fail("unknown engine '" + artifact.engine.substr(0, 64) + "'");
  const std::string& component = node.at("component").string();
  if (component != "unet" && component != "decoder")
    node.at("component").fail("unknown component '" + component.substr(0, 64) + "'");
  node.at("target").string();
  node.at("engine_version").string();
  for (const json::Node& unit : node.at("units").items()) unit.string();
  artifact.file = read_ref(node.at("file"));
  if (auto parts = node.find("parts"))
    for (const json::Node& part : parts->items()) artifact.parts.push_back(read_ref(part));
  if (auto workspace = node.find("workspace"))
    artifact.workspace = static_cast<uint64_t>(workspace->integer(0, INT64_MAX));
  if (auto options = node.find("options"))
    for (const auto& [name, value] : options->members()) artifact.options[name] = value.string();
  json::Node ports = node.at("ports");
  ports.only({"inputs", "outputs"});
  artifact.ports.inputs = read_port_list(ports.at("inputs"));
  artifact.ports.outputs = read_port_list(ports.at("outputs"));
  return artifact;
}

Size read_size(const std::string& name, const json::Node& node) {
  node.only({"width", "height", "program"});
  check_name(node, name);
  Size size;
  size.width = node.at("width").integer(8, 8192);
  size.height = node.at("height").integer(8, 8192);
  std::string text = std::to_string(size.width) + "x" + std::to_string(size.height);
  if (name != text) node.fail("the size is " + text);
  size.program = read_program(node.at("program"));
  return size;
}

void check_picture(const Manifest& manifest, const Size& size, const std::string& where) {
  for (const auto& [role, name] : size.program.outputs) {
    if (role != "picture") continue;
    auto found = size.program.tensors.find(name);
    const TensorSpec& spec =
        found != size.program.tensors.end() ? found->second : manifest.constant_specs.at(name);
    TensorSpec wanted{{1, size.height, size.width, 3}, DType::u8};
    if (spec != wanted)
      throw Error("bundle",
                  where + ": the picture is " + spec.text() + ", not " + wanted.text());
  }
}

int64_t check_version(const json::Node& root) {
  auto version = root.find("schema_version");
  if (!version)
    root.fail("schema_version: is not a manifest of handheld: there is no version number");
  int64_t number = version->integer(INT64_MIN, INT64_MAX);
  if (number < 1 || number > kSchemaVersion)
    version->fail("unknown version " + std::to_string(number) + ", this harness reads up to " +
                  std::to_string(kSchemaVersion) +
                  (number > kSchemaVersion ? " (upgrade handheld)" : ""));
  return number;
}

// A file of LiteRT or ExecuTorch is whole, or continued by one more.
void check_parts(const json::Node& node, const Artifact& artifact, int64_t version) {
  if (!artifact.continued()) return;
  if (version < 3)
    node.fail("schema_version " + std::to_string(version) + " has no parts of " + artifact.engine);
  if (artifact.parts.size() > 1)
    node.at("parts").fail("a file of " + artifact.engine + " is continued by one part");
}

}  // namespace

FileRef read_ref(const json::Node& node) {
  node.only({"path", "sha256", "bytes"});
  FileRef ref;
  ref.path = node.at("path").string();
  check_inside(node.at("path"), ref.path);
  ref.sha256 = node.at("sha256").string();
  auto hex = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  if (ref.sha256.size() != 64 || !std::ranges::all_of(ref.sha256, hex))
    node.at("sha256").fail("is not a sha256");
  ref.bytes = static_cast<uint64_t>(node.at("bytes").integer(0, INT64_MAX));
  return ref;
}

const Artifact* Manifest::artifact(const std::string& id) const {
  for (const Artifact& a : artifacts)
    if (a.id == id) return &a;
  return nullptr;
}

std::string Manifest::packed_sha256(const Artifact& artifact) const {
  if (!artifact.continued()) return artifact.file.sha256;
  // Weights are packed by what the graphs say of them, which those that share them agree on.
  std::set<std::string> graphs;
  for (const Artifact& other : artifacts)
    if (other.engine == artifact.engine && other.continued() &&
        other.parts.front().path == artifact.parts.front().path)
      graphs.insert(other.file.sha256);
  Sha256 hash;
  hash.update(artifact.parts.front().sha256.data(), artifact.parts.front().sha256.size());
  for (const std::string& graph : graphs) hash.update(graph.data(), graph.size());
  return hash.hex();
}

Manifest read_manifest(const std::string& folder) {
  struct stat st {};
  if (::stat(folder.c_str(), &st) != 0 || !S_ISDIR(st.st_mode))
    throw Error("bundle", folder + ": no such bundle (it is a folder with a manifest.json)");
  const std::string path = manifest_path(folder);
  Manifest manifest;
  manifest.folder = folder;
  const json::Value tree = json::parse(read_file(path, kMaxManifestBytes, "bundle"), path, "bundle");
  json::Node root(tree, path, "bundle");
  if (!root.is_object()) root.fail("is not a JSON object");
  const int64_t version = check_version(root);
  root.only({"schema_version", "model", "target", "precision", "sizes", "artifacts", "constants",
             "constant_specs", "text", "reference", "references", "verification", "licence",
             "provenance"});
  if (auto references = root.find("references"); references && version < 3 && references->size())
    references->fail("schema_version " + std::to_string(version) +
                     " has no references of several sizes");
  root.at("target").string();
  root.at("precision").string();
  root.at("model").members();
  root.at("text").members();

  if (auto constants = root.find("constants")) manifest.constants = read_ref(*constants);
  if (auto specs = root.find("constant_specs"))
    for (const auto& [name, spec] : specs->members()) {
      check_name(spec, name);
      manifest.constant_specs.emplace(name, read_spec(spec));
    }
  if (!manifest.constants && !manifest.constant_specs.empty())
    root.at("constant_specs").fail("declares constants, but there is no file of them");

  std::map<std::string, const Ports*> ports;
  json::Node artifacts = root.at("artifacts");
  if (artifacts.size() == 0) artifacts.fail("is empty");
  if (artifacts.size() > kMaxArtifacts) artifacts.fail("holds too many artifacts");
  manifest.artifacts.reserve(artifacts.size());
  for (const json::Node& node : artifacts.items()) {
    Artifact& artifact = manifest.artifacts.emplace_back(read_artifact(node));
    check_parts(node, artifact, version);
    if (!ports.emplace(artifact.id, &artifact.ports).second)
      node.at("id").fail("a second artifact has the id '" + artifact.id + "'");
  }

  auto sizes = root.at("sizes").members();
  if (sizes.empty() || sizes.size() > kMaxSizes) root.at("sizes").fail("holds no size or too many");
  for (const auto& [name, node] : sizes) {
    Size& size = manifest.sizes.emplace(name, read_size(name, node)).first->second;
    const std::string where = path + ": " + node.path() + ".program";
    check_program(size.program, ports, manifest.constant_specs, where);
    check_picture(manifest, size, where);
  }
  return manifest;
}

std::string check_file(const Manifest& manifest, const FileRef& ref, const std::string& field,
                       bool verify_hash) {
  const std::string where = manifest_path(manifest.folder) + ": " + field;
  std::string path = manifest.folder;
  struct stat st {};
  size_t start = 0;
  while (start <= ref.path.size()) {
    size_t end = std::min(ref.path.find('/', start), ref.path.size());
    path += "/" + ref.path.substr(start, end - start);
    if (::lstat(path.c_str(), &st) != 0)
      throw Error("bundle", where + ".path: " + path + ": the file is missing");
    if (S_ISLNK(st.st_mode))
      throw Error("bundle",
                  where + ".path: " + path + ": symbolic links are not allowed in a bundle");
    start = end + 1;
  }
  if (!S_ISREG(st.st_mode)) throw Error("bundle", where + ".path: " + path + ": is not a plain file");
  if (static_cast<uint64_t>(st.st_size) != ref.bytes)
    throw Error("bundle", where + ".bytes: " + path + ": has " + std::to_string(st.st_size) +
                              " bytes, the manifest says " + std::to_string(ref.bytes));
  if (verify_hash) {
    std::string have = sha256_of_file(path, "bundle");
    if (have != ref.sha256)
      throw Error("hash", where + ".sha256: " + path + ": has the sha256 " + have +
                              ", the manifest says " + ref.sha256 + " (fetch the bundle again)");
  }
  return path;
}

}  // namespace hh
