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

// Words of the fours of ranks that are a token's own.
__host__ __device__ inline int words_of_fours(const product_group &q) {
  return q.adapters.gains ? (q.own / 4 * q.tokens + 3) / 4 * 4 : 0;
}

inline size_t inner_bytes(const single_product &) { return 0; }
inline size_t inner_bytes(const product_group &q) { return ((size_t)q.own * q.tokens + words_of_fours(q)) * 4; }

// Of the rows of B that a team of `tiles` tiles stores.
inline size_t bytes_of_b(const product_group &q, int tiles) { return (size_t)tiles * kTileRows * q.b_stride * 8; }

// What a block needs of its adapters when it stores its rows, in shared memory.
struct adapter_memory {
  float *inner;  // [token][a token's own ranks of all adapters]
  int *fours;    // as lowra_adapters has them
  uint2 *b;      // [row of the team][q.b_stride], if q.b_is_shared

  template <class S>
  __device__ __forceinline__ void lie_at(const product_group &q, int *memory) {
    inner = reinterpret_cast<float *>(memory);
    fours = memory + q.own * q.tokens;
    b = reinterpret_cast<uint2 *>(S::SIMPLE ? fours : fours + words_of_fours(q));
  }
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

// Factors of A x, or null.
template <class S>
__device__ __forceinline__ const float *gains_of(const product_group &q) {
  return S::SIMPLE ? nullptr : q.adapters.gains;
}
template <class S>
__device__ __forceinline__ bool shares_b(const product_group &q) {
  return S::SIMPLE || q.b_is_shared;
}

// Which piece of which row of A a warp sums, and for which tokens: a bit each. A row below zero: none, and none after
// it.
struct piece_of_a {
  int rank, number;
  uint32_t tokens;
};

// As shared_row_sums::put_all, out of the way of the code that every launch runs through.
template <class S>
__device__ __noinline__ void put_all_pieces(const typename S::PRODUCT &q, const uint4 *plain, int begin, int end,
                                            uint32_t launch);

// A x of all adapters of a group, shared out among warps.
template <class S>
struct shared_row_sums {
  const typename S::PRODUCT &q;
  const uint4 *plain;  // x of the block's columns [begin, end), see stage_x
  int begin, end, lane;
  int task, stride;   // this warp's first, of which it usually has no other, and how far it is to the next
  uint32_t launch;    // its number
  piece_of_a piece;   // of that task
  uint2 first[2][2];  // of A, for it
  float first_gain;   // of that row of A for token `lane`
  int four;           // word threadIdx.x of memory.fours
  int taker;          // this thread's place among those that take sums

  // Cells that a thread looks at in its last unit of the product: they are there by then, and come while it works.
  static constexpr int kEarly = S::SIMPLE ? 1 : S::TOKENS <= 2 ? S::TOKENS : 0;
  const uint64_t *early_cell;  // the first of them, or null
  uint64_t early[kEarly > 0 ? kEarly : 1];

  // Before earlier kernels have finished. spare: how many warps of the block come before this one when those with
  // fewest units of the product come first.
  __device__ __forceinline__ void ask_for_first(int team, int teams, int spare) {
    task = team + teams * spare, stride = teams * kWarps;
    taker = spare * 32 + lane;
    piece = piece_of_task(task);
    if (piece.rank < 0 || lane != 0) return;
    const int column = begin + piece.number * kPieceColumns;
    const uint16_t *row = row_of_a(piece.rank);
    prefetch_to_l2(row + column, row + min(column + kPieceColumns, q.in_features));
  }
  // A row of B, which is read when sums are stored: to `target`, or to the L2 cache. wait_for_copies<0> follows.
  __device__ __forceinline__ void ask_for_b(int part, int row, uint2 *target) const {
    const lowra_adapter &own = q.adapters.of[part];
    const uint16_t *values = static_cast<const uint16_t *>(own.b) + (size_t)row * own.rank;
    if (!shares_b<S>(q)) {
      for (int rank = 0; rank < own.rank; rank += 16) prefetch_to_l2(values + rank);  // 32 bytes each
      return;
    }
#if __CUDA_ARCH__ >= 800
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(target);
    if (S::SIMPLE || q.b_in_16) {
      for (int rank = 0; rank < own.rank; rank += 8) copy_async<16>(address + rank * 2, values + rank);
    } else {
      for (int rank = 0; rank < own.rank; rank += 4) copy_async<8>(address + rank * 2, values + rank);
    }
    commit_copies();
#else
    for (int rank = 0; rank < own.rank; rank += 4) target[rank / 4] = *reinterpret_cast<const uint2 *>(values + rank);
#endif
  }

