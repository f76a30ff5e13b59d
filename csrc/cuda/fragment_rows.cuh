// What product_wgmma reads of a weight: which columns a block has, and the codes and scales of a lane's rows.
#pragma once

#include "product.cuh"

namespace lowra {

constexpr int kHalfColumns = 128;  // of half a tile of x: the columns of a block are a multiple of these
constexpr int kAheadBytes = 256;   // of a row's codes, asked for at the start

// Columns [begin, end) of a block, in tiles of which a quad takes four times 64, half of them at a time. A rest of half
// a tile or less is one of four times 32.
struct column_slice {
  int begin, end;
  __device__ __forceinline__ int halves() const { return (end - begin + kHalfColumns - 1) / kHalfColumns; }
  __device__ __forceinline__ bool is_half(int tile_begin) const { return end - tile_begin <= kHalfColumns; }
  // End of the whole tiles, of which the last one may lack some columns.
  __device__ __forceinline__ int whole_end() const {
    const int rest = (end - begin) % kTileColumns;
    return rest > 0 && rest <= kHalfColumns ? end - rest : end;
  }
  // First of a lane's 32 columns in a half tile.
  __device__ __forceinline__ int lane_column(int half, int lane) const {
    const int tile = begin + half / 2 * kTileColumns;
    return tile + half % 2 * 32 + lane % 4 * (is_half(tile) ? kLaneColumns / 2 : kLaneColumns);
  }
};

// The two rows of a lane, `lane / 4` and `lane / 4 + 8` of its warp's 16, as offsets of 32 bits: registers are scarce
// here. Rows past the end of a precision repeat its last row; their sums are never stored.
template <int BITS>
struct fragment_rows {
  uint32_t rows[2], codes[2], first_scale[2], tables[2];
  row_levels<BITS> levels[2];

  __device__ __forceinline__ void place(const product &q, const tile_place &tile, int warp, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows[h] = min(tile.first_row + warp * kTileRows + lane / 4 + 8 * h, tile.last_row);
      const row_place at = place_of<0>(q.layout, rows[h]);
      codes[h] = (uint32_t)at.code_offset;
      first_scale[h] = rows[h] * q.groups;
      tables[h] = (uint32_t)at.table_offset;
    }
  }

  // Asks for what is read first, in the L2 cache. The lanes of a quad share their rows.
  __device__ __forceinline__ void ask_for(const product &q, const column_slice &slice, int lane) const {
    if (slice.begin >= slice.end) return;
    const int begin = slice.begin * BITS / 8, end = min(begin + kAheadBytes, slice.end * BITS / 8);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint8_t *row = q.packed.codes + codes[h];
      const uint32_t scale = first_scale[h] + (slice.begin >> q.group_shift);
      if (lane % 4 == 0) prefetch_to_l2(row + begin, row + end);
      if (lane % 4 == 1) prefetch_to_l2(scale_address(q.packed, scale));
      if (lane % 4 == 2) prefetch_to_l2(q.packed.levels + tables[h]);
      if (lane % 4 == 3) {
        prefetch_to_l2(q.packed.row_order + rows[h]);
        if (q.packed.scale_type == LOWRA_UINT8) prefetch_to_l2(q.packed.scale_steps + (scale >> 8));
      }
    }
  }

  __device__ __forceinline__ void read_levels(const product &q) {
#pragma unroll
    for (int h = 0; h < 2; ++h) levels[h].place(q.packed.levels + tables[h]);
  }

  // WORDS words of each row, whose columns begin at `column`, zero from `end` on (a multiple of 32).
  template <int WORDS>
  __device__ __forceinline__ void fetch_codes(const product &q, int column, int end,
                                              uint32_t (&words)[2][WORDS]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint8_t *at = q.packed.codes + (codes[h] + column * BITS / 8);
#pragma unroll
      for (int i = 0; i < WORDS; ++i) words[h][i] = 0;
      if (column < end) load_codes(at, words[h]);
    }
  }

  __device__ __forceinline__ void fetch_scales(const product &q, int column, int end, raw_scale (&scales)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scales[h] = {0, 0.f};
      if (column < end) scales[h] = fetch_scale(q.packed, first_scale[h] + (column >> q.group_shift));
    }
  }
};

}  // namespace lowra
