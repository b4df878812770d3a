#include "events.hpp"

#include <chrono>
#include <cstdio>

#include "json.hpp"

namespace hh {
namespace {

const auto kStart = std::chrono::steady_clock::now();

void append_number(std::string& out, double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4f", value);
  out += text;
}

}  // namespace

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - kStart).count();
}

Event::Event(const char* name) : text_("{") {
  add("event", name);
  milliseconds("t_ms", now_ms());
}

void Event::key(const char* name) {
  if (text_.size() > 1) text_ += ',';
  json::append_string(text_, name);
  text_ += ':';
}

Event& Event::add(const char* name, std::string_view value) {
  key(name);
  json::append_string(text_, value);
  return *this;
}

Event& Event::add(const char* name, uint64_t value) {
  key(name);
  text_ += std::to_string(value);
  return *this;
}

Event& Event::add(const char* name, std::optional<uint64_t> value) {
  return value ? add(name, *value) : raw(name, "null");
}

Event& Event::number(const char* name, double value) {
  key(name);
  append_number(text_, value);
  return *this;
}

Event& Event::list(const char* name, std::span<const double> milliseconds) {
  key(name);
  text_ += '[';
  for (size_t i = 0; i < milliseconds.size(); ++i) {
    if (i) text_ += ',';
    append_number(text_, milliseconds[i]);
  }
  text_ += ']';
  return *this;
}

Event& Event::list(const char* name, std::span<const int64_t> values) {
  key(name);
  text_ += '[';
  for (size_t i = 0; i < values.size(); ++i) text_ += (i ? "," : "") + std::to_string(values[i]);
  text_ += ']';
  return *this;
}

Event& Event::raw(const char* name, std::string_view json) {
  key(name);
  text_ += json;
  return *this;
}

const char* Event::text() {
  text_ += '}';
  return text_.c_str();
}

}  // namespace hh