  // Once they have.
  __device__ __forceinline__ void fetch_first(int thread) {
    launch = (uint32_t)*q.adapters.launches + (uint32_t)q.adapters.launch;
    if (piece.rank >= 0) fetch_piece();
    if constexpr (!S::SIMPLE) four = thread < words_of_fours(q) ? four_at(thread) : -1;
  }
  // When those words are there. A barrier follows.
  __device__ __forceinline__ void put_fours(int thread, const adapter_memory &memory) const {
    if constexpr (!S::SIMPLE) {
#pragma unroll 1
      for (int i = thread; i < words_of_fours(q); i += kThreads) memory.fours[i] = i == thread ? four : four_at(i);
    }
  }

  // After it.
  __device__ __forceinline__ void put_own(const adapter_memory &memory) {
#pragma unroll 1
    while (piece.rank >= 0) {
      put_piece(piece, first, first_gain);
      if constexpr (S::SIMPLE) break;  // a warp has one at most, see launch
      task += stride;
      piece = piece_of_task(task);
      if (piece.rank >= 0) fetch_piece();
    }
    if constexpr (kEarly > 0) {
      early_cell = first_cell_of(taker, memory);
#pragma unroll
      for (int i = 0; i < kEarly; ++i) early[i] = (uint64_t)~launch << 32;  // not there
    }
  }

  __device__ __forceinline__ void look_early() {
#pragma unroll
    for (int i = 0; i < kEarly; ++i) {
      if (early_cell && (i == 0 || piece_of(taker, i) < all_pieces())) early[i] = look_at_cell(early_cell + i * step());
    }
  }

  // Into memory.inner; to be followed by a barrier. Several lanes share the pieces of a sum, so that each of them waits
  // for memory once.
  __device__ __forceinline__ void take_all(const adapter_memory &memory) const {
    if constexpr (S::SIMPLE) {
      if (taker - lane < q.own * q.tokens << q.sharing) take_one(memory);
    } else {
      take_several(memory);
    }
  }

  // The sums of all rows of A in the block's own columns, into their cells.
  __device__ __forceinline__ void put_all() const {
    const int pieces = (end - begin + kPieceColumns - 1) / kPieceColumns;
#pragma unroll 1
    for (int rank = 0; rank < q.ranks; ++rank) {
#pragma unroll 1
      for (int number = 0; number < pieces; ++number) {
        uint2 a[2][2];
        fetch(rank, number, a);
        put_piece({rank, number, ~0u}, a, gain_of(rank, lane));
      }
    }
  }

