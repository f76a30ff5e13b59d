// Decode x product for up to 8 tokens. Reference: reference.linear.
//
// The weight is operand A of mma.m16n8k16 (16 packed rows), x operand B. With few tokens the 8 columns of an mma are put to
// use: lane t of a quad decodes neighbouring columns of its own, and columns 2t and 2t + 1 of B hold x of two tokens at
// the k's of lane t only, zero elsewhere. So each sum belongs to one lane's columns, ends up in that lane, and is
// multiplied by their scale once for 32 columns: operand A needs no scale, its values are the levels as they are stored.
//
// float16 holds them exactly. x becomes float16 as well, divided by a power of two for each 64 columns: whatever is lost
// lies 2^-32 below the largest of them. So the result is nearer to the exact product than a weight rounded to the type
// of x allows.
//
// A team of blocks (a cluster, which splits the columns) takes a share of all rows, 4-, 2- and 1-bit rows alike; its work is
// counted in units of 64 bytes of 16 rows, whose cost hardly depends on the precision, and its warps share them evenly.
#include <cooperative_groups.h>

#include "product.cuh"

namespace lowra {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kUnitBits = 512;    // bits of a row in a unit: 16 bytes of each lane of a quad
constexpr int kChunkColumns = 64; // columns of x under one exponent
constexpr int kChunkUnits = 9;    // 16-byte units of a token's chunk: 8 of x and one of its exponent and sums
constexpr int kMaxTeams = 256;
constexpr int kKinds = 3;         // kinds of rows: 4, 2 and 1 bits

// Tokens rounded up to what the kernel is compiled for, and the 16-byte units between two chunks of x: neighbouring chunks
// start 32 bytes further round the banks, so that the four lanes of a quad never meet.
template <int TOKENS>
struct x_place {
  static constexpr int kTokens = TOKENS == 1 ? 2 : TOKENS;
  static constexpr int kStride = kTokens * kChunkUnits + (10 - kTokens * kChunkUnits % 8) % 8;
  static_assert(kStride % 8 == 2, "32 bytes round the banks");
};

// Which tiles of 16 rows each team takes, and how its blocks share the columns.
struct division {
  int teams, splits, slice;            // slice: columns of a block
  int most_tiles;                      // of one team
  int first[kKinds][kMaxTeams + 1];    // first tile of a team, counted within the kind
};

// Two values that are summed for one lane's columns, and how they become products with the levels.
// BITS: precision. 1 bit: operand A is the codes themselves, so the sum is over the columns whose bit is set.
template <int BITS>
struct levels_of {
  float low, step;
  __device__ __forceinline__ void load(const uint16_t *levels) {
    low = half_bits_to_float(__ldg(levels));
    // 2^17: a code at bit j is 2^(j - 24) as a float16, and x of that column is multiplied by 2^(7 - j).
    step = (half_bits_to_float(__ldg(levels + 1)) - low) * 131072.f;
  }
};
// 2 and 4 bits: low and high bytes of the float16 levels.
template <>
struct levels_of<2> {
  uint32_t low, high;
  __device__ __forceinline__ void load(const uint16_t *levels) {
    const uint32_t first = __ldg(reinterpret_cast<const uint32_t *>(levels));
    const uint32_t second = __ldg(reinterpret_cast<const uint32_t *>(levels) + 1);
    low = permute(first, second, 0x6420);
    high = permute(first, second, 0x7531);
  }
};
template <>
struct levels_of<4> {
  uint32_t low[4], high[4];
  __device__ __forceinline__ void load(const uint16_t *levels) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = __ldg(reinterpret_cast<const uint32_t *>(levels) + 2 * i);
      const uint32_t second = __ldg(reinterpret_cast<const uint32_t *>(levels) + 2 * i + 1);
      low[i] = permute(first, second, 0x6420);
      high[i] = permute(first, second, 0x7531);
    }
  }
};

// 32 columns of codes (BITS words) in steps of two mma: half `part` of them becomes out[j], the values of columns
// 8 part + j and 8 part + j + 16, j = 0 to 7.
__device__ __forceinline__ void decode(const levels_of<1> &, const uint32_t *words, int part, uint32_t (&out)[8]) {
  const uint32_t word = part == 0 ? words[0] : words[0] >> 8;
#pragma unroll
  for (int j = 0; j < 8; ++j) out[j] = word & (0x00010001u << j);
}

