// Codes to operands of the tensor cores, in registers: weights rounded to the type of x (product_tensor.cu).
//
// The weight is operand A of mma.m16n8k16 (16 packed rows), x is operand B (8 tokens), sums are float32. Which 16
// columns of W meet in one mma is free as long as A and B agree, so it is chosen for cheap decoding: lane t of a quad
// takes columns [64 t, 64 t + 64) of a tile of 256, so that its codes are 8, 16 or 32 neighbouring bytes under one
// scale, and four neighbouring columns of it meet in one mma, so that x needs no reordering.
//
// The value of a weight, float32(level) * scale, is rounded to T as in lowra_cuda_dequantize: the products sum exactly
// the weights that dequantise + cuBLAS sums.
#pragma once

#include "common.cuh"

namespace lowra {

// Blocks of rows, each of one precision: 4-bit rows first.
struct tile_counts {
  int tiles4, tiles2, tiles1;
  __host__ __device__ int total() const { return tiles4 + tiles2 + tiles1; }
};

// rows: rows of one tile (16 times the warps that share a tile's columns).
inline tile_counts tiles_of(const rows_layout &l, int rows) {
  return {(l.rows4 + rows - 1) / rows, (l.rows2 + rows - 1) / rows, (l.rows1 + rows - 1) / rows};
}

// Arguments of a product.
struct product {
  lowra_packed packed;
  rows_layout layout;
  tile_counts tiles;
  const void *x, *bias;  // x [tokens, in_features]; bias [rows] or null
  void *out;             // [tokens, rows]
  int tokens, in_features, groups, group_shift;
};

constexpr int kTileRows = 16;                 // rows of one mma
constexpr int kLaneColumns = 64;              // columns of a lane in one tile
constexpr int kTileColumns = 256;             // columns of a quad: one tile of x
constexpr int kTileUnits = kTileColumns / 8;  // 16-byte units of one token in a tile of x

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

// Levels of one row, as stored: two float16 in a word. Those of 1- and 2-bit rows stay in registers. The 32 bytes of a
// 4-bit row are read from the first-level cache each time a table is built: they would cost 16 registers all along.
template <int BITS>
struct row_levels {
  uint32_t words[BITS];
  __device__ __forceinline__ void place(const uint16_t *levels) {
#pragma unroll
    for (int i = 0; i < BITS; ++i) words[i] = __ldg(reinterpret_cast<const uint32_t *>(levels) + i);
  }
  __device__ __forceinline__ void read(uint32_t (&out)[BITS]) const {
#pragma unroll
    for (int i = 0; i < BITS; ++i) out[i] = words[i];
  }
};
template <>
struct row_levels<4> {
  const uint16_t *at;
  __device__ __forceinline__ void place(const uint16_t *levels) { at = levels; }
  __device__ __forceinline__ void read(uint32_t (&out)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      // volatile: the compiler would otherwise keep the words across all columns.
      asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(out[i]), "=r"(out[i + 1]), "=r"(out[i + 2]), "=r"(out[i + 3])
                   : "l"(at + 2 * i));
    }
  }
};

// Two levels as values of a group, rounded to T.
template <class T>
__device__ __forceinline__ uint32_t scaled(uint32_t levels, float scale) {
  const float2 level = __half22float2(*reinterpret_cast<const __half2 *>(&levels));
  return pack<T>(level.x * scale, level.y * scale);
}

// stored: the levels of a row, two in a word.
template <int BITS, class T>
__device__ __forceinline__ value_table<BITS> table_of(const uint32_t (&stored)[(1 << BITS) / 2], float scale) {
  value_table<BITS> table;
  if constexpr (BITS == 1) {
    const uint32_t both = scaled<T>(stored[0], scale);
    table.base = permute(both, 0, 0x1010);
    table.flip = table.base ^ permute(both, 0, 0x3232);
  } else if constexpr (BITS == 2) {
    const uint32_t first = scaled<T>(stored[0], scale), second = scaled<T>(stored[1], scale);
    table.low = permute(first, second, 0x6420);
    table.high = permute(first, second, 0x7531);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = scaled<T>(stored[2 * i], scale), second = scaled<T>(stored[2 * i + 1], scale);
      table.low[i] = permute(first, second, 0x6420);
      table.high[i] = permute(first, second, 0x7531);
    }
  }
  return table;
}

template <int BITS, class T>
__device__ __forceinline__ value_table<BITS> build_table(const row_levels<BITS> &levels, float scale) {
  uint32_t stored[(1 << BITS) / 2];
  levels.read(stored);
  return table_of<BITS, T>(stored, scale);
}

// Bytes 0 and 2 of the result are bytes 0 and 2 of `word` (bytes 1 and 3 for ODD), and the byte above each is the same
// one code further on: field j of a byte and of the byte above are then neighbouring codes. BITS: width of a code. ODD:
// which half of the bytes.
template <int BITS, bool ODD>
__device__ __forceinline__ uint32_t neighbours(uint32_t word) {
  return permute(word, word >> BITS, ODD ? 0x7351 : 0x6240);
}

