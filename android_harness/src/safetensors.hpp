// Reading and writing safetensors files.
#pragma once

#include <map>
#include <span>
#include <string>

#include "dtype.hpp"
#include "file.hpp"

namespace hh {

class SafeTensors {
 public:
  struct Tensor {
    TensorSpec spec;
    std::span<const std::byte> data;
  };

  // Every offset is checked against the file. Throws Error(code).
  SafeTensors(const std::string& path, const char* code);
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  const Tensor& at(const std::string& name) const;

 private:
  std::string path_;
  const char* code_;
  Mapping mapping_;
  std::map<std::string, Tensor> tensors_;
};

// Writes tensors one after the other in the order in which they are declared.
class SafeTensorsWriter {
 public:
  SafeTensorsWriter(const std::string& path,
                    const std::vector<std::pair<std::string, TensorSpec>>& tensors);
  void write(const void* data, size_t bytes) { file_.write(data, bytes); }
  void commit() { file_.commit(); }

 private:
  AtomicFile file_;
};

}  // namespace hh
