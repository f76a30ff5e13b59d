// Codes to operands of the tensor cores, in registers: what both product kernels share.
//
// The weight is operand A of mma.m16n8k16 (16 packed rows), x is operand B (8 tokens), sums are float32. Which 16 columns
// of W meet in one mma is free as long as A and B agree, so it is chosen for cheap decoding: a lane holds one 32-bit word
// of codes of its row, and mma r of that word takes the r-th code of each of its 4 bytes. A code byte has P = 8 / bits
// codes, so lane t of a quad brings columns k + r, k + P + r, k + 2P + r, k + 3P + r, with k the first column of its word.
//
// The value of a weight, float32(level) * scale, is rounded to T as in lowra_cuda_dequantize: the products sum exactly
// the weights that dequantise + cuBLAS sums. A table holds the rounded values of one row for one group; it is built for
// 32 columns at a time, hence the smallest group size of the products.
#pragma once

#include "common.cuh"

namespace lowra {

constexpr int kStep = 32;      // columns that one table serves
constexpr int kTileRows = 16;  // rows of one mma

// BITS: decides table and selection. 1 bit: two values, selected by masks.
template <int BITS>
struct value_table {
  uint32_t base, flip;
};
// 2 bits: low bytes of the four values in `low`, high bytes in `high`.
template <>
struct value_table<2> {
  uint32_t low, high;
};
// 4 bits: low and high bytes of the sixteen values.
template <>
struct value_table<4> {
  uint32_t low[4], high[4];
};

// Levels of one row, as stored: two float16 in a word.
template <int BITS>
struct row_levels {
  static constexpr int kWords = (1 << BITS) / 2;
  uint32_t words[kWords];
  __device__ __forceinline__ void load(const uint16_t *levels) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldg(reinterpret_cast<const uint32_t *>(levels) + i);
  }
  // Values 2i and 2i + 1 of a group, rounded to T.
  template <class T>
  __device__ __forceinline__ uint32_t pair(int i, float scale) const {
    const float2 level = __half22float2(*reinterpret_cast<const __half2 *>(&words[i]));
    return pack<T>(level.x * scale, level.y * scale);
  }
};

template <int BITS, class T>
__device__ __forceinline__ value_table<BITS> build_table(const row_levels<BITS> &levels, float scale) {
  value_table<BITS> table;
  if constexpr (BITS == 1) {
    const uint32_t both = levels.template pair<T>(0, scale);
    table.base = permute(both, 0, 0x1010);
    table.flip = table.base ^ permute(both, 0, 0x3232);
  } else if constexpr (BITS == 2) {
    const uint32_t first = levels.template pair<T>(0, scale), second = levels.template pair<T>(1, scale);
    table.low = permute(first, second, 0x6420);
    table.high = permute(first, second, 0x7531);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = levels.template pair<T>(2 * i, scale), second = levels.template pair<T>(2 * i + 1, scale);
      table.low[i] = permute(first, second, 0x6420);
      table.high[i] = permute(first, second, 0x7531);
    }
  }
  return table;
}

// Words 2r and 2r + 1 of `out`: the r-th codes of bytes 0 and 1, and of bytes 2 and 3.
__device__ __forceinline__ void decode(const value_table<1> &table, uint32_t word, uint32_t (&out)[16]) {
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const uint32_t top = word << (7 - r);  // code r of each byte is now the sign of that byte
    out[2 * r] = (permute(top, 0, 0x9988) & table.flip) ^ table.base;
    out[2 * r + 1] = (permute(top, 0, 0xBBAA) & table.flip) ^ table.base;
  }
}

__device__ __forceinline__ void decode(const value_table<2> &table, uint32_t word, uint32_t (&out)[8]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    // A byte of the selector names byte c of `low` and byte c of `high`.
    const uint32_t selector = ((word >> (2 * r)) & 0x03030303u) * 0x11u + 0x40404040u;
    out[2 * r] = permute(table.low, table.high, selector);
    out[2 * r + 1] = permute(table.low, table.high, selector >> 16);
  }
}

__device__ __forceinline__ void decode(const value_table<4> &table, uint32_t word, uint32_t (&out)[4]) {
  // A permutation selects among 8 bytes, so each code is looked up in both halves of the table by its low three bits and
  // its top bit picks between the two.
  const uint32_t index = word & 0x77777777u, half = ((word & 0x88888888u) >> 1) | 0x32103210u;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t at = index >> (16 * i), pick = half >> (16 * i);
    const uint32_t low = permute(permute(table.low[0], table.low[1], at), permute(table.low[2], table.low[3], at), pick);
    const uint32_t high =
        permute(permute(table.high[0], table.high[1], at), permute(table.high[2], table.high[3], at), pick);
    out[i] = permute(low, high, 0x6240);
    out[2 + i] = permute(low, high, 0x7351);
  }
}

// T: float16 or bfloat16.
template <class T>
__device__ __forceinline__ void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1);
template <>
__device__ __forceinline__ void mma<bf16>(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<fp16>(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The two rows of a tile that a lane decodes: `lane / 4` and `lane / 4 + 8`. Rows past the end of a precision repeat its
// last row; their sums are never stored.
template <int BITS>
struct lane_rows {
  const uint8_t *codes[2];
  size_t first_scale[2];
  row_levels<BITS> levels[2];

  // tile_row: first row of the tile; last: last packed row of this precision.
  __device__ __forceinline__ void place(const lowra_packed &p, const rows_layout &layout, int groups, int tile_row,
                                        int last, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(tile_row + lane / 4 + 8 * h, last);
      const row_place at = place_of<0>(layout, row);
      codes[h] = p.codes + at.code_offset;
      first_scale[h] = (size_t)row * groups;
      levels[h].load(p.levels + at.table_offset);
    }
  }
};

// Tiles of 16 rows, each of one precision: 4-bit tiles first.
struct tile_counts {
  int tiles4, tiles2, tiles1;
  __host__ __device__ int total() const { return tiles4 + tiles2 + tiles1; }
};

// rows: rows of one tile (16 times the warps that share a tile's columns).
inline tile_counts tiles_of(const rows_layout &l, int rows) {
  return {(l.rows4 + rows - 1) / rows, (l.rows2 + rows - 1) / rows, (l.rows1 + rows - 1) / rows};
}

struct tile_place {
  int bits, first_row, last_row;  // last_row: last packed row of this precision
};

__device__ __forceinline__ tile_place tile_at(const rows_layout &l, const tile_counts &tiles, int rows, int tile) {
  if (tile < tiles.tiles4) return {4, tile * rows, l.rows4 - 1};
  tile -= tiles.tiles4;
  if (tile < tiles.tiles2) return {2, l.rows4 + tile * rows, l.rows4 + l.rows2 - 1};
  tile -= tiles.tiles2;
  return {1, l.rows4 + l.rows2 + tile * rows, l.rows() - 1};
}

}  // namespace lowra
