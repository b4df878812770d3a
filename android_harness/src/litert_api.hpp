// The part of LiteRT's C interface (2.x) that the harness uses, resolved when first needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace hh::litert {

using Status = int;  // 0: ok
using Environment = struct EnvironmentT*;
using Model = struct ModelT*;
using Options = struct OptionsT*;
using OpaqueOptions = struct OpaqueOptionsT*;
using CompiledModel = struct CompiledModelT*;
using TensorBuffer = struct TensorBufferT*;
using Signature = struct SignatureT*;
using Tensor = struct TensorT*;
using Index = size_t;

inline constexpr int kAcceleratorCpu = 1;

struct Any {
  int type;
  union {
    bool boolean;
    int64_t integer;
    double real;
    const char* string;
    const void* pointer;
  };
};
inline constexpr int kAnyInteger = 2;

struct EnvironmentOption {
  int tag;
  Any value;
};
inline constexpr int kAutoRegisterAccelerators = 24;
inline constexpr int kMinLogSeverity = 25;
inline constexpr int kLogError = 3;
static_assert(sizeof(EnvironmentOption) == 24);

inline constexpr int kMaxRank = 8;

enum ElementType : int { kFloat32 = 1, kInt32 = 2, kUInt8 = 3, kInt8 = 9, kFloat16 = 10 };

struct Layout {
  unsigned int rank : 7;
  unsigned int has_strides : 1;
  int32_t dimensions[kMaxRank];
  uint32_t strides[kMaxRank];
};

struct RankedTensorType {
  ElementType element;
  Layout layout;
};
static_assert(sizeof(RankedTensorType) == 72);

struct Api {
  Status (*LiteRtCreateEnvironment)(int, const EnvironmentOption*, Environment*);
  void (*LiteRtDestroyEnvironment)(Environment);
  Status (*LiteRtCreateModelFromBuffer)(Environment, const void*, size_t, Model*);
  // Unused; libraries without it are of the time when the function above took no environment.
  Status (*LiteRtCreateModelFromFd)(Environment, int, size_t, size_t, Model*);
  void (*LiteRtDestroyModel)(Model);
  Status (*LiteRtGetNumModelSignatures)(Model, Index*);
  Status (*LiteRtGetModelSignature)(Model, Index, Signature*);
  Status (*LiteRtGetNumSignatureInputs)(Signature, Index*);
  Status (*LiteRtGetNumSignatureOutputs)(Signature, Index*);
  Status (*LiteRtGetSignatureInputName)(Signature, Index, const char**);
  Status (*LiteRtGetSignatureOutputName)(Signature, Index, const char**);
  Status (*LiteRtGetSignatureInputTensorByIndex)(Signature, Index, Tensor*);
  Status (*LiteRtGetSignatureOutputTensorByIndex)(Signature, Index, Tensor*);
  Status (*LiteRtGetRankedTensorType)(Tensor, RankedTensorType*);
  Status (*LiteRtCreateOptions)(Options*);
  void (*LiteRtDestroyOptions)(Options);
  Status (*LiteRtSetOptionsHardwareAccelerators)(Options, int);
  Status (*LiteRtCreateOpaqueOptions)(const char*, void*, void (*)(void*), OpaqueOptions*);
  Status (*LiteRtAddOpaqueOptions)(Options, OpaqueOptions);
  Status (*LiteRtCreateCompiledModel)(Environment, Model, Options, CompiledModel*);
  void (*LiteRtDestroyCompiledModel)(CompiledModel);
  Status (*LiteRtRunCompiledModel)(CompiledModel, Index, size_t, TensorBuffer*, size_t,
                                   TensorBuffer*);
  Status (*LiteRtCreateTensorBufferFromHostMemory)(const RankedTensorType*, void*, size_t,
                                                   void (*)(void*), TensorBuffer*);
  void (*LiteRtDestroyTensorBuffer)(TensorBuffer);

  // Identifies the library's build: a file of packed weights is only good for the one that
  // wrote it.
  std::string build;
};

// Loads the library on first call. Throws Error "engine-missing".
const Api& api();

}  // namespace hh::litert
