// Quantise: group absmax, codes and packing in one pass over the weight. Reference: reference.quantize.
//
// A warp takes 1024 neighbouring weights of one row. 16-bit weights of groups of 32 or more: a lane takes 32
// neighbouring ones and compares two at a time. A 16-bit weight is greater than a float32 edge exactly if it is greater
// than the edge rounded down to 16 bits, so nothing is lost; the code of two weights is searched with masks, each step
// halving the edges that are left. Any other weight: a lane takes 8 at a time and counts all edges below each.
#include <type_traits>

#include "common.cuh"

namespace lowra {
namespace {

constexpr int kWarps = 8;   // warps of a block, each on its own row
constexpr int kChunks = 4;  // chunks of 8 weights of a lane
constexpr int kSpan = 32 * kChunks;

// Two edges, both `edge` rounded down to T.
template <class T>
__device__ __forceinline__ uint32_t rounded_down(float edge);
template <>
__device__ __forceinline__ uint32_t rounded_down<bf16>(float edge) {
  const uint32_t bits = __float_as_uint(edge);
  const uint32_t down = bits + (bits >> 31) * 0xffffu;  // below zero, down is away from zero
  return permute(down, 0, 0x3232);
}
template <>
__device__ __forceinline__ uint32_t rounded_down<fp16>(float edge) {
  return __half_as_ushort(__float2half_rd(edge)) * 0x00010001u;
}

// 0xffff in each half whose value is greater.
template <class T>
__device__ __forceinline__ uint32_t greater(uint32_t values, uint32_t edges);
template <>
__device__ __forceinline__ uint32_t greater<bf16>(uint32_t values, uint32_t edges) {
  return __hgt2_mask(*reinterpret_cast<const __nv_bfloat162 *>(&values),
                     *reinterpret_cast<const __nv_bfloat162 *>(&edges));
}
template <>
__device__ __forceinline__ uint32_t greater<fp16>(uint32_t values, uint32_t edges) {
  return __hgt2_mask(*reinterpret_cast<const __half2 *>(&values), *reinterpret_cast<const __half2 *>(&edges));
}

// The larger absolute value in each half.
template <class T>
__device__ __forceinline__ uint32_t larger_sizes(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t larger_sizes<bf16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 out = __hmax2(__habs2(*reinterpret_cast<const __nv_bfloat162 *>(&a)),
                                     __habs2(*reinterpret_cast<const __nv_bfloat162 *>(&b)));
  return *reinterpret_cast<const uint32_t *>(&out);
}
template <>
__device__ __forceinline__ uint32_t larger_sizes<fp16>(uint32_t a, uint32_t b) {
  const __half2 out =
      __hmax2(__habs2(*reinterpret_cast<const __half2 *>(&a)), __habs2(*reinterpret_cast<const __half2 *>(&b)));
  return *reinterpret_cast<const uint32_t *>(&out);
}

__device__ __forceinline__ uint32_t choose(uint32_t mask, uint32_t yes, uint32_t no) {
  return (mask & yes) | (~mask & no);
}

// The codes of two weights, given to bits `low` and up of the first and `high` and up of the second.
// edge: ascending.
template <int BITS, class T>
__device__ __forceinline__ uint32_t search(uint32_t two, const uint32_t (&edge)[(1 << BITS) - 1], int low, int high) {
  const auto place = [&](uint32_t mask, int bit) { return mask & (1u << (low + bit) | 1u << (16 + high + bit)); };
  if constexpr (BITS == 1) {
    return place(greater<T>(two, edge[0]), 0);
  } else if constexpr (BITS == 2) {
    const uint32_t upper = greater<T>(two, edge[1]);
    return place(upper, 1) | place(greater<T>(two, choose(upper, edge[2], edge[0])), 0);
  } else {
    const uint32_t m3 = greater<T>(two, edge[7]);
    const uint32_t m2 = greater<T>(two, choose(m3, edge[11], edge[3]));
    uint32_t three[3];  // the edges inside the quarter that is left
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      three[i] = choose(m2, choose(m3, edge[12 + i], edge[4 + i]), choose(m3, edge[8 + i], edge[i]));
    }
    const uint32_t m1 = greater<T>(two, three[1]);
    const uint32_t m0 = greater<T>(two, choose(m1, three[2], three[0]));
    return place(m3, 3) | place(m2, 2) | place(m1, 1) | place(m0, 0);
  }
}

// 32 neighbouring weights of a lane. words: pairs of weights; out: their codes.
template <int BITS, class T>
__device__ __forceinline__ void search_all(const uint32_t (&words)[16], const uint32_t (&edge)[(1 << BITS) - 1],
                                           uint32_t (&out)[BITS]) {
  constexpr int kPairs = 8 / BITS;  // whose codes fill 16 bits
#pragma unroll
  for (int o = 0; o < BITS; ++o) {
    uint32_t half[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t sum = 0;
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        sum |= search<BITS, T>(words[(2 * o + i) * kPairs + k], edge, 2 * k * BITS, (2 * k + 1) * BITS);
      }
      half[i] = sum | sum >> 16;
    }
    out[o] = permute(half[0], half[1], 0x5410);
  }
}

