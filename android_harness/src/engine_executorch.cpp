// ExecuTorch with the XNNPACK delegate; packed weights in memory-mapped files.
#include <dlfcn.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>
#include <executorch/runtime/platform/platform.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <optional>

#include "dtype.hpp"
#include "engine.hpp"
#include "pack_cache.hpp"

// The wheel exports the thread pool but ships no header for it.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace hh {
namespace {

namespace et = executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::extension::MallocMemoryAllocator;

constexpr const char* kBackend = "XnnpackBackend";
constexpr const char* kMethod = "forward";

thread_local std::string last_log;

// ExecuTorch says why it failed in its log only.
void keep_log(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t,
              const char* message, size_t length) {
  if (level == et_pal_log_level_t::kError || level == et_pal_log_level_t::kFatal)
    last_log.assign(message, std::min<size_t>(length, 300));
}

[[noreturn]] void fail(const std::string& artifact, const std::string& what, et::Error error) {
  std::string reason = last_log.empty() ? et::to_string(error) : last_log;
  const char* code = error == et::Error::MemoryAllocationFailed ? "memory" : "engine";
  throw Error(code, "artifact '" + artifact + "': " + what + ": " + reason);
}

void check(const std::string& artifact, const char* what, et::Error error) {
  if (error != et::Error::Ok) fail(artifact, what, error);
}

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::f32: return ScalarType::Float;
    case DType::f16: return ScalarType::Half;
    case DType::u8: return ScalarType::Byte;
    case DType::i8: return ScalarType::Char;
    case DType::i32: return ScalarType::Int;
  }
  return ScalarType::Undefined;
}

// Planned memory that all methods share, since one runs at a time. Address space is reserved
// once, so that it never moves; pages count when a method touches them.
class SharedMemory {
 public:
  static constexpr size_t kReserve = size_t{4} << 30;

  // Held while a model runs or the delegate makes one: both use XNNPACK's one workspace, which
  // has a lock of its own. Ours lets us tell loading from waiting.
  std::mutex busy;

  ~SharedMemory() {
    for (void* p : blocks_) ::munmap(p, kReserve);
  }

  uint8_t* block(size_t index, size_t bytes) {
    std::lock_guard lock(mutex_);
    if (bytes > kReserve) return nullptr;
    while (blocks_.size() <= index) {
      void* p = ::mmap(nullptr, kReserve, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) return nullptr;
      blocks_.push_back(p);
    }
    return static_cast<uint8_t*>(blocks_[index]);
  }

 private:
  std::mutex mutex_;
  std::vector<void*> blocks_;
};

// An artifact's file, mapped as long as the model lives. ExecuTorch 1.5's own loader unmaps a
// constant when the delegate frees it, which with a weight cache it does to constants that are
// not packed (of elementwise operators) and are still read when the model runs.
class MappedFile final : public et::DataLoader {
 public:
  MappedFile(const std::string& path, const std::string& more) : mapping_(path, more, "bundle") {}

  et::Result<et::FreeableBuffer> load(size_t offset, size_t size,
                                      const SegmentInfo&) const override {
    if (!inside(offset, size)) return et::Error::InvalidArgument;
    return et::FreeableBuffer(mapping_.bytes().data() + offset, size, nullptr);
  }

  et::Error load_into(size_t offset, size_t size, const SegmentInfo&, void* out) const override {
    if (!inside(offset, size)) return et::Error::InvalidArgument;
    std::memcpy(out, mapping_.bytes().data() + offset, size);
    return et::Error::Ok;
  }

  et::Result<size_t> size() const override { return mapping_.bytes().size(); }

  // What was read for packing need not stay; what is read again comes back by itself.
  void drop_pages() const { mapping_.drop_pages(); }

 private:
  bool inside(size_t offset, size_t size) const {
    const size_t all = mapping_.bytes().size();
    return offset <= all && size <= all - offset;
  }

  Mapping mapping_;
};

class ExecuTorchModel final : public Model {
 public:
  ExecuTorchModel(const ArtifactInfo& info, std::shared_ptr<SharedMemory> memory,
                  et::LoadBackendOptionsMap& options)
      : info_(info), memory_(std::move(memory)), file_(info_.path, info_.weights) {
    auto program = et::Program::load(&file_, et::Program::Verification::InternalConsistency);
    if (!program.ok()) fail(info_.id, "is not an ExecuTorch program", program.error());
    program_.emplace(std::move(program.get()));
    auto meta = program_->method_meta(kMethod);
    if (!meta.ok()) fail(info_.id, "has no method 'forward'", meta.error());
    check_ports(meta.get());
    plan_memory(meta.get());
    auto before = std::chrono::steady_clock::now();
    std::lock_guard lock(memory_->busy);
    std::chrono::duration<double, std::milli> waited = std::chrono::steady_clock::now() - before;
    blocked_ms = waited.count();
    auto method = program_->load_method(kMethod, &*manager_, nullptr, nullptr, &options);
    if (!method.ok()) fail(info_.id, "cannot be loaded", method.error());
    method_.emplace(std::move(method.get()));
    bind_inputs();
    file_.drop_pages();
  }