__device__ __forceinline__ void decode(const levels_of<2> &levels, const uint32_t *words, int part,
                                       uint32_t (&out)[8]) {
  const uint32_t both = permute(words[0], words[1], part == 0 ? 0x5140 : 0x7362);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    // A byte of the selector names byte c of `low` and byte c of `high`.
    const uint32_t selector = ((both >> (2 * j)) & 0x03030303u) * 0x11u + 0x40404040u;
    out[j] = permute(levels.low, levels.high, selector);
    out[4 + j] = permute(levels.low, levels.high, selector >> 16);
  }
}

__device__ __forceinline__ void decode(const levels_of<4> &levels, const uint32_t *words, int part,
                                       uint32_t (&out)[8]) {
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    const uint32_t both = permute(words[part], words[2 + part], w == 0 ? 0x5140 : 0x7362);
    // A permutation selects among 8 bytes, so each code is looked up in both halves of the levels by its low three bits
    // and its top bit picks between the two.
    const uint32_t index = both & 0x77777777u, pick = ((both >> 1) & 0x44444444u) | 0x32103210u;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = index >> (16 * i), which = pick >> (16 * i);
      const uint32_t low = permute(permute(levels.low[0], levels.low[1], at),
                                   permute(levels.low[2], levels.low[3], at), which);
      const uint32_t high = permute(permute(levels.high[0], levels.high[1], at),
                                    permute(levels.high[2], levels.high[3], at), which);
      out[4 * w + 2 * i] = permute(low, high, 0x6240);
      out[4 * w + 2 * i + 1] = permute(low, high, 0x7351);
    }
  }
}

// Into registers that keep their zeros in the lanes that load nothing.
__device__ __forceinline__ void load_if(bool wanted, uint32_t address, int offset, uint32_t (&out)[4]) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(out[0]), "+r"(out[1]), "+r"(out[2]), "+r"(out[3])
      : "r"(address + offset), "r"((uint32_t)wanted));
}

// Unit 8 of a token's chunk, see stage_x.
template <int BITS>
__device__ __forceinline__ float4 load_facts(uint32_t chunk, int offset) {
  float4 facts = {};
  if constexpr (BITS == 1) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(facts.x), "=f"(facts.y), "=f"(facts.z), "=f"(facts.w) : "r"(chunk + offset));
  } else {
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(facts.z) : "r"(chunk + offset + 8));
  }
  return facts;
}

// x of a block in shared memory: [chunk][token] units of 16 bytes. Word j of a chunk's half holds columns j and j + 16 of
// its 32; unit 8 holds the sums of both halves, the power of two that was divided out, and the sum of both sums (the sums
// are divided as well). `folded`: column j is multiplied by 2^(7 - j % 8), for the codes of 1 bit.
template <int TOKENS, class T>
__device__ __forceinline__ void stage_x(const product &q, int begin, int end, int chunks, uint4 *plain, uint4 *folded) {
  const int units = chunks * 8;
  for (int i = threadIdx.x; i < units * q.tokens; i += kThreads) {
    const int token = TOKENS == 1 ? 0 : i / units, unit = i - token * units, part = unit % 4;
    const int column = begin + unit / 4 * 32 + part * 4;
    uint2 raw[2] = {};
    if (column < end) {
      const T *source = static_cast<const T *>(q.x) + (size_t)token * q.in_features + column;
      raw[0] = __ldg(reinterpret_cast<const uint2 *>(source));
      raw[1] = __ldg(reinterpret_cast<const uint2 *>(source + 16));
    }
    const T *value = reinterpret_cast<const T *>(raw);
    float x[8], largest = 0.f, sum = 0.f;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      x[k] = to_float(value[k]);
      largest = fmaxf(largest, fabsf(x[k]));
    }
#pragma unroll
    for (int step = 1; step < 8; step <<= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    // The largest comes to lie in [2^7, 2^8). An infinity or NaN stays one, and its neighbours do not matter then.
    const uint32_t exponent = max(__float_as_uint(largest) >> 23, 8u);
    const float factor = __uint_as_float((261u - exponent) << 23);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      x[k] *= factor;
      sum += x[k];
    }
#pragma unroll
    for (int step = 1; step < 4; step <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    const float other = __shfl_xor_sync(0xffffffffu, sum, 4);
    const int at = unit / 8 * x_place<TOKENS>::kStride + token * kChunkUnits;
    uint32_t word[4], high[4];
    const __half2 shift = __float2half2_rn(part % 2 ? 1.f : 16.f);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const __half2 both = __floats2half2_rn(x[k], x[4 + k]);
      const __half2 up = __hmul2(__hmul2(both, __float2half2_rn((float)(8 >> k))), shift);
      word[k] = *reinterpret_cast<const uint32_t *>(&both);
      high[k] = *reinterpret_cast<const uint32_t *>(&up);
    }
    plain[at + unit % 8] = make_uint4(word[0], word[1], word[2], word[3]);
    folded[at + unit % 8] = make_uint4(high[0], high[1], high[2], high[3]);
    if (unit % 8 == 0) {
      const float4 facts = make_float4(sum, other, __uint_as_float((exponent - 7u) << 23), sum + other);
      *reinterpret_cast<float4 *>(plain + at + 8) = facts;
      *reinterpret_cast<float4 *>(folded + at + 8) = facts;
    }
  }
}

