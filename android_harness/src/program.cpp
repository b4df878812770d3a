#include "program.hpp"

#include <algorithm>
#include <limits>
#include <unordered_set>

namespace hh {
namespace {

constexpr int64_t kMaxExtent = int64_t{1} << 31;
constexpr size_t kMaxOps = 16'384;
constexpr size_t kMaxOperands = 65'536;
constexpr double kMaxBinary32 = std::numeric_limits<float>::max();

template <class... F>
struct Overload : F... {
  using F::operator()...;
};

float binary32(const json::Node& node) {
  return static_cast<float>(node.number(-kMaxBinary32, kMaxBinary32));
}

Names read_names(const json::Node& node) {
  Names out;
  for (const auto& [port, tensor] : node.members()) {
    check_name(tensor, port);
    out.emplace_back(port, read_name(tensor));
  }
  return out;
}

std::vector<std::string> read_list(const json::Node& node) {
  std::vector<std::string> out;
  for (const json::Node& item : node.items()) out.push_back(read_name(item));
  if (out.empty()) node.fail("is empty");
  return out;
}

int64_t read_axis(const json::Node& node) { return node.at("axis").integer(0, 5); }

Op read_op(const json::Node& node) {
  auto kind_node = node.find("op");
  // pydantic needs the discriminator, though each class gives it a default.
  if (!kind_node) node.fail("has no 'op'");
  const std::string& kind = kind_node->string();
  auto offset = [&](const char* name) {
    auto found = node.find(name);
    return found ? found->integer(0, kMaxExtent) : 0;
  };
  auto single = [&](const char* name) {
    auto found = node.find(name);
    return found ? binary32(*found) : 0.0f;
  };
  if (kind == "call") {
    node.only({"op", "artifact", "args", "results"});
    return CallOp{read_name(node.at("artifact")), read_names(node.at("args")),
                  read_names(node.at("results"))};
  }
  if (kind == "slice") {
    node.only({"op", "x", "axis", "start", "length", "out"});
    return SliceOp{read_name(node.at("x")), read_axis(node), node.at("start").integer(0, kMaxExtent),
                   node.at("length").integer(1, kMaxExtent), read_name(node.at("out"))};
  }
  if (kind == "pad") {
    node.only({"op", "x", "axis", "before", "after", "value", "out"});
    return PadOp{read_name(node.at("x")), read_axis(node), offset("before"), offset("after"),
                 single("value"), read_name(node.at("out"))};
  }
  if (kind == "concat") {
    node.only({"op", "xs", "axis", "out"});
    return ConcatOp{read_list(node.at("xs")), read_axis(node), read_name(node.at("out"))};
  }
  if (kind == "affine") {
    node.only({"op", "terms", "bias", "out"});
    AffineOp op{{}, single("bias"), read_name(node.at("out"))};
    for (const json::Node& term : node.at("terms").items()) {
      term.only({"x", "scale"});
      op.terms.push_back({read_name(term.at("x")), binary32(term.at("scale"))});
    }
    if (op.terms.empty()) node.at("terms").fail("is empty");
    return op;
  }
  if (kind == "moments") {
    node.only({"op", "x", "groups", "out"});
    return MomentsOp{read_name(node.at("x")), node.at("groups").integer(1, kMaxExtent),
                     read_name(node.at("out"))};
  }
  if (kind == "normalizer") {
    node.only({"op", "moments", "eps", "mean", "rstd"});
    double eps = node.at("eps").number(0, 1);
    if (eps == 0) node.at("eps").fail("is out of range");
    return NormalizerOp{read_list(node.at("moments")), eps, read_name(node.at("mean")),
                        read_name(node.at("rstd"))};
  }
  node.at("op").fail("unknown operation '" + kind.substr(0, 64) + "'");
}

struct Mismatch {
  std::string message;
};

TensorSpec resized(TensorSpec spec, int64_t axis, int64_t extent) {
  if (extent > kMaxExtent) throw Mismatch{"extent " + std::to_string(extent) + " is too large"};
  spec.shape[static_cast<size_t>(axis)] = extent;
  return spec;
}

int64_t extent(const TensorSpec& spec, int64_t axis) { return spec.shape[static_cast<size_t>(axis)]; }

bool has_axis(const TensorSpec& spec, int64_t axis) {
  return axis < static_cast<int64_t>(spec.shape.size());
}

void compare_ports(const std::string& artifact, const char* kind, const Names& given,
                   const std::vector<std::pair<std::string, TensorSpec>>& wanted) {
  for (const auto& [port, spec] : wanted)
    if (std::ranges::none_of(given, [&](const auto& g) { return g.first == port; }))
      throw Mismatch{"call of '" + artifact + "' lacks " + kind + " '" + port + "'"};
  for (const auto& [port, name] : given)
    if (std::ranges::none_of(wanted, [&](const auto& w) { return w.first == port; }))
      throw Mismatch{"call of '" + artifact + "' has an unknown " + kind + " '" + port + "'"};
}

using Results = std::vector<std::pair<std::string, TensorSpec>>;

class Computed {
 public:
  Computed(const Specs& known, const Specs& declared,
           const std::map<std::string, const Ports*>& artifacts)
      : known_(known), declared_(declared), artifacts_(artifacts) {}

