// Rows of a tile that are neighbours in W, decoded to shared memory: which they are, and 64 weights of one at a time.
//
// Sorted by precision they are three runs of packed rows, since packing keeps the order of W within a precision. A warp
// takes 32 in this order. Where a run ends within a warp, its rows of fewer bits are decoded as if they had as many as
// the others: their codes are spread, which costs less than decoding twice.
#pragma once

#include "product.cuh"
#include "wgmma.cuh"

namespace lowra {

constexpr int kStepColumns = 64;              // of a row at a time, at most one group
constexpr int kStepBytes = 2 * kStepColumns;  // of a decoded row or a token: what the swizzle of wgmma.cuh spans
constexpr int kRuns = 6;                      // first packed row and the one past the last, for each precision

// First packed row of [begin, end) whose place in W is `row` or later; places ascend there. All 32 lanes must be here.
__device__ __forceinline__ int first_from(const int32_t *row_order, int begin, int end, int row) {
  while (begin < end) {
    const int stride = (end - begin + 31) / 32, probe = begin + threadIdx.x % 32 * stride;
    const bool before = probe < end && __ldg(row_order + probe) < row;
    const int count = __popc(__ballot_sync(0xffffffffu, before));
    if (count == 0) return begin;
    end = min(begin + count * stride, end);
    begin += (count - 1) * stride + 1;
  }
  return begin;
}

// One of the six ends of the runs of rows [first_row, end_row) of W; a warp each.
__device__ __forceinline__ int end_of_run(const product &q, int which, int first_row, int end_row) {
  const rows_layout &l = q.layout;
  const int begin = which < 2 ? 0 : which < 4 ? l.rows4 : l.rows4 + l.rows2;
  const int end = which < 2 ? l.rows4 : which < 4 ? l.rows4 + l.rows2 : l.rows();
  return first_from(q.packed.row_order, begin, end, which % 2 ? end_row : first_row);
}

struct sorted_row {
  int bits, packed;  // bits: 0 past the last row
};

// The row at `position` of the three runs.
__device__ __forceinline__ sorted_row row_at(const int *runs, int position) {
  sorted_row row = {0, 0};
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const int count = runs[2 * c + 1] - runs[2 * c];
    if (position >= 0 && position < count) row = {4 >> c, runs[2 * c] + position};
    position -= count;
  }
  return row;
}

// Exchanges 16-byte units of a decoded row, and so 2 * BITS bytes of its codes: place i gets unit i ^ key.
template <int BITS>
__device__ __forceinline__ void exchange_units(uint32_t (&words)[2 * BITS], uint32_t key) {
  constexpr int kInWord = 4 / BITS;  // units in a word of codes
  if constexpr (kInWord > 1) {
    const uint32_t selector = BITS == 1 ? 0x3210u ^ (key & 3) * 0x1111u : 0x3210u ^ (key & 1) * 0x2222u;
#pragma unroll
    for (int i = 0; i < 2 * BITS; ++i) words[i] = permute(words[i], 0, selector);
  }
#pragma unroll
  for (int distance = 1; distance < 2 * BITS; distance *= 2) {
    const bool swap = key & (distance * kInWord);
#pragma unroll
    for (int i = 0; i < 2 * BITS; ++i) {
      if (i & distance) continue;
      const uint32_t low = words[i], high = words[i + distance];
      words[i] = swap ? high : low, words[i + distance] = swap ? low : high;
    }
  }
}

// The low 16 / TO * FROM bits of x, codes of FROM bits, as 32 bits of codes of TO bits.
template <int FROM, int TO>
__device__ __forceinline__ uint32_t spread(uint32_t x) {
  if constexpr (FROM == 1 && TO == 4) {
    x = (x | x << 12) & 0x000f000fu;
    x = (x | x << 6) & 0x03030303u;
    return (x | x << 3) & 0x11111111u;
  }
  x = (x | x << 8) & 0x00ff00ffu;
  x = (x | x << 4) & 0x0f0f0f0fu;
  x = (x | x << 2) & 0x33333333u;
  return FROM == 2 ? x : (x | x << 1) & 0x55555555u;
}

// The first 2 * FROM words hold 64 codes of FROM bits, and then all of them 64 of TO bits.
template <int FROM, int TO>
__device__ __forceinline__ void spread_codes(uint32_t (&words)[2 * TO]) {
  constexpr int kBits = 32 / TO * FROM, kInWord = TO / FROM;
  uint32_t narrow[2 * FROM];
#pragma unroll
  for (int i = 0; i < 2 * FROM; ++i) narrow[i] = words[i];
#pragma unroll
  for (int i = 0; i < 2 * TO; ++i) {
    words[i] = spread<FROM, TO>(narrow[i / kInWord] >> i % kInWord * kBits & ((1u << kBits) - 1));
  }
}

// What was asked for: a thread's codes of a step in two units of 16 bytes, the word that its scale lies in, and the
// step of a double-quantised one. A slot has these of all THREADS that decode.
template <int THREADS>
struct code_slot {
  static constexpr int kScales = 32 * THREADS, kScaleSteps = 36 * THREADS, kBytes = 40 * THREADS;
};

// A thread's row in a warp whose rows have BITS bits or fewer. THREADS: see code_slot.
template <int BITS, int THREADS>
struct tile_row {
  using slot_layout = code_slot<THREADS>;
  const uint8_t *codes;
  int bits;
  uint32_t first_scale;
  uint32_t target;                   // where its first store goes among the rows of a stage
  uint32_t key;                      // see exchange_units
  uint32_t levels[(1 << BITS) / 2];  // two float16 in a word