// A part of a word is at most four mma, so that few operands are alive at once: half a word of 1-bit codes, else a
// word. out[i] and out[M + i]: column pairs i of its first and of its second unit of x, M the number of mma. ODD: for 1
// bit, whether the part takes the odd bytes of the word.
template <bool ODD>
__device__ __forceinline__ void decode(const value_table<1> &table, uint32_t word, uint32_t (&out)[8]) {
  const uint32_t half = neighbours<1, ODD>(word);
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const uint32_t top = half << (7 - 2 * m);  // the wanted codes are now the signs of the bytes
    out[m] = (permute(top, 0, 0x9988) & table.flip) ^ table.base;
    out[4 + m] = (permute(top, 0, 0xBBAA) & table.flip) ^ table.base;
  }
}

template <bool ODD>
__device__ __forceinline__ void decode(const value_table<2> &table, uint32_t word, uint32_t (&out)[8]) {
  const uint32_t half[2] = {neighbours<2, false>(word), neighbours<2, true>(word)};
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    // A byte of the selector names byte c of `low` and byte c of `high`.
    const uint32_t selector = ((half[m / 2] >> (4 * (m % 2))) & 0x03030303u) * 0x11u + 0x40404040u;
    out[m] = permute(table.low, table.high, selector);
    out[4 + m] = permute(table.low, table.high, selector >> 16);
  }
}

template <bool ODD>
__device__ __forceinline__ void decode(const value_table<4> &table, uint32_t word, uint32_t (&out)[4]) {
  // A permutation selects among 8 bytes, so each code is looked up in both halves of the table by its low three bits
  // and its top bit picks between the two.
  const uint32_t index = word & 0x77777777u, half = ((word & 0x88888888u) >> 1) | 0x32103210u;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t at = index >> (16 * i), pick = half >> (16 * i);
    const uint32_t low =
        permute(permute(table.low[0], table.low[1], at), permute(table.low[2], table.low[3], at), pick);
    const uint32_t high =
        permute(permute(table.high[0], table.high[1], at), permute(table.high[2], table.high[3], at), pick);
    out[2 * i] = permute(low, high, 0x5140);
    out[2 * i + 1] = permute(low, high, 0x7362);
  }
}

// T: float16 or bfloat16. Turing multiplies float16 alone, half as many columns at a time.
template <class T>
__device__ __forceinline__ void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1);
template <>
__device__ __forceinline__ void mma<bf16>(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  __trap();  // never launched: product_tensor answers LOWRA_UNSUPPORTED
#endif
}
template <>
__device__ __forceinline__ void mma<fp16>(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// A scale as loaded, finished when it is needed: nothing waits for memory in between.
struct raw_scale {
  uint32_t bits;
  float step;
};

__device__ __forceinline__ raw_scale fetch_scale(const lowra_packed &p, size_t index) {
  raw_scale raw = {0, 0.f};
  if (p.scale_type == LOWRA_UINT8) {
    raw.bits = __ldg(static_cast<const uint8_t *>(p.scales) + index);
    raw.step = __ldg(p.scale_steps + (index >> 8));
  } else if (p.scale_type == LOWRA_FLOAT16) {
    raw.bits = __ldg(static_cast<const unsigned short *>(p.scales) + index);
  } else {
    raw.bits = __ldg(static_cast<const uint32_t *>(p.scales) + index);
  }
  return raw;
}

__device__ __forceinline__ float finish_scale(const lowra_packed &p, const raw_scale &raw) {
  const float root = (float)(int)raw.bits;
  if (p.scale_type == LOWRA_UINT8) return root * root * raw.step;
  return p.scale_type == LOWRA_FLOAT16 ? half_bits_to_float((uint16_t)raw.bits) : __uint_as_float(raw.bits);
}

// What a lane holds of one tile: the codes of 64 columns of its two rows, `lane / 4` and `lane / 4 + 8`, and the scale
// of the first 32 or more of them.
template <int BITS>
struct lane_codes {
  static constexpr int kWords = 2 * BITS;
  uint32_t words[2][kWords];
  raw_scale scales[2];
};

// The rows of a lane. Rows past the end of a precision repeat its last row; their sums are never stored.
template <int BITS>
struct lane_rows {
  const uint8_t *codes[2];
  size_t first_scale[2];
  row_levels<BITS> levels[2];

  // first: first row of the mma tile; last: last packed row of this precision.
  __device__ __forceinline__ void place(const lowra_packed &p, const rows_layout &layout, int groups, int first,
                                        int last, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(first + lane / 4 + 8 * h, last);
      const row_place at = place_of<0>(layout, row);
      codes[h] = p.codes + at.code_offset;
      first_scale[h] = (size_t)row * groups;
      levels[h].place(p.levels + at.table_offset);
    }
  }

  // Columns [column, column + 64), zero from `end` on (a multiple of 32).
  __device__ __forceinline__ void fetch(const lowra_packed &p, int column, int end, int group_shift,
                                        lane_codes<BITS> &out) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < lane_codes<BITS>::kWords; ++i) out.words[h][i] = 0;
      out.scales[h] = {0, 0.f};
      if (column >= end) continue;
      const uint8_t *at = codes[h] + column * BITS / 8;
      if constexpr (BITS == 1) {
        const uint2 raw = __ldg(reinterpret_cast<const uint2 *>(at));
        out.words[h][0] = raw.x, out.words[h][1] = raw.y;
      } else {
#pragma unroll
        for (int i = 0; i < BITS / 2; ++i) {
          if (i == 1 && column + 32 >= end) continue;  // with 4 bits the second half may lie past the row
          const uint4 raw = __ldg(reinterpret_cast<const uint4 *>(at) + i);
          out.words[h][4 * i] = raw.x, out.words[h][4 * i + 1] = raw.y;
          out.words[h][4 * i + 2] = raw.z, out.words[h][4 * i + 3] = raw.w;
        }
      }
      out.scales[h] = fetch_scale(p, first_scale[h] + (column >> group_shift));
    }
  }
};

