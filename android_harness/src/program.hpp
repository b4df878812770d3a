// The program of a bundle: a straight line of operations over named tensors.
#pragma once

#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "dtype.hpp"
#include "json.hpp"

namespace hh {

using Names = std::vector<std::pair<std::string, std::string>>;
using Specs = std::unordered_map<std::string, TensorSpec>;

struct Input {
  std::string name;
  bool noise = false;
  uint32_t stream = 0;
};

struct CallOp {
  std::string artifact;
  Names args, results;  // port to tensor
};
struct SliceOp {
  std::string x;
  int64_t axis, start, length;
  std::string out;
};
struct PadOp {
  std::string x;
  int64_t axis, before, after;
  float value;
  std::string out;
};
struct ConcatOp {
  std::vector<std::string> xs;
  int64_t axis;
  std::string out;
};
struct Term {
  std::string x;
  float scale;
};
struct AffineOp {
  std::vector<Term> terms;
  float bias;
  std::string out;
};
struct MomentsOp {
  std::string x;
  int64_t groups;
  std::string out;
};
struct NormalizerOp {
  std::vector<std::string> moments;
  double eps;
  std::string mean, rstd;
};

using Op = std::variant<CallOp, SliceOp, PadOp, ConcatOp, AffineOp, MomentsOp, NormalizerOp>;

struct Program {
  std::vector<Input> inputs;
  Specs tensors;
  std::vector<Op> ops;
  Names outputs;  // role to tensor
};

struct Ports {
  std::vector<std::pair<std::string, TensorSpec>> inputs, outputs;
};

std::vector<std::string> reads(const Op&);
std::vector<std::string> writes(const Op&);

std::string read_name(const json::Node&);
void check_name(const json::Node& owner, const std::string& name);
TensorSpec read_spec(const json::Node&);
Program read_program(const json::Node&);

// Throws Error("bundle") for the first thing that does not fit; `where` names file and field.
void check_program(const Program&, const std::map<std::string, const Ports*>& artifacts,
                   const Specs& constants, const std::string& where);

}  // namespace hh
