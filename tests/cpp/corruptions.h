// Planted corruptions of a checkpoint's files, each with the error that it has to give: the tests
// hold them to it, and the fuzzer starts from them.
#pragma once

#include <cstring>
#include <string>
#include <vector>

namespace moefuse::test {

struct Corruption {
  char kind;  // 'c': config.json, 'i': an index, 's': a safetensors file
  const char* name;
  std::string bytes;
  const char* error;  // part of the message; empty: nothing is wrong
};

inline std::string safetensors(const std::string& header, size_t data_bytes = 8) {
  const uint64_t size = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &size, 8);
  return bytes + header + std::string(data_bytes, 'x');
}

inline std::string tensor(const std::string& dtype, const std::string& shape,
                          const std::string& offsets) {
  return safetensors(R"({"a":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" +
                     offsets + "}}");
}

inline std::string nested(int levels) {
  return std::string(levels, '[') + std::string(levels, ']');
}

// A whole config.json of the family, with `field` (a key with its colon) given `value`.
inline std::string config(const std::string& family, const std::string& field = "",
                          const std::string& value = "") {
  std::string text =
      R"({"model_type":")" + family +
      R"(","hidden_size":64,"num_hidden_layers":2,"vocab_size":99,"max_position_embeddings":64,)"
      R"("num_attention_heads":4,"intermediate_size":64,"moe_intermediate_size":32,)"
      R"("rms_norm_eps":1e-06,"rope_theta":10000.0,"num_experts_per_tok":2,)";
  text += family == "qwen3_moe"
              ? R"("num_key_value_heads":2,"head_dim":16,"num_experts":8,"decoder_sparse_step":1,)"
                R"("mlp_only_layers":[],"norm_topk_prob":true,"tie_word_embeddings":false})"
              : R"("q_lora_rank":8,"kv_lora_rank":8,"qk_nope_head_dim":8,"qk_rope_head_dim":8,)"
                R"("v_head_dim":8,"n_routed_experts":8,"n_shared_experts":1,"n_group":1,)"
                R"("topk_group":1,"routed_scaling_factor":1.8,"first_k_dense_replace":1,)"
                R"("rope_scaling":{"type":"default"},"moe_layer_freq":1})";
  if (field.empty()) return text;
  const size_t at = text.find(field);
  if (at == std::string::npos) return text.insert(text.size() - 1, "," + field + value);
  const size_t begin = at + field.size();
  return text.replace(begin, text.find_first_of(",}", begin) - begin, value);
}

inline std::vector<Corruption> safetensors_corruptions() {
  const std::string good = R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  return {
      {'s', "good", safetensors("{" + good + R"(,"__metadata__":{"format":"mlx"}})"), ""},
      {'s', "no_tensor", safetensors("{}"), ""},
      {'s', "empty_tensor", tensor(R"("F32")", "[0,5]", "[3,3]"), ""},
      {'s', "empty_file", "", "a safetensors header, got 0 bytes"},
      {'s', "seven_bytes", "1234567", "a safetensors header, got 7 bytes"},
      {'s', "no_header", std::string(8, '\0'), "a header of 1 to"},
      {'s', "header_past_the_end", "\x7f" + std::string(7, '\0') + "{}", "a header within"},
      {'s', "header_of_2_to_64", std::string(8, '\xff') + "{}", "a header within"},
      {'s', "truncated", safetensors("{" + good + "}").substr(0, 60), "a header within"},
      {'s', "not_json", safetensors("{\"a\":"), "JSON, got an error at byte"},
      {'s', "bad_utf8", safetensors("{\"\xff\xfe\":1}"), "JSON, got an error at byte"},
      {'s', "huge_number", safetensors("{\"a\":1e999}"), "JSON, got a number out of range"},
      {'s', "an_array", safetensors("[1]"), "a JSON object, got [1]"},
      {'s', "deep", safetensors("{\"a\":" + nested(500) + "}"), "JSON of at most 32 levels"},
      {'s', "twice", safetensors("{" + good + "," + good + "}"),
       "each key once, got a second \"a\""},
      {'s', "metadata_number", safetensors(R"({"__metadata__":1})"), "an object of strings, got 1"},
      {'s', "metadata_of_numbers", safetensors(R"({"__metadata__":{"a":1}})"), "object of strings"},
      {'s', "name_with_zero", safetensors("{\"a\\u0000\\u001b\":0}"),
       "a??: expected dtype, shape and data_offsets, got 0"},
      {'s', "no_fields", safetensors(R"({"a":{}})"), "dtype, shape and data_offsets, got {}"},
      {'s', "dtype_unknown", tensor(R"("F64")", "[1]", "[0,8]"), "a known dtype, got \"F64\""},
      {'s', "dtype_number", tensor("4", "[1]", "[0,4]"), "a known dtype, got 4"},
      {'s', "shape_text", tensor(R"("U8")", R"("8")", "[0,8]"), "a shape, got"},
      {'s', "shape_negative", tensor(R"("U8")", "[-8]", "[0,8]"), "a shape of 31-bit numbers"},
      {'s', "shape_float", tensor(R"("U8")", "[8.0]", "[0,8]"), "a shape of 31-bit numbers"},
      {'s', "shape_32_bits", tensor(R"("U8")", "[2147483648]", "[0,8]"), "31-bit numbers"},
      {'s', "shape_overflow", tensor(R"("U8")", "[2147483647,2147483647,2147483647]", "[0,8]"),
       "a shape that fits"},
      {'s', "shape_overflow_empty",
       tensor(R"("U8")", "[0,2147483647,2147483647,2147483647]", "[0,0]"), "a shape that fits"},
      {'s', "offsets_three", tensor(R"("U8")", "[8]", "[0,4,8]"), "two data_offsets"},
      {'s', "offsets_negative", tensor(R"("U8")", "[8]", "[-8,0]"), "two data_offsets"},
      {'s', "offsets_back", tensor(R"("U8")", "[8]", "[8,0]"), "data within the file's 8 bytes"},
      {'s', "offsets_past_the_end", tensor(R"("U8")", "[8]", "[4,12]"), "data within the file's 8"},
      {'s', "offsets_2_to_64", tensor(R"("U8")", "[8]", "[0,18446744073709551615]"), "data within"},
      {'s', "offsets_short", tensor(R"("U8")", "[8]", "[0,7]"), "8 bytes for its shape, got [0,7]"},
      {'s', "shared_bytes",
       safetensors("{" + good + R"(,"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})"),
       "b: expected bytes of its own, got some of"},
  };
}