  // position: see row_at; past the end the last row is repeated. first_row: row 0 of the tile.
  __device__ __forceinline__ void place(const product &q, const int *runs, int position, int first_row) {
    int rows = 0;
#pragma unroll
    for (int c = 0; c < 3; ++c) rows += runs[2 * c + 1] - runs[2 * c];
    const sorted_row mine = row_at(runs, min(position, rows - 1));
    const row_place at = place_of<0>(q.layout, mine.packed);
    bits = mine.bits;
    codes = q.packed.codes + at.code_offset;
    first_scale = (uint32_t)mine.packed * q.groups;
    const uint32_t row = __ldg(q.packed.row_order + mine.packed) - first_row, lane = threadIdx.x;
    // Unit j of row r lies at j ^ r % 8, and the i-th store of a thread takes unit i ^ key: eight threads that store
    // together then meet all banks, whichever rows they have.
    key = (row ^ lane) % 8;
    target = row * kStepBytes + lane % 8 * 16;
    const uint32_t *stored = reinterpret_cast<const uint32_t *>(q.packed.levels + at.table_offset);
#pragma unroll
    for (int i = 0; i < (1 << BITS) / 2; ++i) levels[i] = i < 1 << bits >> 1 ? __ldg(stored + i) : 0;
  }

  // Of the scale of step `step`, among all scales.
  __device__ __forceinline__ uint32_t scale_index(const product &q, int step) const {
    return first_scale + (step * kStepColumns >> q.group_shift);
  }
  __device__ __forceinline__ uintptr_t scale_address(const product &q, uint32_t index) const {
    const int shift = q.packed.scale_type == LOWRA_UINT8 ? 0 : q.packed.scale_type == LOWRA_FLOAT16 ? 1 : 2;
    return reinterpret_cast<uintptr_t>(q.packed.scales) + ((uintptr_t)index << shift);
  }

  // Copies scale and codes of step `step`, if there is one, to a slot.
  __device__ __forceinline__ void ask_for(const product &q, int step, int steps, uint32_t slot) const {
    if (step < steps) {
      const uint32_t thread = threadIdx.x % THREADS, unit = slot + 16 * thread, word = slot + 4 * thread;
      const uint8_t *from = codes + step * 8 * bits;
      if (bits == 1) {
        copy_async<8>(unit, from);
      } else {
        copy_async<16>(unit, from);
      }
      if (BITS == 4 && bits == 4) copy_async<16>(unit + 16 * THREADS, from + 16);
      const uint32_t index = scale_index(q, step);
      // Copies are of whole words, and a word that has a byte of the scales ends in no other page.
      const uintptr_t scale = scale_address(q, index) & ~(uintptr_t)3;
      copy_async<4>(word + slot_layout::kScales, reinterpret_cast<const void *>(scale));
      if (q.packed.scale_type == LOWRA_UINT8) {
        copy_async<4>(word + slot_layout::kScaleSteps, q.packed.scale_steps + (index >> 8));
      }
    }
    commit_copies();
  }

  // The scale of step `step`, which has come into a slot.
  __device__ __forceinline__ float scale_in(const product &q, int step, uint32_t slot) const {
    const uint32_t word = slot + threadIdx.x % THREADS * 4;
    raw_scale scale = {shared_load(word + slot_layout::kScales), 0.f};
    scale.bits >>= (scale_address(q, scale_index(q, step)) & 3) * 8;
    if (q.packed.scale_type == LOWRA_UINT8) {
      scale.bits &= 0xff;
      scale.step = __uint_as_float(shared_load(word + slot_layout::kScaleSteps));
    }
    return finish_scale(q.packed, scale);
  }

  // The 64 weights of step `step`, which has come into a slot, rounded to T, to shared memory. rows: the rows of a
  // stage.
  template <class T>
  __device__ __forceinline__ void decode_step(const product &q, uint32_t rows, int step, uint32_t slot) const {
    constexpr int kParts = BITS == 1 ? 2 : 1;  // of a word: see fragments.cuh
    const uint32_t unit = slot + threadIdx.x % THREADS * 16;
    uint32_t words[2 * BITS];
    if constexpr (BITS < 4) {
      shared_load(unit, words);
    } else {
      uint32_t first[4], second[4];
      shared_load(unit, first);
      shared_load(unit + 16 * THREADS, second);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = first[i], words[4 + i] = second[i];
    }
    if constexpr (BITS == 2) {
      if (bits == 1) spread_codes<1, 2>(words);
    }
    if constexpr (BITS == 4) {
      if (bits == 2) spread_codes<2, 4>(words);
      if (bits == 1) spread_codes<1, 4>(words);
    }
    exchange_units<BITS>(words, key);
    const value_table<BITS> table = table_of<BITS, T>(levels, scale_in(q, step, slot));
#pragma unroll
    for (int w = 0; w < 2 * BITS; ++w) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint32_t out[BITS == 4 ? 4 : 8];
        if (part == 0) decode<false>(table, words[w], out);
        if (part == 1) decode<true>(table, words[w], out);
        const int unit = BITS == 4 ? w : BITS == 2 ? 2 * w : 4 * w + part;
        shared_store((rows + target) ^ unit * 16, out);
        if constexpr (BITS < 4) shared_store((rows + target) ^ (unit + kParts) * 16, out + 4);
      }
    }
  }
};

}  // namespace lowra
