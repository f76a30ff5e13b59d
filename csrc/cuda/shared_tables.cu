// Tables with changes that the levels of a channel, or the scales of a group of columns, have in common, and the
// gradients of these changes (bitsandbytes/backends/lowra/shared_tables.py). No gradient of a dense weight is made:
// sums over tokens of two tensors that a backward pass has anyway are enough.
#include "column_chunks.cuh"

namespace lowra {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kAtOnce = 4;       // tokens of group_sums whose loads are on their way together
constexpr int kMoreAtOnce = 8;   // of channel_sums
constexpr int kRowsOfSums = 32;  // rows of a block that adds up parts

struct tables_task {
  lowra_packed packed;
  rows_layout layout;
  const float *level_shift, *level_gain, *scale_gain;
  fp16 *levels;
  float *scales;
  int groups;
};

// A warp for each packed row.
__global__ void __launch_bounds__(kThreads) shared_tables_kernel(const __grid_constant__ tables_task t) {
  const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_earlier_kernels();
  if (row >= t.layout.rows()) return;
  const row_place place = place_of<0>(t.layout, row);
  if (lane < 1 << place.bits) {
    const size_t entry = place.table_offset + lane;
    float level = half_bits_to_float(__ldg(t.packed.levels + entry)) + __ldg(t.level_shift + row);
    if (t.level_gain) level *= expf(__ldg(t.level_gain + row));
    t.levels[entry] = __float2half_rn(level);
  }
  const size_t first = (size_t)row * t.groups;
  for (int group = lane; group < t.groups; group += 32) {
    t.scales[first + group] = load_scale(t.packed, first + group) * expf(__ldg(t.scale_gain + group));
  }
}

struct sums_task {
  const void *x, *y;
  void *means;
  float *products;
  int tokens, columns, chunks, chunks_per_block, chunks_per_group, groups, tokens_per_part;
  float share;  // 1 / group size
};

template <class T>
__device__ __forceinline__ T rounded(float value);
template <>
__device__ __forceinline__ float rounded<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ fp16 rounded<fp16>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ bf16 rounded<bf16>(float value) {
  return __float2bfloat16_rn(value);
}

// A block has some columns, whole groups of them, of the tokens of one part; a thread eight of the columns.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) group_sums_kernel(const __grid_constant__ sums_task t) {
  __shared__ float sums[kAtOnce][kThreads];
  const int chunk = blockIdx.x * t.chunks_per_block + threadIdx.x;
  const bool mine = threadIdx.x < t.chunks_per_block && chunk < t.chunks;
  const int first_group = blockIdx.x * t.chunks_per_block / t.chunks_per_group;
  const int groups = min(t.chunks_per_block / t.chunks_per_group, t.groups - first_group);
  const int begin = blockIdx.y * t.tokens_per_part, end = min(begin + t.tokens_per_part, t.tokens);
  const T *x = static_cast<const T *>(t.x), *y = static_cast<const T *>(t.y);
  float product = 0.f;
  wait_for_earlier_kernels();
  for (int token = begin; token < end; token += kAtOnce) {
    const int some = min(kAtOnce, end - token);
    if (mine) {
      raw_chunk<T> own[kAtOnce], other[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const size_t row = (size_t)(token + min(i, some - 1)) * t.columns;
        own[i] = load_raw<kVector>(x + row, chunk * kChunk, t.columns);
        other[i] = load_raw<kVector>(y + row, chunk * kChunk, t.columns);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i >= some) break;
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          const float value = to_float(own[i].values[k]);
          sum += value, product += value * to_float(other[i].values[k]);
        }
        sums[i][threadIdx.x] = sum;
      }
    }
    __syncthreads();
    for (int place = threadIdx.x; place < some * groups; place += kThreads) {
      const int i = place / groups, group = place % groups, first = group * t.chunks_per_group;
      const int last = min(first + t.chunks_per_group, t.chunks - blockIdx.x * t.chunks_per_block);
      float sum = 0.f;
      for (int k = 0; k < t.chunks_per_group; ++k) {  // each four groups begin at another bank
        const int turned = k + group / 4 % t.chunks_per_group;
        const int own = first + (turned < t.chunks_per_group ? turned : turned - t.chunks_per_group);
        if (own < last) sum += sums[i][own];
      }
      static_cast<T *>(t.means)[(size_t)(token + i) * t.groups + first_group + group] = rounded<T>(sum * t.share);
    }
    __syncthreads();
  }
  sums[0][threadIdx.x] = mine ? product : 0.f;
  __syncthreads();
  for (int group = threadIdx.x; group < groups; group += kThreads) {
    float sum = 0.f;
    for (int k = 0; k < t.chunks_per_group; ++k) sum += sums[0][group * t.chunks_per_group + k];
    t.products[(size_t)blockIdx.y * t.groups + first_group + group] = sum;
  }
}

