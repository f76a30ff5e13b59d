// Arguments of the product kernels and what they do with x and with finished sums.
#pragma once

#include "fragments.cuh"

namespace lowra {

struct product {
  lowra_packed packed;
  rows_layout layout;
  tile_counts tiles;
  const void *x, *bias;  // x [tokens, in_features]; bias [rows] or null
  void *out;             // [tokens, rows]
  int tokens, in_features, groups, group_shift;
};

__device__ __forceinline__ uint32_t word_of(const uint4 &chunk, int i) {
  return i == 0 ? chunk.x : i == 1 ? chunk.y : i == 2 ? chunk.z : chunk.w;
}

// From x in natural order (two columns in a word) the columns r and P + r, which meet codes r of two neighbouring bytes.
template <int PER_BYTE>
__device__ __forceinline__ uint32_t partner(const uint32_t *natural, int r) {
  return permute(natural[r / 2], natural[(PER_BYTE + r) / 2], r % 2 ? 0x7632 : 0x5410);
}

// row: packed row; the output stands in the order of W.
template <class T>
__device__ __forceinline__ void store_output(const product &q, int token, int row, float total) {
  const int place = __ldg(q.packed.row_order + row);
  if (q.bias) total += to_float(static_cast<const T *>(q.bias)[place]);
  static_cast<T *>(q.out)[(size_t)token * q.layout.rows() + place] = static_cast<T>(total);
}

int product_small(const product &q, int32_t type, cudaStream_t stream);
int product_tensor(const product &q, int32_t type, cudaStream_t stream);

}  // namespace lowra
