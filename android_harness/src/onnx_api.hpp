// The part of onnxruntime's C interface that the harness uses. Its functions lie in one table that
// only grows, so those of version 5 are at the same places in every later library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hh::onnx {

using Status = struct StatusT;  // null: ok
using Env = struct EnvT;
using Session = struct SessionT;
using SessionOptions = struct SessionOptionsT;
using ThreadingOptions = struct ThreadingOptionsT;
using MemoryInfo = struct MemoryInfoT;
using Value = struct ValueT;
using TypeInfo = struct TypeInfoT;
using TensorInfo = struct TensorInfoT;
using Allocator = struct AllocatorT;
using RunOptions = struct RunOptionsT;

inline constexpr uint32_t kVersion = 5;
inline constexpr int kLogError = 3;
inline constexpr int kDeviceAllocator = 0, kMemTypeDefault = 0;

enum ElementType : int { kFloat32 = 1, kUInt8 = 2, kInt8 = 3, kInt32 = 6, kFloat16 = 10 };

// A function's place in the table, and its type.
template <size_t Place, class F>
struct Function {
  static constexpr size_t place = Place;
  using type = F*;
};

using GetErrorMessage = Function<2, const char*(const Status*)>;
using CreateSession = Function<7, Status*(const Env*, const char*, const SessionOptions*, Session**)>;
using Run = Function<9, Status*(Session*, const RunOptions*, const char* const*, const Value* const*,
                                size_t, const char* const*, size_t, Value**)>;
using CreateSessionOptions = Function<10, Status*(SessionOptions**)>;
using DisableCpuMemArena = Function<19, Status*(SessionOptions*)>;
using SessionGetInputCount = Function<30, Status*(const Session*, size_t*)>;
using SessionGetOutputCount = Function<31, Status*(const Session*, size_t*)>;
using SessionGetInputTypeInfo = Function<33, Status*(const Session*, size_t, TypeInfo**)>;
using SessionGetOutputTypeInfo = Function<34, Status*(const Session*, size_t, TypeInfo**)>;
using SessionGetInputName = Function<36, Status*(const Session*, size_t, Allocator*, char**)>;
using SessionGetOutputName = Function<37, Status*(const Session*, size_t, Allocator*, char**)>;
using CreateTensorWithDataAsOrtValue =
    Function<49, Status*(const MemoryInfo*, void*, size_t, const int64_t*, size_t, ElementType,
                         Value**)>;
using CastTypeInfoToTensorInfo = Function<55, Status*(const TypeInfo*, const TensorInfo**)>;
using GetTensorElementType = Function<60, Status*(const TensorInfo*, ElementType*)>;
using GetDimensionsCount = Function<61, Status*(const TensorInfo*, size_t*)>;
using GetDimensions = Function<62, Status*(const TensorInfo*, int64_t*, size_t)>;
using CreateCpuMemoryInfo = Function<69, Status*(int, int, MemoryInfo**)>;
using AllocatorFree = Function<76, Status*(Allocator*, void*)>;
using GetAllocatorWithDefaultOptions = Function<78, Status*(Allocator**)>;
using ReleaseEnv = Function<92, void(Env*)>;
using ReleaseStatus = Function<93, void(Status*)>;
using ReleaseMemoryInfo = Function<94, void(MemoryInfo*)>;
using ReleaseSession = Function<95, void(Session*)>;
using ReleaseValue = Function<96, void(Value*)>;
using ReleaseTypeInfo = Function<98, void(TypeInfo*)>;
using ReleaseSessionOptions = Function<100, void(SessionOptions*)>;
using CreateEnvWithGlobalThreadPools =
    Function<119, Status*(int, const char*, const ThreadingOptions*, Env**)>;
using DisablePerSessionThreads = Function<120, Status*(SessionOptions*)>;
using CreateThreadingOptions = Function<121, Status*(ThreadingOptions**)>;
using ReleaseThreadingOptions = Function<122, void(ThreadingOptions*)>;
using SetGlobalIntraOpNumThreads = Function<147, Status*(ThreadingOptions*, int)>;
using SetGlobalInterOpNumThreads = Function<148, Status*(ThreadingOptions*, int)>;

struct Base {
  void* const* (*table)(uint32_t version);
  const char* (*version)();
};

}  // namespace hh::onnx
