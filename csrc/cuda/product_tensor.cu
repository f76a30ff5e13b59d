// Decode x product for up to 64 tokens. Reference: reference.linear, up to the order of the float32 sums.
//
// A block takes 128 rows of one precision, 16 for each warp, and a slice of the columns; x streams through shared
// memory in tiles of 256 columns, copied ahead without passing through registers. On Hopper the blocks of a cluster
// split the columns and add up their sums through distributed shared memory: every block then reads only its part of x,
// and one launch serves.
#include <cooperative_groups.h>

#include "product.cuh"

namespace lowra {
namespace {

constexpr int kWarps = 8;
constexpr int kBlockRows = kWarps * kTileRows;
// Tiles of x in shared memory: one in use, two on their way. On Turing one, since two of 64 tokens are all its 64 KB.
__host__ __device__ constexpr int stages_of(int code) { return code < kAmpere ? 2 : 3; }
constexpr int kStages = stages_of(kCode);
constexpr int kMaxSplits = 8;

// A warp copies every eighth token, a lane one unit of each. Tokens and columns that do not exist become zeros.
// NT: tiles of 8 tokens, one for each warp at a time.
template <int NT, class T>
__device__ __forceinline__ void copy_tile(const product &q, int base, int end, uint4 *tile, int lane, int warp) {
  static_assert(kWarps == 8, "a warp's tokens are all odd or all even, so unit_place is the same for them");
  if (base < end) {
    const T *source = static_cast<const T *>(q.x) + (size_t)warp * q.in_features + base + lane * 8;
    uint4 *target = tile + warp * kTileUnits + unit_place(warp, lane);
    const int tokens = base + lane * 8 < end ? q.tokens : 0;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const bool inside = warp + 8 * n < tokens;
      copy_unit(target + 8 * n * kTileUnits, inside ? source : static_cast<const T *>(q.x), inside);
      source += 8 * q.in_features;
    }
  }
  commit_copies();  // also where there is nothing to copy, so that the count of groups stays right
}

// NT: tiles of 8 tokens. BITS, T: precision of the rows and type of x.
template <int BITS, int NT, class T>
__device__ __forceinline__ void sum_columns(const product &q, const tile_place &place, int begin, int end,
                                            uint4 *staged, float (&sum)[NT][4]) {
  constexpr int kTile = 8 * NT * kTileUnits;
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int lane_column = lane % 4 * kLaneColumns;
  const uint4 *mine = staged + lane / 4 * kTileUnits + lane % 4 * 8;
  lane_rows<BITS> rows;
  rows.place(q.packed, q.layout, q.groups, place.first_row + warp * kTileRows, place.last_row, lane);
  lane_codes<BITS> next;
  rows.fetch(q.packed, begin + lane_column, end, q.group_shift, next);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    copy_tile<NT, T>(q, begin + s * kTileColumns, end, staged + s * kTile, lane, warp);
  }
  int stage = 0;
  for (int base = begin; base < end; base += kTileColumns) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // this tile is there, and everyone is done with the one before, whose place the next copy takes
    const lane_codes<BITS> now = next;
    rows.fetch(q.packed, base + kTileColumns + lane_column, end, q.group_shift, next);
    const int free = stage == 0 ? kStages - 1 : stage - 1;
    copy_tile<NT, T>(q, base + (kStages - 1) * kTileColumns, end, staged + free * kTile, lane, warp);
    multiply_tile<BITS, NT, T>(q, rows, now, base + lane_column, mine + stage * kTile, ~0, lane, sum);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  wait_for_copies<0>();
}