// Rows of one precision: packed rows, and bytes of one.
struct kind_rows {
  int first, count, stride;
};

__device__ __forceinline__ kind_rows rows_of(const rows_layout &l, int kind) {
  if (kind == 0) return {0, l.rows4, l.bytes4};
  if (kind == 1) return {l.rows4, l.rows2, l.bytes2};
  return {l.rows4 + l.rows2, l.rows1, l.bytes1};
}

// Work of a block: units of the tiles of its team, 4-bit tiles first.
struct workload {
  int tiles4, tiles2, tiles1;
  int units4, units2, units1;  // of one tile
  __device__ __forceinline__ int total() const { return tiles4 * units4 + tiles2 * units2 + tiles1 * units1; }
  __device__ __forceinline__ int total_tiles() const { return tiles4 + tiles2 + tiles1; }
};

// A tile of the team. tile: within its kind; number: among all.
struct tile_spot {
  int kind, tile, number, unit, units;  // unit: of the tile; units: that it has
};

__device__ __forceinline__ tile_spot spot_of_unit(const workload &w, int unit) {
  tile_spot spot = {0, 0, 0, 0, w.units4};
  if (unit >= w.tiles4 * w.units4) {
    unit -= w.tiles4 * w.units4;
    spot.kind = 1, spot.number = w.tiles4, spot.units = w.units2;
    if (unit >= w.tiles2 * w.units2) {
      unit -= w.tiles2 * w.units2;
      spot.kind = 2, spot.number += w.tiles2, spot.units = w.units1;
    }
  }
  spot.tile = unit / spot.units;
  spot.unit = unit - spot.tile * spot.units;
  spot.number += spot.tile;
  return spot;
}

// unit: counted from the first of the block.
__device__ __forceinline__ tile_spot spot_of_tile(const workload &w, int number) {
  if (number < w.tiles4) return {0, number, number, number * w.units4, w.units4};
  const int tile2 = number - w.tiles4, before2 = w.tiles4 * w.units4;
  if (tile2 < w.tiles2) return {1, tile2, number, before2 + tile2 * w.units2, w.units2};
  const int tile1 = tile2 - w.tiles2;
  return {2, tile1, number, before2 + w.tiles2 * w.units2 + tile1 * w.units1, w.units1};
}

// What a lane reads of the packed weight in one tile: rows lane / 4 and lane / 4 + 8.
struct lane_tile {
  const uint8_t *codes[2];    // the lane's 16 bytes of the first unit
  size_t first_scale[2];
  const uint16_t *levels[2];
  int byte, stride;           // where those 16 bytes lie in the row, and its length

  __device__ __forceinline__ void place(const product &q, const division &d, const tile_spot &spot, int team, int begin,
                                        int lane) {
    const kind_rows rows = rows_of(q.layout, spot.kind);
    const int bits = 4 >> spot.kind, tile = d.first[spot.kind][team] + spot.tile;
    stride = rows.stride;
    byte = begin * bits / 8 + spot.unit * (kUnitBits / 8) + lane % 4 * 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = rows.first + min(tile * kTileRows + lane / 4 + 8 * h, rows.count - 1);
      const row_place at = place_of<0>(q.layout, row);
      codes[h] = q.packed.codes + at.code_offset + byte;
      levels[h] = q.packed.levels + at.table_offset;
      first_scale[h] = (size_t)row * q.groups;
    }
  }
  // The 16 bytes of each row `units` units further on; zeros past the end of the row.
  __device__ __forceinline__ void fetch(uint4 (&words)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      words[h] = byte < stride ? __ldg(reinterpret_cast<const uint4 *>(codes[h])) : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void advance() {
    codes[0] += kUnitBits / 8, codes[1] += kUnitBits / 8, byte += kUnitBits / 8;
  }
};