// The same for thresholds in any order: every edge is counted.
template <int BITS, class T>
__device__ __forceinline__ void count_all(const uint32_t (&words)[16], const float *thresholds, float largest,
                                          uint32_t (&out)[BITS]) {
  uint32_t codes[16] = {};  // of two weights, 16 bits each
  for (int j = 0; j < (1 << BITS) - 1; ++j) {
    const uint32_t edge = rounded_down<T>(__ldg(thresholds + j) * largest);
#pragma unroll
    for (int i = 0; i < 16; ++i) codes[i] += greater<T>(words[i], edge) & 0x00010001u;
  }
#pragma unroll
  for (int o = 0; o < BITS; ++o) {
    out[o] = 0;
#pragma unroll
    for (int k = 0; k < 16 / BITS; ++k) {
      const uint32_t two = codes[o * (16 / BITS) + k];
      out[o] |= ((two & 0xffff) | two >> 16 << BITS) << (2 * k * BITS);
    }
  }
}

// T: bfloat16 or float16. in_features is a multiple of 32.
template <int BITS, class T>
__device__ __forceinline__ void quantize_pairs(const T *row, int in_features, int group_shift, int groups, int span,
                                               const float *thresholds, uint8_t *codes, int stride, float *absmax) {
  constexpr int kCuts = (1 << BITS) - 1;
  const int part = span * 32 + threadIdx.x;  // 32 weights each
  uint32_t words[16] = {};
  if (part * 32 < in_features) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 raw = __ldg(reinterpret_cast<const uint4 *>(row + part * 32) + i);
      words[4 * i] = raw.x, words[4 * i + 1] = raw.y, words[4 * i + 2] = raw.z, words[4 * i + 3] = raw.w;
    }
  }
  uint32_t most = words[0];
#pragma unroll
  for (int i = 1; i < 16; ++i) most = larger_sizes<T>(most, words[i]);
  const T *two = reinterpret_cast<const T *>(&most);
  float largest = fmaxf(fabsf(to_float(two[0])), fabsf(to_float(two[1])));
  const int lanes = group_shift - 2;  // log2 of the lanes of a group
  for (int step = 1; step < 1 << lanes; step <<= 1) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  if ((part & ((1 << lanes) - 1)) == 0 && part >> lanes < groups) absmax[part >> lanes] = largest;
  const int cut = min((int)threadIdx.x, kCuts - 1);
  const bool ascending = __ldg(thresholds + cut) <= __ldg(thresholds + min(cut + 1, kCuts - 1));
  uint32_t out[BITS];
  if (__all_sync(0xffffffffu, ascending)) {
    uint32_t edge[kCuts];
#pragma unroll
    for (int i = 0; i < kCuts; ++i) edge[i] = rounded_down<T>(__ldg(thresholds + i) * largest);
    search_all<BITS, T>(words, edge, out);
  } else {
    count_all<BITS, T>(words, thresholds, largest, out);
  }
  if (part * 4 * BITS >= stride) return;
  // Weights past the end of the row are zero padding.
#pragma unroll
  for (int i = 0; i < BITS; ++i) out[i] = part * 32 < in_features ? out[i] : 0u;
  if constexpr (BITS == 1) reinterpret_cast<uint32_t *>(codes)[part] = out[0];
  if constexpr (BITS == 2) reinterpret_cast<uint2 *>(codes)[part] = make_uint2(out[0], out[1]);
  if constexpr (BITS == 4) reinterpret_cast<uint4 *>(codes)[part] = make_uint4(out[0], out[1], out[2], out[3]);
}

