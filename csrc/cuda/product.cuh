// Arguments of the product kernels and what they do with finished sums.
#pragma once

#include "fragments.cuh"

namespace lowra {

// place: row of W, loaded well before the sums are there.
template <class T>
__device__ __forceinline__ void store_output(const product &q, int token, int place, float total) {
  if (q.bias) total += to_float(static_cast<const T *>(q.bias)[place]);
  static_cast<T *>(q.out)[(size_t)token * q.layout.rows() + place] = static_cast<T>(total);
}

// *at = value, where wanted. A branch for each of many stores would cost more than the store.
template <class T>
__device__ __forceinline__ void store_if(bool wanted, T *at, float value) {
  const T rounded = static_cast<T>(value);
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.s32 wanted, %2, 0;\n"
      "@wanted st.global.u16 [%0], %1;\n"
      "}\n" ::"l"(at),
      "h"(reinterpret_cast<const uint16_t &>(rounded)), "r"((int)wanted)
      : "memory");
}

// Words of codes at `at`. Asks for 256 bytes in the L2 cache, the columns that follow: a wait for memory takes longer
// than decoding them.
#define LOWRA_LOAD "ld.global.nc.L2::256B."
__device__ __forceinline__ void load_codes(const uint8_t *at, uint32_t (&words)[1]) {
  asm volatile(LOWRA_LOAD "u32 %0, [%1];" : "=r"(words[0]) : "l"(at));
}
__device__ __forceinline__ void load_codes(const uint8_t *at, uint32_t (&words)[2]) {
  asm volatile(LOWRA_LOAD "v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(at));
}
__device__ __forceinline__ void load_codes(const uint8_t *at, uint32_t (&words)[4]) {
  asm volatile(LOWRA_LOAD "v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(at));
}
#undef LOWRA_LOAD

int product_small(const product &q, int32_t type, cudaStream_t stream);
// Of the weights of a group in one launch (few_tokens.cuh). base: what they share.
int product_small_group(const lowra_packed *weights, const void *const *bias, void *const *out, int count,
                        const lowra_input &input, const lowra_adapters *adapters, const product &base, int32_t type,
                        cudaStream_t stream);
int product_tensor(const product &q, int32_t type, cudaStream_t stream);
// Both LOWRA_UNSUPPORTED on chips without wgmma, and in a library without code for Hopper.
int product_wgmma(const product &q, int32_t type, cudaStream_t stream);
int product_many(const product &q, int32_t type, cudaStream_t stream);
// Whether product_many is quicker than a dense product of the dequantised weight. On Hopper.
bool product_many_is_quicker(int64_t tokens, int64_t rows, int64_t in_features, int64_t l2_bytes);
#ifndef LOWRA_HOPPER  // CMakeLists.txt
inline int product_wgmma(const product &, int32_t, cudaStream_t) { return LOWRA_UNSUPPORTED; }
inline int product_many(const product &, int32_t, cudaStream_t) { return LOWRA_UNSUPPORTED; }
inline bool product_many_is_quicker(int64_t, int64_t, int64_t, int64_t) { return false; }
#endif

}  // namespace lowra