 private:
  // Of a thread's only cell.
  __device__ __forceinline__ void take_one(const adapter_memory &memory) const {
    uint64_t word = early[0];
#pragma unroll 1
    for (int looks = 0; !__all_sync(0xffffffffu, !early_cell || (uint32_t)(word >> 32) == launch); ++looks) {
      if (looks == kPatience) put_all_pieces<S>(q, plain, begin, end, launch);
      if (early_cell) word = look_at_cell(early_cell);
    }
    put_sum(memory, taker, early_cell ? __uint_as_float((uint32_t)word) : 0.f);
  }
  __device__ __forceinline__ void take_several(const adapter_memory &memory) const {
    const int count = q.own * q.tokens;
#pragma unroll 1
    for (int at = taker; at - lane < count << q.sharing; at += kThreads) {
      const uint64_t *const cell = kEarly > 0 && at == taker ? early_cell : first_cell_of(at, memory);
      float sum;
#pragma unroll 1
      for (int looks = 0;; ++looks) {
        bool there = true;
        sum = 0.f;
        if (cell) {
          // All are asked for before the first is waited for.
          constexpr int kAtOnce = S::TOKENS == 1 ? 2 : 8;
#pragma unroll 1
          for (int i = 0; piece_of(at, i) < all_pieces(); i += kAtOnce) {
            uint64_t words[kAtOnce];
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
              words[k] = (uint64_t)launch << 32;
              if (piece_of(at, i + k) >= all_pieces()) continue;
              if (k < kEarly && i == 0 && looks == 0 && at == taker) {
                words[k] = early[k < kEarly ? k : 0];
              } else {
                words[k] = look_at_cell(cell + (i + k) * step());
              }
            }
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
              there = there && (uint32_t)(words[k] >> 32) == launch;
              sum += __uint_as_float((uint32_t)words[k]);
            }
          }
        }
        if (__all_sync(0xffffffffu, there)) break;
        if (looks == kPatience) put_all();
      }
      put_sum(memory, at, sum);
    }
  }
  // Of the pieces that thread or further number `at` has taken, and of its neighbours'.
  __device__ __forceinline__ void put_sum(const adapter_memory &memory, int at, float sum) const {
#pragma unroll 1
    for (int share = 1 << q.sharing >> 1; share > 0; share /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, share);
    if (at >> q.sharing < q.own * q.tokens && piece_of(at, 0) == 0) memory.inner[at >> q.sharing] = sum;
  }
  // Without gains a row is wanted for all tokens, and several warps share them.
  static constexpr int kPortion = S::TOKENS <= 2 ? S::TOKENS : 2;  // tokens of a task
  __device__ __forceinline__ piece_of_a piece_of_task(int number) const {
    constexpr int kPortions = S::TOKENS / kPortion;
    constexpr uint32_t kAll = (1u << S::TOKENS) - 1;
    const bool whole = kPortions == 1 || gains_of<S>(q);
    const int portion = whole ? 0 : number % kPortions, both = whole ? number : number / kPortions;
    const int piece = (int)q.per_piece.divide(both), rank = both - piece * q.ranks;
    const bool is_there = begin + piece * kPieceColumns < end;
    return {is_there ? rank : -1, piece, whole ? kAll : ((1u << kPortion) - 1) << portion * kPortion};
  }
  __device__ __forceinline__ int all_pieces() const { return (q.in_features + kPieceColumns - 1) / kPieceColumns; }
  // The cells of a sum are shared out among 1 << q.sharing lanes, whose cells lie side by side: all blocks read the
  // same few lines of memory. Cell i of thread or further number `at` is of this piece, lies so far behind the one
  // before, and the first here: null where the sum is none of a token's own.
  __device__ __forceinline__ int piece_of(int at, int i) const {
    return (i << q.sharing) + (at & ((1 << q.sharing) - 1));
  }
  __device__ __forceinline__ size_t step() const { return (size_t)cells_of_piece() << q.sharing; }
  __device__ __forceinline__ const uint64_t *first_cell_of(int at, const adapter_memory &memory) const {
    const int number = at >> q.sharing;  // in memory.inner
    if (number >= q.own * q.tokens || piece_of(at, 0) >= all_pieces()) return nullptr;
    const int token = S::TOKENS == 1 ? 0 : number / q.own;
    int rank = number - token * q.own;
    if (gains_of<S>(q)) {
      const int four = memory.fours[rank / 4 * q.tokens + token];
      if (four < 0) return nullptr;
      rank = four * 4 + rank % 4;
    }
    return q.adapters.cells + place_of_cell(piece_of(at, 0), token, rank);
  }
  // Cells are [piece >> q.sharing][token][rank][the other bits of the piece].
  __device__ __forceinline__ int cells_of_piece() const { return q.ranks * q.tokens; }
  __device__ __forceinline__ size_t place_of_cell(int piece, int token, int rank) const {
    const int shared = piece & ((1 << q.sharing) - 1);
    return (piece >> q.sharing) * step() + ((token * q.ranks + rank) << q.sharing) + shared;
  }
  // Of a rank, counted over all adapters; see lowra_adapters.
  __device__ __forceinline__ float gain_of(int rank, int token) const {
    if (!gains_of<S>(q)) return 1.f;
    return token < q.tokens ? __ldg(gains_of<S>(q) + rank * q.tokens + token) : 0.f;
  }
  __device__ __forceinline__ const uint16_t *row_of_a(int rank) const {
    int part = 0;
#pragma unroll
    for (int i = 0; i < kMostParts - 1; ++i) {
      if (part == i && rank >= q.adapters.of[i].rank) rank -= q.adapters.of[i].rank, ++part;
    }
    return static_cast<const uint16_t *>(q.adapters.of[part].a) + (size_t)rank * q.in_features;
  }
  __device__ __forceinline__ void fetch_piece() {
    fetch(piece.rank, piece.number, first);
    first_gain = gain_of(piece.rank, lane);
  }
  __device__ __forceinline__ int four_at(int word) const {
    return word < q.own / 4 * q.tokens ? __ldg(q.adapters.fours + word) : -1;
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
  __device__ __forceinline__ void put_piece(const piece_of_a &own, const uint2 (&a)[2][2], float gain) const {
    using T = typename S::T;
    // A bit for each token. -0 is wanted too.
    uint32_t wanted = S::TOKENS == 1 ? 1 : (1u << q.tokens) - 1;
    if (gains_of<S>(q)) wanted = __ballot_sync(0xffffffffu, lane < q.tokens && __float_as_uint(gain) != 0);
    wanted &= own.tokens;
    uint64_t *cells = q.adapters.cells + place_of_cell(begin / kPieceColumns + own.number, 0, own.rank);
#pragma unroll 1
    for (; wanted; wanted &= wanted - 1) {  // a loop, since code that runs once is slow to come
      const int token = S::TOKENS == 1 ? 0 : __ffs(wanted) - 1;
      float sum = 0.f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int unit = unit_of(own.number, half);  // x past the end of the row is zero
        const T *values = reinterpret_cast<const T *>(a[half]);
        const uint4 *chunk = plain + unit / 8 * S::kStride + token * kChunkUnits;
        const uint4 staged = chunk[unit % 8];
        const __half2 *x = reinterpret_cast<const __half2 *>(&staged);
        float part = 0.f;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 both = __half22float2(x[k]);
          part = __fmaf_rn(to_float(values[k]), both.x, part);
          part = __fmaf_rn(to_float(values[4 + k]), both.y, part);
        }
        sum = __fmaf_rn(reinterpret_cast<const float4 *>(chunk + 8)->z, part, sum);
      }
#pragma unroll
      for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane == token) put_cell(cells + ((token * q.ranks) << q.sharing), gain == 0.f ? 0.f : gain * sum, launch);
    }
  }
};