// In: element type of the weight, which decides the width of the loads.
template <class In>
__device__ __forceinline__ void load_chunk(const In *row, int first, int in_features, bool vector, float (&w)[8]) {
  if (vector && first + 8 <= in_features) {
    constexpr int kLoads = sizeof(In) / 2;
    uint4 raw[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) raw[i] = __ldg(reinterpret_cast<const uint4 *>(row + first) + i);
    const In *value = reinterpret_cast<const In *>(raw);
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = to_float(value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = first + i < in_features ? to_float(row[first + i]) : 0.f;
  }
}

// BITS: 1, 2 or 4; the thresholds of the row stay in registers, which needs their number at compile time.
template <int BITS, class In>
__device__ __forceinline__ void quantize_span(const In *row, int in_features, int group_shift, int groups, bool vector,
                                              int first_chunk, const float *thresholds, uint8_t *codes, int stride,
                                              float *absmax) {
  constexpr int kCuts = (1 << BITS) - 1;
  float cut[kCuts];
#pragma unroll
  for (int i = 0; i < kCuts; ++i) cut[i] = __ldg(thresholds + i);
  const int lane = threadIdx.x;
  float w[kChunks][8];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    load_chunk(row, (first_chunk + 32 * c + lane) * 8, in_features, vector, w[c]);
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = first_chunk + 32 * c + lane;
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(w[c][i]));
    for (int step = 1; step < 1 << group_shift; step <<= 1) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    const int group = chunk >> group_shift;  // 2^group_shift neighbouring lanes hold one group
    if (group << group_shift == chunk && group < groups) absmax[group] = largest;
    uint32_t word = 0;
    if constexpr (BITS == 1) {
      const float edge = cut[0] * largest;
#pragma unroll
      for (int i = 0; i < 8; ++i) word |= (w[c][i] > edge ? 1u : 0u) << i;
    } else {
      float edge[kCuts];
#pragma unroll
      for (int i = 0; i < kCuts; ++i) edge[i] = cut[i] * largest;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint32_t code = 0;
#pragma unroll
        for (int j = 0; j < kCuts; ++j) code += w[c][i] > edge[j] ? 1u : 0u;
        // Weights past the end of the row are zero padding.
        word |= (chunk * 8 + i < in_features ? code : 0u) << (BITS * i);
      }
    }
    if constexpr (BITS == 1) {
      const int inside = in_features - chunk * 8;
      if (inside < 8) word = inside > 0 ? word & ((1u << inside) - 1) : 0u;
    }
    if (chunk * BITS < stride) {  // a chunk has BITS bytes of codes
      if constexpr (BITS == 4) reinterpret_cast<uint32_t *>(codes)[chunk] = word;
      if constexpr (BITS == 2) reinterpret_cast<uint16_t *>(codes)[chunk] = (uint16_t)word;
      if constexpr (BITS == 1) codes[chunk] = (uint8_t)word;
    }
  }
}

// PAIRS: whether lanes take 32 weights and compare two at a time.
template <bool PAIRS, class In>
__global__ void __launch_bounds__(32 * kWarps)
    quantize_kernel(const In *weight, const int32_t *row_order, const float *thresholds, uint8_t *codes, float *absmax,
                    rows_layout layout, int in_features, int group_shift, int groups, bool vector) {
  const int row = blockIdx.y * kWarps + threadIdx.y;
  wait_for_earlier_kernels();
  let_later_kernels_start();
  if (row >= layout.rows()) return;
  const row_place place = place_of<-1>(layout, row);
  const In *source = weight + (size_t)row_order[row] * in_features;
  const float *cuts = thresholds + place.table_offset;
  uint8_t *target = codes + place.code_offset;
  float *scale = absmax + (size_t)row * groups;
  const auto quantize = [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    if constexpr (PAIRS) {
      quantize_pairs<kBits>(source, in_features, group_shift, groups, blockIdx.x, cuts, target, place.stride, scale);
    } else {
      quantize_span<kBits>(source, in_features, group_shift, groups, vector, blockIdx.x * kSpan, cuts, target,
                           place.stride, scale);
    }
  };
  if (place.bits == 1) {
    quantize(std::integral_constant<int, 1>());
  } else if (place.bits == 2) {
    quantize(std::integral_constant<int, 2>());
  } else {
    quantize(std::integral_constant<int, 4>());
  }
}

