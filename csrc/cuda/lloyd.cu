// Weighted Lloyd-Max of all precisions for every row. Reference: lloyd.lloyd_max (values agree to float32 rounding).
//
// A block keeps one row on chip for all iterations: the weight is read from memory once, unless shared memory is too
// small for it (K above 15,000 on Turing, 24,000 on sm_86), where every iteration reads it. The reference sorts the row
// and takes a cell's sums from prefix sums; here every weight is compared with every threshold and added in double
// precision to the sums above it, which costs a row of 4096 less than its sort would at 20 iterations, needs no scratch
// memory and gives the same sums, since both are differences of sums over "greater than the threshold". The order of
// additions is fixed, so results repeat bit for bit. Double precision matters: the search ends when the error no longer
// falls, and float32 sums would end it early.
#include "common.cuh"

namespace lowra {
namespace {

constexpr int kMaxWarps = 16;
constexpr unsigned kAll = 0xffffffffu;

struct search {
  const void *weight;  // [rows, in_features]
  int32_t weight_type;
  int in_features, group_size, groups;
  small_divisor fours_per_group;
  const float *initial_levels, *initial_thresholds;
  int iterations;
  bool squared;
  float *levels, *thresholds, *errors;  // [rows, 22], [rows, 19], [rows, 3]
};

// What the warps tell each other about one precision.
struct shared_state {
  double partial[kMaxWarps][32];  // sums of a warp: above threshold j in j, times x in 16 + j
  double second[kMaxWarps];       // sum of weight * x^2
  float cuts[16];
  int go_on;
};

// Adds 32 values over the lanes of a warp; lane i gets the total of value i. Each round halves the values a lane holds:
// 31 exchanges in place of 32 x 5.
// WIDTH: values exchanged in this round, 16 at first; a constant keeps them in registers.
template <int WIDTH>
__device__ __forceinline__ double reduce_scatter(double (&value)[32]) {
  const bool upper = threadIdx.x & WIDTH;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    const double mine = upper ? value[i + WIDTH] : value[i], other = upper ? value[i] : value[i + WIDTH];
    value[i] = mine + __shfl_xor_sync(kAll, other, WIDTH);
  }
  if constexpr (WIDTH > 1) return reduce_scatter<WIDTH / 2>(value);
  return value[0];
}

__device__ __forceinline__ double reduce(double value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

__device__ __forceinline__ float load_weight(const search &s, size_t index) {
  if (s.weight_type == LOWRA_FLOAT32) return __ldg(static_cast<const float *>(s.weight) + index);
  const uint16_t raw = __ldg(static_cast<const unsigned short *>(s.weight) + index);
  return s.weight_type == LOWRA_FLOAT16 ? half_bits_to_float(raw) : __uint_as_float((uint32_t)raw << 16);
}

__device__ __forceinline__ float normalised(float weight, float largest) {
  return largest > 0.f ? __fdiv_rn(weight, largest) : 0.f;
}

// The row of a block: its weights over the absmax of their groups.
template <bool ON_CHIP>
struct normal_row;
template <>
struct normal_row<true> {
  const float *x, *absmax;  // shared memory; x zeros up to the next multiple of 4
  __device__ __forceinline__ float4 four(const search &, int number, float) const {
    return reinterpret_cast<const float4 *>(x)[number];
  }
};
template <>
struct normal_row<false> {
  size_t start;  // in the weight
  const float *absmax;
  __device__ __forceinline__ float4 four(const search &s, int number, float largest) const {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = 4 * number + i;
      x[i] = k < s.in_features ? normalised(load_weight(s, start + k), largest) : 0.f;
    }
    return make_float4(x[0], x[1], x[2], x[3]);
  }
};

// CUTS: thresholds of the precision; the sums are registers. In value[j] and value[16 + j] the sums of weight and
// weight * x over x above threshold j; in value[15] and value[31] over all x.
template <int CUTS, class ROW>
__device__ __forceinline__ double sum_cells(const search &s, const ROW &row, bool squared, shared_state &state) {
  float cut[CUTS];
#pragma unroll
  for (int j = 0; j < CUTS; ++j) cut[j] = state.cuts[j];
  double value[32] = {};
  double second = 0;
  for (int four = threadIdx.x; four < (s.in_features + 3) / 4; four += blockDim.x) {
    const float largest = row.absmax[s.fours_per_group.divide(four)];
    const float4 xs = row.four(s, four, largest);
    const double scale = largest;
    const double importance = squared ? scale * scale : scale;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = 4 * four + i;
      const float at = i == 0 ? xs.x : i == 1 ? xs.y : i == 2 ? xs.z : xs.w;
      const double mass = k < s.in_features ? importance : 0.0;
      const double first = mass * (double)at;
      second += first * (double)at;
      value[15] += mass;
      value[31] += first;
#pragma unroll
      for (int j = 0; j < CUTS; ++j) {
        if (at > cut[j]) {
          value[j] += mass;
          value[16 + j] += first;
        }
      }
    }
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const double total = reduce_scatter<16>(value);
  second = reduce(second);
  state.partial[warp][lane] = total;
  if (lane == 0) state.second[warp] = second;
  __syncthreads();
  // The first warp adds up the warps; its lane i returns total i. The others have nothing to return.
  double sum = 0;
  if (warp == 0) {
    for (int w = 0; w < blockDim.x / 32; ++w) sum += state.partial[w][lane];
  }
  return sum;
}

struct cell {
  double mass, first;
};

// Lane c < CUTS + 1 of the first warp: sums of cell c, from the sums above its two thresholds.
template <int CUTS>
__device__ __forceinline__ cell cell_of(double sum, int lane) {
  const int above = lane == 0 ? 15 : lane - 1;
  const bool last = lane >= CUTS;
  const double mass_low = __shfl_sync(kAll, sum, above), first_low = __shfl_sync(kAll, sum, 16 + above);
  const double mass_high = __shfl_sync(kAll, sum, lane % 16), first_high = __shfl_sync(kAll, sum, 16 + lane % 16);
  return {mass_low - (last ? 0.0 : mass_high), first_low - (last ? 0.0 : first_high)};
}

template <int CUTS>
__device__ __forceinline__ double error_of(const cell &c, double level, const shared_state &state, int lane) {
  double second = 0;
  for (int w = 0; w < blockDim.x / 32; ++w) second += state.second[w];
  const double part = lane <= CUTS ? level * level * c.mass - 2.0 * level * c.first : 0.0;
  return fmax(second + reduce(part), 0.0);
}

// BITS: as CUTS. The first warp decides, all warps sum.
template <int BITS, class ROW>
__device__ __forceinline__ void learn(const search &s, const ROW &values, shared_state &state, int row) {
  constexpr int kCuts = (1 << BITS) - 1;
  constexpr int kLevelAt = BITS == 4 ? 0 : BITS == 2 ? 16 : 20;
  constexpr int kCutAt = BITS == 4 ? 0 : BITS == 2 ? 15 : 18;
  constexpr int kErrorAt = BITS == 4 ? 0 : BITS == 2 ? 1 : 2;
  const int lane = threadIdx.x % 32, place = min(lane, kCuts);
  const bool decides = threadIdx.x < 32;
  double level = s.initial_levels[kLevelAt + place], threshold = s.initial_thresholds[kCutAt + min(lane, kCuts - 1)];
  cell cells = {};
  double error = 0;
  __syncthreads();
  if (decides && lane < kCuts) state.cuts[lane] = (float)threshold;
  __syncthreads();
  double sum = sum_cells<kCuts>(s, values, s.squared, state);
  if (decides) {
    cells = cell_of<kCuts>(sum, lane);
    error = error_of<kCuts>(cells, level, state, lane);
  }
  for (int i = 0; i < s.iterations; ++i) {
    double candidate = level, midpoint = 0;
    if (decides) {
      if (cells.mass > 0.0) candidate = cells.first / fmax(cells.mass, 2.2250738585072014e-308);
      midpoint = (candidate + __shfl_down_sync(kAll, candidate, 1)) / 2.0;
      if (lane < kCuts) state.cuts[lane] = (float)midpoint;
    }
    __syncthreads();
    sum = sum_cells<kCuts>(s, values, s.squared, state);
    if (decides) {
      const cell found = cell_of<kCuts>(sum, lane);
      const double found_error = error_of<kCuts>(found, candidate, state, lane);
      const bool better = found_error < error;
      if (better) level = candidate, threshold = midpoint, cells = found, error = found_error;
      if (lane == 0) state.go_on = better;
    }
    __syncthreads();
    if (!state.go_on) break;
  }
  if (!s.squared) {  // the search weighed differently: the error is still that of the weight itself
    __syncthreads();
    if (decides && lane < kCuts) state.cuts[lane] = (float)threshold;
    __syncthreads();
    sum = sum_cells<kCuts>(s, values, true, state);
    if (decides) error = error_of<kCuts>(cell_of<kCuts>(sum, lane), level, state, lane);
  }
  if (decides) {
    if (lane <= kCuts) s.levels[(size_t)row * 22 + kLevelAt + lane] = (float)level;
    if (lane < kCuts) s.thresholds[(size_t)row * 19 + kCutAt + lane] = (float)threshold;
    if (lane == 0) s.errors[(size_t)row * 3 + kErrorAt] = (float)error;
  }
}

// Floats of shared memory that x takes.
__host__ __device__ __forceinline__ int64_t floats_of_row(int64_t in_features, bool on_chip) {
  return on_chip ? (in_features + 3) / 4 * 4 : 0;
}

template <bool ON_CHIP>
__global__ void __launch_bounds__(32 * kMaxWarps) lloyd_max_kernel(const __grid_constant__ search s) {
  extern __shared__ float4 memory[];
  __shared__ shared_state state;
  float *x = reinterpret_cast<float *>(memory), *absmax = x + floats_of_row(s.in_features, ON_CHIP);
  const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const size_t start = (size_t)row * s.in_features;
  for (int group = warp; group < s.groups; group += blockDim.x / 32) {
    const int first = group * s.group_size, end = min(first + s.group_size, s.in_features);
    float w[LOWRA_MAX_GROUP_SIZE / 32];
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < LOWRA_MAX_GROUP_SIZE / 32; ++i) {
      const int k = first + 32 * i + lane;
      w[i] = k < end ? load_weight(s, start + k) : 0.f;
      largest = fmaxf(largest, fabsf(w[i]));
    }
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, step));
#pragma unroll
    for (int i = 0; i < LOWRA_MAX_GROUP_SIZE / 32; ++i) {
      const int k = first + 32 * i + lane;
      if (ON_CHIP && k < end) x[k] = normalised(w[i], largest);
    }
    if (lane == 0) absmax[group] = largest;
  }
  if (ON_CHIP && threadIdx.x < (4 - s.in_features % 4) % 4) x[s.in_features + threadIdx.x] = 0.f;
  __syncthreads();
  normal_row<ON_CHIP> values;
  values.absmax = absmax;
  if constexpr (ON_CHIP) {
    values.x = x;
  } else {
    values.start = start;
  }
  learn<4>(s, values, state, row);
  learn<2>(s, values, state, row);
  learn<1>(s, values, state, row);
}