  Results operator()(const CallOp& op) const {
    auto found = artifacts_.find(op.artifact);
    if (found == artifacts_.end())
      throw Mismatch{"calls artifact '" + op.artifact + "', which the bundle does not have"};
    const Ports& ports = *found->second;
    compare_ports(op.artifact, "argument", op.args, ports.inputs);
    compare_ports(op.artifact, "result", op.results, ports.outputs);
    for (const auto& [port, name] : op.args) {
      const TensorSpec& want = port_spec(ports.inputs, port);
      const TensorSpec& have = known_.at(name);
      if (have != want)
        throw Mismatch{"argument '" + port + "' of '" + op.artifact + "' wants " + want.text() +
                       ", tensor '" + name + "' is " + have.text()};
    }
    Results out;
    for (const auto& [port, name] : op.results) out.emplace_back(name, port_spec(ports.outputs, port));
    return out;
  }

  Results operator()(const SliceOp& op) const {
    const TensorSpec& x = known_.at(op.x);
    if (!has_axis(x, op.axis) || op.start + op.length > extent(x, op.axis))
      throw Mismatch{"slice leaves tensor '" + op.x + "' of shape " + x.text()};
    return {{op.out, resized(x, op.axis, op.length)}};
  }

  Results operator()(const PadOp& op) const {
    const TensorSpec& x = known_.at(op.x);
    if (!has_axis(x, op.axis)) throw no_axis(op.axis, op.x);
    return {{op.out, resized(x, op.axis, extent(x, op.axis) + op.before + op.after)}};
  }

  Results operator()(const ConcatOp& op) const {
    const TensorSpec& first = known_.at(op.xs[0]);
    if (!has_axis(first, op.axis)) throw no_axis(op.axis, op.xs[0]);
    int64_t total = 0;
    for (const std::string& name : op.xs) {
      const TensorSpec& x = known_.at(name);
      if (x.shape.size() != first.shape.size() ||
          resized(x, op.axis, 1) != resized(first, op.axis, 1))
        throw Mismatch{"tensor '" + name + "' does not fit the concatenation"};
      total += extent(x, op.axis);
    }
    return {{op.out, resized(first, op.axis, total)}};
  }

  Results operator()(const AffineOp& op) const {
    const TensorSpec& out = declared_.at(op.out);
    auto floating = [](DType d) { return d == DType::f32 || d == DType::f16; };
    if (!floating(out.dtype) && out.dtype != DType::u8)
      throw Mismatch{"an affine result is float32, float16 or uint8"};
    for (const Term& term : op.terms) {
      const TensorSpec& x = known_.at(term.x);
      if (x.shape != out.shape || !floating(x.dtype))
        throw Mismatch{"term '" + term.x +
                       "' does not have the result's shape in float32 or float16"};
    }
    return {{op.out, out}};
  }