// Scales of a lane's columns in one unit. USUAL: 8-bit scales of groups of 64, an even number in a row, so that the two
// of a lane of a 1-bit row are one load under one step.
template <int BITS, bool USUAL>
struct lane_scales {
  static constexpr int kBlocks = 4 / BITS;  // blocks of 32 columns
  raw_scale raw[2][kBlocks];

  // column: the lane's first.
  __device__ __forceinline__ void fetch(const product &q, const lane_tile &tile, int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (USUAL) {
        const size_t index = tile.first_scale[h] + min(column >> 6, q.groups - (BITS == 1 ? 2 : 1));
        const uint8_t *at = static_cast<const uint8_t *>(q.packed.scales) + index;
        raw[h][0].bits = BITS == 1 ? __ldg(reinterpret_cast<const uint16_t *>(at)) : __ldg(at);
        raw[h][0].step = __ldg(q.packed.scale_steps + (index >> 8));
      } else {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          const int group = min((column + 32 * i) >> q.group_shift, q.groups - 1);
          raw[h][i] = fetch_scale(q.packed, tile.first_scale[h] + group);
        }
      }
    }
  }
  __device__ __forceinline__ float of_block(const product &q, int h, int i) const {
    if constexpr (USUAL) {
      const float root = (float)(int)(BITS == 1 ? (raw[h][0].bits >> (i / 2 * 8)) & 0xff : raw[h][0].bits);
      return root * root * raw[h][0].step;
    } else {
      return finish_scale(q.packed, raw[h][i]);
    }
  }
};

// total += `count` units of one tile. unit: of this block's columns. x: address of the staged x.
// tile: where `next` comes from; next: codes of the first unit, fetched. On return both stand at the last unit.
template <int BITS, int TOKENS, bool USUAL>
__device__ __forceinline__ void sum_units(const product &q, int begin, int unit, int count, uint32_t x, int lane,
                                          lane_tile &tile, uint4 (&next)[2], uint32_t (&b)[2][4],
                                          float (&total)[x_place<TOKENS>::kTokens / 2][4]) {
  constexpr int kPairs = x_place<TOKENS>::kTokens / 2, kStride = x_place<TOKENS>::kStride * 16;
  constexpr int kBlocks = 4 / BITS, kLaneColumns = 32 * kBlocks;
  constexpr int kAtOnce = USUAL && BITS < 4 ? 2 : 1;  // blocks under one scale
  constexpr int kToken = kChunkUnits * 16;
  levels_of<BITS> levels[2];
  levels[0].load(tile.levels[0]);
  levels[1].load(tile.levels[1]);
  const int quad = lane % 4, odd = lane / 4 % 2;
  const int column = unit * (kUnitBits / BITS) + quad * kLaneColumns;
  const bool mine = lane / 8 == quad;
  x += column / kChunkColumns * kStride + (BITS == 4 ? quad % 2 * 64 : 0);
  int of_row = begin + column;
  for (;;) {
    const uint4 words[2] = {next[0], next[1]};
    lane_scales<BITS, USUAL> scales;
    scales.fetch(q, tile, of_row);
    if (count > 1) {
      tile.advance();
      tile.fetch(next);
    }
    float sum[kPairs][4];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (i % kAtOnce == 0) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) sum[p][0] = sum[p][1] = sum[p][2] = sum[p][3] = 0.f;
      }
      const uint32_t chunk = x + i / 2 * kStride;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        uint32_t a[2][8];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          decode(levels[h], reinterpret_cast<const uint32_t *>(&words[h]) + i * BITS, part, a[h]);
        }
