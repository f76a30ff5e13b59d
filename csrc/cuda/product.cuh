// Arguments of the product kernels and what they do with finished sums.
#pragma once

#include "fragments.cuh"

namespace lowra {

// row: packed row; the output stands in the order of W.
template <class T>
__device__ __forceinline__ void store_output(const product &q, int token, int row, float total) {
  const int place = __ldg(q.packed.row_order + row);
  if (q.bias) total += to_float(static_cast<const T *>(q.bias)[place]);
  static_cast<T *>(q.out)[(size_t)token * q.layout.rows() + place] = static_cast<T>(total);
}

bool product_small_fits(const product &q);
int product_small(const product &q, int32_t type, cudaStream_t stream);
int product_tensor(const product &q, int32_t type, cudaStream_t stream);

}  // namespace lowra
