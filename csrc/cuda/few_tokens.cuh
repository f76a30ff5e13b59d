// Codes to operands of the tensor cores for up to 8 tokens: what product_small.cuh is made of. x: staged_x.cuh.
//
// The weight is operand A of mma.m16n8k16 (16 packed rows), x operand B. With few tokens the 8 columns of an mma are
// put to use: a lane, or a pair of lanes, of a quad decodes columns of one group, and its own columns of B hold x of
// the tokens at these k's only, zeros elsewhere. So each sum belongs to one group, ends up in a lane that decodes it,
// and is multiplied by the group's scale afterwards: operand A needs no scale, its values are the levels as they are
// stored.
//
// float16 holds them exactly. x becomes float16 as well, divided by a power of two for each 64 columns; what is lost
// lies 2^-21 below the largest of the 64 for 1-bit rows, 2^-31 for others. So the result is nearer to the exact product
// than a weight rounded to the type of x would allow.
#pragma once

#include "decoding.cuh"
#include "product.cuh"

namespace lowra {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kUnitBits = 512;     // bits of a row in a unit of work: 64 bytes, 16 of each lane of a quad
constexpr int kChunkColumns = 64;  // columns of x under one power of two
constexpr int kChunkUnits = 9;     // 16-byte units of a token's chunk: 8 of x, and one of its power and sums
constexpr int kMaxTeams = 256;
constexpr int kMostMadeTokens = 4;  // of a group whose x is normed or gated: every block does that for all of x
constexpr int kKinds = 3;           // kinds of rows: 4, 2 and 1 bits
constexpr int kMostParts = LOWRA_MOST_GROUPED;

// Rows of one precision, and how a block counts its share of them.
struct kind_rows {
  int first, count, stride;  // packed rows, and bytes of one
  int units;                 // of a tile in the columns of a block
  small_divisor per_tile;    // divides by them
  size_t codes, levels;      // where the first row begins
};

// Which tiles of 16 rows each team takes, and how its blocks share the columns.
struct division {
  int splits, slice;        // blocks of a team, columns of a block
  small_divisor per_token;  // divides by the 16-byte units of x in a slice
  int most_tiles;           // of one team
  kind_rows kinds[kKinds];
  int first[kMaxTeams + 1][kKinds];  // first tile of a team, counted within the kind
};

// Rows of one precision of one weight, and the tiles of that precision that come before its own.
struct part_rows {
  int first, count, tiles_before;
  size_t codes, levels;
};

// As `division`, of several weights: `first` and `count` of `kinds` are unused, tiles are counted over all weights.
struct group_division : division {
  part_rows parts[kMostParts][kKinds];
};

// A product with one weight.
struct single_product : product {
  using DIVISION = division;
  static constexpr bool GROUP = false;
};

// Several weights that share x (q, k and v; gate and up), multiplied in one launch. They have the same columns, and
// 8-bit scales of groups of 64. What the base says of a single weight is that of the last; x is what `input` says.
struct product_group : product {
  using DIVISION = group_division;
  static constexpr bool GROUP = true;
  lowra_input input;
  lowra_adapters adapters;
  int ranks;                // of all adapters
  small_divisor per_piece;  // divides by `ranks`
  int own, sharing;         // ranks that a token has, of all adapters; lanes that share a sum's cells: 1 << sharing
  bool b_is_shared;         // the rows of B fit into shared memory
  bool b_in_16;             // they are whole units of 16 bytes
  int b_stride;             // from one to the next there, in units of 8 bytes: neighbours begin in other banks
  int parts;
  struct member {
    const uint8_t *codes;
    const int32_t *row_order;
    const uint8_t *scales;
    const float *scale_steps;
    const uint16_t *levels;
    const void *bias;  // [rows] or null
    void *out;         // [tokens, rows]
    rows_layout layout;
  } members[kMostParts];
};

// The weight that a tile belongs to, and the tile's number among those of its kind there.
struct tile_owner {
  int part, tile;
};
__device__ __forceinline__ tile_owner owner_of(const single_product &, const division &, int, int tile) {
  return {0, tile};
}
__device__ __forceinline__ tile_owner owner_of(const product_group &q, const group_division &d, int kind, int tile) {
  int part = 0;
#pragma unroll
  for (int i = 1; i < kMostParts; ++i) {
    if (i < q.parts && tile >= d.parts[i][kind].tiles_before) part = i;
  }
  return {part, tile - d.parts[part][kind].tiles_before};
}

// Adapters that weights of a group may have, as a kernel is compiled for them. simple: up to 2 tokens, all of which go
// through all adapters; B lies in shared memory, in units of 16 bytes; no warp sums more than one piece, no thread
// looks at more than one cell. It needs half of the code, and a short launch waits for its code.
enum class adapter_form { none, simple, any };

// How a kernel is compiled. TOKENS_: tokens rounded up to 1, 2, 4 or 8, since their sums are registers. LANES_: lanes
// of a quad that share a sum: 1, or 2 where groups have 64 columns or more. DEFAULT_FORM_: 8-bit scales of groups of
// 64, an even number in a row. T_: type of x. PRODUCT_: of one weight or of a group. What x is made of is no part of
// it: the launches of a decoding step are short, and code that all of them share is fetched once.
template <int TOKENS_, int LANES_, bool DEFAULT_FORM_, class T_, class PRODUCT_ = single_product,
          adapter_form ADAPTERS_ = adapter_form::none>
struct setup {
  using T = T_;
  using PRODUCT = PRODUCT_;
  using DIVISION = typename PRODUCT::DIVISION;
  static constexpr int TOKENS = TOKENS_, LANES = LANES_;
  static constexpr bool DEFAULT_FORM = DEFAULT_FORM_;
  static constexpr bool ADAPTED = ADAPTERS_ != adapter_form::none, SIMPLE = ADAPTERS_ == adapter_form::simple;
  static constexpr bool MADE = PRODUCT::GROUP && TOKENS <= kMostMadeTokens;  // whether x may be normed or gated
  static constexpr int kPerMma = 2 * LANES;                                  // tokens of one mma
  static constexpr int kMmas = (TOKENS + kPerMma - 1) / kPerMma;
  static constexpr int kCells = TOKENS * kTileRows;        // sums of a tile
  static constexpr int kRowsAtOnce = TOKENS >= 4 ? 4 : 1;  // that a thread stores, of the same token
  // 16-byte units between two chunks of x: neighbouring chunks start 32 bytes further round the banks.
  static constexpr int kStride = kMmas * kPerMma * kChunkUnits + (10 - kMmas * kPerMma * kChunkUnits % 8) % 8;
  static_assert(kStride % 8 == 2, "32 bytes round the banks");
};

// Codes of 1 bit become operand A without a table: moved to one of the bits 7 to 14, a code is a float16 that is a
// power of two, and x of its column is divided by it (`folded`). Bits 10 to 14 are normal numbers; 7 to 9 have at most
// three leading zeros, which is all that the tensor cores lose when they align the products. Column j of 8 is
// multiplied by fold(j); kFolded undoes it.
constexpr float kFolded = 1024.f;
__device__ __forceinline__ constexpr float fold(int j) {
  return j < 5 ? (float)(128 >> j) : j == 5 ? 2.f : j == 6 ? 0.125f : 1.f / 2048.f;
}

// Two values that are summed for one lane's columns, and how they become products with the levels.
// BITS: precision. 1 bit: operand A is the codes themselves, so the sum is over the columns whose bit is set.
template <int BITS>
struct levels_of {
  float low, step;
  __device__ __forceinline__ void load(uint32_t first, const uint16_t *) {
    low = half_bits_to_float((uint16_t)first);
    step = (half_bits_to_float((uint16_t)(first >> 16)) - low) * kFolded;
  }
};
// 2 and 4 bits: low and high bytes of the float16 levels.
template <>
struct levels_of<2> {
  uint32_t low, high;
  __device__ __forceinline__ void load(uint32_t first, const uint16_t *levels) {
    const uint32_t second = __ldg(reinterpret_cast<const uint32_t *>(levels) + 1);
    low = permute(first, second, 0x6420);
    high = permute(first, second, 0x7531);
  }
};
template <>
struct levels_of<4> {
  uint32_t low[4], high[4];
  __device__ __forceinline__ void load(uint32_t first, const uint16_t *levels) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i > 0) first = __ldg(reinterpret_cast<const uint32_t *>(levels) + 2 * i);
      const uint32_t second = __ldg(reinterpret_cast<const uint32_t *>(levels) + 2 * i + 1);
      low[i] = permute(first, second, 0x6420);
      high[i] = permute(first, second, 0x7531);
    }
  }
};

