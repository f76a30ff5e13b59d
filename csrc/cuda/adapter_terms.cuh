// LoRA adapters in a product of a group: scaling B (A x) is added to its sums before they are rounded.
//
// A x takes all columns of all rows of A, which is too much for each block to do by itself and no work of its rows. So
// all blocks do it together: a warp sums a piece of 512 columns of one row of A, and puts the sum in a cell of global
// memory. Before a block stores its rows, it takes the sums of all. A cell holds the number of the launch beside the
// sum, in one word of 8 bytes: it is there or it is not, and no cell is ever cleared.
//
// Blocks wait for each other only as long as all are on the chip. Where some find no place, since another kernel waits
// there in the same way, those that wait compute the missing sums from their own x.
#pragma once

#include "staged_x.cuh"

namespace lowra {

constexpr int kPieceColumns = 512;
constexpr int kPatience = 32;  // looks at missing cells before a warp computes them itself
static_assert(kUnitBits % kPieceColumns == 0, "a block has whole pieces, or the end of a row");

inline size_t inner_bytes(const single_product &) { return 0; }
inline size_t inner_bytes(const product_group &q) { return (size_t)q.ranks * q.tokens * 4; }

// Of the rows of B that a team of `tiles` tiles stores, all as long as the longest.
inline size_t bytes_of_b(const product_group &q, int tiles) { return (size_t)tiles * kTileRows * q.most_ranks * 2; }

// What a block needs of its adapters when it stores its rows, in shared memory.
struct adapter_memory {
  float *inner;  // [token][rank of all adapters]
  uint2 *b;      // [row of the team][q.most_ranks], if q.b_is_shared
};

__device__ __forceinline__ void put_cell(uint64_t *cell, float sum, uint32_t launch) {
  const uint64_t word = (uint64_t)launch << 32 | __float_as_uint(sum);
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(cell), "l"(word) : "memory");
}
__device__ __forceinline__ uint64_t look_at_cell(const uint64_t *cell) {
  uint64_t word;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(cell) : "memory");
  return word;
}

// A x of all adapters of a group, shared out among warps.
template <class S>
struct shared_row_sums {
  const typename S::PRODUCT &q;
  const uint4 *plain;  // x of the block's columns [begin, end), see stage_x
  int begin, end, team, teams, lane;
  uint32_t launch;    // its number
  uint2 first[2][2];  // of A, for this warp's piece, of which it usually has one
  float first_gain;   // of that row of A for token `lane`

  // Before earlier kernels have finished.
  __device__ __forceinline__ void ask_for_first(int warp) const {
    const int pieces = own_pieces(), number = team + teams * warp;
    if (number >= q.ranks * pieces || lane != 0) return;
    const int column = begin + number % pieces * kPieceColumns;
    const uint16_t *row = row_of_a(number / pieces);
    prefetch_to_l2(row + column, row + min(column + kPieceColumns, q.in_features));
  }
  // A row of B, which is read when sums are stored: to `target`, or to the L2 cache. wait_for_copies<0> follows.
  __device__ __forceinline__ void ask_for_b(int part, int row, uint2 *target) const {
    const lowra_adapter &own = q.adapters.of[part];
    const uint16_t *values = static_cast<const uint16_t *>(own.b) + (size_t)row * own.rank;
    if (!q.b_is_shared) {
      for (int rank = 0; rank < own.rank; rank += 16) prefetch_to_l2(values + rank);  // 32 bytes each
      return;
    }
#if __CUDA_ARCH__ >= 800
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(target);
    for (int rank = 0; rank < own.rank; rank += 4) copy_async<8>(address + rank * 2, values + rank);
    commit_copies();
#else
    for (int rank = 0; rank < own.rank; rank += 4) target[rank / 4] = *reinterpret_cast<const uint2 *>(values + rank);
#endif
  }

  // Once they have.
  __device__ __forceinline__ void fetch_first(int warp) {
    launch = (uint32_t)*q.adapters.launches + (uint32_t)q.adapters.launch;
    const int number = team + teams * warp;
    if (number < q.ranks * own_pieces()) fetch_piece(number);
  }

  __device__ __forceinline__ void put_own(int warp) {
    const int pieces = own_pieces();
#pragma unroll 1
    for (int number = team + teams * warp; number < q.ranks * pieces;) {
      put_piece(number / pieces, number % pieces, first, first_gain);
      number += teams * kWarps;
      if (number < q.ranks * pieces) fetch_piece(number);
    }
  }

  // Into inner [token][rank], times the gains; to be followed by a barrier. Several lanes share the pieces of a sum, so
  // that each of them waits for memory once.
  __device__ __forceinline__ void take_all(int thread, float *inner) const {
    const int pieces = (q.in_features + kPieceColumns - 1) / kPieceColumns, count = q.ranks * q.tokens;
    int lanes = 32;
    while (lanes > 1 && lanes * count > kThreads) lanes /= 2;
    for (int at = thread; at - lane < count * lanes; at += kThreads) {
      const int cell = at / lanes;
      const float gain = cell < count ? gain_of(0, cell) : 0.f;
      float sum;
      for (int looks = 0;; ++looks) {
        bool there = true;
        sum = 0.f;
        if (gain != 0.f) {
#pragma unroll 8
          for (int piece = at % lanes; piece < pieces; piece += lanes) {
            const uint64_t word = look_at_cell(q.adapters.cells + (size_t)piece * count + cell);
            there = there && (uint32_t)(word >> 32) == launch;
            sum += __uint_as_float((uint32_t)word);
          }
        }
        if (__all_sync(0xffffffffu, there)) break;
        if (looks == kPatience) put_all();
      }
      for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (cell < count && at % lanes == 0) {
        inner[cell % q.tokens * q.ranks + cell / q.tokens] = gain == 0.f ? 0.f : gain * sum;
      }
    }
  }

