// LiteRT on the CPU (XNNPACK inside), with packed weights in memory-mapped files.
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <optional>
#include <utility>

#include "engine.hpp"
#include "file.hpp"
#include "litert_api.hpp"
#include "litert_workspace.hpp"

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

namespace fs = std::filesystem;

constexpr char kSuffix[] = ".litert";

void check(Status status, const ArtifactInfo& info, const char* what) {
  if (status != 0) {
    throw Error("engine", "artifact '" + info.id + "': LiteRT cannot " + what + " (status " +
                              std::to_string(status) + ")");
  }
}

uint64_t fnv(const void* data, size_t size, uint64_t hash = 0xcbf29ce484222325) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < size; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3;
  return hash;
}

std::string hex(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

// Size and a hash of the beginning, the end and samples between. XNNPACK checks a cache's
// header, but neither that the file is whole nor whose weights it holds.
std::string fingerprint(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return {};
  struct stat st{};
  std::string result;
  if (fstat(fd, &st) == 0 && st.st_size > 0) {
    constexpr off_t kEnds = 4096, kSamples = 256;
    std::array<char, kEnds> block;
    uint64_t hash = fnv(&st.st_size, sizeof st.st_size);
    const auto add = [&](off_t at, off_t size) {
      const ssize_t got = pread(fd, block.data(), static_cast<size_t>(size), at);
      hash = fnv(block.data(), got > 0 ? static_cast<size_t>(got) : 0, hash);
    };
    add(0, kEnds);
    add(std::max<off_t>(0, st.st_size - kEnds), kEnds);
    for (off_t i = 1; i < kSamples; ++i) add(st.st_size / kSamples * i, 64);
    result = hex(hash);
  }
  ::close(fd);
  return result;
}

// The processor's abilities decide how weights are packed.
uint64_t processor() {
  std::ifstream file("/proc/cpuinfo");
  uint64_t hash = fnv("", 0);
  for (std::string line; std::getline(file, line);) {
    for (const char* kept : {"flags", "Features", "CPU part", "model\t"}) {
      if (line.rfind(kept, 0) == 0) hash = fnv(line.data(), line.size(), hash);
    }
  }
  return hash;
}

// Finds the cache whose name begins with `prefix` and ends with its own fingerprint; others
// of that prefix are damaged and go.
std::optional<std::string> find_cache(const std::string& folder, const std::string& prefix) {
  std::optional<std::string> found;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind(prefix, 0) != 0 || name.find(".tmp.") != std::string::npos) continue;
    if (name == prefix + fingerprint(entry.path().string()) + kSuffix) {
      found = entry.path().string();
    } else {
      fs::remove(entry.path(), ignored);
    }
  }
  return found;
}

// Gives a finished cache its name, whole or not at all.
std::optional<std::string> publish(const std::string& temporary, const std::string& prefix) {
  const int fd = ::open(temporary.c_str(), O_RDONLY | O_CLOEXEC);
  bool ok = fd >= 0 && fsync(fd) == 0;
  if (fd >= 0) ::close(fd);
  const std::string print = ok ? fingerprint(temporary) : std::string();
  const std::string path = prefix + print + kSuffix;
  if (!print.empty() && std::rename(temporary.c_str(), path.c_str()) == 0) return path;
  ::unlink(temporary.c_str());
  return std::nullopt;
}

// Packing onto a full disk must not be tried.
bool has_room(const std::string& folder, const std::string& artifact) {
  std::error_code error;
  const uint64_t bytes = fs::file_size(artifact, error);
  if (error) return false;
  const fs::space_info disk = fs::space(folder, error);
  return !error && disk.available >= 2 * bytes + (uint64_t{32} << 20);
}

// Removes half-built caches of processes that are gone.
void sweep(const std::string& folder) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    const size_t at = name.find(".tmp.");
    if (at == std::string::npos) continue;
    const long pid = std::strtol(name.c_str() + at + 5, nullptr, 10);
    if (pid <= 0 || (kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH)) {
      fs::remove(entry.path(), ignored);
    }
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
        file_(info_.path, "bundle"),
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
  explicit LiteRtEngine(const EngineOptions& options) : options_(options) {
    std::string& folder = options_.cache_dir;
    if (folder.empty()) return;
    std::error_code error;
    fs::create_directories(folder, error);
    // The path travels as text between quotes.
    const bool plain = folder.find_first_of("\"\n\\") == std::string::npos;
    if (error || !plain || access(folder.c_str(), W_OK | X_OK) != 0) {
      folder.clear();
    } else {
      sweep(folder);
    }
  }
  ~LiteRtEngine() override {
    if (environment_) api().LiteRtDestroyEnvironment(environment_);
  }

  bool must_pack(const ArtifactInfo& info) override {
    if (options_.cache_dir.empty()) return false;
    const std::string prefix = info.sha256.substr(0, 40) + "." + hex(identity()) + ".";
    return !find_cache(options_.cache_dir, prefix);
  }

  bool takes(const std::string& option, const std::string& value) const override {
    return option == "accelerator" && value == "cpu";
  }

  std::unique_ptr<hh::Model> load(const ArtifactInfo& info) override {
    Environment environment = this->environment();
    const std::string threads = "num_threads = " + std::to_string(options_.threads) + "\n";
    if (options_.cache_dir.empty()) {
      return std::make_unique<LiteRtModel>(info, environment, threads, shared());
    }
    const std::string prefix = info.sha256.substr(0, 40) + "." + hex(identity()) + ".";
    const auto make = [&](const std::string& cache, std::shared_ptr<Shared> shared) {
      return std::make_unique<LiteRtModel>(
          info, environment, threads + "weight_cache_file_path = \"" + cache + "\"\n",
          std::move(shared));
    };
    if (const auto hit = find_cache(options_.cache_dir, prefix)) {
      auto model = make(*hit, shared());
      model->cache = CacheState::hit;
      return model;
    }
    if (!has_room(options_.cache_dir, info.path)) {
      return std::make_unique<LiteRtModel>(info, environment, threads, shared());
    }
    const std::string temporary = options_.cache_dir + "/" + prefix + "tmp." +
                                  std::to_string(getpid()) + "." + std::to_string(++counter_);
    std::unique_ptr<LiteRtModel> model;
    try {
      model = make(temporary, nullptr);
    } catch (...) {
      ::unlink(temporary.c_str());
      throw;
    }
    if (const auto built = publish(temporary, options_.cache_dir + "/" + prefix)) {
      // The model that packed holds more than it needs.
      model.reset();
      model = make(*built, shared());
      model->cache = CacheState::built;
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

  // What besides the artifact decides how packed weights look.
  uint64_t identity() {
    const std::scoped_lock lock(mutex_);
    if (!identity_) {
      const std::string text = HANDHELD_LITERT_VERSION + api().build;
      identity_ = fnv(text.data(), text.size(), processor());
    }
    return *identity_;
  }

  EngineOptions options_;
  std::mutex mutex_;
  std::optional<uint64_t> identity_;
  std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
  Environment environment_ = nullptr;
  std::atomic<int> counter_{0};
};

}  // namespace
}  // namespace litert

std::unique_ptr<Engine> make_litert(const EngineOptions& options) {
  return std::make_unique<litert::LiteRtEngine>(options);
}

}  // namespace hh