template <bool ON_CHIP>
int launch(const search &s, int64_t rows, cudaStream_t stream) {
  const int64_t bytes = (floats_of_row(s.in_features, ON_CHIP) + s.groups) * (int64_t)sizeof(float);
  auto *kernel = lloyd_max_kernel<ON_CHIP>;
  device_limits limits;
  if (const int status = limits_of_current_device(limits)) return status;
  if (bytes + (int64_t)sizeof(shared_state) > limits.shared_bytes) return LOWRA_UNSUPPORTED;
  if (const int status =
          keep_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes))) {
    return status;
  }
  // Few warps for each row keep the share of the reductions small; long rows leave room for few blocks, so they get
  // more.
  const int warps = s.in_features <= 8192 ? 4 : s.in_features <= 16384 ? 8 : kMaxWarps;
  kernel<<<(unsigned)rows, 32 * warps, (size_t)bytes, stream>>>(s);
  return launched();
}

}  // namespace
}  // namespace lowra

int lowra_cuda_lloyd_max(const lowra_lloyd *wanted, const void *weight, int32_t weight_type, float *levels,
                         float *thresholds, float *errors, void *stream) {
  using namespace lowra;
  if (!wanted) return LOWRA_NULL_POINTER;
  const int64_t rows = wanted->rows, in_features = wanted->in_features, group_size = wanted->group_size;
  if (bad_cuda_shape({rows, 0, 0, in_features, group_size}) || wanted->iterations < 0) {
    return LOWRA_BAD_SHAPE;
  }
  if (!is_float_type(weight_type)) return LOWRA_BAD_TYPE;
  if (rows == 0) return LOWRA_OK;
  if (const int status = first_of(check_memory(weight, bytes_of(weight_type)), check_memory(wanted->initial_levels, 4),
                                  check_memory(wanted->initial_thresholds, 4), check_memory(levels, 4),
                                  check_memory(thresholds, 4), check_memory(errors, 4))) {
    return status;
  }
  search s = {};
  s.weight = weight, s.weight_type = weight_type;
  s.in_features = (int)in_features, s.group_size = (int)group_size;
  s.groups = (int)((in_features + group_size - 1) / group_size);
  s.fours_per_group = divisor_of((uint32_t)group_size / 4);
  s.initial_levels = wanted->initial_levels, s.initial_thresholds = wanted->initial_thresholds;
  s.iterations = wanted->iterations, s.squared = wanted->squared != 0;
  s.levels = levels, s.thresholds = thresholds, s.errors = errors;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const int status = launch<true>(s, rows, on);
  return status == LOWRA_UNSUPPORTED ? launch<false>(s, rows, on) : status;
}