// U: of y, T itself or float8.
template <class T, class U, bool kVector>
__global__ void __launch_bounds__(kThreads) channel_sums_kernel(const __grid_constant__ sums_task t) {
  const int chunk = blockIdx.x * kThreads + threadIdx.x;
  if (chunk >= t.chunks) return;  // the first thread of a block never does, so that every block waits
  const int begin = blockIdx.y * t.tokens_per_part, end = min(begin + t.tokens_per_part, t.tokens);
  const T *x = static_cast<const T *>(t.x);
  const U *y = static_cast<const U *>(t.y);
  float products[kChunk] = {};
  wait_for_earlier_kernels();
  for (int token = begin; token < end; token += kMoreAtOnce) {
    raw_chunk<T> own[kMoreAtOnce];
    raw_chunk<U> other[kMoreAtOnce];
#pragma unroll
    for (int i = 0; i < kMoreAtOnce; ++i) {
      const size_t row = (size_t)min(token + i, end - 1) * t.columns;
      own[i] = load_raw<kVector>(x + row, chunk * kChunk, t.columns);
      other[i] = load_raw<kVector>(y + row, chunk * kChunk, t.columns);
    }
#pragma unroll
    for (int i = 0; i < kMoreAtOnce; ++i) {
      if (token + i >= end) break;
#pragma unroll
      for (int k = 0; k < kChunk; ++k) products[k] += to_float(own[i].values[k]) * to_float(other[i].values[k]);
    }
  }
  float *out = t.products + (size_t)blockIdx.y * t.columns + chunk * kChunk;
  if constexpr (kVector) {
    reinterpret_cast<float4 *>(out)[0] = make_float4(products[0], products[1], products[2], products[3]);
    reinterpret_cast<float4 *>(out)[1] = make_float4(products[4], products[5], products[6], products[7]);
  } else {
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      if (chunk * kChunk + k < t.columns) out[k] = products[k];
    }
  }
}

struct gradients_task {
  const void *of_means;
  const float *of_groups, *of_channels, *scales, *level_gain;
  const int32_t *row_order;
  float *for_shift, *for_gain, *for_scale_gain;
  int rows, groups, group_parts, channel_parts, shift_blocks, gain_blocks;
  float group_size;
};

// What a block of 32 x 8 threads has of a column of parts, one under the other.
__device__ __forceinline__ float sum_of_parts(const float *column, size_t stride, int parts,
                                              float (*sums)[kRowsOfSums]) {
  const int slice = threadIdx.x / kRowsOfSums, lane = threadIdx.x % kRowsOfSums;
  float sum = 0.f;
  if (column) {
#pragma unroll 4
    for (int part = slice; part < parts; part += kThreads / kRowsOfSums) sum += __ldg(column + part * stride);
  }
  sums[slice][lane] = sum;
  __syncthreads();
  sum = 0.f;
  for (int i = 0; i < kThreads / kRowsOfSums; ++i) sum += sums[i][lane];
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) shared_gradients_kernel(const __grid_constant__ gradients_task t) {
  __shared__ float sums[kThreads / kRowsOfSums][kRowsOfSums];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int block = blockIdx.x;
  wait_for_earlier_kernels();
  if (block < t.shift_blocks) {  // a warp for each packed row
    const int row = block * kWarps + warp;
    if (row >= t.rows) return;
    const T *own = static_cast<const T *>(t.of_means) + (size_t)t.row_order[row] * t.groups;
    const float *scales = t.scales + (size_t)row * t.groups;
    float sum = 0.f;
    for (int group = lane; group < t.groups; group += 32) sum += to_float(own[group]) * __ldg(scales + group);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) t.for_shift[row] = sum * t.group_size * (t.level_gain ? expf(__ldg(t.level_gain + row)) : 1.f);
    return;
  }
  block -= t.shift_blocks;
  const bool of_rows = block < t.gain_blocks;
  if (!of_rows) block -= t.gain_blocks;
  const int place = block * kRowsOfSums + lane, count = of_rows ? t.rows : t.groups;
  const float *column = nullptr;
  if (place < count) column = of_rows ? t.of_channels + t.row_order[place] : t.of_groups + place;
  const float sum = sum_of_parts(column, count, of_rows ? t.channel_parts : t.group_parts, sums);
  if (warp == 0 && place < count) (of_rows ? t.for_gain : t.for_scale_gain)[place] = sum;
}

