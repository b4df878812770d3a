// LiteRT on the CPU (XNNPACK inside), with packed weights in memory-mapped files.
#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <utility>

#include "engine.hpp"
#include "file.hpp"
#include "litert_api.hpp"
#include "litert_workspace.hpp"
#include "pack_cache.hpp"

#ifndef HANDHELD_LITERT_LIBRARY
#define HANDHELD_LITERT_LIBRARY ""
#endif

namespace hh {
namespace litert {
namespace {

template <class F>
void resolve(void* library, const char* name, F& function) {
  void* symbol = dlsym(library, name);
  if (!symbol) throw Error("engine-missing", std::string("LiteRT's library lacks ") + name);
  std::memcpy(&function, &symbol, sizeof symbol);
}

// Size and modification time stand in for a build id, which the library does not carry.
std::string build_of(void* symbol) {
  Dl_info info{};
  struct stat st{};
  if (!dladdr(symbol, &info) || stat(info.dli_fname, &st) != 0) return "unknown";
  char text[64];
  std::snprintf(text, sizeof text, "%llx-%llx", static_cast<unsigned long long>(st.st_size),
                static_cast<unsigned long long>(st.st_mtime));
  return text;
}

Api open() {
  const char* path = std::getenv("HANDHELD_LITERT_LIBRARY");
  if (!path || !*path) path = *HANDHELD_LITERT_LIBRARY ? HANDHELD_LITERT_LIBRARY : "libLiteRt.so";
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* reason = dlerror();
    throw Error("engine-missing", std::string("LiteRT cannot be loaded: ") +
                                      (reason ? reason : path) +
                                      " (pip install ai-edge-litert, then: handheld harness build)");
  }
  Api api{};
#define HH_RESOLVE(name) resolve(library, #name, api.name)
  HH_RESOLVE(LiteRtCreateEnvironment);
  HH_RESOLVE(LiteRtDestroyEnvironment);
  HH_RESOLVE(LiteRtCreateModelFromBuffer);
  HH_RESOLVE(LiteRtCreateModelFromFd);
  HH_RESOLVE(LiteRtDestroyModel);
  HH_RESOLVE(LiteRtGetNumModelSignatures);
  HH_RESOLVE(LiteRtGetModelSignature);
  HH_RESOLVE(LiteRtGetNumSignatureInputs);
  HH_RESOLVE(LiteRtGetNumSignatureOutputs);
  HH_RESOLVE(LiteRtGetSignatureInputName);
  HH_RESOLVE(LiteRtGetSignatureOutputName);
  HH_RESOLVE(LiteRtGetSignatureInputTensorByIndex);
  HH_RESOLVE(LiteRtGetSignatureOutputTensorByIndex);
  HH_RESOLVE(LiteRtGetRankedTensorType);
  HH_RESOLVE(LiteRtCreateOptions);
  HH_RESOLVE(LiteRtDestroyOptions);
  HH_RESOLVE(LiteRtSetOptionsHardwareAccelerators);
  HH_RESOLVE(LiteRtCreateOpaqueOptions);
  HH_RESOLVE(LiteRtAddOpaqueOptions);
  HH_RESOLVE(LiteRtCreateCompiledModel);
  HH_RESOLVE(LiteRtDestroyCompiledModel);
  HH_RESOLVE(LiteRtRunCompiledModel);
  HH_RESOLVE(LiteRtCreateTensorBufferFromHostMemory);
  HH_RESOLVE(LiteRtDestroyTensorBuffer);
#undef HH_RESOLVE
  api.build = build_of(reinterpret_cast<void*>(api.LiteRtCreateEnvironment));
  return api;
}

}  // namespace

const Api& api() {
  static const Api loaded = open();
  return loaded;
}

namespace {

// What XNNPACK's delegate has by default: kernels for int8 and uint8, and fully connected layers
// whose weights are inputs. And tables of addresses, which convolutions read through, in the
// workspace, which models share, instead of beside each convolution.
constexpr int kXnnpackFlags = 0x01 | 0x02 | 0x08 | 0x20;

void check(Status status, const ArtifactInfo& info, const char* what) {
  if (status != 0) {
    throw Error("engine", "artifact '" + info.id + "': LiteRT cannot " + what + " (status " +
                              std::to_string(status) + ")");
  }
}

std::optional<ElementType> element_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return kFloat32;
    case DType::f16: return kFloat16;
    case DType::u8: return kUInt8;
    case DType::i8: return kInt8;
    case DType::i32: return kInt32;
  }
  return std::nullopt;
}