template <class S>
__device__ __noinline__ void put_all_pieces(const typename S::PRODUCT &q, const uint4 *plain, int begin, int end,
                                            uint32_t launch) {
  shared_row_sums<S> sums = {q, plain, begin, end, (int)threadIdx.x % 32};
  sums.launch = launch;
  sums.put_all();
}

// Adds scaling B (A x) to the sums of ROWS rows of one weight for one token. cell: the first row's among those of the
// team; the others follow it there. memory: what shared_row_sums brought there.
template <class S, int ROWS>
__device__ __forceinline__ void add_adapter_terms(const product_group &q, int part, const int (&rows)[ROWS], int token,
                                                  int cell, const adapter_memory &memory, float (&out)[ROWS]) {
  using T = typename S::T;
  const lowra_adapter &adapter = q.adapters.of[part];
  int begin = 0, first = 0;  // among a token's own ranks, and among all
#pragma unroll
  for (int i = 0; i < kMostParts - 1; ++i) {
    if (i < part) begin += q.adapters.of[i].own, first += q.adapters.of[i].rank / 4;
  }
  if (!gains_of<S>(q)) first = 0;
  const float4 *inner = reinterpret_cast<const float4 *>(memory.inner + token * q.own + begin);
  const int *fours = memory.fours + begin / 4 * q.tokens + token;
  const uint2 *b[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    b[r] = shares_b<S>(q) ? memory.b + (cell + r) * q.b_stride
                          : static_cast<const uint2 *>(adapter.b) + (size_t)rows[r] * (adapter.rank / 4);
  }
  float4 sums[ROWS] = {};
#pragma unroll(ROWS == 1 ? 4 : 1)
  for (int i = 0; i < adapter.own / 4; ++i) {
    const int four = gains_of<S>(q) ? fours[i * q.tokens] : i;
    if (four < 0) break;
    const float4 a = inner[i];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const uint2 raw = b[r][four - first];
      const T *values = reinterpret_cast<const T *>(&raw);
      sums[r].x = __fmaf_rn(to_float(values[0]), a.x, sums[r].x);
      sums[r].y = __fmaf_rn(to_float(values[1]), a.y, sums[r].y);
      sums[r].z = __fmaf_rn(to_float(values[2]), a.z, sums[r].z);
      sums[r].w = __fmaf_rn(to_float(values[3]), a.w, sums[r].w);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) out[r] += adapter.scaling * (sums[r].x + sums[r].y + (sums[r].z + sums[r].w));
}

}  // namespace lowra
