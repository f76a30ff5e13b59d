// What all CUDA kernels share: element types, the place of a packed row, scales, checks of the arguments, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "lowra.h"
#include "checks.h"

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
  return {(int)s.rows4,
          (int)s.rows2,
          (int)s.rows1,
          (int)lowra_row_bytes(s.in_features, 4),
          (int)lowra_row_bytes(s.in_features, 2),
          (int)lowra_row_bytes(s.in_features, 1)};
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

__device__ __forceinline__ const uint8_t *scale_address(const lowra_packed &p, size_t index) {
  const int shift = p.scale_type == LOWRA_UINT8 ? 0 : p.scale_type == LOWRA_FLOAT16 ? 1 : 2;
  return static_cast<const uint8_t *>(p.scales) + (index << shift);
}

// Division of a chunk number by a small constant of the launch: multiplication by ceil(2^32 / divisor). Exact while
// number * divisor < 2^32; a divisor of 1 is marked by 0, since 2^32 has no place in the word.
struct small_divisor {
  uint32_t magic;
  __device__ __forceinline__ uint32_t divide(uint32_t number) const { return magic ? __umulhi(number, magic) : number; }
};

inline small_divisor divisor_of(uint32_t divisor) {
  return {divisor == 1 ? 0u : (uint32_t)(((uint64_t{1} << 32) + divisor - 1) / divisor)};
}

// What the kernels count in 32 bits.
constexpr int64_t kMostCounted = INT32_MAX / 8;

inline bool bad_cuda_shape(const lowra_shape &s) {
  return bad_shape(s) || row_count(s) > kMostCounted || s.in_features > kMostCounted;
}

// Codes are loaded 16 bytes at a time, levels 4.
inline int check_packed(const lowra_packed &p) {
  return bad_cuda_shape(p.shape) ? LOWRA_BAD_SHAPE : check_memory(p, LOWRA_ROW_ALIGNMENT, 4);
}

inline bool aligned16(const void *pointer) { return aligned(pointer, 16); }

// Status of the launch just made; keeps the words of an error for lowra_cuda_error.
int launched();
int keep_error(cudaError_t error);

// Compute capability that the code at hand is compiled for, 75 for 7.5; 0 in what runs on the host.
#ifdef __CUDA_ARCH__
constexpr int kCode = __CUDA_ARCH__ / 10;
#else
constexpr int kCode = 0;
#endif
constexpr int kAmpere = 80, kHopper = 90;

// What the choice of a kernel goes by is `code`, not the chip: PTX for 7.5 on a Hopper chip has none of the
// instructions of 9.0, and is how the code for Turing is tested there.
struct device_limits {
  int code;                                // compute capability that the code which runs here was compiled for
  bool hopper;                             // whether the kernels in code for sm_90a run
  bool clusters;                           // whether blocks of a cluster can add up each other's sums
  int processors, l2_bytes, shared_bytes;  // shared_bytes: most that one block can have
};

// Of the current device; asked for once, since the queries cost more than a launch. LOWRA_NO_CODE where the library has
// no code for it.
int limits_of_current_device(device_limits &limits);

// Programmatic dependent launch (Hopper on): a kernel may be put on the chip while the one before it on the stream
// drains. Nothing that this one writes may be read, and nothing be written, before wait_for_earlier_kernels, which
// every block must reach: only then have all earlier kernels finished and their writes arrived. Prefetches into the L2
// cache may come before, since they move no value. let_later_kernels_start must come after the wait, so that a kernel
// that starts early follows at most one unfinished kernel, the one that it waits for.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_later_kernels_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Asks for [begin, end) in the L2 cache. The ends are rounded inwards to 16 bytes.
__device__ __forceinline__ void prefetch_to_l2(const void *begin, const void *end) {
#if __CUDA_ARCH__ >= 900
  const uint64_t from = (reinterpret_cast<uint64_t>(begin) + 15) & ~uint64_t{15};
  const uint64_t to = reinterpret_cast<uint64_t>(end) & ~uint64_t{15};
  if (from < to) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"((uint32_t)(to - from)) : "memory");
  }
#endif
}

// As above for a range of a few bytes: its ends are rounded outwards, which cannot leave a page.
__device__ __forceinline__ void prefetch_around(const void *begin, const void *end) {
#if __CUDA_ARCH__ >= 900
  const uint64_t from = reinterpret_cast<uint64_t>(begin) & ~uint64_t{15};
  const uint64_t to = (reinterpret_cast<uint64_t>(end) + 15) & ~uint64_t{15};
  if (begin < end) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"((uint32_t)(to - from)) : "memory");
  }
#endif
}

// Asks for the 32 bytes around `at` in the L2 cache.
__device__ __forceinline__ void prefetch_to_l2(const void *at) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at) : "memory");
#endif
}

// A launch of a kernel that calls wait_for_earlier_kernels, in clusters of `cluster` blocks.
template <class... Parameters, class... Arguments>
int launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, unsigned cluster,
                 cudaStream_t stream, const Arguments &...arguments) {
  device_limits limits;
  if (const int status = limits_of_current_device(limits)) return status;
  if (shared > 32 << 10) {  // 48 KB need no asking, but the kernel's own static memory counts too
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (error != cudaSuccess) return keep_error(error);
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster, attributes[1].val.clusterDim.y = 1, attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = limits.code < kHopper ? 0 : cluster > 1 ? 2 : 1;
  return keep_error(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// How many clusters of `cluster` blocks of a kernel the device holds at once; at least one.
template <class... Parameters>
int clusters_at_once(void (*kernel)(Parameters...), unsigned cluster, unsigned threads, size_t shared) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster), config.blockDim = dim3(threads), config.dynamicSmemBytes = shared;
  config.attrs = &attribute, config.numAttrs = 1;
  int count = 0;
  return cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess && count > 0 ? count : 1;
}

}  // namespace lowra
