// What an engine is to the harness: it makes artifacts ready and runs them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pack_cache.hpp"

namespace hh {

enum class DType { f32, f16, u8, i8, i32 };

struct Port {
  std::string name;
  std::vector<int64_t> shape;
  DType dtype = DType::f32;
  size_t bytes = 0;
};

// Ports are in the order of the manifest, which is that of the engine's signature.
struct ArtifactInfo {
  std::string id;
  std::string path;
  std::string sha256;   // by which packed weights are known
  std::vector<Port> inputs, outputs;
  uint64_t bytes = 0;   // of its files
  std::string weights;  // the file that continues it, if there is one
};

struct EngineOptions {
  int threads = 2;
  std::string cache_dir;  // empty: no packed-weight cache on disk
  bool verify_cache = true;  // read packed weights whole before their first use
};

enum class CacheState { none, built, hit };

// An error with a code of protocol.Failure: job, bundle, hash, engine-missing, engine, input,
// memory, cancelled or io.
struct __attribute__((visibility("default"))) Error : std::runtime_error {
  Error(std::string code_, const std::string& message)
      : std::runtime_error(message), code(std::move(code_)) {}
  std::string code;
};

// An artifact that is ready to run. Destroying it gives its memory back.
class Model {
 public:
  virtual ~Model() = default;
  // Pointers are 64-byte aligned, dense row-major, in port order and valid for the call only;
  // they may differ from call to call. Inputs and outputs never overlap. Throws Error.
  virtual void run(std::span<const void* const> inputs, std::span<void* const> outputs) = 0;
  CacheState cache = CacheState::none;
  PackedFile packed;  // the file that it maps, if any
  double blocked_ms = 0;  // part of its loading in which it waited for another model's run
};

class Engine {
 public:
  virtual ~Engine() = default;
  // Whether it can do what an artifact's manifest asks for, such as accelerator=gpu.
  virtual bool takes(const std::string& /*option*/, const std::string& /*value*/) const {
    return false;
  }
  // May be called from a prefetch thread while another model runs. Throws Error.
  virtual std::unique_ptr<Model> load(const ArtifactInfo&) = 0;
  // Whether loading it now would pack its weights into a file first.
  virtual bool must_pack(const ArtifactInfo&) { return false; }
};

// Each engine file defines one of these. The CMake options HANDHELD_LITERT, HANDHELD_EXECUTORCH
// and HANDHELD_ONNX decide which are compiled in.
std::unique_ptr<Engine> make_litert(const EngineOptions&);
std::unique_ptr<Engine> make_executorch(const EngineOptions&);
std::unique_ptr<Engine> make_onnx(const EngineOptions&);

}  // namespace hh