#pragma unroll
        for (int u = 0; u < 2; ++u) {
#pragma unroll
          for (int p = 0; p < kPairs; ++p) {
            uint32_t(&to)[4] = b[(u + p) % 2];
            load_if(mine && 2 * p + odd < q.tokens, chunk + odd * kToken,
                    i % 2 * 64 + (part * 2 + u) * 16 + 2 * p * kToken, to);
            mma<fp16>(sum[p], a[0][4 * u], a[1][4 * u], a[0][4 * u + 1], a[1][4 * u + 1], to[0], to[1]);
            mma<fp16>(sum[p], a[0][4 * u + 2], a[1][4 * u + 2], a[0][4 * u + 3], a[1][4 * u + 3], to[2], to[3]);
          }
        }
      }
      if (i % kAtOnce == kAtOnce - 1) {
        const float scale[2] = {scales.of_block(q, 0, i), scales.of_block(q, 1, i)};
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
          const float4 facts = load_facts<BITS>(chunk - (BITS == 4 ? quad % 2 * 64 : 0), token * kToken + 128);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float &to = total[token / 2][2 * h + token % 2];
            float value = sum[token / 2][2 * h + token % 2];
            if constexpr (BITS == 1) {
              const float all = kAtOnce == 2 ? facts.w : i % 2 ? facts.y : facts.x;
              value = __fmaf_rn(levels[h].step, value, levels[h].low * all);
            }
            to = __fmaf_rn(scale[h] * facts.z, value, to);
          }
        }
      }
    }
    if (--count == 0) return;
    x += kUnitBits / BITS / kChunkColumns * kStride;
    of_row += kUnitBits / BITS;
  }
}

// One prefetch for the codes and one for the scales of each kind of this block's rows; the blocks of a team share them out.
__device__ __forceinline__ void prefetch_rows(const product &q, const division &d, int kind, int team, int rank) {
  const kind_rows rows = rows_of(q.layout, kind);
  const int first = min(d.first[kind][team] * kTileRows, rows.count);
  const int count = min(d.first[kind][team + 1] * kTileRows, rows.count) - first;
  const int from = first + count * rank / d.splits, to = first + count * (rank + 1) / d.splits;
  if (from == to) return;
  const uint8_t *codes = q.packed.codes + place_of<0>(q.layout, rows.first + from).code_offset;
  prefetch_to_l2(codes, codes + (size_t)(to - from) * rows.stride);
  const int bytes = q.packed.scale_type == LOWRA_UINT8 ? 1 : q.packed.scale_type == LOWRA_FLOAT16 ? 2 : 4;
  const uint8_t *scales = static_cast<const uint8_t *>(q.packed.scales);
  prefetch_to_l2(scales + (size_t)(rows.first + from) * q.groups * bytes,
                 scales + (size_t)(rows.first + to) * q.groups * bytes);
}

