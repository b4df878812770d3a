// Events of the harness protocol: one JSON object each.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace hh {

double now_ms();  // since the process started (the library was loaded)

// Builds one event.
class Event {
 public:
  explicit Event(const char* name);
  Event& add(const char* name, std::string_view value);
  Event& add(const char* name, const char* value) { return add(name, std::string_view(value)); }
  Event& add(const char* name, uint64_t value);
  Event& add(const char* name, int value) { return add(name, static_cast<uint64_t>(value)); }
  Event& add(const char* name, std::optional<uint64_t> value);
  Event& number(const char* name, double value);  // four digits after the point
  Event& milliseconds(const char* name, double value) { return number(name, value); }
  Event& list(const char* name, std::span<const double> milliseconds);
  Event& list(const char* name, std::span<const int64_t> values);
  Event& raw(const char* name, std::string_view json);
  const char* text();

 private:
  void key(const char* name);
  std::string text_;
};

using EventSink = std::function<void(const char*)>;

}  // namespace hh