// 32 columns of codes (BITS words) in steps of two mma: half `part` of them becomes out[j], the values of columns
// 8 part + j and 8 part + j + 16, j = 0 to 7.
__device__ __forceinline__ void decode(const levels_of<1> &, const uint32_t *words, int part, uint32_t (&out)[8]) {
  const uint32_t word = part == 0 ? words[0] << 7 : words[0] >> 1;
#pragma unroll
  for (int j = 0; j < 8; ++j) out[j] = word & (0x00800080u << j);
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
      const uint32_t low =
          permute(permute(levels.low[0], levels.low[1], at), permute(levels.low[2], levels.low[3], at), which);
      const uint32_t high =
          permute(permute(levels.high[0], levels.high[1], at), permute(levels.high[2], levels.high[3], at), which);
      out[4 * w + 2 * i] = permute(low, high, 0x6240);
      out[4 * w + 2 * i + 1] = permute(low, high, 0x7351);
    }
  }
}

// Into registers that keep their zeros in the lanes that load nothing.
__device__ __forceinline__ void load_if(bool wanted, uint32_t address, uint32_t (&out)[4]) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(out[0]), "+r"(out[1]), "+r"(out[2]), "+r"(out[3])
               : "r"(address), "r"((uint32_t)wanted));
}

// Unit 8 of a token's chunk, see stage_x.
template <int BITS>
__device__ __forceinline__ float4 load_facts(uint32_t address) {
  float4 facts = {};
  if constexpr (BITS == 1) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(facts.x), "=f"(facts.y), "=f"(facts.z), "=f"(facts.w)
                 : "r"(address));
  } else {
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(facts.z) : "r"(address + 8));
  }
  return facts;
}