  void run(std::span<const void* const> inputs, std::span<void* const> outputs) override {
    std::lock_guard lock(memory_->busy);
    for (size_t i = 0; i < inputs.size(); ++i) {
      inputs_[i].impl->set_data(const_cast<void*>(inputs[i]));
      check(info_.id, "input refused", method_->set_input(Tensor(&*inputs_[i].impl), i));
    }
    for (size_t i = 0; i < outputs.size(); ++i)
      if (!output_planned_[i])
        check(info_.id, "output refused",
              method_->set_output_data_ptr(outputs[i], info_.outputs[i].bytes, i));
    check(info_.id, "failed", method_->execute());
    for (size_t i = 0; i < outputs.size(); ++i) {
      const void* data = method_->get_output(i).toTensor().const_data_ptr();
      if (data != outputs[i]) std::memcpy(outputs[i], data, info_.outputs[i].bytes);
    }
  }

 private:
  struct Bound {
    std::vector<TensorImpl::SizesType> sizes;
    std::vector<TensorImpl::DimOrderType> order;
    std::vector<TensorImpl::StridesType> strides;
    std::optional<TensorImpl> impl;
  };

  [[noreturn]] void mismatch(const char* kind, const Port& port, const std::string& what) const {
    throw Error("bundle", "artifact '" + info_.id + "': " + kind + " '" + port.name +
                              "' is not what the manifest says: " + what);
  }

  void check_port(const char* kind, const Port& port, const et::Result<et::TensorInfo>& meta) const {
    if (!meta.ok()) mismatch(kind, port, "it is no tensor");
    auto sizes = meta->sizes();
    auto order = meta->dim_order();
    if (!std::equal(sizes.begin(), sizes.end(), port.shape.begin(), port.shape.end()))
      mismatch(kind, port, "it has another shape");
    if (meta->scalar_type() != scalar_type(port.dtype)) mismatch(kind, port, "it has another dtype");
    for (size_t i = 0; i < order.size(); ++i)
      if (order[i] != i) mismatch(kind, port, "it is not row-major");
  }

  void check_ports(const et::MethodMeta& meta) {
    if (meta.num_inputs() != info_.inputs.size() || meta.num_outputs() != info_.outputs.size())
      throw Error("bundle", "artifact '" + info_.id + "': takes " +
                                std::to_string(meta.num_inputs()) + " and gives " +
                                std::to_string(meta.num_outputs()) +
                                " tensors, the manifest says otherwise");
    for (size_t i = 0; i < info_.inputs.size(); ++i)
      check_port("input", info_.inputs[i], meta.input_tensor_meta(i));
    for (size_t i = 0; i < info_.outputs.size(); ++i) {
      auto output = meta.output_tensor_meta(i);
      check_port("output", info_.outputs[i], output);
      output_planned_.push_back(output->is_memory_planned());
    }
  }

  void plan_memory(const et::MethodMeta& meta) {
    for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
      auto bytes = meta.memory_planned_buffer_size(i);
      if (!bytes.ok()) fail(info_.id, "has a broken memory plan", bytes.error());
      auto size = static_cast<size_t>(*bytes);
      uint8_t* data = memory_->block(i, size);
      if (!data) throw Error("memory", "artifact '" + info_.id + "': wants too much planned memory");
      spans_.emplace_back(data, size);
    }
    planned_.emplace(et::Span<et::Span<uint8_t>>(spans_.data(), spans_.size()));
    manager_.emplace(&method_memory_, &*planned_, &scratch_);
  }

  void bind_inputs() {
    inputs_.resize(info_.inputs.size());
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const Port& port = info_.inputs[i];
      Bound& b = inputs_[i];
      const size_t rank = port.shape.size();
      b.sizes.assign(port.shape.begin(), port.shape.end());
      b.strides.resize(rank);
      TensorImpl::StridesType stride = 1;
      for (size_t d = rank; d-- > 0; stride *= b.sizes[d]) b.strides[d] = stride;
      for (size_t d = 0; d < rank; ++d) b.order.push_back(static_cast<uint8_t>(d));
      b.impl.emplace(scalar_type(port.dtype), static_cast<ssize_t>(rank), b.sizes.data(), nullptr,
                     b.order.data(), b.strides.data());
    }
  }

  // Destroyed from the last to the first: the method before what it lies on.
  ArtifactInfo info_;
  std::shared_ptr<SharedMemory> memory_;
  MappedFile file_;
  std::optional<et::Program> program_;
  MallocMemoryAllocator method_memory_, scratch_;
  std::vector<et::Span<uint8_t>> spans_;
  std::optional<et::HierarchicalAllocator> planned_;
  std::optional<et::MemoryManager> manager_;
  std::vector<Bound> inputs_;
  std::vector<bool> output_planned_;
  std::optional<et::Method> method_;
};

