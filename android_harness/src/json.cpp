#include "json.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "engine.hpp"

namespace hh::json {
namespace {

constexpr size_t kMaxDepth = 32;
constexpr size_t kMaxValues = 1'000'000;
constexpr size_t kHashFrom = 16;

class Builder {
 public:
  using number_integer_t = int64_t;
  using number_unsigned_t = uint64_t;
  using number_float_t = double;
  using string_t = std::string;
  using binary_t = nlohmann::json::binary_t;

  Value root;
  std::string message;

  bool null() { return add({nullptr}); }
  bool boolean(bool v) { return add({v}); }
  bool number_integer(int64_t v) { return add({v}); }
  bool number_unsigned(uint64_t v) { return add({v}); }
  bool number_float(double v, const std::string&) { return add({v}); }
  bool string(std::string& v) { return add({std::move(v)}); }
  bool binary(binary_t&) { return stop("has binary data"); }
  bool start_object(size_t) { return open({std::vector<Member>{}}); }
  bool start_array(size_t) { return open({std::vector<Value>{}}); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }

  bool key(std::string& name) {
    Level& top = levels_.back();
    auto& members = std::get<std::vector<Member>>(top.value->data);
    bool twice = false;
    if (members.size() < kHashFrom) {
      twice = std::ranges::any_of(members, [&](const Member& m) { return m.name == name; });
    } else {
      if (top.names.empty())
        for (const Member& m : members) top.names.insert(m.name);
      twice = !top.names.insert(name).second;
    }
    if (twice) return stop("the field '" + name.substr(0, 64) + "' is given twice");
    members.push_back({std::move(name), {}});
    return true;
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception&) {
    return stop("broken JSON at byte " + std::to_string(position));
  }

 private:
  struct Level {
    Value* value;
    std::unordered_set<std::string> names;
  };

  bool stop(std::string text) {
    if (message.empty()) message = std::move(text);
    return false;
  }

  Value* place(Value&& value) {
    if (levels_.empty()) return &(root = std::move(value));
    if (auto* items = std::get_if<std::vector<Value>>(&levels_.back().value->data))
      return &items->emplace_back(std::move(value));
    auto& members = std::get<std::vector<Member>>(levels_.back().value->data);
    return &(members.back().value = std::move(value));
  }

  bool add(Value&& value) {
    if (++count_ > kMaxValues) return stop("holds too many values");
    place(std::move(value));
    return true;
  }

  bool open(Value&& value) {
    if (++count_ > kMaxValues) return stop("holds too many values");
    if (levels_.size() >= kMaxDepth) return stop("is nested too deeply");
    // Only the innermost level grows, so pointers to its parents stay good.
    levels_.push_back({place(std::move(value)), {}});
    return true;
  }

  bool close() {
    levels_.pop_back();
    return true;
  }