// A place in the work of a block: its team's tiles one after the other, 4-bit ones first, each `units` long.
struct tile_spot {
  int kind, tile, number, unit, units;  // tile: within the team's of its kind; number: among all; unit: of the tile
};

__device__ __forceinline__ tile_spot spot_of_unit(const division &d, const int (&tiles)[kKinds], int unit) {
  int kind = 0, number = 0;
  if (unit >= tiles[0] * d.kinds[0].units) {
    unit -= tiles[0] * d.kinds[0].units;
    kind = 1, number = tiles[0];
    if (unit >= tiles[1] * d.kinds[1].units) {
      unit -= tiles[1] * d.kinds[1].units;
      kind = 2, number += tiles[1];
    }
  }
  const int units = d.kinds[kind].units, tile = d.kinds[kind].per_tile.divide(unit);
  return {kind, tile, number + tile, unit - tile * units, units};
}

// What a lane reads of the packed weight in one tile: rows lane / 4 and lane / 4 + 8. Of a unit it takes blocks of 32
// columns, 4 / bits of them: neighbouring ones where no other lane shares its sums, else every fourth, so that the quad
// has 128 neighbouring columns at a time.
template <class S>
struct lane_tile {
  const uint8_t *codes[2];  // the next unit
  const uint16_t *levels[2];
  size_t first_scale[2];
  uint32_t first_levels[2];  // two of them, so that the others come from the first-level cache
  int byte, stride;          // where the unit lies in the row, and the row's length
  int part;                  // the weight of a group

