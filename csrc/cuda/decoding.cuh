// Norm and gate of a decoding step, value by value, rounded where Transformers' modules round them (decoding.py).
#pragma once

#include "common.cuh"

namespace lowra {

constexpr int kVector = 8;  // values of one 16-byte load

template <class T>
struct alignas(16) vector8 {
  T value[kVector];
};

template <class T>
__device__ __forceinline__ vector8<T> load8(const void *base, size_t index) {
  const uint4 raw = reinterpret_cast<const uint4 *>(base)[index];
  return *reinterpret_cast<const vector8<T> *>(&raw);
}

template <class T>
__device__ __forceinline__ void store8(void *base, size_t index, const vector8<T> &v) {
  reinterpret_cast<uint4 *>(base)[index] = *reinterpret_cast<const uint4 *>(v.value);
}

// A normalised value times its weight.
template <class T>
__device__ __forceinline__ T weighted(float normal, T weight, bool one_plus) {
  if (one_plus) return static_cast<T>(normal * (1.f + to_float(weight)));  // Gemma: in float32, rounded once
  return static_cast<T>(to_float(static_cast<T>(normal)) * to_float(weight));
}

__device__ __forceinline__ float activated(float x, int32_t activation) {
  // Approximate to a few units of float32, of which nothing is left once the result is rounded to 16 bits.
  if (activation == LOWRA_SILU) return __fdividef(x, 1.f + __expf(-x));
  const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);  // sqrt(2 / pi)
  return 0.5f * x * (1.f + tanhf(inner));
}

template <class T>
__device__ __forceinline__ T gated(T opened, T up, int32_t activation) {
  return static_cast<T>(to_float(static_cast<T>(activated(to_float(opened), activation))) * to_float(up));
}

}  // namespace lowra
