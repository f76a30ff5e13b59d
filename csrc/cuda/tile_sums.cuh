// The sums of a tile of product_many.cuh: added up between the pairs of blocks of a cluster, and stored as outputs.
#pragma once

#include "product.cuh"
#include "wgmma.cuh"

namespace lowra {

constexpr int kMultiplyWarps = 8;
constexpr int kPair = 2;

// Units of 16 rows of a tile.
struct unit_range {
  int first, end;
};

// Each pair of a cluster has the sums of some of the columns, and gets from the others what they have of its own units.
// rank: of this block in its cluster. memory: what the stages were.
template <int ROWS, int PARTS>
__device__ __forceinline__ void add_up(int rank, int splits, uint32_t memory, const unit_range &own,
                                       float (&sums)[PARTS][ROWS / 2]) {
  constexpr int kQuadBytes = 32 * kMultiplyWarps * 16;  // four sums of every thread
  constexpr int kPartBytes = ROWS / 8 * kQuadBytes;
  const uint32_t place = memory + threadIdx.x * 16;
  cluster_sync();  // the stages are free: nothing comes from this block's or into it any more
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j) {
      const float *sum = sums[part] + 4 * j;
      if (j / 2 < own.first || j / 2 >= own.end) {
        const uint32_t four[4] = {__float_as_uint(sum[0]), __float_as_uint(sum[1]), __float_as_uint(sum[2]),
                                  __float_as_uint(sum[3])};
        shared_store(place + part * kPartBytes + j * kQuadBytes, four);
      }
    }
  }
  cluster_sync();
#pragma unroll 1
  for (int i = 1; i < splits; ++i) {
    const int other = rank + kPair * i, blocks = kPair * splits;
    const uint32_t there = address_in_block(place, other < blocks ? other : other - blocks);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
      for (int j = 0; j < ROWS / 8; ++j) {
        float *sum = sums[part] + 4 * j;
        if (j / 2 >= own.first && j / 2 < own.end) {
          const float4 more = load_from_cluster(there + part * kPartBytes + j * kQuadBytes);
          sum[0] += more.x, sum[1] += more.y, sum[2] += more.z, sum[3] += more.w;
        }
      }
    }
  }
}

// Some units of the sums of 64 tokens from first_token on, 16 tokens a warp. Neighbouring lanes exchange sums, so that
// each has four outputs of a token in a line and a token's outputs fill whole sectors of 32 bytes.
template <int ROWS, class T>
__device__ __forceinline__ void store_sums(const product &q, int first_row, int first_token, const unit_range &units,
                                           float (&sum)[ROWS / 2]) {
  const int lane = threadIdx.x % 32, odd = lane % 2, rows = q.layout.rows();
  if (q.bias) {
    const T *bias = static_cast<const T *>(q.bias);
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j) {
      if (j / 2 < units.first || j / 2 >= units.end) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + 8 * j + lane % 4 * 2 + i;
        const float addend = row < rows ? to_float(bias[row]) : 0.f;
        sum[4 * j + i] += addend, sum[4 * j + 2 + i] += addend;
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = first_token + threadIdx.x / 32 % 4 * 16 + lane / 4 + 8 * h;
    T *out = static_cast<T *>(q.out) + (size_t)token * rows + first_row;
#pragma unroll
    for (int j = 0; j < ROWS / 8; j += 2) {
      if (j / 2 < units.first || j / 2 >= units.end) continue;
      const uint32_t first = pack<T>(sum[4 * j + 2 * h], sum[4 * j + 2 * h + 1]);
      const uint32_t second = pack<T>(sum[4 * j + 4 + 2 * h], sum[4 * j + 5 + 2 * h]);
      const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
      const int at = 8 * (j + odd) + lane % 4 / 2 * 4;
      if (token < q.tokens && first_row + at < rows) {
        *reinterpret_cast<uint2 *>(out + at) = odd ? make_uint2(got, second) : make_uint2(first, got);
      }
    }
  }
}

}  // namespace lowra
