// What all CUDA kernels share: element types, the place of a packed row, scales, checks of the arguments, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "lowra.h"

namespace lowra {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(fp16 v) { return __half2float(v); }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }

// Two values rounded to T in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t *>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t *>(&both);
}

// prmt.b32 with all four bits of a selector nibble: bits 0-2 name a byte of (low, high), bit 3 spreads its sign.
// (The __byte_perm intrinsic promises only bits 0-2.)
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
}

__device__ __forceinline__ float half_bits_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// The packed rows in 32-bit counts, with the bytes of a row of each precision.
struct rows_layout {
  int rows4, rows2, rows1;
  int bytes4, bytes2, bytes1;
  __host__ __device__ int rows() const { return rows4 + rows2 + rows1; }
};

inline rows_layout layout_of(const lowra_shape &s) {
  return {(int)s.rows4, (int)s.rows2, (int)s.rows1, (int)lowra_row_bytes(s.in_features, 4),
          (int)lowra_row_bytes(s.in_features, 2), (int)lowra_row_bytes(s.in_features, 1)};
}

// Where a packed row begins: in the codes, and in a table with 2^bits + EXTRA entries for each row.
struct row_place {
  int bits, stride;
  size_t code_offset, table_offset;
};

// EXTRA: 0 for levels, -1 for thresholds, of which a row has one fewer than levels.
template <int EXTRA>
__device__ __forceinline__ row_place place_of(const rows_layout &l, int row) {
  if (row < l.rows4) return {4, l.bytes4, (size_t)row * l.bytes4, (size_t)row * (16 + EXTRA)};
  const size_t codes4 = (size_t)l.rows4 * l.bytes4, table4 = (size_t)l.rows4 * (16 + EXTRA);
  row -= l.rows4;
  if (row < l.rows2) return {2, l.bytes2, codes4 + (size_t)row * l.bytes2, table4 + (size_t)row * (4 + EXTRA)};
  row -= l.rows2;
  return {1, l.bytes1, codes4 + (size_t)l.rows2 * l.bytes2 + (size_t)row * l.bytes1,
          table4 + (size_t)l.rows2 * (4 + EXTRA) + (size_t)row * (2 + EXTRA)};
}

// One scale of any storage. The switch is uniform over the grid, so it costs a predicted branch, and a template
// parameter for it would triple the number of kernels.
__device__ __forceinline__ float load_scale(const lowra_packed &p, size_t index) {
  if (p.scale_type == LOWRA_UINT8) {
    const float root = __ldg(static_cast<const uint8_t *>(p.scales) + index);
    return root * root * __ldg(p.scale_steps + (index >> 8));
  }
  if (p.scale_type == LOWRA_FLOAT16) {
    return half_bits_to_float(__ldg(static_cast<const unsigned short *>(p.scales) + index));
  }
  return __ldg(static_cast<const float *>(p.scales) + index);
}
static_assert(LOWRA_SCALE_BLOCK == 1 << 8, "load_scale shifts by 8");

// Division of a chunk number by a small constant of the launch: multiplication by ceil(2^32 / divisor). Exact while
// number * divisor < 2^32; a divisor of 1 is marked by 0, since 2^32 has no place in the word.
struct small_divisor {
  uint32_t magic;
  __device__ __forceinline__ uint32_t divide(uint32_t number) const {
    return magic ? __umulhi(number, magic) : number;
  }
};

inline small_divisor divisor_of(uint32_t divisor) {
  return {divisor == 1 ? 0u : (uint32_t)(((uint64_t{1} << 32) + divisor - 1) / divisor)};
}

inline bool bad_shape(const lowra_shape &s) {
  const int64_t limit = INT32_MAX;
  return s.rows4 < 0 || s.rows2 < 0 || s.rows1 < 0 || s.in_features <= 0 || s.group_size <= 0 ||
         s.group_size % 8 != 0 || s.group_size > LOWRA_MAX_GROUP_SIZE || s.rows4 + s.rows2 + s.rows1 > limit / 8 ||
         s.in_features > limit / 8;
}

inline bool bad_scale_type(int32_t type) {
  return type != LOWRA_FLOAT32 && type != LOWRA_FLOAT16 && type != LOWRA_UINT8;
}

inline int check_packed(const lowra_packed &p) {
  if (bad_shape(p.shape)) return LOWRA_BAD_SHAPE;
  if (bad_scale_type(p.scale_type)) return LOWRA_BAD_TYPE;
  if (!p.codes || !p.row_order || !p.scales || !p.levels) return LOWRA_NULL_POINTER;
  if (p.scale_type == LOWRA_UINT8 && !p.scale_steps) return LOWRA_NULL_POINTER;
  return LOWRA_OK;
}

inline int64_t row_count(const lowra_shape &s) { return s.rows4 + s.rows2 + s.rows1; }

inline bool aligned16(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Status of the launch just made; keeps the words of an error for lowra_cuda_error.
int launched();
int keep_error(cudaError_t error);

}  // namespace lowra