bool matches(const RankedTensorType& type, const Port& port) {
  if (type.element != element_of(port.dtype) || type.layout.rank != port.shape.size()) return false;
  for (size_t i = 0; i < port.shape.size(); ++i) {
    if (type.layout.dimensions[i] != port.shape[i]) return false;
  }
  return true;
}

// One place of the signature, with the buffer object for the address it had last. The memory
// itself is the caller's.
class Slot {
 public:
  Slot(size_t port, const RankedTensorType& type, size_t bytes)
      : port_(port), type_(type), bytes_(bytes) {}
  Slot(Slot&& other) noexcept
      : port_(other.port_),
        type_(other.type_),
        bytes_(other.bytes_),
        address_(other.address_),
        buffer_(std::exchange(other.buffer_, nullptr)) {}
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
  ~Slot() { drop(); }
  size_t port() const { return port_; }
  TensorBuffer at(void* address, const ArtifactInfo& info) {
    if (!buffer_ || address_ != address) {
      drop();
      check(api().LiteRtCreateTensorBufferFromHostMemory(&type_, address, bytes_, nullptr,
                                                         &buffer_),
            info, "wrap a tensor");
      address_ = address;
    }
    return buffer_;
  }

 private:
  void drop() {
    if (buffer_) api().LiteRtDestroyTensorBuffer(buffer_);
    buffer_ = nullptr;
  }

  size_t port_;
  RankedTensorType type_;
  size_t bytes_;
  void* address_ = nullptr;
  TensorBuffer buffer_ = nullptr;
};

// The workspace pages of an engine, and the models that use them one at a time.
struct Shared {
  std::mutex mutex;
  Pool pool;
};

class LiteRtModel final : public hh::Model {
 public:
  // Without `shared` the model's workspace is its own.
  LiteRtModel(const ArtifactInfo& info, Environment environment, const std::string& options,
              std::shared_ptr<Shared> shared)
      : info_(info),
        file_(info_.path, info_.weights, "bundle"),
        shared_(std::move(shared)),
        workspace_(shared_ ? &shared_->pool : nullptr) {
    const Workspace::Scope scope(shared_ ? &workspace_ : nullptr);
    try {
      check(api().LiteRtCreateModelFromBuffer(environment, file_.bytes().data(),
                                              file_.bytes().size(), &model_),
            info_, "read it");
      bind();
      compile(environment, options);
      workspace_.settle();
      // Packed copies of the weights serve from now on.
      file_.drop_pages();
    } catch (...) {
      release();
      throw;
    }
  }
  ~LiteRtModel() override { release(); }

  void run(std::span<const void* const> inputs, std::span<void* const> outputs) override {
    if (inputs.size() != inputs_.size() || outputs.size() != outputs_.size()) {
      throw Error("input", "artifact '" + info_.id + "': wrong number of tensors");
    }
    std::unique_lock<std::mutex> turn;
    if (shared_) {
      turn = std::unique_lock(shared_->mutex);
      shared_->pool.attach(workspace_);
    }
    const Workspace::Scope scope(shared_ ? &workspace_ : nullptr);
    for (size_t i = 0; i < inputs_.size(); ++i) {
      in_[i] = inputs_[i].at(const_cast<void*>(inputs[inputs_[i].port()]), info_);
    }
    for (size_t i = 0; i < outputs_.size(); ++i) {
      out_[i] = outputs_[i].at(outputs[outputs_[i].port()], info_);
    }
    check(api().LiteRtRunCompiledModel(compiled_, 0, in_.size(), in_.data(), out_.size(),
                                       out_.data()),
          info_, "run it");
    // Norms and biases are read from the original; the system maps their surroundings, too.
    file_.drop_pages();
  }