template <class T>
int launch_group_sums(const sums_task &t, dim3 grid, cudaStream_t stream) {
  const bool vector = t.columns % kChunk == 0 && aligned16(t.x) && aligned16(t.y);
  const auto kernel = vector ? group_sums_kernel<T, true> : group_sums_kernel<T, false>;
  return launch_early(kernel, grid, kThreads, 0, 1, stream, t);
}

template <class T, class U>
int launch_channel_sums(const sums_task &t, dim3 grid, cudaStream_t stream) {
  const bool vector = t.columns % kChunk == 0 && aligned16(t.x) && aligned16(t.y) && aligned16(t.products);
  const auto kernel = vector ? channel_sums_kernel<T, U, true> : channel_sums_kernel<T, U, false>;
  return launch_early(kernel, grid, kThreads, 0, 1, stream, t);
}

inline bool bad_sums(int64_t tokens, int64_t columns, int64_t parts) {
  return tokens <= 0 || columns <= 0 || tokens > kMostCounted || columns > kMostCounted || parts <= 0 || parts > 65535;
}

inline unsigned blocks_of(int64_t count, int64_t each) { return (unsigned)((count + each - 1) / each); }

}  // namespace
}  // namespace lowra

int lowra_cuda_shared_tables(const lowra_packed *packed, const float *level_shift, const float *level_gain,
                             const float *scale_gain, uint16_t *levels, float *scales, void *stream) {
  using namespace lowra;
  if (!packed) return LOWRA_NULL_POINTER;
  if (const int status = check_packed(*packed)) return status;
  tables_task t = {};
  t.packed = *packed, t.layout = layout_of(packed->shape);
  if (t.layout.rows() == 0) return LOWRA_OK;
  if (const int status = first_of(check_memory(level_shift, 4), level_gain ? check_memory(level_gain, 4) : LOWRA_OK,
                                  check_memory(scale_gain, 4), check_memory(levels, 2), check_memory(scales, 4))) {
    return status;
  }
  t.level_shift = level_shift, t.level_gain = level_gain, t.scale_gain = scale_gain;
  t.levels = reinterpret_cast<fp16 *>(levels), t.scales = scales;
  t.groups = (int)((packed->shape.in_features + packed->shape.group_size - 1) / packed->shape.group_size);
  const auto on = static_cast<cudaStream_t>(stream);
  return launch_early(shared_tables_kernel, blocks_of(t.layout.rows(), kWarps), kThreads, 0, 1, on, t);
}

int lowra_cuda_group_sums(const void *x, const void *gradient, int32_t type, int64_t tokens, int64_t in_features,
                          int64_t group_size, void *means, float *products, int64_t parts, void *stream) {
  using namespace lowra;
  if (!is_float_type(type)) return LOWRA_BAD_TYPE;
  if (bad_sums(tokens, in_features, parts) || bad_sizes(1, in_features, group_size)) return LOWRA_BAD_SHAPE;
  if (const int status = first_of(check_memory(x, bytes_of(type)), check_memory(gradient, bytes_of(type)),
                                  check_memory(means, bytes_of(type)), check_memory(products, 4))) {
    return status;
  }
  sums_task t = {};
  t.x = x, t.y = gradient, t.means = means, t.products = products, t.tokens = (int)tokens, t.columns = (int)in_features;
  t.chunks = (int)((in_features + kChunk - 1) / kChunk), t.chunks_per_group = (int)group_size / kChunk;
  t.chunks_per_block = kThreads / t.chunks_per_group * t.chunks_per_group;
  t.groups = (int)((in_features + group_size - 1) / group_size);
  t.tokens_per_part = (int)((tokens + parts - 1) / parts), t.share = 1.f / (float)group_size;
  const dim3 grid(blocks_of(t.chunks, t.chunks_per_block), (unsigned)parts);
  const auto on = static_cast<cudaStream_t>(stream);
  if (type == LOWRA_FLOAT32) return launch_group_sums<float>(t, grid, on);
  if (type == LOWRA_FLOAT16) return launch_group_sums<fp16>(t, grid, on);
  return launch_group_sums<bf16>(t, grid, on);
}

