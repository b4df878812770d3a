// onnxruntime on the CPU: the portable engine.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "engine.hpp"
#include "onnx_api.hpp"

#ifndef HANDHELD_ONNX_LIBRARY
#define HANDHELD_ONNX_LIBRARY ""
#endif

namespace hh {
namespace onnx {
namespace {

void* const* open_table() {
  const char* path = std::getenv("HANDHELD_ONNX_LIBRARY");
  if (!path || !*path) path = *HANDHELD_ONNX_LIBRARY ? HANDHELD_ONNX_LIBRARY : "libonnxruntime.so";
  const std::string remedy = " (pip install onnxruntime, then: handheld harness build)";
  void* library = ::dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* reason = ::dlerror();
    throw Error("engine-missing",
                std::string("onnxruntime cannot be loaded: ") + (reason ? reason : path) + remedy);
  }
  void* symbol = ::dlsym(library, "OrtGetApiBase");
  if (!symbol) throw Error("engine-missing", std::string(path) + ": is not onnxruntime" + remedy);
  const Base* (*base)() = nullptr;
  std::memcpy(&base, &symbol, sizeof symbol);
  void* const* table = base()->table(kVersion);
  if (!table) throw Error("engine-missing", std::string(path) + ": is too old" + remedy);
  return table;
}

template <class F, class... Args>
auto call(Args... args) {
  static void* const* const table = open_table();
  typename F::type function = nullptr;
  std::memcpy(&function, table + F::place, sizeof function);
  return function(args...);
}

template <class Release>
struct Deleter {
  template <class T>
  void operator()(T* object) const {
    call<Release>(object);
  }
};
template <class T, class Release>
using Held = std::unique_ptr<T, Deleter<Release>>;

void check(Status* status, const std::string& what) {
  if (!status) return;
  const Held<Status, ReleaseStatus> held(status);
  std::string message = call<GetErrorMessage>(static_cast<const Status*>(status));
  throw Error("engine", what + ": " + message.substr(0, 300));
}

ElementType element_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return kFloat32;
    case DType::f16: return kFloat16;
    case DType::u8: return kUInt8;
    case DType::i8: return kInt8;
    case DType::i32: return kInt32;
  }
  return kFloat32;
}

// What all sessions share: threads, and where tensors lie.
struct Shared {
  Held<Env, ReleaseEnv> env;
  Held<MemoryInfo, ReleaseMemoryInfo> memory;
  Allocator* allocator = nullptr;

  explicit Shared(int threads) {
    ThreadingOptions* options = nullptr;
    check(call<CreateThreadingOptions>(&options), "onnxruntime's threads");
    const Held<ThreadingOptions, ReleaseThreadingOptions> held(options);
    check(call<SetGlobalIntraOpNumThreads>(options, threads), "onnxruntime's threads");
    check(call<SetGlobalInterOpNumThreads>(options, 1), "onnxruntime's threads");
    Env* made = nullptr;
    check(call<CreateEnvWithGlobalThreadPools>(
              kLogError, "handheld", static_cast<const ThreadingOptions*>(options), &made),
          "onnxruntime cannot start");
    env.reset(made);
    MemoryInfo* info = nullptr;
    check(call<CreateCpuMemoryInfo>(kDeviceAllocator, kMemTypeDefault, &info), "memory");
    memory.reset(info);
    check(call<GetAllocatorWithDefaultOptions>(&allocator), "memory");
  }
};

class OnnxModel final : public Model {
 public:
  OnnxModel(const ArtifactInfo& info, std::shared_ptr<Shared> shared)
      : info_(info), shared_(std::move(shared)) {
    const std::string what = "artifact '" + info_.id + "': onnxruntime cannot load it";
    SessionOptions* options = nullptr;
    check(call<CreateSessionOptions>(&options), what);
    const Held<SessionOptions, ReleaseSessionOptions> held(options);
    check(call<DisablePerSessionThreads>(options), what);
    // Arenas keep what they once had, one for each session.
    check(call<DisableCpuMemArena>(options), what);
    Session* session = nullptr;
    check(call<CreateSession>(static_cast<const Env*>(shared_->env.get()), info_.path.c_str(),
                              static_cast<const SessionOptions*>(options), &session),
          what);
    session_.reset(session);
    compare<SessionGetInputCount, SessionGetInputName, SessionGetInputTypeInfo>(info_.inputs);
    compare<SessionGetOutputCount, SessionGetOutputName, SessionGetOutputTypeInfo>(info_.outputs);
  }

