#include "safetensors.hpp"

#include "json.hpp"

namespace hh {
namespace {
constexpr uint64_t kMaxHeader = 16 << 20;
}

SafeTensors::SafeTensors(const std::string& path, const char* code)
    : path_(path), code_(code), mapping_(path, code) {
  std::span<const std::byte> bytes = mapping_.bytes();
  if (bytes.size() < 8) throw Error(code, path + ": is too short for a safetensors file");
  uint64_t header = 0;
  for (size_t i = 0; i < 8; ++i) header |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  if (header > kMaxHeader || header > bytes.size() - 8)
    throw Error(code, path + ": the safetensors header is cut off or too large");
  std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, header);
  std::span<const std::byte> data = bytes.subspan(8 + header);
  const json::Value tree = json::parse(text, path, code);
  for (const auto& [name, node] : json::Node(tree, path, code).members()) {
    if (name == "__metadata__") continue;
    auto dtype = dtype_from_safetensors(node.at("dtype").string());
    if (!dtype) node.fail("the dtype " + node.at("dtype").string().substr(0, 16) + " is not supported");
    Tensor tensor;
    tensor.spec.dtype = *dtype;
    for (const json::Node& d : node.at("shape").items())
      tensor.spec.shape.push_back(d.integer(0, int64_t{1} << 40));
    auto offsets = node.at("data_offsets").items();
    if (offsets.size() != 2) node.at("data_offsets").fail("are not two");
    uint64_t begin = offsets[0].natural(), end = offsets[1].natural();
    if (begin > end || end > data.size() || end - begin != tensor.spec.bytes())
      node.at("data_offsets").fail("do not fit the shape or leave the file");
    tensor.data = data.subspan(begin, end - begin);
    tensors_.emplace(name, std::move(tensor));
  }
}

const SafeTensors::Tensor& SafeTensors::at(const std::string& name) const {
  auto found = tensors_.find(name);
  if (found == tensors_.end()) throw Error(code_, path_ + ": tensor '" + name + "' is missing");
  return found->second;
}

SafeTensorsWriter::SafeTensorsWriter(
    const std::string& path, const std::vector<std::pair<std::string, TensorSpec>>& tensors)
    : file_(path) {
  std::string header = "{";
  uint64_t offset = 0;
  for (const auto& [name, spec] : tensors) {
    if (header.size() > 1) header += ',';
    json::append_string(header, name);
    header += ":{\"dtype\":\"" + std::string(safetensors_name(spec.dtype)) + "\",\"shape\":[";
    for (size_t i = 0; i < spec.shape.size(); ++i)
      header += (i ? "," : "") + std::to_string(spec.shape[i]);
    header += "],\"data_offsets\":[" + std::to_string(offset) + ",";
    offset += spec.bytes();
    header += std::to_string(offset) + "]}";
  }
  header += '}';
  header.resize((header.size() + 7) / 8 * 8, ' ');
  unsigned char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(header.size() >> (8 * i));
  file_.write(length, 8);
  file_.write(header.data(), header.size());
}

}  // namespace hh