// TOKENS: tokens, rounded up to 1, 2, 4 or 8: the sums are registers. USUAL: as for lane_scales.
template <int TOKENS, bool USUAL>
__global__ void __launch_bounds__(kThreads, 1)
    product_small_kernel(const __grid_constant__ product q, const __grid_constant__ division d, int32_t type) {
  constexpr int kPairs = x_place<TOKENS>::kTokens / 2, kCells = TOKENS * kTileRows;
  extern __shared__ uint4 memory[];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int team = blockIdx.x / d.splits, rank = blockIdx.x - team * d.splits;
  const int begin = rank * d.slice, end = min(begin + d.slice, q.in_features), chunks = d.slice / kChunkColumns;
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  cluster.barrier_arrive();
#endif
#ifndef NO_PREFETCH
  if (thread < 3 * 32 && lane == 0) prefetch_rows(q, d, warp, team, rank);
#endif
  const workload work = {d.first[0][team + 1] - d.first[0][team], d.first[1][team + 1] - d.first[1][team],
                         d.first[2][team + 1] - d.first[2][team], ((end - begin) * 4 + kUnitBits - 1) / kUnitBits,
                         ((end - begin) * 2 + kUnitBits - 1) / kUnitBits, (end - begin + kUnitBits - 1) / kUnitBits};
  const int tiles = work.total_tiles(), units = work.total(), warps = max(1, min(units, kWarps));
  uint4 *plain = memory, *folded = plain + chunks * x_place<TOKENS>::kStride;
  float *sums = reinterpret_cast<float *>(folded + chunks * x_place<TOKENS>::kStride);  // [tile + warp][token][row]
  float *parts = sums + (d.most_tiles + kWarps) * kCells;                              // [block][tile][token][row]
  int *places = reinterpret_cast<int *>(parts + d.splits * d.most_tiles * kCells);     // row of W, -1 for none
  int2 *spans = reinterpret_cast<int2 *>(places + d.most_tiles * kTileRows);           // first and last warp of a tile
  int unit = units * warp / warps;
  const int last_unit = warp < warps ? units * (warp + 1) / warps : unit;
  tile_spot spot = spot_of_unit(work, unit < last_unit ? unit : 0);
  lane_tile tile;
  uint4 next[2];
  wait_for_earlier_kernels();
  let_later_kernels_start();
  if (unit < last_unit) {
    tile.place(q, d, spot, team, begin, lane);
    tile.fetch(next);
  }
  if (type == LOWRA_FLOAT16) {
    stage_x<TOKENS, fp16>(q, begin, end, chunks, plain, folded);
  } else {
    stage_x<TOKENS, bf16>(q, begin, end, chunks, plain, folded);
  }
  for (int i = kThreads - 1 - thread; i < tiles * kTileRows; i += kThreads) {
    const tile_spot at = spot_of_tile(work, i / kTileRows);
    const kind_rows rows = rows_of(q.layout, at.kind);
    const int row = (d.first[at.kind][team] + at.tile) * kTileRows + i % kTileRows;
    places[i] = row < rows.count ? __ldg(q.packed.row_order + rows.first + row) : -1;
    if (i % kTileRows == 0) {
      spans[i / kTileRows] =
          make_int2((warps * (at.unit + 1) - 1) / units, (warps * (at.unit + at.units) - 1) / units);
    }
  }
  __syncthreads();
  uint32_t b[2][4] = {};
  const uint32_t plain_at = (uint32_t)__cvta_generic_to_shared(plain);
  const uint32_t folded_at = (uint32_t)__cvta_generic_to_shared(folded);
  while (unit < last_unit) {
    const int count = min(last_unit - unit, spot.units - spot.unit);
    float total[kPairs][4] = {};
    if (spot.kind == 2) {
      sum_units<1, TOKENS, USUAL>(q, begin, spot.unit, count, folded_at, lane, tile, next, b, total);
    } else if (spot.kind == 1) {
      sum_units<2, TOKENS, USUAL>(q, begin, spot.unit, count, plain_at, lane, tile, next, b, total);
    } else {
      sum_units<4, TOKENS, USUAL>(q, begin, spot.unit, count, plain_at, lane, tile, next, b, total);
    }
    float *mine = sums + (spot.number + warp) * kCells;
    unit += count;
    if (unit < last_unit) {
      spot = spot_of_unit(work, unit);
      tile.place(q, d, spot, team, begin, lane);
      tile.fetch(next);
    }
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float value = total[token / 2][2 * h + token % 2];
        value += __shfl_xor_sync(0xffffffffu, value, 1);
        value += __shfl_xor_sync(0xffffffffu, value, 2);
        if (lane % 4 == 0) mine[token * kTileRows + lane / 4 + 8 * h] = value;
      }
    }
  }
  __syncthreads();
#if __CUDA_ARCH__ >= 900
  cluster.barrier_wait();  // the other blocks have started: their memory can be written
#endif
  // A block adds up what its warps have and hands each sum to the block that will store it.
  for (int i = thread; i < tiles * kCells; i += kThreads) {
    const int2 span = spans[i / kCells];
    float sum = 0.f;
#pragma unroll 1
    for (int w = span.x; w <= span.y; ++w) sum += sums[w * kCells + i];
    float *to = parts + rank * d.most_tiles * kCells + i;
#if __CUDA_ARCH__ >= 900
    *cluster.map_shared_rank(to, i / kTileRows % d.splits) = sum;
#else
    *to = sum;
#endif
  }
#if __CUDA_ARCH__ >= 900
  cluster.sync();
#else
  __syncthreads();
#endif
  for (int i = thread; i < tiles * kCells; i += kThreads) {
    const int token = i / kTileRows % TOKENS, stored = places[i / kCells * kTileRows + i % kTileRows];
    if (i / kTileRows % d.splits != rank || token >= q.tokens || stored < 0) continue;
    float sum = 0.f;
#pragma unroll 1
    for (int s = 0; s < d.splits; ++s) sum += parts[s * d.most_tiles * kCells + i];
    if (type == LOWRA_FLOAT16) {
      store_output<fp16>(q, token, stored, sum);
    } else {
      store_output<bf16>(q, token, stored, sum);
    }
  }
}

