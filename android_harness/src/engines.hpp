// The engines built in, opened when a bundle first needs them.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "engine.hpp"

namespace hh {

// Name to version; nothing is loaded.
std::map<std::string, std::string> built_in_engines();
std::string engines_json();

class Engines {
 public:
  explicit Engines(EngineOptions options) : options_(std::move(options)) {}
  // Throws Error("engine-missing") if the engine is not built in or cannot be opened.
  Engine& get(const std::string& name);

 private:
  EngineOptions options_;
  std::map<std::string, std::unique_ptr<Engine>> engines_;
};

}  // namespace hh
