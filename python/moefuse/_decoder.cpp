// The Python face of include/moefuse/{model,decoder}.h, for moefuse/step.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unordered_map.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "cpu/kernels.h"
#include "decode/read_bandwidth.h"
#include "moefuse/decoder.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace mx = mlx::core;

namespace {

using Row = std::tuple<uint32_t, int, int, int, int>;

// The very arrays behind Python's, because a step writes into their buffers.
std::vector<moefuse::LayerCache> layer_caches(const nb::list& keys, const nb::list& values) {
  if (keys.size() != values.size())
    throw std::invalid_argument("[step] values: expected one for each of keys, got another number");
  std::vector<moefuse::LayerCache> caches;
  for (size_t i = 0; i < keys.size(); ++i)
    caches.push_back({nb::cast<mx::array&>(keys[i]), nb::cast<mx::array&>(values[i])});
  return caches;
}

template <bool GREEDY>
mx::array step(moefuse::Decoder& decoder, const std::vector<Row>& rows, const nb::list& keys,
               const nb::list& values, const std::optional<mx::array>& tokens) {
  std::vector<moefuse::StepRow> list;
  list.reserve(rows.size());
  for (const auto& [token, sequence, position, first, slot] : rows)
    list.push_back({token, sequence, position, first, slot});
  auto caches = layer_caches(keys, values);
  nb::gil_scoped_release release;
  return GREEDY ? decoder.greedy(list, caches, tokens) : decoder.step(list, caches, tokens);
}

nb::list stages(const moefuse::Decoder& decoder) {
  nb::list list;
  for (const moefuse::StageInfo& s : decoder.stages()) {
    nb::dict stage;
    stage["name"] = s.name;
    stage["layer"] = s.layer;
    stage["shape"] = s.shape;
    stage["weight_bytes"] = s.weight_bytes;
    stage["calls"] = s.calls;
    stage["seconds"] = s.seconds;
    list.append(stage);
  }
  return list;
}

}  // namespace

void bind_decoder(nb::module_& m) {
  m.attr("MAX_ROWS") = moefuse::kMaxRows;
  m.def("has_executor", &moefuse::has_executor, "Whether the default device runs the step.");
  nb::class_<moefuse::Decoder>(m, "Decoder",
                               "The whole decode step of one model; see moefuse/decoder.h.")
      .def(
          "__init__",
          [](moefuse::Decoder* self, const std::string& config, const moefuse::Weights& weights,
             const std::string& accumulate) {
            new (self) moefuse::Decoder({moefuse::parse_config(config), weights},
                                        moefuse::accumulate_from(accumulate));
          },
          "config"_a, "weights"_a, "accumulate"_a,
          "config: the text of a config.json; weights: arrays by mlx-lm's names, not copied.")
      .def("step", &step<false>, "rows"_a, "keys"_a, "values"_a, "tokens"_a = nb::none(),
           "rows: (token, sequence, position, first, slot); keys and values: a cache's arrays, one "
           "for each layer, written in place; tokens: [rows], in place of the rows' own, which on "
           "CUDA may still be on their way. Returns logits [rows, vocab_size].")
      .def("greedy", &step<true>, "rows"_a, "keys"_a, "values"_a, "tokens"_a = nb::none(),
           "step() and sample_greedy() of its logits: the next tokens [rows]. On CUDA one launch, "
           "whose tokens the next call takes before they are known here.")
      .def("wait", &moefuse::Decoder::wait, nb::call_guard<nb::gil_scoped_release>(),
           "Ends when the steps so far have.")
      .def("kernel_times", &moefuse::Decoder::kernel_times, "rows"_a,
           "On CUDA, after a step of as many rows: {kernel: (calls, microseconds each)}.")
      .def_prop_ro(
          "cache_shape",
          [](const moefuse::Decoder& d) {
            const auto [heads, key, value] = d.cache_shape();
            return std::make_tuple(heads, key, value);
          },
          "(kv_heads, key_dim, value_dim) of a layer's cache.")
      .def_prop_ro("dtype", &moefuse::Decoder::dtype, "Of the model's activations and caches.")
      .def_prop_ro("max_position_embeddings",
                   [](const moefuse::Decoder& d) { return d.config().max_position_embeddings; })
      .def("stages", &stages, "What runs, in order: name, layer, shape, weight_bytes, times.");
  m.def("read_bandwidth", &moefuse::read_bandwidth, "bytes"_a,
        nb::call_guard<nb::gil_scoped_release>(),
        "Bytes a second of a plain read of a buffer of that size by the step's threads, the best "
        "of several.");
  m.def(
      "check_memory",
      [](const std::string& model, uint64_t weight_bytes) {
        moefuse::check_memory(model, weight_bytes, moefuse::available_memory());
      },
      "model"_a, "weight_bytes"_a,
      "Raises ValueError with the estimate and what there is, where weights and a twentieth do not "
      "fit into the available memory.");
  m.def("cpu_threads", &moefuse::cpu::num_threads, "Threads of the ops and of the step on a CPU.");
  m.def(
      "writable",
      [](const mx::array& a) {
        return a.is_available() && a.is_donatable() && a.flags().row_contiguous;
      },
      "Whether nobody else refers to the array's buffer, so that it may be written in place.");
}