  __device__ __forceinline__ void place(const typename S::PRODUCT &q, const typename S::DIVISION &d,
                                        const tile_spot &spot, int team, int begin, int lane) {
    const tile_owner owner = owner_of(q, d, spot.kind, d.first[team][spot.kind] + spot.tile);
    stride = d.kinds[spot.kind].stride;
    byte = (begin >> (spot.kind + 1)) + spot.unit * (kUnitBits / 8);
    part = owner.part;
    if constexpr (S::PRODUCT::GROUP) {
      const auto &member = q.members[part];
      place_rows(member.codes, member.levels, d.parts[part][spot.kind], q.groups, owner.tile, spot.kind, lane);
    } else {
      place_rows(q.packed.codes, q.packed.levels, d.kinds[spot.kind], q.groups, owner.tile, spot.kind, lane);
    }
  }
  __device__ __forceinline__ void ask_for_codes(int quad) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (byte + quad * 16 < stride) prefetch_to_l2(codes[h] + quad * 16);
    }
  }
  __device__ __forceinline__ void fetch_levels() {
#pragma unroll
    for (int h = 0; h < 2; ++h) first_levels[h] = __ldg(reinterpret_cast<const uint32_t *>(levels[h]));
  }
  // Zeros past the end of the row. kind: of the rows.
  __device__ __forceinline__ void fetch(int kind, int quad, uint32_t (&words)[2][4]) const {
    if (S::LANES == 1 || kind == 0) {
      fetch_parts<4>(quad, words);
    } else if (kind == 1) {
      fetch_parts<2>(quad, words);
    } else {
      fetch_parts<1>(quad, words);
    }
  }
  __device__ __forceinline__ void advance() {
    codes[0] += kUnitBits / 8, codes[1] += kUnitBits / 8, byte += kUnitBits / 8;
  }

 private:
  template <class ROWS>
  __device__ __forceinline__ void place_rows(const uint8_t *all_codes, const uint16_t *all_levels, const ROWS &rows,
                                             int groups, int tile, int kind, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(tile * kTileRows + lane / 4 + 8 * h, rows.count - 1);
      codes[h] = all_codes + rows.codes + (size_t)row * stride + byte;
      levels[h] = all_levels + rows.levels + ((size_t)row << (4 >> kind));
      first_scale[h] = (size_t)(rows.first + row) * groups;
    }
  }
  // WORDS: words of a lane that stand together.
  template <int WORDS>
  __device__ __forceinline__ void fetch_parts(int quad, uint32_t (&words)[2][4]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 4; i += WORDS) {
        const int at = (4 * i + WORDS * quad) * 4;
        const bool inside = byte + at < stride;
        if constexpr (WORDS == 4) {
          const uint4 raw = inside ? __ldg(reinterpret_cast<const uint4 *>(codes[h] + at)) : make_uint4(0, 0, 0, 0);
          words[h][0] = raw.x, words[h][1] = raw.y, words[h][2] = raw.z, words[h][3] = raw.w;
        } else if constexpr (WORDS == 2) {
          const uint2 raw = inside ? __ldg(reinterpret_cast<const uint2 *>(codes[h] + at)) : make_uint2(0, 0);
          words[h][i] = raw.x, words[h][i + 1] = raw.y;
        } else {
          words[h][i] = inside ? __ldg(reinterpret_cast<const uint32_t *>(codes[h] + at)) : 0u;
        }
      }
    }
  }
};

// Scales of a lane's blocks of 32 columns in one unit.
template <int BITS, class S>
struct lane_scales {
  static constexpr int kBlocks = 4 / BITS;
  static constexpr int kStep = S::LANES == 1 ? 32 : 128;  // columns from one block to the next
  // Usually two neighbouring blocks have one scale, and the two scales of a 1-bit row are one load under one step.
  static constexpr int kLoads = S::DEFAULT_FORM && S::LANES == 1 ? 1 : kBlocks;
  raw_scale raw[2][kLoads];

  // column: the lane's first.
  __device__ __forceinline__ void fetch(const typename S::PRODUCT &q, const lane_tile<S> &tile, int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if constexpr (S::DEFAULT_FORM) {
          constexpr bool kPair = S::LANES == 1 && BITS == 1;
          const size_t index = tile.first_scale[h] + min((column + kStep * i) >> 6, q.groups - 1 - kPair);
          const uint8_t *at;
          if constexpr (S::PRODUCT::GROUP) {
            at = q.members[tile.part].scales + index;
            raw[h][i].step = __ldg(q.members[tile.part].scale_steps + (index >> 8));
          } else {
            at = static_cast<const uint8_t *>(q.packed.scales) + index;
            raw[h][i].step = __ldg(q.packed.scale_steps + (index >> 8));
          }
          raw[h][i].bits = kPair ? __ldg(reinterpret_cast<const uint16_t *>(at)) : __ldg(at);
        } else {
          const int group = min((column + kStep * i) >> q.group_shift, q.groups - 1);
          raw[h][i] = fetch_scale(q.packed, tile.first_scale[h] + group);
        }
      }
    }
  }
  __device__ __forceinline__ float of_block(const product &q, int h, int i) const {
    if constexpr (S::DEFAULT_FORM && S::LANES == 1) {
      const float root = (float)(int)(BITS == 1 ? (raw[h][0].bits >> (i / 2 * 8)) & 0xff : raw[h][0].bits);
      return root * root * raw[h][0].step;
    } else if constexpr (S::DEFAULT_FORM) {
      const float root = (float)(int)raw[h][i].bits;
      return root * root * raw[h][i].step;
    } else {
      return finish_scale(q.packed, raw[h][i]);
    }
  }
};

}  // namespace lowra