  Results operator()(const MomentsOp& op) const {
    const TensorSpec& x = known_.at(op.x);
    if (x.shape.size() != 4 || x.shape[0] != 1 || x.dtype != DType::f32)
      throw Mismatch{"tensor '" + op.x + "' is not [1, h, W, C] in float32"};
    if (x.shape[3] % op.groups != 0)
      throw Mismatch{"tensor '" + op.x + "' does not divide into " + std::to_string(op.groups) +
                     " groups"};
    return {{op.out, {{1, 3, op.groups}, DType::f32}}};
  }

  Results operator()(const NormalizerOp& op) const {
    const TensorSpec& out = declared_.at(op.mean);
    for (const std::string& name : op.moments) {
      const TensorSpec& x = known_.at(name);
      if (x.shape.size() != 3 || x.shape[0] != 1 || x.shape[1] != 3 || x.dtype != DType::f32)
        throw Mismatch{"tensor '" + name + "' does not hold moments"};
      if (out.shape.back() % x.shape[2] != 0)
        throw Mismatch{"tensor '" + name + "' does not hold moments for '" + op.mean + "'"};
      if (x != known_.at(op.moments[0]))
        throw Mismatch{"tensor '" + name + "' has other groups than '" + op.moments[0] + "'"};
    }
    TensorSpec spec{{1, 1, 1, out.shape.back()}, DType::f32};
    return {{op.mean, spec}, {op.rstd, spec}};
  }

 private:
  static const TensorSpec& port_spec(const std::vector<std::pair<std::string, TensorSpec>>& ports,
                                     const std::string& name) {
    return std::ranges::find_if(ports, [&](const auto& p) { return p.first == name; })->second;
  }
  static Mismatch no_axis(int64_t axis, const std::string& name) {
    return {"axis " + std::to_string(axis) + " is not one of tensor '" + name + "'"};
  }