int lowra_cuda_channel_sums(const void *gradient, int32_t type, const void *output, int32_t output_type, int64_t tokens,
                            int64_t out_features, float *products, int64_t parts, void *stream) {
  using namespace lowra;
  if (!is_float_type(type) || (output_type != type && output_type != LOWRA_FLOAT8)) return LOWRA_BAD_TYPE;
  if (bad_sums(tokens, out_features, parts)) return LOWRA_BAD_SHAPE;
  if (const int status =
          first_of(check_memory(gradient, bytes_of(type)),
                   check_memory(output, output_type == LOWRA_FLOAT8 ? 1 : bytes_of(type)), check_memory(products, 4))) {
    return status;
  }
  sums_task t = {};
  t.x = gradient, t.y = output, t.products = products, t.tokens = (int)tokens, t.columns = (int)out_features;
  t.chunks = (int)((out_features + kChunk - 1) / kChunk), t.tokens_per_part = (int)((tokens + parts - 1) / parts);
  const dim3 grid(blocks_of(t.chunks, kThreads), (unsigned)parts);
  const auto on = static_cast<cudaStream_t>(stream);
  const bool narrow = output_type == LOWRA_FLOAT8;
  if (type == LOWRA_FLOAT32)
    return (narrow ? launch_channel_sums<float, float8> : launch_channel_sums<float, float>)(t, grid, on);
  if (type == LOWRA_FLOAT16)
    return (narrow ? launch_channel_sums<fp16, float8> : launch_channel_sums<fp16, fp16>)(t, grid, on);
  return (narrow ? launch_channel_sums<bf16, float8> : launch_channel_sums<bf16, bf16>)(t, grid, on);
}

int lowra_cuda_shared_gradients(const lowra_shared_gradients *given, void *stream) {
  using namespace lowra;
  if (!given) return LOWRA_NULL_POINTER;
  if (!is_float_type(given->type)) return LOWRA_BAD_TYPE;
  if (given->rows < 0 || given->rows > kMostCounted || given->groups <= 0 || given->groups > kMostCounted ||
      given->group_parts <= 0 || given->channel_parts < 0 || given->group_size <= 0) {
    return LOWRA_BAD_SHAPE;
  }
  if (given->rows == 0) return LOWRA_OK;
  const bool gains = given->channel_parts > 0;
  if (const int status = first_of(
          check_memory(given->of_means, bytes_of(given->type)), check_memory(given->of_groups, 4),
          check_memory(given->row_order, 4), check_memory(given->scales, 4), check_memory(given->for_shift, 4),
          check_memory(given->for_scale_gain, 4), gains ? check_memory(given->of_channels, 4) : LOWRA_OK,
          gains ? check_memory(given->level_gain, 4) : LOWRA_OK, gains ? check_memory(given->for_gain, 4) : LOWRA_OK)) {
    return status;
  }
  gradients_task t = {};
  t.of_means = given->of_means, t.of_groups = given->of_groups, t.of_channels = given->of_channels;
  t.scales = given->scales, t.level_gain = gains ? given->level_gain : nullptr, t.row_order = given->row_order;
  t.for_shift = given->for_shift, t.for_gain = given->for_gain, t.for_scale_gain = given->for_scale_gain;
  t.rows = (int)given->rows, t.groups = (int)given->groups, t.group_parts = (int)given->group_parts;
  t.channel_parts = (int)given->channel_parts, t.group_size = (float)given->group_size;
  t.shift_blocks = (int)blocks_of(t.rows, kWarps), t.gain_blocks = gains ? (int)blocks_of(t.rows, kRowsOfSums) : 0;
  const unsigned blocks = t.shift_blocks + t.gain_blocks + blocks_of(t.groups, kRowsOfSums);
  const auto on = static_cast<cudaStream_t>(stream);
  const auto kernel = given->type == LOWRA_FLOAT32   ? shared_gradients_kernel<float>
                      : given->type == LOWRA_FLOAT16 ? shared_gradients_kernel<fp16>
                                                     : shared_gradients_kernel<bf16>;
  return launch_early(kernel, blocks, kThreads, 0, 1, on, t);
}