// Two blocks on a multiprocessor hide each other's barriers: hence the cap of 128 registers.
template <int NT, class T>
__global__ void __launch_bounds__(32 * kWarps, 2) product_tensor_kernel(const __grid_constant__ product q, int slice) {
  extern __shared__ uint4 staged[];
  const int lane = threadIdx.x, warp = threadIdx.y, splits = gridDim.x, split = blockIdx.x;
  const tile_place place = tile_at(q.layout, q.tiles, kBlockRows, blockIdx.y);
  const int thread = warp * 32 + lane, row = place.first_row + thread % kBlockRows;  // that this thread will store
  const int stored_row = __ldg(q.packed.row_order + min(row, place.last_row));
  const int begin = split * slice, end = min(begin + slice, q.in_features);
  float sum[NT][4] = {};
  if (place.bits == 1) {
    sum_columns<1, NT, T>(q, place, begin, end, staged, sum);
  } else if (place.bits == 2) {
    sum_columns<2, NT, T>(q, place, begin, end, staged, sum);
  } else {
    sum_columns<4, NT, T>(q, place, begin, end, staged, sum);
  }
  // x is done with: its memory takes the sums, [token][row], one float of padding for each token.
  constexpr int kStride = kBlockRows + 1;
  float *sums = reinterpret_cast<float *>(staged);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 8 * n + 2 * (lane % 4) + i % 2, row = warp * kTileRows + lane / 4 + i / 2 * 8;
      sums[token * kStride + row] = sum[n][i];
    }
  }
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
#else
  __syncthreads();
#endif
  // The blocks of a cluster share out the tokens; half a block takes one token's rows.
  constexpr int kAtOnce = 32 * kWarps / kBlockRows;
  for (int token = split * kAtOnce + thread / kBlockRows; token < q.tokens; token += splits * kAtOnce) {
    if (row > place.last_row) continue;
    float total = 0.f;
    for (int s = 0; s < splits; ++s) {
#if __CUDA_ARCH__ >= 900
      total += cluster.map_shared_rank(sums, s)[token * kStride + thread % kBlockRows];
#else
      total += sums[token * kStride + thread % kBlockRows];
#endif
    }
    store_output<T>(q, token, stored_row, total);
  }
#if __CUDA_ARCH__ >= 900
  cluster.sync();  // a block must not leave while others read its sums
#endif
}

// NT, T: as above.
template <int NT, class T>
int launch(product q, cudaStream_t stream) {
  q.tiles = tiles_of(q.layout, kBlockRows);
  const int tiles = q.tiles.total(), steps = (q.in_features + kTileColumns - 1) / kTileColumns;
  device_limits limits;
  if (const int status = limits_of_current_device(limits)) return status;
  // As many blocks as run at once, two on each multiprocessor, with at least two tiles of columns each.
  int splits = 1;
  if (limits.clusters) {
    while (splits < kMaxSplits && tiles * (splits + 1) <= 2 * limits.processors && 2 * (splits + 1) <= steps) ++splits;
  }
  const int slice = (steps + splits - 1) / splits * kTileColumns;
  constexpr int kTile = 8 * NT * kTileUnits * 16, kSums = 8 * NT * (kBlockRows + 1) * 4;
  static_assert(kSums <= 2 * kTile && 2 * kTile <= 64 << 10, "the sums take the place of x; Turing");
  const int bytes = stages_of(limits.code) * kTile;
  auto *kernel = product_tensor_kernel<NT, T>;
  if (const int status = keep_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))) {
    return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(splits, tiles);
  config.blockDim = dim3(32, kWarps);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = splits, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = limits.clusters ? 1 : 0;
  return keep_error(cudaLaunchKernelEx(&config, kernel, q, slice));
}

template <class T>
int choose(const product &q, cudaStream_t stream) {
  if (q.tokens <= 8) return launch<1, T>(q, stream);
  if (q.tokens <= 16) return launch<2, T>(q, stream);
  if (q.tokens <= 32) return launch<4, T>(q, stream);
  return launch<8, T>(q, stream);
}

}  // namespace

int product_tensor(const product &q, int32_t type, cudaStream_t stream) {
  device_limits limits;
  if (const int status = limits_of_current_device(limits)) return status;
  if (type == LOWRA_BFLOAT16 && limits.code < kAmpere) return LOWRA_UNSUPPORTED;  // see mma
  return type == LOWRA_FLOAT16 ? choose<fp16>(q, stream) : choose<bf16>(q, stream);
}

}  // namespace lowra