 private:
  void bind() {
    Index signatures = 0;
    check(api().LiteRtGetNumModelSignatures(model_, &signatures), info_, "read its signature");
    Signature signature = nullptr;
    if (signatures == 1) {
      check(api().LiteRtGetModelSignature(model_, 0, &signature), info_, "read its signature");
    } else {
      throw Error("bundle", "artifact '" + info_.id + "' does not have one signature");
    }
    bind(signature, info_.inputs, inputs_, api().LiteRtGetNumSignatureInputs,
         api().LiteRtGetSignatureInputName, api().LiteRtGetSignatureInputTensorByIndex);
    bind(signature, info_.outputs, outputs_, api().LiteRtGetNumSignatureOutputs,
         api().LiteRtGetSignatureOutputName, api().LiteRtGetSignatureOutputTensorByIndex);
    in_.resize(inputs_.size());
    out_.resize(outputs_.size());
  }

  void bind(Signature signature, const std::vector<Port>& ports, std::vector<Slot>& slots,
            Status (*count)(Signature, Index*), Status (*name)(Signature, Index, const char**),
            Status (*tensor)(Signature, Index, Tensor*)) {
    Index n = 0;
    check(count(signature, &n), info_, "count its tensors");
    if (n != ports.size()) {
      throw Error("bundle", "artifact '" + info_.id + "' has " + std::to_string(n) +
                                " tensors where the manifest has " + std::to_string(ports.size()));
    }
    for (Index i = 0; i < n; ++i) {
      const char* found = nullptr;
      Tensor handle = nullptr;
      RankedTensorType type{};
      check(name(signature, i, &found), info_, "name its tensors");
      check(tensor(signature, i, &handle), info_, "find its tensors");
      check(api().LiteRtGetRankedTensorType(handle, &type), info_, "tell its shapes");
      size_t port = 0;
      while (port < ports.size() && ports[port].name != found) ++port;
      if (port == ports.size() || !matches(type, ports[port])) {
        throw Error("bundle", "artifact '" + info_.id + "': tensor '" + found +
                                  "' is not what the manifest says");
      }
      type.layout.has_strides = 0;
      slots.emplace_back(port, type, ports[port].bytes);
    }
  }

  void compile(Environment environment, const std::string& text) {
    Options options = nullptr;
    check(api().LiteRtCreateOptions(&options), info_, "make options");
    Status status = api().LiteRtSetOptionsHardwareAccelerators(options, kAcceleratorCpu);
    OpaqueOptions cpu = nullptr;
    char* payload = strdup(text.c_str());
    if (status == 0) {
      status = api().LiteRtCreateOpaqueOptions("xnnpack", payload, std::free, &cpu);
      if (status != 0) std::free(payload);
    }
    if (status == 0) status = api().LiteRtAddOpaqueOptions(options, cpu);
    if (status == 0) {
      status = api().LiteRtCreateCompiledModel(environment, model_, options, &compiled_);
    }
    api().LiteRtDestroyOptions(options);
    check(status, info_, "prepare it");
  }

  void release() {
    inputs_.clear();
    outputs_.clear();
    std::unique_lock<std::mutex> turn;
    if (shared_) {
      turn = std::unique_lock(shared_->mutex);
      shared_->pool.detach(workspace_);
    }
    if (compiled_) api().LiteRtDestroyCompiledModel(compiled_);
    if (model_) api().LiteRtDestroyModel(model_);
  }