  std::vector<Level> levels_;
  size_t count_ = 0;
};

}  // namespace

Value parse(std::string_view text, const std::string& where, const char* code) {
  Builder builder;
  bool good = false;
  try {
    good = nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
  } catch (const nlohmann::json::exception&) {
    good = false;
  }
  if (!good)
    throw Error(code, where + ": " + (builder.message.empty() ? "broken JSON" : builder.message));
  return std::move(builder.root);
}

void Node::fail(const std::string& message) const {
  throw Error(code_, *where_ + ": " + (path_.empty() ? "" : path_ + ": ") + message);
}

const std::vector<Member>& Node::object() const {
  if (auto* v = std::get_if<std::vector<Member>>(&value_->data)) return *v;
  fail("is not an object");
}

const std::vector<Value>& Node::array() const {
  if (auto* v = std::get_if<std::vector<Value>>(&value_->data)) return *v;
  fail("is not a list");
}

std::optional<Node> Node::find(const char* name) const {
  for (const Member& m : object())
    if (m.name == name) {
      if (std::holds_alternative<std::nullptr_t>(m.value.data)) return std::nullopt;
      return Node(*this, m.value, path_.empty() ? m.name : path_ + "." + m.name);
    }
  return std::nullopt;
}

Node Node::at(const char* name) const {
  if (auto node = find(name)) return *node;
  Node(*this, *value_, path_.empty() ? name : path_ + "." + name).fail("is missing");
}

void Node::only(std::initializer_list<const char*> names) const {
  for (const Member& m : object())
    if (std::ranges::none_of(names, [&](const char* n) { return m.name == n; }))
      fail("unknown field '" + m.name.substr(0, 64) + "'");
}

std::vector<Node> Node::items() const {
  std::vector<Node> out;
  size_t i = 0;
  for (const Value& v : array()) out.push_back(Node(*this, v, path_ + "[" + std::to_string(i++) + "]"));
  return out;
}

std::vector<std::pair<std::string, Node>> Node::members() const {
  std::vector<std::pair<std::string, Node>> out;
  for (const Member& m : object())
    out.emplace_back(m.name, Node(*this, m.value, path_.empty() ? m.name : path_ + "." + m.name));
  return out;
}

size_t Node::size() const { return array().size(); }

const std::string& Node::string() const {
  if (auto* v = std::get_if<std::string>(&value_->data)) return *v;
  fail("is not a string");
}

bool Node::boolean() const {
  if (auto* v = std::get_if<bool>(&value_->data)) return *v;
  fail("is not true or false");
}

int64_t Node::integer(int64_t least, int64_t most) const {
  int64_t value = 0;
  if (auto* v = std::get_if<int64_t>(&value_->data)) {
    value = *v;
  } else if (auto* u = std::get_if<uint64_t>(&value_->data)) {
    value = *u > static_cast<uint64_t>(INT64_MAX) ? INT64_MAX : static_cast<int64_t>(*u);
  } else {
    fail("is not an integer");
  }
  if (value < least || value > most)
    fail("is not in " + std::to_string(least) + " .. " + std::to_string(most));
  return value;
}

uint64_t Node::natural() const {
  if (auto* u = std::get_if<uint64_t>(&value_->data)) return *u;
  if (auto* v = std::get_if<int64_t>(&value_->data); v && *v >= 0) return static_cast<uint64_t>(*v);
  fail("is not an integer from 0 to 2**64 - 1");
}

double Node::number(double least, double most) const {
  double value = 0;
  if (auto* d = std::get_if<double>(&value_->data)) {
    value = *d;
  } else if (auto* v = std::get_if<int64_t>(&value_->data)) {
    value = static_cast<double>(*v);
  } else if (auto* u = std::get_if<uint64_t>(&value_->data)) {
    value = static_cast<double>(*u);
  } else {
    fail("is not a number");
  }
  if (!(value >= least && value <= most)) fail("is out of range");
  return value;
}

namespace {

// Length of the UTF-8 sequence that starts here, 0 if it is broken.
size_t sequence(std::string_view text) {
  auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  unsigned char u = byte(0);
  size_t n = u < 0x80 ? 1 : u >= 0xC2 && u < 0xE0 ? 2 : u >= 0xE0 && u < 0xF0 ? 3 : u >= 0xF0 && u < 0xF5 ? 4 : 0;
  if (n == 0 || n > text.size()) return 0;
  for (size_t i = 1; i < n; ++i)
    if ((byte(i) & 0xC0) != 0x80) return 0;
  bool bad = n > 2 && ((u == 0xE0 && byte(1) < 0xA0) || (u == 0xED && byte(1) > 0x9F) ||
                       (u == 0xF0 && byte(1) < 0x90) || (u == 0xF4 && byte(1) > 0x8F));
  return bad ? 0 : n;
}

}  // namespace

void append_string(std::string& out, std::string_view text) {
  out += '"';
  for (size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    auto u = static_cast<unsigned char>(c);
    if (u >= 0x80) {
      // File names and cut messages may hold broken UTF-8; events never do.
      size_t n = sequence(text.substr(i));
      out += n == 0 ? std::string_view("?") : text.substr(i, n);
      i += n == 0 ? 0 : n - 1;
      continue;
    }
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (u < 0x20) {
      constexpr char hex[] = "0123456789abcdef";
      out += "\\u00";
      out += hex[u >> 4];
      out += hex[u & 15];
    } else {
      out += c;
    }
  }
  out += '"';
}

}  // namespace hh::json