std::string library_hash() {
  Dl_info info{};
  const void* symbol = ::dlsym(RTLD_DEFAULT, "xnn_create_workspace");
  const et::BackendInterface* backend = et::get_backend_class(kBackend);
  // The address of the backend's object lies in the library that defines it.
  if (!symbol) symbol = backend;
  if (!symbol || !::dladdr(symbol, &info) || !info.dli_fname) return "unknown";
  return sha256_of_file(info.dli_fname, "engine");
}

class ExecuTorchEngine final : public Engine {
 public:
  explicit ExecuTorchEngine(const EngineOptions& options) : options_(options) {
    static std::once_flag once;
    std::call_once(once, [] {
      et::register_pal(et::PalImpl::create(keep_log, __FILE__));
      et::runtime_init();
    });
    if (!et::get_backend_class(kBackend))
      throw Error("engine-missing", "this build of ExecuTorch has no XNNPACK backend");
    if (!options.cache_dir.empty())
      cache_.emplace(options.cache_dir,
                     std::string("executorch ") + HANDHELD_EXECUTORCH_VERSION + " " + library_hash(),
                     options.verify_cache);
    if (cache_ && !cache_->usable()) cache_.reset();
    set_threads(options.threads);
  }

  ~ExecuTorchEngine() override {
    std::lock_guard lock(users_mutex_);
    --users_;
  }

  bool must_pack(const ArtifactInfo& info) override { return cache_ && !cache_->has(info.sha256); }

  std::unique_ptr<Model> load(const ArtifactInfo& info) override {
    last_log.clear();
    if (!cache_) return open(info, nullptr);
    const auto turn = cache_->wait(info.sha256);
    if (auto hit = cache_->find(info.sha256)) {
      auto model = use(info, std::move(*hit));
      // ExecuTorch locks the file of a loaded model. One that another process has just let go, after
      // it was found locked, is packed again in place; then it no longer is what was found.
      if (model->packed.intact()) {
        // Still locked, so it is not used, and what becomes of it does not matter.
        if (!model->packed.mapped()) model->packed = PackedFile();
        return model;
      }
    }
    const std::string temporary = cache_->begin(info.sha256, info.id, info.bytes);
    try {
      auto model = open(info, temporary.c_str());
      et::BackendOptions<1> save;
      save.set_option("save_weight_cache_on_disk", true);
      check(info.id, "packed weights cannot be kept", et::set_option(kBackend, save.view()));
      if (auto built = cache_->publish(info.sha256, temporary)) {
        model->packed = std::move(*built);
        model->cache = CacheState::built;
      } else if (!last_log.empty()) {
        throw Error("io", "artifact '" + info.id + "': its packed weights cannot be written: " +
                              last_log + " (is the disk full? free some, or run without a cache)");
      }
      return model;
    } catch (...) {
      cache_->abandon(temporary);
      throw;
    }
  }

 private:
  // The pool belongs to the process, and models keep pointers into it.
  static void set_threads(int threads) {
    std::lock_guard lock(users_mutex_);
    auto* pool = executorch::extension::threadpool::get_threadpool();
    if (pool && pool->get_thread_count() != static_cast<size_t>(threads)) {
      if (users_ > 0)
        throw Error("job", "another session in this process runs ExecuTorch with " +
                               std::to_string(pool->get_thread_count()) + " threads");
      pool->_unsafe_reset_threadpool(static_cast<uint32_t>(threads));
    }
    ++users_;
  }

  std::unique_ptr<Model> use(const ArtifactInfo& info, PackedFile packed) {
    auto model = open(info, packed.path().c_str());
    model->packed = std::move(packed);
    model->cache = CacheState::hit;
    return model;
  }

  std::unique_ptr<Model> open(const ArtifactInfo& info, const char* cache_file) {
    constexpr int kOneWorkspaceForAll = 2;
    et::BackendOptions<3> options;
    options.set_option("workspace_sharing_mode", kOneWorkspaceForAll);
    if (cache_file) {
      options.set_option("weight_cache_enabled", true);
      options.set_option("packed_cache_path", cache_file);
    }
    et::LoadBackendOptionsMap map;
    check(info.id, "options refused", map.set_options(kBackend, options.view()));
    return std::make_unique<ExecuTorchModel>(info, memory_, map);
  }

  inline static std::mutex users_mutex_;
  inline static int users_ = 0;

  EngineOptions options_;
  std::optional<PackCache> cache_;
  std::shared_ptr<SharedMemory> memory_ = std::make_shared<SharedMemory>();
};

}  // namespace

std::unique_ptr<Engine> make_executorch(const EngineOptions& options) {
  return std::make_unique<ExecuTorchEngine>(options);
}

}  // namespace hh

extern "C" __attribute__((visibility("default"))) hh::Engine* hh_make_executorch(
    const hh::EngineOptions& options) {
  return hh::make_executorch(options).release();
}
