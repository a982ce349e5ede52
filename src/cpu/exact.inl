// Stock MLX's quantised matrix-vector product on x86, bit for bit: it keeps one sum per row in the
// activation dtype and rounds scale * q, + bias, * x and the sum itself, k ascending. The order in
// k is the contract, so the sixteen lanes are sixteen rows.

template <Dtype T>
inline f32x16 round_to(f32x16 v) {
  if constexpr (T == Dtype::bfloat16) {
    return round_bfloat16(v);
  } else if constexpr (T == Dtype::float16) {
    return round_float16(v);
  } else {
    return v;
  }
}

template <Dtype T>
inline float load_scalar(const void* p, int64_t i) {
  if constexpr (T == Dtype::float32) {
    return static_cast<const float*>(p)[i];
  } else if constexpr (T == Dtype::bfloat16) {
    return bfloat16_to_float(static_cast<const uint16_t*>(p)[i]);
  } else {
    return float16_to_float(static_cast<const uint16_t*>(p)[i]);
  }
}

template <Dtype T>
inline void store_scalar(void* p, int64_t i, float v) {
  if constexpr (T == Dtype::float32) {
    static_cast<float*>(p)[i] = v;
  } else if constexpr (T == Dtype::bfloat16) {
    static_cast<uint16_t*>(p)[i] = float_to_bfloat16(v);
  } else {
    static_cast<uint16_t*>(p)[i] = float_to_float16(v);
  }
}

template <Dtype T, int bits>
f32x16 exact_rows(const QuantizedMatrix& w, const void* x, const int64_t (&row)[kLanes]) {
  constexpr int kPerWord = 32 / bits;
  constexpr uint32_t kMask = bits == 32 ? ~0u : (1u << bits) - 1;
  const int words = w.cols / kPerWord, groups = w.cols / w.group_size;
  f32x16 sum = {}, scale, bias;
  u32x16 word;
  for (int g = 0; g < groups; ++g) {
    for (int i = 0; i < kLanes; ++i) {
      scale[i] = load_scalar<T>(w.scales, row[i] * groups + g);
      bias[i] = load_scalar<T>(w.biases, row[i] * groups + g);
    }
    for (int j = g * w.group_size / kPerWord; j < (g + 1) * w.group_size / kPerWord; ++j) {
      for (int i = 0; i < kLanes; ++i) word[i] = w.weight[row[i] * words + j];
      for (int p = 0; p < kPerWord; ++p, word >>= bits) {
        f32x16 q = __builtin_convertvector((i32x16)(word & kMask), f32x16);
        f32x16 value = round_to<T>(round_to<T>(scale * q) + bias);
        float xk = load_scalar<T>(x, j * kPerWord + p);
        sum = round_to<T>(sum + round_to<T>(splat(xk) * value));
      }
    }
  }
  return sum;
}

template <Dtype T, int bits>
void exact_qmv_typed(const QuantizedMatrix& w, const void* x, void* y, int begin, int end) {
  for (int n = begin; n < end; n += kLanes) {
    int64_t row[kLanes];
    for (int i = 0; i < kLanes; ++i) row[i] = n + i < end ? n + i : end - 1;
    f32x16 sum = exact_rows<T, bits>(w, x, row);
    for (int i = 0; i < kLanes && n + i < end; ++i) store_scalar<T>(y, n + i, sum[i]);
  }
}

template <Dtype T>
void exact_qmv_bits(const QuantizedMatrix& w, const void* x, void* y, int begin, int end) {
  switch (w.bits) {
    case 2: return exact_qmv_typed<T, 2>(w, x, y, begin, end);
    case 4: return exact_qmv_typed<T, 4>(w, x, y, begin, end);
    default: return exact_qmv_typed<T, 8>(w, x, y, begin, end);
  }
}

inline void exact_qmv(const QuantizedMatrix& w, const void* x, void* y, int begin, int end) {
  switch (w.dtype) {
    case Dtype::float32: return exact_qmv_bits<Dtype::float32>(w, x, y, begin, end);
    case Dtype::float16: return exact_qmv_bits<Dtype::float16>(w, x, y, begin, end);
    case Dtype::bfloat16: return exact_qmv_bits<Dtype::bfloat16>(w, x, y, begin, end);
  }
}
