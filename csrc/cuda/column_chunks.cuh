// Eight neighbouring columns of a row as float32: what a thread of the gradient kernels has of it.
#pragma once

#include "common.cuh"

namespace lowra {

constexpr int kChunk = 8;  // never of two groups, and whole bytes of every precision

// float8_e5m2, which is the upper half of float16. Numbers above its largest have become infinite: they count as that.
struct float8 {
  uint8_t bits;
};
__device__ __forceinline__ float to_float(float8 v) {
  return half_bits_to_float((uint16_t)((v.bits & 0x7f) == 0x7c ? (v.bits - 1) << 8 : v.bits << 8));
}

// The elements as they lie in memory, so that many loads can be on their way before the first is waited for.
template <class T>
struct alignas(sizeof(T) == 1 ? 8 : 16) raw_chunk {
  T values[kChunk];
};

// kVector: rows of whole chunks, 16-byte aligned. Columns from in_features on are 0.
template <bool kVector, class T>
__device__ __forceinline__ raw_chunk<T> load_raw(const T *row, int first, int in_features) {
  raw_chunk<T> chunk = {};
  if constexpr (kVector && sizeof(chunk) == 8) {
    *reinterpret_cast<uint2 *>(&chunk) = __ldg(reinterpret_cast<const uint2 *>(row + first));
  } else if constexpr (kVector) {
#pragma unroll
    for (int word = 0; word < (int)sizeof(chunk) / 16; ++word) {
      reinterpret_cast<uint4 *>(&chunk)[word] = __ldg(reinterpret_cast<const uint4 *>(row + first) + word);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (first + i < in_features) chunk.values[i] = row[first + i];
    }
  }
  return chunk;
}

template <class T, bool kVector>
__device__ __forceinline__ void load_chunk(const T *row, int first, int in_features, float (&values)[kChunk]) {
  const raw_chunk<T> chunk = load_raw<kVector>(row, first, in_features);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) values[i] = to_float(chunk.values[i]);
}

}  // namespace lowra
