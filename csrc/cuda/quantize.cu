// Quantise: group absmax, codes and packing in one pass over the weight. Reference: reference.quantize.
//
// A warp takes 1024 neighbouring weights of one row, a lane 8 of them at a time: one 16-byte load of 16-bit weights, and
// the codes of 8 weights fill whole bytes at every precision, so no two lanes write the same byte.
#include "common.cuh"

namespace lowra {
namespace {

constexpr int kWarps = 8;     // warps of a block, each on its own row
constexpr int kChunks = 4;    // chunks of 8 weights that a lane has in flight
constexpr int kSpan = 32 * kChunks;

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
__device__ __forceinline__ void quantize_span(const In *row, int in_features, int group_shift, int groups,
                                              bool vector, int first_chunk, const float *thresholds, uint8_t *codes,
                                              int stride, float *absmax) {
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

template <class In>
__global__ void __launch_bounds__(32 * kWarps)
    quantize_kernel(const In *weight, const int32_t *row_order, const float *thresholds, uint8_t *codes, float *absmax,
                    rows_layout layout, int in_features, int group_shift, int groups, bool vector) {
  const int row = blockIdx.y * kWarps + threadIdx.y;
  if (row >= layout.rows()) return;
  const row_place place = place_of<-1>(layout, row);
  const In *source = weight + (size_t)row_order[row] * in_features;
  const float *cuts = thresholds + place.table_offset;
  uint8_t *target = codes + place.code_offset;
  float *scale = absmax + (size_t)row * groups;
  const int first = blockIdx.x * kSpan;
  if (place.bits == 1) {
    quantize_span<1>(source, in_features, group_shift, groups, vector, first, cuts, target, place.stride, scale);
  } else if (place.bits == 2) {
    quantize_span<2>(source, in_features, group_shift, groups, vector, first, cuts, target, place.stride, scale);
  } else {
    quantize_span<4>(source, in_features, group_shift, groups, vector, first, cuts, target, place.stride, scale);
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
  const dim3 grid((chunks + kSpan - 1) / kSpan, (layout.rows() + kWarps - 1) / kWarps), block(32, kWarps);
  quantize_kernel<In><<<grid, block, 0, stream>>>(static_cast<const In *>(weight), row_order, thresholds, codes, absmax,
                                                  layout, (int)s.in_features, __builtin_ctz((unsigned)s.group_size / 8), groups, vector);
  return launched();
}

// One block for each 256 scales. Reference: reference.encode_scales.
__global__ void __launch_bounds__(LOWRA_SCALE_BLOCK)
    encode_scales_kernel(const float *absmax, int64_t count, uint8_t *scales, float *scale_steps) {
  __shared__ float of_warp[LOWRA_SCALE_BLOCK / 32];
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
  if (bad_shape(*shape)) return LOWRA_BAD_SHAPE;
  if (weight_type < LOWRA_FLOAT32 || weight_type > LOWRA_BFLOAT16) return LOWRA_BAD_TYPE;
  if ((shape->group_size & (shape->group_size - 1)) != 0) return LOWRA_UNSUPPORTED;
  if (row_count(*shape) == 0) return LOWRA_OK;
  if (!weight || !row_order || !thresholds || !codes || !absmax) return LOWRA_NULL_POINTER;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (weight_type == LOWRA_FLOAT32) return quantize<float>(*shape, weight, row_order, thresholds, codes, absmax, on);
  if (weight_type == LOWRA_FLOAT16) return quantize<fp16>(*shape, weight, row_order, thresholds, codes, absmax, on);
  return quantize<bf16>(*shape, weight, row_order, thresholds, codes, absmax, on);
}

int lowra_cuda_encode_scales(const float *absmax, int64_t count, uint8_t *scales, float *scale_steps, void *stream) {
  using namespace lowra;
  if (count < 0 || count > (int64_t)INT32_MAX * LOWRA_SCALE_BLOCK) return LOWRA_BAD_SHAPE;
  if (count == 0) return LOWRA_OK;
  if (!absmax || !scales || !scale_steps) return LOWRA_NULL_POINTER;
  const unsigned blocks = (unsigned)((count + LOWRA_SCALE_BLOCK - 1) / LOWRA_SCALE_BLOCK);
  encode_scales_kernel<<<blocks, LOWRA_SCALE_BLOCK, 0, static_cast<cudaStream_t>(stream)>>>(absmax, count, scales,
                                                                                           scale_steps);
  return launched();
}