inline std::vector<Corruption> index_corruptions() {
  const auto map = [](const std::string& file) { return R"({"weight_map":{"a":)" + file + "}}"; };
  const char* expected = "weight_map.a: expected a *.safetensors in the same folder";
  return {
      {'i', "good", R"({"metadata":{},"weight_map":{"a":"1.safetensors","b":"2.safetensors"}})",
       ""},
      {'i', "empty", "", "JSON, got an error at byte"},
      {'i', "no_map", "{}", "a weight_map, got {}"},
      {'i', "map_is_array", R"({"weight_map":["1.safetensors"]})", "a weight_map, got"},
      {'i', "number", map("1"), expected},
      {'i', "parent", map(R"("..")"), expected},
      {'i', "above", map(R"("../1.safetensors")"), expected},
      {'i', "absolute", map(R"("/1.safetensors")"), expected},
      {'i', "other_file", map(R"("config.json")"), expected},
      {'i', "zero_byte", map(R"("a\u0000.safetensors")"), expected},
      {'i', "deep", map(nested(500)), "JSON of at most 32 levels"},
  };
}

inline std::vector<Corruption> config_corruptions() {
  const std::string q = "qwen3_moe", g = "glm4_moe_lite";
  return {
      {'c', "qwen3_moe", config(q), ""},
      {'c', "glm4_moe_lite", config(g), ""},
      {'c', "empty", "", "config.json: expected JSON, got an error at byte"},
      {'c', "half", config(q).substr(0, 99), "config.json: expected JSON"},
      {'c', "deep", config(q, "\"x\":", nested(500)), "JSON of at most 32 levels"},
      {'c', "twice", config(q, "\"x\":", "1,\"x\":1"), "each key once, got a second \"x\""},
      {'c', "other_family", config("llama"), "glm4_moe_lite, got \"llama\""},
      {'c', "family_number", config(q, "\"model_type\":", "1"), "model_type: expected a string"},
      {'c', "size_missing", config(q, "\"hidden_size\":", "null"), "hidden_size: expected a value"},
      {'c', "size_text", config(q, "\"hidden_size\":", "\"64\""),
       "hidden_size: expected an integer"},
      {'c', "size_float", config(q, "\"hidden_size\":", "64.5"),
       "hidden_size: expected an integer"},
      {'c', "size_zero", config(q, "\"hidden_size\":", "0"), "hidden_size: expected an integer"},
      {'c', "size_2_to_64", config(q, "\"hidden_size\":", "18446744073709551615"), "hidden_size: "},
      {'c', "layers", config(q, "\"num_hidden_layers\":", "1025"), "num_hidden_layers: expected"},
      {'c', "eps_zero", config(q, "\"rms_norm_eps\":", "0"), "a positive number, got 0"},
      {'c', "eps_no_float", config(q, "\"rms_norm_eps\":", "1e-300"),
       "a positive number, got 1e-3"},
      {'c', "eps_too_large", config(q, "\"rms_norm_eps\":", "1e300"),
       "a positive number, got 1e+3"},
      {'c', "tie_number", config(q, "\"tie_word_embeddings\":", "1"), "true or false, got 1"},
      {'c', "heads_uneven", config(q, "\"num_key_value_heads\":", "3"), "a divisor of"},
      {'c', "head_dim_odd", config(q, "\"head_dim\":", "15"), "head_dim: expected an even number"},
      {'c', "few_experts", config(q, "\"num_experts\":", "1"), "at most the 1 experts"},
      {'c', "only_layers_number", config(q, "\"mlp_only_layers\":", "1"), "an array, got 1"},
      {'c', "only_layers_text", config(q, "\"mlp_only_layers\":", "[\"1\"]"), "layer numbers"},
      {'c', "rope_number", config(g, "\"type\":", "1"), "none or the default type, got"},
      {'c', "rope_yarn", config(g, "\"type\":", "\"yarn\""), "none or the default type, got"},
      {'c', "attention_bias", config(g, "\"attention_bias\":", "true"), "attention_bias: expected"},
      {'c', "long", config(q, "\"head_dim\":", "\"" + std::string(900, 'x') + "\""), "xxx..."},
  };
}

inline std::vector<Corruption> corruptions() {
  std::vector<Corruption> all;
  for (const auto& part : {safetensors_corruptions(), index_corruptions(), config_corruptions()})
    all.insert(all.end(), part.begin(), part.end());
  return all;
}

}  // namespace moefuse::test
