// JSON as a tree, and strict reading of its fields.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace hh::json {

struct Member;

// Members of objects keep their order. A name occurs once.
struct Value {
  std::variant<std::nullptr_t, bool, int64_t, uint64_t, double, std::string, std::vector<Value>,
               std::vector<Member>>
      data;
};

struct Member {
  std::string name;
  Value value;
};

// Bounds on depth and number of values keep hostile text from exhausting memory. `where` and
// `code` go into errors.
Value parse(std::string_view text, const std::string& where, const char* code);

// A value, with the path of fields that leads to it for error messages.
class Node {
 public:
  Node(const Value& value, const std::string& where, const char* code)
      : value_(&value), where_(&where), code_(code) {}

  [[noreturn]] void fail(const std::string& message) const;

  Node at(const char* name) const;
  std::optional<Node> find(const char* name) const;  // null counts as absent
  void only(std::initializer_list<const char*> names) const;
  std::vector<Node> items() const;
  std::vector<std::pair<std::string, Node>> members() const;
  size_t size() const;

  const std::string& string() const;
  bool boolean() const;
  int64_t integer(int64_t least, int64_t most) const;
  uint64_t natural() const;
  double number(double least, double most) const;
  bool is_object() const { return std::holds_alternative<std::vector<Member>>(value_->data); }
  const std::string& path() const { return path_; }

 private:
  Node(const Node& parent, const Value& value, std::string path)
      : value_(&value), where_(parent.where_), code_(parent.code_), path_(std::move(path)) {}
  const std::vector<Member>& object() const;
  const std::vector<Value>& array() const;

  const Value* value_;
  const std::string* where_;
  const char* code_;
  std::string path_;
};

void append_string(std::string& out, std::string_view text);  // quoted and escaped

}  // namespace hh::json
