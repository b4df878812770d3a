#include "session.hpp"

#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "memory.hpp"
#include "memory_plan.hpp"
#include "noise.hpp"
#include "sha256.hpp"
#include "thermal.hpp"

namespace hh {
namespace {

constexpr int kProtocol = 1;

std::string platform() {
  utsname name{};
  ::uname(&name);
  std::string system = name.sysname;
  std::ranges::transform(system, system.begin(), [](unsigned char c) { return std::tolower(c); });
#if defined(__ANDROID__)
  system = "android";
#endif
  return system + "-" + name.machine;
}

std::vector<int64_t> without_leading_ones(const std::vector<int64_t>& shape) {
  auto first = std::ranges::find_if(shape, [](int64_t d) { return d != 1; });
  return {first, shape.end()};
}

std::vector<Port> ports_of(const std::vector<std::pair<std::string, TensorSpec>>& ports) {
  std::vector<Port> out;
  for (const auto& [name, spec] : ports) out.push_back({name, spec.shape, spec.dtype, spec.bytes()});
  return out;
}

// Half the width of the 95 % confidence interval of the median, as part of it: by order
// statistics, so that no distribution is assumed. Infinite below six values.
double median_uncertainty(std::vector<double> values) {
  const size_t n = values.size();
  if (n < 6) return INFINITY;
  std::ranges::sort(values);
  const double spread = 1.959964 * std::sqrt(static_cast<double>(n));
  const auto low = static_cast<size_t>(std::max(0.0, std::floor((n - spread) / 2)));
  const auto high = std::min(n - 1, static_cast<size_t>(std::ceil((n + spread) / 2)));
  const double median = n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
  return median > 0 ? std::max(median - values[low], values[high] - median) / median : INFINITY;
}

const char* cache_name(CacheState state) {
  switch (state) {
    case CacheState::built: return "built";
    case CacheState::hit: return "hit";
    case CacheState::none: break;
  }
  return "none";
}

}  // namespace

Session::Session(Job job, EventSink events, const std::function<bool()>& cancelled)
    : job_(std::move(job)), events_(std::move(events)), seed_(job_.seed) {
  MemoryUse base = memory_use();
  emit(std::move(Event("hello")
                     .add("protocol", kProtocol)
                     .add("harness", HANDHELD_VERSION)
                     .add("pid", static_cast<uint64_t>(::getpid()))
                     .raw("engines", engines_json())
                     .add("platform", platform())
                     .add("base_rss_bytes", base.rss)
                     .add("engine_library_bytes", 0)));
  emit_memory("start");
  emit_thermal();
  auto go_on = [&] {
    if (cancelled()) throw Error("cancelled", "cancelled while the bundle was opened");
  };
  manifest_ = read_manifest(job_.bundle);
  trim_heap();
  auto size = manifest_.sizes.find(job_.size);
  if (size == manifest_.sizes.end()) {
    std::string have;
    for (const auto& [name, unused] : manifest_.sizes) have += (have.empty() ? "" : ", ") + name;
    throw Error("job", job_.bundle + ": the bundle has no size '" + job_.size + "' (it has " + have + ")");
  }
  size_ = &size->second;
  if (!job_.output.empty() && std::ranges::none_of(program().outputs, [](const auto& output) {
        return output.first == "picture";
      }))
    throw Error("job", "output: the program has no picture to write");
  for (const Input& input : program().inputs) given_[input.name] = false;
  for (const auto& [id, unused] : job_.stream_by_artifact)
    if (!manifest_.artifact(id))
      throw Error("job", "job: residency_by_artifact: the bundle has no artifact '" + id + "'");
  {
    auto constants = open_constants();
    go_on();
    executor_ = std::make_unique<Executor>(manifest_, program(), constants.get());
  }
  read_job_inputs();
  open_artifacts(go_on);
  trim_heap();
  emit_memory("loaded");
  if (job_.reset_peak && !reset_peak_memory())
    throw Error("io", "/proc/self/clear_refs: the high-water mark of memory cannot be reset");
}

std::unique_ptr<SafeTensors> Session::open_constants() const {
  if (!manifest_.constants) return nullptr;
  std::string path = check_file(manifest_, *manifest_.constants, "constants", job_.verify_hashes);
  auto file = std::make_unique<SafeTensors>(path, "bundle");
  auto fail = [&](const std::string& message) {
    return Error("bundle", manifest_.folder + "/manifest.json: constant_specs: " + path +
                               ": tensor " + message + " (export the bundle again)");
  };
  for (const auto& [name, spec] : manifest_.constant_specs) {
    auto found = file->tensors().find(name);
    if (found == file->tensors().end()) throw fail("'" + name + "' is missing");
    if (const TensorSpec& have = found->second.spec; have != spec)
      throw fail("'" + name + "' is " + have.text() + ", the manifest says " + spec.text());
  }
  for (const auto& [name, tensor] : file->tensors())
    if (!manifest_.constant_specs.contains(name))
      throw fail("'" + name + "' is not one that the manifest names");
  return file;
}

// Decides by the job's budget, if it has one, what is streamed. Returns whether to prefetch.
bool Session::plan_memory(std::vector<Slot>& slots, const std::vector<size_t>& calls) const {
  if (!job_.memory_budget) return job_.prefetch;
  std::vector<Weights> weights;
  uint64_t largest = 0;
  bool keeps = false;
  for (const Slot& slot : slots) {
    const Artifact& artifact = *manifest_.artifact(slot.info.id);
    if (artifact.engine != "litert" && artifact.engine != "executorch")
      throw Error("bundle", manifest_.folder + "/manifest.json: " + artifact.field + ".engine: what '" +
                                artifact.engine + "' takes for weights cannot be planned (choose a "
                                "residency instead of a memory budget)");
    if (!artifact.workspace)
      throw Error("bundle", manifest_.folder + "/manifest.json: " + artifact.field +
                                ".workspace: is missing, so memory cannot be planned (export the "
                                "bundle again)");
    uint64_t bytes = artifact.file.bytes;
    for (const FileRef& part : artifact.parts) bytes += part.bytes;
    weights.push_back({slot.info.id, bytes, *artifact.workspace});
    largest = std::max(largest, *artifact.workspace);
    // Its workspace stays as large as it ever was, whatever is loaded.
    keeps = keeps || artifact.engine == "executorch";
  }
  if (keeps)
    for (Weights& w : weights) w.workspace = largest;
  uint64_t activations = activation_bytes(program());
  for (const auto& [name, spec] : manifest_.constant_specs) activations += spec.bytes();
  const MemoryPlan plan =
      hh::plan_memory(job_.memory_budget, activations, !job_.cache.empty(), weights, calls);
  for (size_t i = 0; i < slots.size(); ++i) slots[i].stream = !plan.resident[i];
  emit(std::move(Event("plan")
                     .raw("resident", artifact_list(weights, plan.resident, true))
                     .raw("streamed", artifact_list(weights, plan.resident, false))
                     .raw("prefetch", plan.prefetch ? "true" : "false")
                     .add("peak_bytes", plan.peak_bytes)
                     .add("budget_bytes", job_.memory_budget)));
  return plan.prefetch && job_.prefetch;
}

void Session::open_artifacts(const std::function<void()>& go_on) {
  EngineOptions options;
  options.threads = job_.threads;
  options.cache_dir = job_.cache;
  options.verify_cache = job_.verify_hashes;
  engines_ = std::make_unique<Engines>(std::move(options));

  constexpr size_t kUnused = SIZE_MAX;
  std::vector<size_t> slot_of(manifest_.artifacts.size(), kUnused), calls;
  std::vector<Slot> slots;
  for (size_t index : executor_->call_order()) {
    if (slot_of[index] == kUnused) {
      const Artifact& artifact = manifest_.artifacts[index];
      go_on();
      Slot slot;
      slot.info = {artifact.id,
                   check_file(manifest_, artifact.file, artifact.field + ".file", job_.verify_hashes),
                   manifest_.packed_sha256(artifact), ports_of(artifact.ports.inputs),
                   ports_of(artifact.ports.outputs), artifact.file.bytes, ""};
      auto exception = job_.stream_by_artifact.find(artifact.id);
      slot.stream = exception == job_.stream_by_artifact.end() ? job_.stream : exception->second;
      for (size_t i = 0; i < artifact.parts.size(); ++i) {
        const std::string part = check_file(
            manifest_, artifact.parts[i], artifact.field + ".parts[" + std::to_string(i) + "]",
            job_.verify_hashes);
        if (artifact.continued()) slot.info.weights = part;
        slot.info.bytes += artifact.parts[i].bytes;
      }
      slot_of[index] = slots.size();
      slots.push_back(std::move(slot));
    }
    calls.push_back(slot_of[index]);
  }
  // Only after all files were checked, so that a broken bundle never reaches an engine.
  for (size_t i = 0; i < slot_of.size(); ++i)
    if (slot_of[i] != kUnused) slots[slot_of[i]].engine = &engine_for(manifest_.artifacts[i]);
  const bool prefetch = plan_memory(slots, calls);
  timing_.calls.resize(calls.size());
  residency_ = std::make_unique<Residency>(
      std::move(slots), std::move(calls), prefetch,
      [this](const ArtifactInfo& info, double ms, CacheState cache) {
        emit(std::move(Event("load")
                           .add("artifact", info.id)
                           .milliseconds("ms", ms)
                           .add("cache", cache_name(cache))));
      });
  residency_->load_residents(go_on);
}

Engine& Session::engine_for(const Artifact& artifact) {
  Engine& engine = engines_->get(artifact.engine);
  for (const auto& [option, value] : artifact.options)
    if (!engine.takes(option, value))
      throw Error("engine-missing", "artifact '" + artifact.id + "' needs " + artifact.engine +
                                        " with " + option + " '" + value +
                                        "', which this harness lacks (export the bundle for "
                                        "another target)");
  return engine;
}

void Session::read_job_inputs() {
  for (const auto& [name, source] : job_.inputs) {
    if (!given_.contains(name))
      throw Error("input", "job: inputs." + name + ": the program has no such input");
    SafeTensors file(source.path, "input");
    const SafeTensors::Tensor& tensor = file.at(source.tensor);
    const TensorSpec want = executor_->tensor(name).spec;
    if (tensor.spec.dtype != want.dtype ||
        without_leading_ones(tensor.spec.shape) != without_leading_ones(want.shape))
      throw Error("input", source.path + ": tensor '" + source.tensor + "' is " +
                               tensor.spec.text() + ", input '" + name + "' wants " + want.text());
    set_input(name, tensor.data.data(), tensor.data.size());
  }
}

void Session::set_input(const std::string& name, const void* data, size_t bytes) {
  auto found = given_.find(name);
  if (found == given_.end()) throw Error("input", "the program has no input '" + name + "'");
  Executor::View view = executor_->tensor(name);
  if (bytes != view.spec.bytes())
    throw Error("input", "input '" + name + "' has " + std::to_string(bytes) + " bytes, " +
                             view.spec.text() + " has " + std::to_string(view.spec.bytes()));
  std::memcpy(view.data, data, bytes);
  found->second = true;
}

void Session::set_seed(uint64_t seed) {
  seed_ = seed;
  draw_ = true;
}

void Session::prepare_inputs() {
  for (const Input& input : program().inputs) {
    if (given_.at(input.name)) continue;
    if (!input.noise) throw Error("input", "input '" + input.name + "' is missing");
    if (!draw_) continue;
    Executor::View view = executor_->tensor(input.name);
    draw_noise(seed_, input.stream, reinterpret_cast<float*>(view.data), view.spec.elements());
  }
  draw_ = false;
}

void Session::check_cancelled() {
  if (cancelled_.exchange(false, std::memory_order_relaxed))
    throw Error("cancelled", "cancelled");
}

void Session::pass(SafeTensorsWriter* dump) {
  timing_.engine = timing_.load = 0;
  size_t done = 0;
  for (const Step& step : executor_->steps()) {
    const auto* call = std::get_if<CallStep>(&step);
    if (!call) {
      executor_->compute(step);
      continue;
    }
    if (cancelled_.load(std::memory_order_relaxed)) check_cancelled();
    if (memory_is_short_.load(std::memory_order_relaxed)) save_memory();
    double before = now_ms();
    Model& model = residency_->acquire(call->call);
    double start = now_ms();
    model.run(call->inputs, call->outputs);
    double end = now_ms();
    residency_->release(call->call);
    timing_.load += start - before;
    timing_.engine += end - start;
    timing_.calls[call->call] = end - start;
    if (progress_) progress_(++done, timing_.calls.size());
    if (dump) {
      const Artifact& artifact = manifest_.artifacts[call->artifact];
      for (size_t i = 0; i < call->outputs.size(); ++i)
        dump->write(call->outputs[i], artifact.ports.outputs[i].second.bytes());
    }
  }
}

double Session::iterate(const char* kind) {
  prepare_inputs();
  ran_ = false;
  double start = now_ms();
  try {
    pass(nullptr);
  } catch (...) {
    residency_->drop_streamed();
    throw;
  }
  residency_->check_intact();
  double total = now_ms() - start;
  ran_ = true;
  emit(std::move(Event("iteration")
                     .add("index", static_cast<uint64_t>(index_))
                     .add("kind", kind)
                     .milliseconds("total_ms", total)
                     .milliseconds("engine_ms", timing_.engine)
                     .milliseconds("load_ms", timing_.load)
                     .list("calls_ms", std::span<const double>(timing_.calls))));
  if (index_++ == 0) emit_memory("first");
  return total;
}

void Session::memory_warning() {
  memory_is_short_.store(true, std::memory_order_relaxed);
  // A run under way sees it before its next call.
  if (std::unique_lock lock(running_, std::try_to_lock); lock) save_memory();
}

void Session::save_memory() {
  if (!memory_is_short_.exchange(false, std::memory_order_relaxed)) return;
  residency_->stream_all();
  trim_heap();
  emit_memory("warning");
}

// Whether there are enough timed runs: at least so many, for so long, and until the median is
// known well enough or has been waited for long enough.
bool Session::enough(const std::vector<double>& timed, double elapsed_ms) {
  if (timed.size() < static_cast<size_t>(job_.iterations)) return false;
  if (elapsed_ms < job_.min_seconds * 1000.0) return false;
  if (job_.precision <= 0) return true;
  if (job_.max_seconds > 0 && elapsed_ms >= job_.max_seconds * 1000.0) return true;
  // Sorting again after each of very many runs would take longer than they do.
  if (timed.size() < judged_ + judged_ / 20) return false;
  judged_ = timed.size();
  return median_uncertainty(timed) <= job_.precision;
}

void Session::run() {
  std::lock_guard lock(running_);
  iterate(index_ == 0 ? "first" : "timed");
  check_cancelled();
}

void Session::run_job() {
  std::lock_guard lock(running_);
  check_cancelled();
  if (index_ == 0) iterate("first");
  for (int64_t i = 0; i < job_.warmup; ++i) iterate("warmup");
  double start = now_ms();
  judged_ = 0;
  std::vector<double> timed;
  do timed.push_back(iterate("timed"));
  while (!enough(timed, now_ms() - start));
  emit_memory("end");
  emit_thermal();
  if (!job_.dump_calls.empty()) dump_calls();
  emit_outputs();
  check_cancelled();
  emit(std::move(Event("done").add("iterations", static_cast<uint64_t>(timed.size()))));
}

// One more pass, outside of the measurements: writing would spoil them, and every pass gives the
// same bits.
void Session::dump_calls() {
  std::vector<std::pair<std::string, TensorSpec>> tensors;
  size_t call = 0;
  for (size_t artifact : executor_->call_order()) {
    for (const auto& [port, spec] : manifest_.artifacts[artifact].ports.outputs)
      tensors.emplace_back("call." + std::to_string(call) + "." + port, spec);
    ++call;
  }
  SafeTensorsWriter dump(job_.dump_calls, tensors);
  pass(&dump);
  dump.commit();
}

std::span<const std::byte> Session::output(const std::string& role) const {
  if (!ran_) throw Error("input", "there is no output before a run");
  for (const auto& [name, tensor] : program().outputs)
    if (name == role) {
      Executor::View view = executor_->tensor(tensor);
      return {view.data, view.spec.bytes()};
    }
  throw Error("input", "the program has no output '" + role + "'");
}

void Session::emit_outputs() const {
  for (const auto& [role, tensor] : program().outputs) {
    Executor::View view = executor_->tensor(tensor);
    Sha256 hash;
    hash.update(view.data, view.spec.bytes());
    Event event("output");
    event.add("role", role)
        .add("sha256", hash.hex())
        .list("shape", std::span<const int64_t>(view.spec.shape))
        .add("dtype", dtype_name(view.spec.dtype));
    if (role == "picture" && !job_.output.empty()) {
      AtomicFile file(job_.output);
      file.write(view.data, view.spec.bytes());
      file.commit();
      event.add("file", job_.output);
    }
    if (role == "picture" && job_.expect)
      event.number("psnr_db", psnr({view.data, view.spec.bytes()}));
    emit(std::move(event));
  }
}

// Peak 255; 999 where all is equal.
double Session::psnr(std::span<const std::byte> picture) const {
  constexpr double kMost = 999;
  SafeTensors file(job_.expect->path, "input");
  const SafeTensors::Tensor& wanted = file.at(job_.expect->tensor);
  if (wanted.spec.dtype != DType::u8 || wanted.data.size() != picture.size())
    throw Error("input", job_.expect->path + ": tensor '" + job_.expect->tensor + "' is " +
                             wanted.spec.text() + ", which is no picture of this size");
  uint64_t squares = 0;
  for (size_t i = 0; i < picture.size(); ++i) {
    int d = std::to_integer<int>(picture[i]) - std::to_integer<int>(wanted.data[i]);
    squares += static_cast<uint64_t>(d * d);
  }
  if (squares == 0) return kMost;
  const double mean = static_cast<double>(squares) / static_cast<double>(picture.size());
  return std::min(kMost, 10 * std::log10(255.0 * 255.0 / mean));
}

void Session::emit_thermal() const {
  if (auto status = thermal_status()) emit(std::move(Event("thermal").add("status", *status)));
}

void Session::emit_memory(const char* phase) const {
  MemoryUse use = memory_use();
  Event event("memory");
  event.add("phase", phase)
      .add("rss", use.rss)
      .add("peak_rss", use.peak_rss)
      .add("anon", use.anon)
      .add("file", use.file)
      .add("swap", use.swap)
      .add("dma_buf", use.dma_buf)
      .add("phys_footprint", use.phys_footprint)
      .add("phys_footprint_peak", use.phys_footprint_peak);
  if (executor_) event.add("activations", executor_->bytes());
  emit(std::move(event));
}

}  // namespace hh
