// Kernel dialect for Metal. MLX puts its own preamble before this text (metal_stdlib, bfloat16_t
// and float16_t), and prologue_metal.h opens each body. Emulated, never run on Apple hardware.
#pragma METAL fp contract(off)

#define FUNC inline
#define UNROLL _Pragma("clang loop unroll(full)")
#define SHARED_ARRAY(type, name, size) threadgroup type name[size]

FUNC void group_barrier() {
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

FUNC uint as_uint(float v) {
  return as_type<uint>(v);
}
FUNC float as_float(uint v) {
  return as_type<float>(v);
}

FUNC uint shuffle(uint v, uint lane) {
  return simd_shuffle(v, ushort(lane));
}
FUNC float shuffle(float v, uint lane) {
  return simd_shuffle(v, ushort(lane));
}
FUNC uint shuffle_xor(uint v, uint mask) {
  return simd_shuffle_xor(v, ushort(mask));
}
FUNC float shuffle_xor(float v, uint mask) {
  return simd_shuffle_xor(v, ushort(mask));
}

// fma rounds once by definition, so a compiler that ignores the pragma above (before Metal 3.2) has
// no separate multiply to contract: a * b - 0 and a * 1 + b keep the sign of zero.
FUNC float mul_rn(float a, float b) {
  return fma(a, b, -0.0f);
}
FUNC float add_rn(float a, float b) {
  return fma(a, 1.0f, b);
}
FUNC float fma_rn(float a, float b, float c) {
  return fma(a, b, c);
}
FUNC float div_rn(float a, float b) {
  return precise::divide(a, b);
}
FUNC float sqrt_rn(float a) {
  return precise::sqrt(a);
}
FUNC float round_even(float a) {
  return rint(a);
}

template <int N>
struct Words {
  uint w[N];
};
template <int N>
FUNC Words<N> load_words(const device uint32_t* p, uint at) {
  return *reinterpret_cast<const device Words<N>*>(p + at);
}

// An input that the kernel updates in place (the KV cache).
template <typename T>
FUNC device T* writable(const device T* p) {
  return const_cast<device T*>(p);
}
