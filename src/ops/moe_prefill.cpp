#include "metal/launch.h"
#include "ops/moe_experts.h"
#include "ops/stock.h"

namespace moefuse {

namespace {

constexpr const char* kOp = "moe_prefill";
// Rows of a block: the smallest tile of MLX's CUDA products, so that padding costs least. With 128
// experts and 1,024 tokens a layer's block took an H200 1,626 us, with 32 rows 1,776.
constexpr int kBlock = 16;

// Slots are sorted by expert and laid out in blocks of rows that share one. All of it is computed
// on the device: no count is read back.
struct Blocks {
  mx::array row;     // [blocks * kBlock] the row of x in each slot; padding repeats a neighbour
  mx::array expert;  // [blocks] uint32; blocks behind the last are the last expert's
  mx::array slot;    // [n] where each index lies
};

Blocks in_blocks(const mx::array& indices, int experts, mx::StreamOrDevice s) {
  auto number = [](int value) { return mx::array(value); };
  const int n = static_cast<int>(indices.size()), k = indices.shape(-1);
  // Every block begins with a row of its own, and an expert leaves at most kBlock - 1 slots empty.
  const int blocks =
      static_cast<int>(std::min<int64_t>((n + int64_t(experts) * (kBlock - 1)) / kBlock, n));
  auto expert = mx::astype(mx::reshape(indices, {-1}, s), mx::int32, s);
  auto order = mx::astype(mx::argsort(expert, 0, s), mx::int32, s);
  auto position = mx::astype(mx::argsort(order, 0, s), mx::int32, s);

  auto ids = mx::arange(0, experts, mx::int32, s);
  auto count = mx::sum(mx::equal(mx::expand_dims(expert, 1, s), ids, s), 0, false, s);
  auto filled = mx::floor_divide(mx::add(count, number(kBlock - 1), s), number(kBlock), s);
  auto end = mx::cumsum(filled, 0, false, true, s);
  auto begin = mx::subtract(end, filled, s);  // an expert's first block
  auto first = mx::subtract(mx::cumsum(count, 0, false, true, s), count, s);  // and first position
  // position + shift[expert] is the slot.
  auto shift = mx::subtract(mx::multiply(begin, number(kBlock), s), first, s);

  auto block = mx::expand_dims(mx::arange(0, blocks, mx::int32, s), 1, s);
  auto of_block = mx::sum(mx::greater_equal(block, end, s), 1, false, s);
  of_block = mx::minimum(of_block, number(experts - 1), s);
  auto slots = mx::reshape(mx::arange(0, blocks * kBlock, mx::int32, s), {blocks, kBlock}, s);
  auto at = mx::subtract(slots, mx::expand_dims(mx::take(shift, of_block, 0, s), 1, s), s);
  at = mx::minimum(mx::reshape(at, {-1}, s), number(n - 1), s);
  return {mx::floor_divide(mx::take(order, at, 0, s), number(k), s),
          mx::astype(of_block, mx::uint32, s), mx::add(position, mx::take(shift, expert, 0, s), s)};
}

mx::array moe_prefill_blocks(const mx::array& x, const QuantizedExperts& gate,
                             const QuantizedExperts& up, const QuantizedExperts& down,
                             const mx::array& indices, int group_size, int bits,
                             const std::string& mode, mx::StreamOrDevice s) {
  const int experts = gate.weight.shape(0), hidden = x.shape(-1), width = down.weight.shape(1);
  const Blocks to = in_blocks(indices, experts, s);
  auto product = [&](const mx::array& rows, const QuantizedExperts& w) {
    return mx::gather_qmm(rows, w.weight, w.scales, w.biases, std::nullopt, to.expert, true,
                          group_size, bits, mode, std::nullopt, true, s);
  };
  auto rows = mx::take(mx::reshape(x, {-1, hidden}, s), to.row, 0, s);
  rows = mx::reshape(rows, {-1, kBlock, hidden}, s);
  auto y = product(stock::swiglu(product(rows, gate), product(rows, up), s), down);
  auto shape = indices.shape();
  shape.push_back(width);
  return mx::reshape(mx::take(mx::reshape(y, {-1, width}, s), to.slot, 0, s), shape, s);
}

}  // namespace

mx::array moe_prefill(const mx::array& x, const QuantizedExperts& gate, const QuantizedExperts& up,
                      const QuantizedExperts& down, const mx::array& indices,
                      const mx::array& weights, Accumulate accumulate, int group_size, int bits,
                      const std::string& mode, PrefillForm form, mx::StreamOrDevice s) {
  const Quantization quantization(kOp, mode, group_size, bits);
  check_moe_experts(kOp, x, gate, up, down, indices, weights, quantization);
  const bool on_cpu = !metal::serves(s) && mx::to_stream(s).device == mx::Device::cpu;
  if (form == PrefillForm::kernels && !on_cpu) fail(kOp, "form", "'blocks' on a GPU", "'kernels'");
  if (form != PrefillForm::blocks && on_cpu) {
    cpu::check_settings();
    return moe_experts_on_cpu(kOp, x, gate, up, down, indices, weights, accumulate, quantization,
                              s);
  }
  if (x.size() == 0) {
    auto shape = x.shape();
    shape.back() = down.weight.shape(1);
    return mx::zeros(shape, x.dtype(), s);
  }
  check_known_indices(kOp, indices, gate.weight.shape(0));
  count(kOp, "blocks");
  auto y = moe_prefill_blocks(x, gate, up, down, indices, group_size, bits, mode, s);
  return stock::moe_combine(y, weights, accumulate, s);
}

}  // namespace moefuse
