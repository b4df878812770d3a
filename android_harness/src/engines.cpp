#include "engines.hpp"

#include <dlfcn.h>

#include "json.hpp"

namespace hh {
namespace {

#if defined(HANDHELD_EXECUTORCH)
// A module of its own, so that a process which needs no ExecuTorch does not map it.
std::unique_ptr<Engine> open_executorch(const EngineOptions& options) {
  Dl_info self{};
  std::string path = "libhandheld_executorch.so";
  if (::dladdr(reinterpret_cast<const void*>(&engines_json), &self) && self.dli_fname) {
    std::string library = self.dli_fname;
    if (size_t slash = library.rfind('/'); slash != std::string::npos)
      path = library.substr(0, slash + 1) + path;
  }
  void* module = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!module) {
    const char* reason = ::dlerror();
    throw Error("engine-missing", std::string("the executorch engine cannot be opened: ") +
                                      (reason ? reason : path) +
                                      " (run: handheld harness build --force)");
  }
  using Make = Engine* (*)(const EngineOptions&);
  auto make = reinterpret_cast<Make>(::dlsym(module, "hh_make_executorch"));
  if (!make) throw Error("engine-missing", path + ": is not the executorch engine");
  return std::unique_ptr<Engine>(make(options));
}
#endif

const char* remedy(const std::string& name) {
  if (name == "litert") return "pip install ai-edge-litert, then: handheld harness build";
  if (name == "executorch") return "pip install executorch, then: handheld harness build";
  if (name == "onnx") return "pip install onnxruntime, then: handheld harness build";
  if (name == "coreml") return "Core ML bundles run on Apple devices only: use the iOS harness";
  if (name == "qnn") return "QNN bundles need a harness built with Qualcomm's SDK";
  return "export the bundle for another target";
}

}  // namespace

std::map<std::string, std::string> built_in_engines() {
  std::map<std::string, std::string> out;
#if defined(HANDHELD_LITERT)
  out["litert"] = HANDHELD_LITERT_VERSION;
#endif
#if defined(HANDHELD_EXECUTORCH)
  out["executorch"] = HANDHELD_EXECUTORCH_VERSION;
#endif
#if defined(HANDHELD_ONNX)
  out["onnx"] = HANDHELD_ONNX_VERSION;
#endif
  return out;
}

std::string engines_json() {
  std::string out = "{";
  for (const auto& [name, version] : built_in_engines()) {
    if (out.size() > 1) out += ',';
    json::append_string(out, name);
    out += ':';
    json::append_string(out, version);
  }
  return out + "}";
}

Engine& Engines::get(const std::string& name) {
  std::unique_ptr<Engine>& engine = engines_[name];
  if (engine) return *engine;
#if defined(HANDHELD_LITERT)
  if (name == "litert") engine = make_litert(options_);
#endif
#if defined(HANDHELD_EXECUTORCH)
  if (name == "executorch") engine = open_executorch(options_);
#endif
#if defined(HANDHELD_ONNX)
  if (name == "onnx") engine = make_onnx(options_);
#endif
  if (!engine)
    throw Error("engine-missing",
                "this harness has no engine '" + name + "' (" + remedy(name) + ")");
  return *engine;
}

}  // namespace hh