// Teams take tiles so that their units come out as even as whole tiles allow: the largest tiles are dealt first, the smaller
// ones level them out.
void divide_rows(const tile_counts &counts, const int (&units)[kKinds], division &d) {
  int left[kKinds] = {counts.tiles4, counts.tiles2, counts.tiles1};
  int taken[kKinds] = {};
  d.most_tiles = 0;
  for (int team = 0; team < d.teams; ++team) {
    const int teams = d.teams - team;
    int64_t goal = 0, have = 0;
    int tiles = 0;
    for (int kind = 0; kind < kKinds; ++kind) {
      d.first[kind][team] = taken[kind];
      goal += (int64_t)left[kind] * units[kind];
      // As many as bring this team nearest to an even share of this kind and the larger ones.
      const int64_t missing = goal - have * teams, each = (int64_t)units[kind] * teams;
      const int64_t wanted = missing > 0 ? (2 * missing + each) / (2 * each) : 0;
      const int take = teams == 1 || wanted > left[kind] ? left[kind] : (int)wanted;
      have += (int64_t)take * units[kind];
      left[kind] -= take;
      taken[kind] += take;
      tiles += take;
    }
    if (tiles > d.most_tiles) d.most_tiles = tiles;
  }
  for (int kind = 0; kind < kKinds; ++kind) d.first[kind][d.teams] = taken[kind];
}

template <int TOKENS>
size_t shared_bytes(const division &d) {
  constexpr int kCells = TOKENS * kTileRows;
  const size_t chunks = (d.slice + kChunkColumns - 1) / kChunkColumns;
  return 2 * chunks * x_place<TOKENS>::kStride * 16 + (size_t)(d.most_tiles + kWarps) * kCells * 4 +
         (size_t)d.splits * d.most_tiles * kCells * 4 + (size_t)d.most_tiles * (kTileRows * 4 + 8);
}

template <int TOKENS, bool USUAL>
int launch(const product &q, int32_t type, cudaStream_t stream) {
  device_limits limits;
  if (const int status = limits_of_current_device(limits)) return status;
  division d;
  const tile_counts counts = tiles_of(q.layout, kTileRows);
  for (int splits = 1 + (limits.major >= 9); splits <= 8; splits *= 2) {
    if (splits > 1 && limits.major < 9) break;
    constexpr int kStep = kUnitBits;  // a slice of columns begins on a unit of 1-bit rows
    const int steps = (q.in_features + kStep - 1) / kStep;
    d.splits = splits < steps ? splits : steps;
    d.slice = (steps + d.splits - 1) / d.splits * kStep;
    d.splits = (steps * kStep + d.slice - 1) / d.slice;
    const int units[kKinds] = {(d.slice * 4) / kUnitBits, (d.slice * 2) / kUnitBits, d.slice / kUnitBits};
    constexpr int kMostTiles = 32;
    d.teams = limits.processors / d.splits;
    const int needed = (counts.total() + kMostTiles - 1) / kMostTiles;
    if (d.teams < needed) d.teams = needed;
    if (d.teams > counts.total()) d.teams = counts.total();
    if (d.teams > kMaxTeams) return LOWRA_UNSUPPORTED;
    divide_rows(counts, units, d);
    const size_t bytes = shared_bytes<TOKENS>(d);
    if (bytes > (size_t)limits.shared_bytes) continue;
    return launch_early(product_small_kernel<TOKENS, USUAL>, dim3(d.teams * d.splits), dim3(kThreads), bytes,
                        (unsigned)d.splits, stream, q, d, type);
  }
  return LOWRA_UNSUPPORTED;
}

template <bool USUAL>
int choose(const product &q, int32_t type, cudaStream_t stream) {
  if (q.tokens == 1) return launch<1, USUAL>(q, type, stream);
  if (q.tokens == 2) return launch<2, USUAL>(q, type, stream);
  if (q.tokens <= 4) return launch<4, USUAL>(q, type, stream);
  return launch<8, USUAL>(q, type, stream);
}

}  // namespace

int product_small(const product &q, int32_t type, cudaStream_t stream) {
  const bool usual = q.packed.scale_type == LOWRA_UINT8 && q.group_shift == 6 && q.groups % 2 == 0 &&
                     reinterpret_cast<uintptr_t>(q.packed.scales) % 2 == 0;
  return usual ? choose<true>(q, type, stream) : choose<false>(q, type, stream);
}

}  // namespace lowra