  void run(std::span<const void* const> inputs, std::span<void* const> outputs) override {
    if (inputs.size() != info_.inputs.size() || outputs.size() != info_.outputs.size())
      throw Error("input", "artifact '" + info_.id + "': wrong number of tensors");
    std::vector<Held<Value, ReleaseValue>> held;
    std::vector<const Value*> in;
    std::vector<Value*> out;
    std::vector<const char*> in_names, out_names;
    for (size_t i = 0; i < inputs.size(); ++i) {
      held.push_back(wrap(info_.inputs[i], const_cast<void*>(inputs[i])));
      in.push_back(held.back().get());
      in_names.push_back(info_.inputs[i].name.c_str());
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      held.push_back(wrap(info_.outputs[i], outputs[i]));
      out.push_back(held.back().get());
      out_names.push_back(info_.outputs[i].name.c_str());
    }
    check(call<Run>(session_.get(), static_cast<const RunOptions*>(nullptr), in_names.data(),
                    in.data(), in.size(), out_names.data(), out.size(), out.data()),
          "artifact '" + info_.id + "': onnxruntime cannot run it");
  }

 private:
  Held<Value, ReleaseValue> wrap(const Port& port, void* data) const {
    Value* value = nullptr;
    check(call<CreateTensorWithDataAsOrtValue>(
              static_cast<const MemoryInfo*>(shared_->memory.get()), data, port.bytes,
              port.shape.data(), port.shape.size(), element_of(port.dtype), &value),
          "artifact '" + info_.id + "': tensor '" + port.name + "'");
    return Held<Value, ReleaseValue>(value);
  }

  template <class Count, class Name, class Type>
  void compare(const std::vector<Port>& ports) const {
    const auto* session = static_cast<const Session*>(session_.get());
    const std::string where = "artifact '" + info_.id + "'";
    size_t count = 0;
    check(call<Count>(session, &count), where);
    if (count != ports.size())
      throw Error("bundle", where + " has " + std::to_string(count) +
                                " tensors where the manifest has " + std::to_string(ports.size()));
    for (size_t i = 0; i < count; ++i) {
      char* text = nullptr;
      check(call<Name>(session, i, shared_->allocator, &text), where);
      const std::string name = text;
      check(call<AllocatorFree>(shared_->allocator, static_cast<void*>(text)), where);
      TypeInfo* type = nullptr;
      check(call<Type>(session, i, &type), where);
      const Held<TypeInfo, ReleaseTypeInfo> held(type);
      size_t port = 0;
      while (port < ports.size() && ports[port].name != name) ++port;
      if (port == ports.size() || !fits(type, ports[port], where))
        throw Error("bundle", where + ": tensor '" + name + "' is not what the manifest says");
    }
  }

  static bool fits(const TypeInfo* type, const Port& port, const std::string& where) {
    const TensorInfo* tensor = nullptr;
    check(call<CastTypeInfoToTensorInfo>(type, &tensor), where);
    if (!tensor) return false;
    ElementType element{};
    size_t rank = 0;
    check(call<GetTensorElementType>(tensor, &element), where);
    check(call<GetDimensionsCount>(tensor, &rank), where);
    if (element != element_of(port.dtype) || rank != port.shape.size()) return false;
    std::vector<int64_t> shape(rank);
    check(call<GetDimensions>(tensor, shape.data(), rank), where);
    return shape == port.shape;
  }

  ArtifactInfo info_;
  std::shared_ptr<Shared> shared_;
  Held<Session, ReleaseSession> session_;
};

class OnnxEngine final : public Engine {
 public:
  explicit OnnxEngine(const EngineOptions& options) : threads_(options.threads) {}

  std::unique_ptr<Model> load(const ArtifactInfo& info) override {
    return std::make_unique<OnnxModel>(info, shared());
  }

 private:
  std::shared_ptr<Shared> shared() {
    const std::scoped_lock lock(mutex_);
    if (!shared_) shared_ = std::make_shared<Shared>(threads_);
    return shared_;
  }

  int threads_;
  std::mutex mutex_;
  std::shared_ptr<Shared> shared_;
};

}  // namespace
}  // namespace onnx

std::unique_ptr<Engine> make_onnx(const EngineOptions& options) {
  return std::make_unique<onnx::OnnxEngine>(options);
}

}  // namespace hh
