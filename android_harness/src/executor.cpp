#include "executor.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

namespace hh {
namespace {

constexpr int64_t kForever = std::numeric_limits<int64_t>::max();

void run_copy(const CopyStep& step) {
  for (const CopyStep::Part& p : step.parts)
    for (size_t r = 0; r < p.rows; ++r)
      std::memcpy(p.to + r * p.to_stride, p.from + r * p.from_stride, p.bytes);
}

void run_fill(const FillStep& step) {
  for (const FillStep::Part& p : step.parts)
    for (size_t r = 0; r < p.rows; ++r) fill(step.dtype, step.value, p.to + r * p.stride, p.elements);
  run_copy(step.copy);
}

}  // namespace

Executor::Executor(const Manifest& manifest, const Program& program, const SafeTensors* constants) {
  std::unordered_map<std::string, bool> used;
  for (const Op& op : program.ops)
    for (const std::string& name : reads(op)) used[name] = true;
  for (const auto& [role, name] : program.outputs) used[name] = true;

  for (const auto& [name, spec] : manifest.constant_specs)
    if (used.contains(name)) declare(name, spec, -1, true);
  for (const Input& input : program.inputs)
    declare(input.name, program.tensors.at(input.name), -1, true);
  for (size_t i = 0; i < program.ops.size(); ++i) {
    for (const std::string& name : writes(program.ops[i]))
      declare(name, program.tensors.at(name), static_cast<int64_t>(i), false);
    for (const std::string& name : reads(program.ops[i])) {
      Placed& t = placed(name);
      t.last = std::max(t.last, static_cast<int64_t>(i));
      t.call_reads |= std::holds_alternative<CallOp>(program.ops[i]);
    }
  }
  for (const auto& [role, name] : program.outputs) placed(name).last = kForever;

  share_memory(program);
  place();
  build(manifest, program);
  for (const auto& [name, spec] : manifest.constant_specs)
    if (index_.contains(name)) {
      auto data = constants->at(name).data;
      std::memcpy(address(name), data.data(), data.size());
    }
}

void Executor::declare(const std::string& name, const TensorSpec& spec, int64_t first, bool pinned) {
  Placed t;
  t.spec = spec;
  t.root = tensors_.size();
  t.bytes = spec.bytes();
  t.first = first;
  t.last = pinned ? kForever : first;
  t.pinned = pinned;
  index_.emplace(name, tensors_.size());
  tensors_.push_back(std::move(t));
}

Executor::Layout Executor::layout(const TensorSpec& spec, int64_t axis) {
  Layout l;
  l.inner_bytes = dtype_bytes(spec.dtype);
  for (size_t i = 0; i < spec.shape.size(); ++i) {
    auto d = static_cast<size_t>(spec.shape[i]);
    if (static_cast<int64_t>(i) < axis) l.outer *= d;
    if (static_cast<int64_t>(i) == axis) l.extent = d;
    if (static_cast<int64_t>(i) > axis) l.inner_bytes *= d;
  }
  return l;
}

// Puts `part` inside `whole`, so that writing it writes the whole: no copy later.
bool Executor::host(const std::string& part, const std::string& whole, uint64_t offset) {
  const size_t p = index_.at(part), w = index_.at(whole);
  if (tensors_[p].root != p || tensors_[p].pinned || offset % kAlignment != 0) return false;
  for (Placed& t : tensors_)
    if (t.root == p) {
      t.root = w;
      t.offset += offset;
    }
  return true;
}

// What only a concatenation reads, and can be written at its place there.
std::unordered_set<std::string> Executor::joined(const Program& program) const {
  std::unordered_map<std::string, int> readers;
  for (const Op& op : program.ops)
    for (const std::string& name : reads(op)) ++readers[name];
  for (const auto& [role, name] : program.outputs) ++readers[name];
  std::unordered_set<std::string> found;
  for (const Op& op : program.ops) {
    const auto* concat = std::get_if<ConcatOp>(&op);
    if (!concat) continue;
    uint64_t offset = 0;
    for (const std::string& name : concat->xs) {
      const Placed& part = placed(name);
      if (layout(part.spec, concat->axis).outer != 1) break;
      if (offset % kAlignment == 0 && readers[name] == 1) found.insert(name);
      offset += part.bytes;
    }
  }
  return found;
}

void Executor::share_memory(const Program& program) {
  const std::unordered_set<std::string> copied = joined(program);
  for (const Op& op : program.ops) {
    if (auto* slice = std::get_if<SliceOp>(&op)) {
      const Placed& x = placed(slice->x);
      // One copy, made at once: what it is cut from need not stay until all parts are there.
      if (copied.contains(slice->out) && x.last < placed(slice->out).last) continue;
      Layout l = layout(x.spec, slice->axis);
      Placed& out = placed(slice->out);
      uint64_t offset = x.offset + static_cast<uint64_t>(slice->start) * l.inner_bytes;
      if (l.outer != 1 || (out.call_reads && offset % kAlignment != 0)) continue;
      out.root = x.root;
      out.offset = offset;
    } else if (auto* pad = std::get_if<PadOp>(&op)) {
      Layout l = layout(placed(pad->x).spec, pad->axis);
      if (l.outer == 1)
        host(pad->x, pad->out, static_cast<uint64_t>(pad->before) * l.inner_bytes);
    } else if (auto* concat = std::get_if<ConcatOp>(&op)) {
      uint64_t offset = 0;
      for (const std::string& name : concat->xs) {
        Layout l = layout(placed(name).spec, concat->axis);
        if (l.outer != 1) break;
        host(name, concat->out, offset);
        offset += placed(name).bytes;
      }
    }
  }
}

void Executor::place() {
  // An operation may have moved a root into another one after others pointed to it; host() has
  // moved those along, so one step always leads to the root.
  for (const Placed& t : tensors_) {
    Placed& root = tensors_[t.root];
    root.first = std::min(root.first, t.first);
    root.last = std::max(root.last, t.last);
  }
  std::vector<Lifetime> lifetimes;
  std::vector<size_t> owners;
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (tensors_[i].root == i) {
      lifetimes.push_back({tensors_[i].bytes, tensors_[i].first, tensors_[i].last, 0});
      owners.push_back(i);
    }
  arena_ = std::make_unique<Arena>(plan_arena(lifetimes));
  std::vector<uint64_t> base(tensors_.size());
  for (size_t i = 0; i < owners.size(); ++i) base[owners[i]] = lifetimes[i].offset;
  for (Placed& t : tensors_) t.offset += base[t.root];
}

std::byte* Executor::address(const std::string& name) const {
  return arena_->data() + placed(name).offset;
}

Executor::View Executor::tensor(const std::string& name) const {
  const Placed& t = placed(name);
  return {t.spec, arena_->data() + t.offset};
}

void Executor::build(const Manifest& manifest, const Program& program) {
  size_t calls = 0, widest = 0;
  auto floats = [&](const std::string& name) { return reinterpret_cast<float*>(address(name)); };
  auto copy = [&](CopyStep& step, CopyStep::Part part) {
    if (part.from != part.to) step.parts.push_back(part);
  };
  for (const Op& op : program.ops) {
    if (auto* call = std::get_if<CallOp>(&op)) {
      CallStep step;
      step.call = calls++;
      const Artifact* artifact = manifest.artifact(call->artifact);
      step.artifact = static_cast<size_t>(artifact - manifest.artifacts.data());
      auto named = [](const Names& names, const std::string& port) -> const std::string& {
        return std::ranges::find_if(names, [&](const auto& n) { return n.first == port; })->second;
      };
      for (const auto& [port, spec] : artifact->ports.inputs)
        step.inputs.push_back(address(named(call->args, port)));
      for (const auto& [port, spec] : artifact->ports.outputs)
        step.outputs.push_back(address(named(call->results, port)));
      steps_.emplace_back(std::move(step));
    } else if (auto* slice = std::get_if<SliceOp>(&op)) {
      Layout l = layout(placed(slice->x).spec, slice->axis);
      auto length = static_cast<size_t>(slice->length) * l.inner_bytes;
      CopyStep step;
      copy(step, {address(slice->x) + static_cast<size_t>(slice->start) * l.inner_bytes,
                  address(slice->out), length, l.extent * l.inner_bytes, length, l.outer});
      if (!step.parts.empty()) steps_.emplace_back(std::move(step));
    } else if (auto* pad = std::get_if<PadOp>(&op)) {
      const TensorSpec& spec = placed(pad->x).spec;
      Layout l = layout(spec, pad->axis);
      size_t before = static_cast<size_t>(pad->before) * l.inner_bytes;
      size_t after = static_cast<size_t>(pad->after) * l.inner_bytes;
      size_t middle = l.extent * l.inner_bytes, row = before + middle + after;
      FillStep step{spec.dtype, pad->value, {}, {}};
      std::byte* out = address(pad->out);
      size_t width = dtype_bytes(spec.dtype);
      if (before) step.parts.push_back({out, before / width, row, l.outer});
      if (after) step.parts.push_back({out + before + middle, after / width, row, l.outer});
      copy(step.copy, {address(pad->x), out + before, middle, middle, row, l.outer});
      steps_.emplace_back(std::move(step));
    } else if (auto* concat = std::get_if<ConcatOp>(&op)) {
      Layout whole = layout(placed(concat->out).spec, concat->axis);
      size_t row = whole.extent * whole.inner_bytes, offset = 0;
      CopyStep step;
      for (const std::string& name : concat->xs) {
        Layout l = layout(placed(name).spec, concat->axis);
        size_t bytes = l.extent * l.inner_bytes;
        copy(step, {address(name), address(concat->out) + offset, bytes, bytes, row, l.outer});
        offset += bytes;
      }
      if (!step.parts.empty()) steps_.emplace_back(std::move(step));
    } else if (auto* affine_op = std::get_if<AffineOp>(&op)) {
      const TensorSpec& spec = placed(affine_op->out).spec;
      AffineStep step{{}, affine_op->bias, spec.dtype, address(affine_op->out), spec.elements()};
      for (const Term& t : affine_op->terms)
        step.terms.push_back({address(t.x), placed(t.x).spec.dtype, t.scale});
      steps_.emplace_back(std::move(step));
    } else if (auto* moments_op = std::get_if<MomentsOp>(&op)) {
      const auto& shape = placed(moments_op->x).spec.shape;
      auto channels = static_cast<size_t>(shape[3]);
      widest = std::max(widest, channels);
      steps_.emplace_back(MomentsStep{floats(moments_op->x),
                                      static_cast<size_t>(shape[1]) * static_cast<size_t>(shape[2]),
                                      channels, static_cast<size_t>(moments_op->groups),
                                      floats(moments_op->out)});
    } else if (auto* norm = std::get_if<NormalizerOp>(&op)) {
      NormalizerStep step{{},
                          static_cast<size_t>(placed(norm->moments[0]).spec.shape[2]),
                          norm->eps,
                          static_cast<size_t>(placed(norm->mean).spec.shape.back()),
                          floats(norm->mean),
                          floats(norm->rstd)};
      for (const std::string& name : norm->moments) step.moments.push_back(floats(name));
      steps_.emplace_back(std::move(step));
    }
  }
  sums_.resize(widest);
  shift_.resize(widest);
}

std::vector<size_t> Executor::call_order() const {
  std::vector<size_t> order;
  for (const Step& step : steps_)
    if (auto* call = std::get_if<CallStep>(&step)) order.push_back(call->artifact);
  return order;
}

void Executor::compute(const Step& any) const {
  if (auto* copy = std::get_if<CopyStep>(&any)) {
    run_copy(*copy);
  } else if (auto* pad = std::get_if<FillStep>(&any)) {
    run_fill(*pad);
  } else if (auto* a = std::get_if<AffineStep>(&any)) {
    affine(a->terms, a->bias, a->dtype, a->out, a->count);
  } else if (auto* m = std::get_if<MomentsStep>(&any)) {
    moments(m->x, m->positions, m->channels, m->groups, sums_.data(), shift_.data(), m->out);
  } else if (auto* n = std::get_if<NormalizerStep>(&any)) {
    normalizer(n->moments, n->groups, n->eps, n->channels, n->mean, n->rstd);
  }
}

}  // namespace hh
