// float16 and bfloat16 as bits, without a type of the compiler's. Static, so that every file has its own copy under its
// own compiler flags (rows.inl says why).
#ifndef LOWRA_CPU_HALVES_H
#define LOWRA_CPU_HALVES_H

#include "lowra.h"

#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

static inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
  uint32_t exponent = (half >> 10) & 31, mantissa = half & 1023, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    float value = (float)mantissa * 5.9604644775390625e-8f;  // 2^-24, exact
    memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float value;
  memcpy(&value, &bits, 4);
  return value;
#endif
}

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline uint32_t float_to_bfloat(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40;  // keep NaN a NaN
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

static inline uint32_t float_to_half(float value) {
#if defined(__F16C__)
  return (uint32_t)(uint16_t)_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = float_bits(value), sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds past 65504
  if (magnitude < 0x38800000u) {                       // subnormal: let the float adder round at 2^-24
    float shifted;
    memcpy(&shifted, &magnitude, 4);
    return sign | (float_bits(shifted + 0.5f) - float_bits(0.5f));
  }
  return sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13);
#endif
}

static inline float load_element(const void *weight, int32_t type, int64_t index) {
  if (type == LOWRA_FLOAT32) return ((const float *)weight)[index];
  const uint16_t raw = ((const uint16_t *)weight)[index];
  if (type == LOWRA_FLOAT16) return half_to_float(raw);
  const uint32_t bits = (uint32_t)raw << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline void store_element(float value, int32_t type, int64_t index, void *out) {
  if (type == LOWRA_FLOAT32) {
    ((float *)out)[index] = value;
  } else {
    ((uint16_t *)out)[index] = (uint16_t)(type == LOWRA_FLOAT16 ? float_to_half(value) : float_to_bfloat(value));
  }
}

#endif
