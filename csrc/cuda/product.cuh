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
      "}\n" ::"l"(at), "h"(reinterpret_cast<const uint16_t &>(rounded)), "r"((int)wanted)
      : "memory");
}

int product_small(const product &q, int32_t type, cudaStream_t stream);
int product_tensor(const product &q, int32_t type, cudaStream_t stream);
int product_wgmma(const product &q, int32_t type, cudaStream_t stream);  // LOWRA_UNSUPPORTED on chips without wgmma

}  // namespace lowra