  ArtifactInfo info_;
  Mapping file_;
  std::shared_ptr<Shared> shared_;
  Workspace workspace_;
  litert::Model model_ = nullptr;
  CompiledModel compiled_ = nullptr;
  std::vector<Slot> inputs_, outputs_;
  std::vector<TensorBuffer> in_, out_;
};

class LiteRtEngine final : public Engine {
 public:
  explicit LiteRtEngine(const EngineOptions& options) : options_(options) {}
  ~LiteRtEngine() override {
    if (environment_) api().LiteRtDestroyEnvironment(environment_);
  }

  bool must_pack(const ArtifactInfo& info) override {
    PackCache* cache = this->cache();
    return cache && !cache->has(info.sha256);
  }

  bool takes(const std::string& option, const std::string& value) const override {
    return option == "accelerator" && value == "cpu";
  }

  std::unique_ptr<hh::Model> load(const ArtifactInfo& info) override {
    Environment environment = this->environment();
    const std::string threads = "num_threads = " + std::to_string(options_.threads) +
                                "\nflags = " + std::to_string(kXnnpackFlags) + "\n";
    PackCache* cache = this->cache();
    if (!cache) return std::make_unique<LiteRtModel>(info, environment, threads, shared());
    const auto make = [&](const std::string& path, std::shared_ptr<Shared> shared) {
      return std::make_unique<LiteRtModel>(
          info, environment, threads + "weight_cache_file_path = \"" + path + "\"\n",
          std::move(shared));
    };
    const auto use = [&](PackedFile packed, CacheState state) {
      auto model = make(packed.path(), shared());
      model->packed = std::move(packed);
      model->cache = state;
      return model;
    };
    if (auto hit = cache->find(info.sha256)) return use(std::move(*hit), CacheState::hit);
    const auto turn = cache->wait(info.sha256);
    if (auto hit = cache->find(info.sha256)) return use(std::move(*hit), CacheState::hit);
    const std::string temporary = cache->begin(info.sha256, info.id, info.bytes);
    std::unique_ptr<LiteRtModel> model;
    try {
      model = make(temporary, nullptr);
    } catch (...) {
      cache->abandon(temporary);
      throw;
    }
    if (auto built = cache->publish(info.sha256, temporary)) {
      // The model that packed holds more than it needs.
      model.reset();
      return use(std::move(*built), CacheState::built);
    }
    return model;
  }

 private:
  Environment environment() {
    const std::scoped_lock lock(mutex_);
    if (!environment_) {
      EnvironmentOption options[2]{};
      options[0] = {kAutoRegisterAccelerators, {kAnyInteger, {.integer = kAcceleratorCpu}}};
      options[1] = {kMinLogSeverity, {kAnyInteger, {.integer = kLogError}}};
      if (api().LiteRtCreateEnvironment(2, options, &environment_) != 0) {
        throw Error("engine", "LiteRT cannot be initialized");
      }
    }
    return environment_;
  }

  std::shared_ptr<Shared> shared() {
    static const bool possible =
        Workspace::redirect(reinterpret_cast<void*>(api().LiteRtCreateEnvironment));
    return possible ? shared_ : nullptr;
  }

  PackCache* cache() {
    const std::scoped_lock lock(mutex_);
    if (options_.cache_dir.empty()) return nullptr;
    if (!cache_)
      cache_.emplace(options_.cache_dir,
                     std::string("litert ") + HANDHELD_LITERT_VERSION + " " + api().build,
                     options_.verify_cache);
    return cache_->usable() ? &*cache_ : nullptr;
  }

  EngineOptions options_;
  std::mutex mutex_;
  std::optional<PackCache> cache_;
  std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
  Environment environment_ = nullptr;
};

}  // namespace
}  // namespace litert

std::unique_ptr<Engine> make_litert(const EngineOptions& options) {
  return std::make_unique<litert::LiteRtEngine>(options);
}

}  // namespace hh
