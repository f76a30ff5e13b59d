// Gradients of levels and scales from that of the dense weight: one pass over the gradient and the codes.
#include "column_chunks.cuh"

namespace lowra {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

struct task {
  lowra_packed packed;
  rows_layout layout;
  const void *gradient;
  float *for_levels, *for_scales;
  int in_features, groups, chunks, chunks_per_group;
  small_divisor group_of_chunk;
};

struct shared_state {
  float levels[16];
  float sums[kWarps][16];
};

// The codes of eight columns, first one lowest. Rows begin at multiples of 16 bytes and are padded to such.
template <int kBits>
__device__ __forceinline__ uint32_t load_codes(const uint8_t *row, int chunk) {
  if constexpr (kBits == 4) return __ldg(reinterpret_cast<const unsigned int *>(row) + chunk);
  if constexpr (kBits == 2) return __ldg(reinterpret_cast<const unsigned short *>(row) + chunk);
  return __ldg(row + chunk);
}

template <int kBits, class T, bool kVector>
__device__ void sum_row(const task &t, const row_place &place, int row, shared_state &state, float *of_chunks) {
  constexpr int kLevels = 1 << kBits;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T *gradient = static_cast<const T *>(t.gradient) + (size_t)t.packed.row_order[row] * t.in_features;
  const uint8_t *codes = t.packed.codes + place.code_offset;
  float sums[kLevels] = {};
  for (int chunk = threadIdx.x; chunk < t.chunks; chunk += kThreads) {
    float values[kChunk];
    load_chunk<T, kVector>(gradient, chunk * kChunk, t.in_features, values);
    const uint32_t packed = load_codes<kBits>(codes, chunk);
    const float scale = load_scale(t.packed, (size_t)row * t.groups + t.group_of_chunk.divide(chunk));
    float of_scale = 0.f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const uint32_t code = packed >> (i * kBits) & (kLevels - 1);
      of_scale += values[i] * state.levels[code];
      const float of_level = values[i] * scale;
#pragma unroll
      for (int level = 0; level < kLevels; ++level) sums[level] += code == level ? of_level : 0.f;
    }
    if (t.for_scales) of_chunks[chunk] = of_scale;
  }
#pragma unroll
  for (int level = 0; level < kLevels; ++level) {
    for (int step = 16; step > 0; step /= 2) sums[level] += __shfl_xor_sync(~0u, sums[level], step);
    if (lane == 0) state.sums[warp][level] = sums[level];
  }
  __syncthreads();
  if (threadIdx.x < kLevels) {
    float sum = 0.f;
    for (int i = 0; i < kWarps; ++i) sum += state.sums[i][threadIdx.x];
    t.for_levels[place.table_offset + threadIdx.x] = sum;
  }
  if (!t.for_scales) return;
  for (int group = threadIdx.x; group < t.groups; group += kThreads) {
    const int first = group * t.chunks_per_group, end = min(first + t.chunks_per_group, t.chunks);
    float sum = 0.f;
    for (int chunk = first; chunk < end; ++chunk) sum += of_chunks[chunk];
    t.for_scales[(size_t)row * t.groups + group] = sum;
  }
}

// A block sums one packed row, always in the same order, so that training repeats bit for bit.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) table_gradients_kernel(const __grid_constant__ task t) {
  extern __shared__ float of_chunks[];
  __shared__ shared_state state;
  const int row = blockIdx.x;
  const row_place place = place_of<0>(t.layout, row);
  if (threadIdx.x < (1 << place.bits)) {
    const auto *levels = static_cast<const unsigned short *>(t.packed.levels);
    state.levels[threadIdx.x] = half_bits_to_float(__ldg(levels + place.table_offset + threadIdx.x));
  }
  __syncthreads();
  if (place.bits == 4) sum_row<4, T, kVector>(t, place, row, state, of_chunks);
  if (place.bits == 2) sum_row<2, T, kVector>(t, place, row, state, of_chunks);
  if (place.bits == 1) sum_row<1, T, kVector>(t, place, row, state, of_chunks);
}

template <class T>
int launch(const task &t, size_t shared, cudaStream_t stream) {
  const bool vector = t.in_features % kChunk == 0 && reinterpret_cast<uintptr_t>(t.gradient) % 16 == 0;
  const auto kernel = vector ? table_gradients_kernel<T, true> : table_gradients_kernel<T, false>;
  kernel<<<(unsigned)t.layout.rows(), kThreads, shared, stream>>>(t);
  return launched();
}

}  // namespace
}  // namespace lowra

int lowra_cuda_table_gradients(const lowra_packed *packed, const void *gradient, int32_t type, float *for_levels,
                               float *for_scales, void *stream) {
  using namespace lowra;
  if (!packed) return LOWRA_NULL_POINTER;
  if (const int status = check_packed(*packed)) return status;
  if (!is_float_type(type)) return LOWRA_BAD_TYPE;
  const lowra_shape &shape = packed->shape;
  task t = {};
  t.packed = *packed, t.layout = layout_of(shape);
  if (t.layout.rows() == 0) return LOWRA_OK;
  if (const int status = first_of(check_memory(gradient, bytes_of(type)), check_memory(for_levels, 4),
                                  for_scales ? check_memory(for_scales, 4) : LOWRA_OK)) {
    return status;
  }
  t.gradient = gradient, t.for_levels = for_levels, t.for_scales = for_scales;
  t.in_features = (int)shape.in_features;
  t.groups = (int)((shape.in_features + shape.group_size - 1) / shape.group_size);
  t.chunks = (t.in_features + kChunk - 1) / kChunk;
  t.chunks_per_group = (int)shape.group_size / kChunk;
  t.group_of_chunk = divisor_of((uint32_t)t.chunks_per_group);
  const size_t shared = for_scales ? (size_t)t.chunks * sizeof(float) : 0;
  if (shared + sizeof(shared_state) > 48 << 10) return LOWRA_UNSUPPORTED;
  const auto on = static_cast<cudaStream_t>(stream);
  if (type == LOWRA_FLOAT32) return launch<float>(t, shared, on);
  if (type == LOWRA_FLOAT16) return launch<fp16>(t, shared, on);
  return launch<bf16>(t, shared, on);
}