 private:
  __device__ __forceinline__ int own_pieces() const {
    return (min(end, q.in_features) - begin + kPieceColumns - 1) / kPieceColumns;
  }
  // rank: counted over all adapters. Sums without a gain are neither made nor taken.
  __device__ __forceinline__ float gain_of(int rank, int token) const {
    if (!q.adapters.gains) return 1.f;
    const int at = rank * q.tokens + token;
    return at < q.ranks * q.tokens ? __ldg(q.adapters.gains + at) : 0.f;
  }
  __device__ __forceinline__ const uint16_t *row_of_a(int rank) const {
    int part = 0;
#pragma unroll
    for (int i = 0; i < kMostParts - 1; ++i) {
      if (part == i && rank >= q.adapters.of[i].rank) rank -= q.adapters.of[i].rank, ++part;
    }
    return static_cast<const uint16_t *>(q.adapters.of[part].a) + (size_t)rank * q.in_features;
  }
  __device__ __forceinline__ void put_all() const {
    const int pieces = own_pieces();
#pragma unroll 1
    for (int number = 0; number < q.ranks * pieces; ++number) {
      uint2 a[2][2];
      fetch(number / pieces, number % pieces, a);
      put_piece(number / pieces, number % pieces, a, gain_of(number / pieces, lane));
    }
  }
  __device__ __forceinline__ void fetch_piece(int number) {
    const int pieces = own_pieces();
    fetch(number / pieces, number % pieces, first);
    first_gain = gain_of(number / pieces, lane);
  }
  // A lane's columns of half a piece begin here, and go on 16 further on, as those of x that is staged.
  __device__ __forceinline__ int unit_of(int piece, int half) const {
    return piece * (kPieceColumns / 8) + half * 32 + lane;
  }
  __device__ __forceinline__ void fetch(int rank, int piece, uint2 (&a)[2][2]) const {
    const uint16_t *row = row_of_a(rank);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int unit = unit_of(piece, half), column = begin + unit / 4 * 32 + unit % 4 * 4;
      a[half][0] = a[half][1] = make_uint2(0, 0);
      if (column < q.in_features) load_two(row, column, a[half]);
    }
  }
  // gain: of token `lane`.
  __device__ __forceinline__ void put_piece(int rank, int piece, const uint2 (&a)[2][2], float gain) const {
    const uint32_t wanted = __ballot_sync(0xffffffffu, lane < q.tokens && gain != 0.f);  // a bit for each token
    using T = typename S::T;
    float sums[S::TOKENS] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int unit = unit_of(piece, half);  // x past the end of the row is zero
      const T *values = reinterpret_cast<const T *>(a[half]);
#pragma unroll
      for (int token = 0; token < S::TOKENS; ++token) {
        if (!(wanted >> token & 1)) continue;
        const uint4 *chunk = plain + unit / 8 * S::kStride + token * kChunkUnits;
        const uint4 staged = chunk[unit % 8];
        const __half2 *x = reinterpret_cast<const __half2 *>(&staged);
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 both = __half22float2(x[k]);
          sum = __fmaf_rn(to_float(values[k]), both.x, sum);
          sum = __fmaf_rn(to_float(values[4 + k]), both.y, sum);
        }
        sums[token] = __fmaf_rn(reinterpret_cast<const float4 *>(chunk + 8)->z, sum, sums[token]);
      }
    }
    uint64_t *cells = q.adapters.cells + ((size_t)(begin / kPieceColumns + piece) * q.ranks + rank) * q.tokens;
#pragma unroll
    for (int token = 0; token < S::TOKENS; ++token) {
      if (!(wanted >> token & 1)) continue;
      float sum = sums[token];
#pragma unroll
      for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane == token) put_cell(cells + token, sum, launch);
    }
  }
};

// scaling B (A x) of one row of W, which is row `cell` of the team. memory: what shared_row_sums::take_all and
// ask_for_b brought there.
template <class T>
__device__ __forceinline__ float adapter_term(const product_group &q, int part, int row, int token, int cell,
                                              const adapter_memory &memory) {
  const lowra_adapter &own = q.adapters.of[part];
  const float *inner = memory.inner + token * q.ranks;
#pragma unroll
  for (int i = 0; i < kMostParts - 1; ++i) {
    if (i < part) inner += q.adapters.of[i].rank;
  }
  const uint2 *b = q.b_is_shared
                       ? memory.b + cell * (q.most_ranks / 4)
                       : reinterpret_cast<const uint2 *>(static_cast<const T *>(own.b) + (size_t)row * own.rank);
  float sum = 0.f;
#pragma unroll 4
  for (int rank = 0; rank < own.rank; rank += 4) {
    // Of a mixed batch's adapters most are not this token's own.
    const float4 a = *reinterpret_cast<const float4 *>(inner + rank);
    if (a.x == 0.f && a.y == 0.f && a.z == 0.f && a.w == 0.f) continue;
    const uint2 raw = b[rank / 4];
    const T *values = reinterpret_cast<const T *>(&raw);
    sum = __fmaf_rn(to_float(values[0]), a.x, sum);
    sum = __fmaf_rn(to_float(values[1]), a.y, sum);
    sum = __fmaf_rn(to_float(values[2]), a.z, sum);
    sum = __fmaf_rn(to_float(values[3]), a.w, sum);
  }
  return own.scaling * sum;
}

}  // namespace lowra