  const Specs& known_;
  const Specs& declared_;
  const std::map<std::string, const Ports*>& artifacts_;
};

}  // namespace

void check_name(const json::Node& owner, const std::string& name) {
  auto good = [](char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '.' || c == '@' || c == '-';
  };
  if (name.empty() || name.size() > 128 || !std::ranges::all_of(name, good))
    owner.fail("'" + name.substr(0, 64) + "' is not a name (letters, digits, _ . @ -)");
}

std::string read_name(const json::Node& node) {
  check_name(node, node.string());
  return node.string();
}

TensorSpec read_spec(const json::Node& node) {
  node.only({"shape", "dtype"});
  TensorSpec spec;
  json::Node shape = node.at("shape");
  if (shape.size() < 1 || shape.size() > 6) shape.fail("has not 1 to 6 dimensions");
  for (const json::Node& d : shape.items()) spec.shape.push_back(d.integer(1, kMaxExtent));
  if (auto dtype = node.find("dtype")) {
    auto known = dtype_from_name(dtype->string());
    if (!known) dtype->fail("unknown dtype '" + dtype->string().substr(0, 64) + "'");
    spec.dtype = *known;
  }
  if (spec.bytes() > kMaxTensorBytes) node.fail("a tensor of " + spec.text() + " is over the limit");
  return spec;
}

Program read_program(const json::Node& node) {
  node.only({"inputs", "tensors", "ops", "outputs"});
  Program program;
  for (const json::Node& item : node.at("inputs").items()) {
    item.only({"name", "role", "stream", "negative"});
    Input input{read_name(item.at("name"))};
    const std::string& role = item.at("role").string();
    constexpr const char* roles[] = {"noise", "prompt_embeds", "pooled", "latent", "other"};
    if (std::ranges::none_of(roles, [&](const char* r) { return role == r; }))
      item.at("role").fail("unknown role '" + role.substr(0, 64) + "'");
    input.noise = role == "noise";
    if (auto stream = item.find("stream"))
      input.stream = static_cast<uint32_t>(stream->integer(0, UINT32_MAX));
    if (auto negative = item.find("negative")) negative->boolean();
    program.inputs.push_back(std::move(input));
  }
  for (const auto& [name, spec] : node.at("tensors").members()) {
    check_name(spec, name);
    program.tensors.emplace(name, read_spec(spec));
  }
  json::Node ops = node.at("ops");
  if (ops.size() > kMaxOps) ops.fail("holds too many operations");
  size_t operands = 0;
  for (const json::Node& op : ops.items()) {
    program.ops.push_back(read_op(op));
    operands += reads(program.ops.back()).size();
    if (operands > kMaxOperands) ops.fail("holds too many operands");
  }
  program.outputs = read_names(node.at("outputs"));
  if (program.outputs.empty()) node.at("outputs").fail("is empty");
  return program;
}

std::vector<std::string> reads(const Op& op) {
  auto second = [](const Names& names) {
    std::vector<std::string> out;
    for (const auto& [port, tensor] : names) out.push_back(tensor);
    return out;
  };
  auto terms = [](const AffineOp& affine) {
    std::vector<std::string> out;
    for (const Term& t : affine.terms) out.push_back(t.x);
    return out;
  };
  return std::visit(Overload{[&](const CallOp& o) { return second(o.args); },
                             [](const ConcatOp& o) { return o.xs; },
                             [&](const AffineOp& o) { return terms(o); },
                             [](const NormalizerOp& o) { return o.moments; },
                             [](const auto& o) { return std::vector<std::string>{o.x}; }},
                    op);
}

std::vector<std::string> writes(const Op& op) {
  return std::visit(Overload{[](const CallOp& o) {
                               std::vector<std::string> out;
                               for (const auto& [port, tensor] : o.results) out.push_back(tensor);
                               return out;
                             },
                             [](const NormalizerOp& o) {
                               return std::vector<std::string>{o.mean, o.rstd};
                             },
                             [](const auto& o) { return std::vector<std::string>{o.out}; }},
                    op);
}

void check_program(const Program& program, const std::map<std::string, const Ports*>& artifacts,
                   const Specs& constants, const std::string& where) {
  auto fail = [&](const std::string& field, const std::string& message) {
    return Error("bundle", where + "." + field + ": " + message + " (export the bundle again)");
  };
  Specs known = constants;
  for (size_t i = 0; i < program.inputs.size(); ++i) {
    const Input& input = program.inputs[i];
    std::string field = "inputs[" + std::to_string(i) + "]";
    auto spec = program.tensors.find(input.name);
    if (spec == program.tensors.end())
      throw fail(field, "tensor '" + input.name + "' is not declared");
    if (!known.emplace(input.name, spec->second).second)
      throw fail(field, "tensor '" + input.name + "' is defined twice");
    if (input.noise && spec->second.dtype != DType::f32)
      throw fail(field, "noise '" + input.name + "' is not float32");
  }
  for (size_t i = 0; i < program.ops.size(); ++i) {
    const Op& op = program.ops[i];
    std::string field = "ops[" + std::to_string(i) + "]";
    for (const std::string& name : reads(op))
      if (!known.contains(name))
        throw fail(field, "reads tensor '" + name + "', which nothing has written");
    std::unordered_set<std::string> written;
    for (const std::string& name : writes(op)) {
      if (known.contains(name) || !written.insert(name).second)
        throw fail(field, "writes tensor '" + name + "' a second time");
      if (!program.tensors.contains(name))
        throw fail(field, "tensor '" + name + "' is not declared");
    }
    try {
      for (auto& [name, spec] : std::visit(Computed(known, program.tensors, artifacts), op)) {
        const TensorSpec& declared = program.tensors.at(name);
        if (declared != spec)
          throw Mismatch{"tensor '" + name + "' is declared " + declared.text() +
                         " but computed as " + spec.text()};
        known.emplace(name, spec);
      }
    } catch (const Mismatch& mismatch) {
      throw fail(field, mismatch.message);
    }
  }
  for (const auto& [role, name] : program.outputs)
    if (!known.contains(name)) throw fail("outputs." + role, "tensor '" + name + "' is never written");
  for (const auto& [name, spec] : program.tensors)
    if (!known.contains(name) || constants.contains(name))
      throw fail("tensors." + name, "declared but never written");
}

}  // namespace hh
