// Decode x product for 1 to 8 tokens. Reference: reference.linear, up to the order of the float32 sums.
//
// A block takes 16 rows of one precision; its warps split the columns and add up their sums at the end, so that a matrix
// of 4096 rows still fills the chip. A lane reads 16 bytes of codes at a time from each of its two rows. x goes straight
// from the first-level cache into operand B: only the quads of real tokens load it.
#include "product.cuh"

namespace lowra {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kTokens = 8;

// BITS decides the columns of 16 bytes of codes: 128, 64 or 32.
template <int BITS, class T>
__device__ __forceinline__ void sum_columns(const product &q, const tile_place &tile, int lane, int warp, int warps,
                                            float (&sum)[4]) {
  constexpr int kPerByte = 8 / BITS, kChunk = 16 * kPerByte, kWordsPerStep = BITS, kWordColumns = 4 * kPerByte;
  lane_rows<BITS> rows;
  rows.place(q.packed, q.layout, q.groups, tile.first_row, tile.last_row, lane);
  const int token = lane / 4, in_features = q.in_features;
  const bool real = token < q.tokens;
  const T *x = static_cast<const T *>(q.x) + (size_t)(real ? token : 0) * in_features;
  const int stride = 4 * kChunk * warps;
  uint4 next[2];
  auto load = [&](int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      next[h] = column < in_features ? __ldg(reinterpret_cast<const uint4 *>(rows.codes[h] + column / kPerByte))
                                     : make_uint4(0, 0, 0, 0);
    }
  };
  int column = (4 * warp + lane % 4) * kChunk;
  load(column);
  for (int base = 4 * warp * kChunk; base < in_features; base += stride, column += stride) {
    const uint4 chunk[2] = {next[0], next[1]};
    load(column + stride);
#pragma unroll
    for (int step = 0; step < kChunk / kStep; ++step) {
      const int first = column + step * kStep;
      const bool inside = first < in_features;  // whole steps only: in_features is a multiple of kStep
      value_table<BITS> table[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int group = min(first, in_features - 1) >> q.group_shift;
        table[h] = build_table<BITS, T>(rows.levels[h], load_scale(q.packed, rows.first_scale[h] + group));
      }
#pragma unroll
      for (int w = 0; w < kWordsPerStep; ++w) {
        // 4 P columns of x, two in a word, then paired as the codes of the word will be.
        uint32_t natural[2 * kPerByte];
#pragma unroll
        for (int i = 0; i < kPerByte / 2; ++i) {
          const uint4 raw = real && inside ? __ldg(reinterpret_cast<const uint4 *>(x + first + w * kWordColumns) + i)
                                           : make_uint4(0, 0, 0, 0);
          natural[4 * i] = raw.x, natural[4 * i + 1] = raw.y, natural[4 * i + 2] = raw.z, natural[4 * i + 3] = raw.w;
        }
        uint32_t a[2][2 * kPerByte];
#pragma unroll
        for (int h = 0; h < 2; ++h) decode(table[h], word_of(chunk[h], step * kWordsPerStep + w), a[h]);
#pragma unroll
        for (int r = 0; r < kPerByte; ++r) {
          mma<T>(sum, a[0][2 * r], a[1][2 * r], a[0][2 * r + 1], a[1][2 * r + 1],
                 partner<kPerByte>(natural, r), partner<kPerByte>(natural + kPerByte, r));
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kMaxWarps) product_small_kernel(const __grid_constant__ product q) {
  __shared__ float sums[kMaxWarps][kTokens][kTileRows + 1];  // + 1: rows of a fragment fall into different banks
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const tile_place tile = tile_at(q.layout, q.tiles, kTileRows, blockIdx.x);
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  if (tile.bits == 1) {
    sum_columns<1, T>(q, tile, lane, warp, warps, sum);
  } else if (tile.bits == 2) {
    sum_columns<2, T>(q, tile, lane, warp, warps, sum);
  } else {
    sum_columns<4, T>(q, tile, lane, warp, warps, sum);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[warp][2 * (lane % 4) + i % 2][lane / 4 + i / 2 * 8] = sum[i];
  __syncthreads();
  for (int cell = warp * 32 + lane; cell < kTokens * kTileRows; cell += warps * 32) {
    const int token = cell / kTileRows, row = tile.first_row + cell % kTileRows;
    if (token >= q.tokens || row > tile.last_row) continue;
    float total = 0.f;
    for (int w = 0; w < warps; ++w) total += sums[w][token][cell % kTileRows];
    store_output<T>(q, token, row, total);
  }
}

template <class T>
int launch(product q, cudaStream_t stream) {
  q.tiles = tiles_of(q.layout, kTileRows);
  // Enough warps for every multiprocessor, few enough that a warp has two loads of codes to overlap.
  const int tiles = q.tiles.total(), warps = tiles >= 512 ? 4 : tiles >= 192 ? 8 : kMaxWarps;
  product_small_kernel<T><<<tiles, dim3(32, warps), 0, stream>>>(q);
  return launched();
}

}  // namespace

int product_small(const product &q, int32_t type, cudaStream_t stream) {
  return type == LOWRA_FLOAT16 ? launch<fp16>(q, stream) : launch<bf16>(q, stream);
}

}  // namespace lowra
