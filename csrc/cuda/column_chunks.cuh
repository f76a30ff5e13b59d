// Eight neighbouring columns of a row as float32: what a thread of the gradient kernels has of it.
#pragma once

#include "common.cuh"

namespace lowra {

constexpr int kChunk = 8;  // never of two groups, and whole bytes of every precision

// kVector: rows of whole chunks, 16-byte aligned. Columns from in_features on are 0.
template <class T, bool kVector>
__device__ __forceinline__ void load_chunk(const T *row, int first, int in_features, float (&values)[kChunk]) {
  if constexpr (kVector) {
    constexpr int kWords = kChunk * sizeof(T) / 16, kEach = 16 / sizeof(T);
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint4 raw = __ldg(reinterpret_cast<const uint4 *>(row + first) + word);
      const T *part = reinterpret_cast<const T *>(&raw);
#pragma unroll
      for (int i = 0; i < kEach; ++i) values[word * kEach + i] = to_float(part[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[i] = first + i < in_features ? to_float(row[first + i]) : 0.f;
  }
}

}  // namespace lowra
