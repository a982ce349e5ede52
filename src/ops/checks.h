// Checks, counters and small helpers that every op shares.
#pragma once

#include <string>
#include <vector>

#include "cpu/moe_experts.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "moefuse/ops.h"

namespace moefuse {

// Most experts per row that the kernels take; the router's scratch is sized by it.
constexpr int kMaxTopK = 16;

// Throws std::invalid_argument "[op] what: expected <expected>, got <got>".
[[noreturn]] void fail(const std::string& op, const std::string& what, const std::string& expected,
                       const std::string& got);
std::string describe(const mx::Shape& shape);
std::string describe(mx::Dtype dtype);

void check_float(const std::string& op, const std::string& what, const mx::array& a);
void check_dtype(const std::string& op, const std::string& what, const mx::array& a,
                 mx::Dtype dtype);
void check_shape(const std::string& op, const std::string& what, const mx::array& a,
                 const mx::Shape& shape);
void check_integer(const std::string& op, const std::string& what, const mx::array& a);
// `of` ("NAME " where several are checked) stands before the field's name in the error.
void check_quantization(const std::string& op, int group_size, int bits,
                        const std::string& of = "");

// How expert stacks are quantised, from what a caller says.
struct Quantization {
  cpu::Format format;
  int group_size, bits;

  // Throws on an unknown mode, and on bits and group_size that the mode does not have.
  Quantization(const std::string& op, const std::string& mode, int group_size, int bits);
  bool operator==(const Quantization&) const = default;
};

// One expert stack [experts, rows, cols] in x's dtype: throws when a tensor contradicts the others.
struct ExpertShape {
  int experts, rows, cols;
};
ExpertShape check_experts(const std::string& op, const std::string& what, const QuantizedExperts& w,
                          mx::Dtype dtype, const Quantization& quantization);

// The array itself where it is known to be row contiguous, else a node that makes it so.
mx::array row_contiguous(const mx::array& a, mx::StreamOrDevice s);

// Appends w's arrays to a primitive's inputs, row contiguous.
void append_experts(std::vector<mx::array>& inputs, const QuantizedExperts& w,
                    mx::StreamOrDevice s);
// The i-th stack among those that begin at inputs[first], for activations of dtype. All are
// evaluated.
cpu::ExpertStack expert_stack(const std::vector<mx::array>& inputs, int first, int i,
                              const Quantization& quantization, mx::Dtype dtype);
cpu::Dtype cpu_dtype(mx::Dtype dtype);
cpu::Arithmetic cpu_arithmetic(Accumulate accumulate, mx::Dtype dtype);

// Throws std::invalid_argument when an index is outside [0, experts).
void check_indices(const std::string& op, const uint32_t* indices, int64_t size, int experts);
// The same at the call, where the values are there already, of any integer dtype and strides. What
// is thrown later, in a stream, is handed on by MLX's evaluation, which then loses count of its
// tasks (MLX 0.32.4): a process that meets it dozens of times may wait for ever.
void check_known_indices(const std::string& op, const mx::array& indices, int experts);

void count(const std::string& op, const std::string& how);

// What runs an op on the stream's device.
enum class Path : uint8_t { cpu, metal, stock };

// metal_refusal: why the Metal kernel would not take the arguments, empty when it would. Counts one
// stock stand-in where the answer is stock. A Metal op counts itself when its node is made, a CPU
// op when it is evaluated.
Path choose_path(const std::string& op, mx::StreamOrDevice s, const std::string& metal_refusal);

}  // namespace moefuse