template <class In>
int quantize(const lowra_shape &s, const void *weight, const int32_t *row_order, const float *thresholds,
             uint8_t *codes, float *absmax, cudaStream_t stream) {
  const rows_layout layout = layout_of(s);
  const int groups = (int)((s.in_features + s.group_size - 1) / s.group_size);
  // The padding of a row is written too, hence the chunks of the longest row.
  const int chunks = layout.bytes1 > 0 ? layout.bytes1 : 1;
  const bool vector = aligned16(weight) && s.in_features * sizeof(In) % 16 == 0;
  const bool pairs = vector && s.in_features % 32 == 0 && s.group_size >= 32;
  const dim3 grid((chunks + kSpan - 1) / kSpan, (layout.rows() + kWarps - 1) / kWarps), block(32, kWarps);
  const auto launch = [&](auto *kernel) {
    return launch_early(kernel, grid, block, 0, 1, stream, static_cast<const In *>(weight), row_order, thresholds,
                        codes, absmax, layout, (int)s.in_features, __builtin_ctz((unsigned)s.group_size / 8), groups,
                        vector);
  };
  if constexpr (sizeof(In) == 2) {
    if (pairs) return launch(quantize_kernel<true, In>);
  }
  return launch(quantize_kernel<false, In>);
}

// One block for each 256 scales. Reference: reference.encode_scales.
__global__ void __launch_bounds__(LOWRA_SCALE_BLOCK)
    encode_scales_kernel(const float *absmax, int64_t count, uint8_t *scales, float *scale_steps) {
  __shared__ float of_warp[LOWRA_SCALE_BLOCK / 32];
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int64_t index = (int64_t)blockIdx.x * LOWRA_SCALE_BLOCK + threadIdx.x;
  const float value = index < count ? absmax[index] : 0.f;
  float largest = value;
  for (int step = 16; step > 0; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int i = 0; i < LOWRA_SCALE_BLOCK / 32; ++i) largest = fmaxf(largest, of_warp[i]);
  const float step = __fdiv_rn(largest, 65025.f);
  if (threadIdx.x == 0) scale_steps[blockIdx.x] = step;
  if (index >= count) return;
  float code = 0.f;
  if (value > 0.f && step > 0.f) code = fmaxf(1.f, fminf(255.f, rintf(__fsqrt_rn(__fdiv_rn(value, step)))));
  scales[index] = (uint8_t)code;
}

}  // namespace
}  // namespace lowra

int lowra_cuda_quantize(const lowra_shape *shape, const void *weight, int32_t weight_type, const int32_t *row_order,
                        const float *thresholds, uint8_t *codes, float *absmax, void *stream) {
  using namespace lowra;
  if (!shape) return LOWRA_NULL_POINTER;
  if (bad_cuda_shape(*shape)) return LOWRA_BAD_SHAPE;
  if (!is_float_type(weight_type)) return LOWRA_BAD_TYPE;
  if ((shape->group_size & (shape->group_size - 1)) != 0) return LOWRA_UNSUPPORTED;
  if (row_count(*shape) == 0) return LOWRA_OK;
  if (const int status =
          first_of(check_memory(weight, bytes_of(weight_type)), check_memory(row_order, 4), check_memory(thresholds, 4),
                   check_memory(codes, LOWRA_ROW_ALIGNMENT), check_memory(absmax, 4))) {
    return status;
  }
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (weight_type == LOWRA_FLOAT32) return quantize<float>(*shape, weight, row_order, thresholds, codes, absmax, on);
  if (weight_type == LOWRA_FLOAT16) return quantize<fp16>(*shape, weight, row_order, thresholds, codes, absmax, on);
  return quantize<bf16>(*shape, weight, row_order, thresholds, codes, absmax, on);
}

int lowra_cuda_encode_scales(const float *absmax, int64_t count, uint8_t *scales, float *scale_steps, void *stream) {
  using namespace lowra;
  if (count < 0 || count > (int64_t)INT32_MAX * LOWRA_SCALE_BLOCK) return LOWRA_BAD_SHAPE;
  if (count == 0) return LOWRA_OK;
  if (const int status = first_of(check_memory(absmax, 4), check_memory(scales, 1), check_memory(scale_steps, 4))) {
    return status;
  }
  const unsigned blocks = (unsigned)((count + LOWRA_SCALE_BLOCK - 1) / LOWRA_SCALE_BLOCK);
  return launch_early(encode_scales_kernel, dim3(blocks), dim3(LOWRA_SCALE_BLOCK), 0, 1,
                      static_cast<cudaStream_t>(stream), absmax, count, scales, scale_steps);
}