// Where 16-byte unit `unit` (0 to 31) of a token lies in its 32 of a tile of x. The eight lanes that load together, two
// tokens by the four lanes of a quad, read units 8 apart; without the exclusive-or they would share banks.
__device__ __forceinline__ int unit_place(int token, int unit) { return unit ^ (unit / 8 | (token % 2) << 2); }

// sum += rows of a lane times columns [column, column + 64) of it.
// NT: tiles of 8 tokens; the sums are registers, so their number must be known to the compiler.
// BITS, T: as above.
// x: the 8 units of these columns of the lane's first token, `lane / 4`. reach: ~0, or 0 for a lane that is to read the
// first unit in place of all others: one of zeros, for a token that does not exist.
template <int BITS, int NT, class T>
__device__ __forceinline__ void multiply_tile(const product &q, const lane_rows<BITS> &rows,
                                              const lane_codes<BITS> &codes, int column, const uint4 *x, int reach,
                                              int lane, float (&sum)[NT][4]) {
  constexpr int kParts = BITS == 1 ? 2 : 1;        // parts of a word
  constexpr int kMmas = BITS == 4 ? 2 : 4;         // mma of a part
  constexpr int kWordUnits = kParts * kMmas / 2;   // units of x that a word meets
  const int key = lane % 4 | (lane / 4 % 2) << 2;  // of unit_place: the same for all units of the lane
  value_table<BITS> table[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) table[h] = build_table<BITS, T>(rows.levels[h], finish_scale(q.packed, codes.scales[h]));
#pragma unroll
  for (int w = 0; w < lane_codes<BITS>::kWords; ++w) {
    if (w == BITS && q.group_shift == 5) {  // column 32 begins another group
      const int group = min(column + 32, q.in_features - 32) >> 5;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        table[h] = build_table<BITS, T>(rows.levels[h], load_scale(q.packed, rows.first_scale[h] + group));
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint32_t a[2][2 * kMmas];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (part == 0) decode<false>(table[h], codes.words[h][w], a[h]);
        if (part == 1) decode<true>(table[h], codes.words[h][w], a[h]);
      }
      const int unit = w * kWordUnits + part;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        uint4 b[2];
        b[0] = x[((unit ^ key) & reach) + 8 * n * kTileUnits];
        if (BITS < 4) b[1] = x[(((unit + kParts) ^ key) & reach) + 8 * n * kTileUnits];
        // Operand B must stand in two neighbouring registers, hence neighbouring words of one unit for each mma.
#pragma unroll
        for (int u = 0; u < kMmas / 2; ++u) {
          mma<T>(sum[n], a[0][4 * u], a[1][4 * u], a[0][4 * u + 1], a[1][4 * u + 1], b[u].x, b[u].y);
          mma<T>(sum[n], a[0][4 * u + 2], a[1][4 * u + 2], a[0][4 * u + 3], a[1][4 * u + 3], b[u].z, b[u].w);
        }
      }
    }
  }
}

// 16 bytes, zeros if not `inside`. Turing, which has no copies past the registers, makes them at once; the waits below
// then have nothing to wait for.
__device__ __forceinline__ void copy_unit(uint4 *shared, const void *global, bool inside) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = (unsigned)__cvta_generic_to_shared(shared);
  const int bytes = inside ? 16 : 0;  // the rest of the 16 is filled with zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
#else
  *shared = inside ? *static_cast<const uint4 *>(global) : make_uint4(0, 0, 0, 0);
#endif
}
// 4, 8 or 16 bytes, without registers in between. Fences wait for loads that are under way, but not for these copies.
template <int BYTES>
__device__ __forceinline__ void copy_async(uint32_t target, const void *source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(source), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// PENDING: youngest groups of copies that may still be under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
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
