// Decode x product for a few tokens. Reference: reference.linear, up to the order of the float32 sums.
//
// A block takes 16 rows of one precision; its warps split the columns and add up their sums at the end, so that a matrix
// of 4096 rows still fills the chip. All of x goes to shared memory while the first codes are on their way.
#include "product.cuh"

namespace lowra {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kTokens = 8;

template <int BITS, class T>
__device__ __forceinline__ void sum_columns(const product &q, const tile_place &place, const uint4 *x, int lane,
                                            int warp, int warps, float (&sum)[1][4]) {
  lane_rows<BITS> rows;
  rows.place(q.packed, q.layout, q.groups, place.first_row, place.last_row, lane);
  const int step = warps * kTileColumns, lane_column = lane % 4 * kLaneColumns;
  const bool real = lane / 4 < q.tokens;
  const int tile_units = q.tokens * kTileUnits;
  // x[0] is the unit of zeros, for the lanes of tokens that do not exist.
  const uint4 *mine = real ? x + 1 + lane / 4 * kTileUnits + lane % 4 * 8 : x;
  lane_codes<BITS> next;
  rows.fetch(q.packed, warp * kTileColumns + lane_column, q.in_features, q.group_shift, next);
  wait_for_copies<0>();
  __syncthreads();
  for (int base = warp * kTileColumns; base < q.in_features; base += step) {
    const lane_codes<BITS> now = next;
    rows.fetch(q.packed, base + step + lane_column, q.in_features, q.group_shift, next);
    const uint4 *tile = real ? mine + base / kTileColumns * tile_units : mine;
    multiply_tile<BITS, 1, T>(q, rows, now, base + lane_column, tile, real ? ~0 : 0, lane, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) product_small_kernel(const __grid_constant__ product q) {
  extern __shared__ uint4 x[];  // a unit of zeros, then [tiles of 256 columns][tokens][32 units]
  __shared__ float sums[kMaxWarps][kTokens][kTileRows + 1];  // + 1: rows of a fragment fall into different banks
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const tile_place place = tile_at(q.layout, q.tiles, kTileRows, blockIdx.x);
  const int cell_row = lane % kTileRows, row = place.first_row + cell_row;  // that this thread will store
  const int stored_row = __ldg(q.packed.row_order + min(row, place.last_row));
  const int units = (q.in_features + kTileColumns - 1) / kTileColumns * kTileUnits;
  for (int token = 0; token < q.tokens; ++token) {
    const T *row = static_cast<const T *>(q.x) + (size_t)token * q.in_features;
    for (int unit = warp * 32 + lane; unit < units; unit += warps * 32) {
      const bool inside = unit * 8 < q.in_features;
      copy_unit(x + 1 + (unit / kTileUnits * q.tokens + token) * kTileUnits + unit_place(token, unit % kTileUnits),
                inside ? row + unit * 8 : row, inside);
    }
  }
  commit_copies();
  if (warp == 0 && lane == 0) x[0] = make_uint4(0, 0, 0, 0);
  float sum[1][4] = {};
  if (place.bits == 1) {
    sum_columns<1, T>(q, place, x, lane, warp, warps, sum);
  } else if (place.bits == 2) {
    sum_columns<2, T>(q, place, x, lane, warp, warps, sum);
  } else {
    sum_columns<4, T>(q, place, x, lane, warp, warps, sum);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[warp][2 * (lane % 4) + i % 2][lane / 4 + i / 2 * 8] = sum[0][i];
  __syncthreads();
  if (row > place.last_row) return;
  for (int token = warp * 2 + lane / kTileRows; token < q.tokens; token += warps * 2) {
    float total = 0.f;
    for (int w = 0; w < warps; ++w) total += sums[w][token][cell_row];
    store_output<T>(q, token, stored_row, total);
  }
}

template <class T>
int launch(product q, cudaStream_t stream) {
  q.tiles = tiles_of(q.layout, kTileRows);
  // Enough warps for every multiprocessor, few enough that a warp has several tiles of columns.
  const int tiles = q.tiles.total(), warps = tiles >= 512 ? 4 : kMaxWarps;
  const int bytes = (q.in_features + kTileColumns - 1) / kTileColumns * kTileColumns * 2 * q.tokens + 16;
  auto *kernel = product_small_kernel<T>;
  if (bytes > 32 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return keep_error(error);
  }
  kernel<<<tiles, dim3(32, warps), bytes, stream>>>(q);
  return launched();
}

}  // namespace

bool product_small_fits(const product &q) { return q.tokens <= kTokens && q.tokens * q.in_features <= 24 << 10; }

int product_small(const product &q, int32_t type, cudaStream_t stream) {
  return type == LOWRA_FLOAT16 ? launch<fp16>(q, stream) : launch<bf16>(q, stream);
}

}  // namespace lowra
