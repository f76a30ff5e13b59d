// Decode x product for up to 8 tokens. Reference: reference.linear. How the operands come about: few_tokens.cuh.
//
// A team of one block or two (a cluster, which splits the columns) takes a share of all rows, 4-, 2- and 1-bit rows
// alike. Its work is counted in units of 64 bytes of 16 rows, whose cost hardly depends on the precision, and its warps
// share them evenly. So a launch fills the chip once, and x is made ready once for each multiprocessor.
#include <cooperative_groups.h>

#include "few_tokens.cuh"

namespace lowra {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;

// total += `count` units of one tile. unit: of this block's columns. x: address of the staged x.
// tile: where `next` comes from; next: codes of the first unit, fetched. On return both stand at the last unit.
template <int BITS, class S>
__device__ __forceinline__ void sum_units(const typename S::PRODUCT &q, int begin, int unit, int count, uint32_t x,
                                          int lane, lane_tile<S> &tile, uint32_t (&next)[2][4], uint32_t (&b)[2][4],
                                          float (&total)[S::kMmas][4]) {
  constexpr int kStride = S::kStride * 16, kToken = kChunkUnits * 16, kUnitColumns = kUnitBits / BITS;
  constexpr int kBlocks = 4 / BITS;
  constexpr int kAtOnce = S::DEFAULT_FORM && S::LANES == 1 && BITS < 4 ? 2 : 1;  // blocks under one scale
  levels_of<BITS> levels[2];
  levels[0].load(tile.first_levels[0], tile.levels[0]);
  levels[1].load(tile.first_levels[1], tile.levels[1]);
  const int quad = lane % 4, column = unit * kUnitColumns + quad * (S::LANES == 1 ? 32 * kBlocks : 32);
  // Of operand B this lane holds a column of its own group, or zeros: of token `token` of each mma.
  const int token = lane / 4 % S::kPerMma, first_token = S::LANES == 1 ? 0 : quad % 2 * 2;
  const bool mine = lane / 4 / S::kPerMma == quad / S::LANES;
  x += column / kChunkColumns * kStride;
  const uint32_t half = S::LANES == 2 || BITS == 4 ? quad % 2 * 64 : 0;
  int of_row = begin + column;
  for (;;) {
    uint32_t words[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i / 4][i % 4] = next[i / 4][i % 4];
    lane_scales<BITS, S> scales;
    scales.fetch(q, tile, of_row);
    if (count > 1) {
      tile.advance();
      tile.fetch(BITS == 4 ? 0 : BITS == 2 ? 1 : 2, quad, next);
    }
    float sum[S::kMmas][4];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (i % kAtOnce == 0) {
#pragma unroll
        for (int p = 0; p < S::kMmas; ++p) sum[p][0] = sum[p][1] = sum[p][2] = sum[p][3] = 0.f;
      }
      const uint32_t chunk = x + (S::LANES == 1 ? i / 2 : 2 * i) * kStride;
      const uint32_t own = chunk + half + token * kToken + (S::LANES == 1 ? i % 2 * 64 : 0);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        uint32_t a[2][8];
#pragma unroll
        for (int h = 0; h < 2; ++h) decode(levels[h], words[h] + i * BITS, part, a[h]);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
#pragma unroll
          for (int p = 0; p < S::kMmas; ++p) {
            uint32_t (&to)[4] = b[(u + p) % 2];
            load_if(mine && S::kPerMma * p + token < q.tokens, own + (part * 2 + u) * 16 + S::kPerMma * p * kToken, to);
            mma<fp16>(sum[p], a[0][4 * u], a[1][4 * u], a[0][4 * u + 1], a[1][4 * u + 1], to[0], to[1]);
            mma<fp16>(sum[p], a[0][4 * u + 2], a[1][4 * u + 2], a[0][4 * u + 3], a[1][4 * u + 3], to[2], to[3]);
          }
        }
      }
      if (i % kAtOnce == kAtOnce - 1) {
        const float scale[2] = {scales.of_block(q, 0, i), scales.of_block(q, 1, i)};
#pragma unroll
        for (int p = 0; p < S::kMmas; ++p) {
#pragma unroll
          for (int c = 0; c < (S::TOKENS == 1 ? 1 : 2); ++c) {
            const float4 facts = load_facts<BITS>(chunk + (S::kPerMma * p + first_token + c) * kToken + 128);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float value = sum[p][2 * h + c];
              if constexpr (BITS == 1) {
                const float all = kAtOnce == 2 || S::LANES == 2 ? facts.w : i % 2 ? facts.y : facts.x;
                value = __fmaf_rn(levels[h].step, value, levels[h].low * all);
              }
              total[p][2 * h + c] = __fmaf_rn(scale[h] * facts.z, value, total[p][2 * h + c]);
            }
          }
        }
      }
    }
    if (--count == 0) return;
    x += kUnitColumns / kChunkColumns * kStride;
    of_row += kUnitColumns;
  }
}

// Asks for the scales, levels and places of packed rows [from, to) of a kind.
template <class ROWS>
__device__ __forceinline__ void ask_for_rows(const uint8_t *scales, const uint16_t *levels, const int32_t *row_order,
                                             const ROWS &rows, size_t scale_bytes, int kind, int from, int to) {
  if (from >= to) return;
  prefetch_to_l2(scales + (rows.first + from) * scale_bytes, scales + (rows.first + to) * scale_bytes);
  levels += rows.levels;
  prefetch_to_l2(levels + ((size_t)from << (4 >> kind)), levels + ((size_t)to << (4 >> kind)));
  prefetch_to_l2(row_order + rows.first + from, row_order + rows.first + to);
}

// The same of a kind of this team's rows; two blocks share them out.
__device__ __forceinline__ void ask_for_facts(const single_product &q, const division &d, int kind, int team,
                                              int rank) {
  const kind_rows &rows = d.kinds[kind];
  int from = min(d.first[team][kind] * kTileRows, rows.count),
      to = min(d.first[team + 1][kind] * kTileRows, rows.count);
  if (d.splits > 1) (rank == 0 ? to : from) = (from + to) / 2;
  const int scale_bytes = q.packed.scale_type == LOWRA_UINT8 ? 1 : q.packed.scale_type == LOWRA_FLOAT16 ? 2 : 4;
  ask_for_rows(static_cast<const uint8_t *>(q.packed.scales), q.packed.levels, q.packed.row_order, rows,
               (size_t)q.groups * scale_bytes, kind, from, to);
}

__device__ __forceinline__ void ask_for_facts(const product_group &q, const group_division &d, int kind, int team,
                                              int rank) {
  int begin = d.first[team][kind], end = d.first[team + 1][kind];
  if (d.splits > 1) (rank == 0 ? end : begin) = (begin + end) / 2;
  for (int part = 0; part < q.parts; ++part) {
    const part_rows &rows = d.parts[part][kind];
    const int from = max(begin - rows.tiles_before, 0) * kTileRows;
    const int to = min((end - rows.tiles_before) * kTileRows, rows.count);
    const auto &member = q.members[part];
    ask_for_rows(member.scales, member.levels, member.row_order, rows, q.groups, kind, from, to);
  }
}

// The place of a row in `places`: its number in W and, above kPartShift, the weight of the group. -1 for none.
constexpr int kPartShift = 28;
static_assert(kMostParts << kPartShift > 0 && INT32_MAX / 8 < 1 << kPartShift, "a place is not negative");

__device__ __forceinline__ int place_of_row(const single_product &q, const division &d, int kind, int tile, int row) {
  row += tile * kTileRows;
  return row < d.kinds[kind].count ? __ldg(q.packed.row_order + d.kinds[kind].first + row) : -1;
}

__device__ __forceinline__ int place_of_row(const product_group &q, const group_division &d, int kind, int tile,
                                            int row) {
  const tile_owner owner = owner_of(q, d, kind, tile);
  const part_rows &rows = d.parts[owner.part][kind];
  row += owner.tile * kTileRows;
  if (row >= rows.count) return -1;
  return __ldg(q.members[owner.part].row_order + rows.first + row) | owner.part << kPartShift;
}

// Of row `cell` of the team's tiles.
template <class Q, class D>
__device__ __forceinline__ int row_of_weight(const Q &q, const D &d, const int (&tiles)[kKinds], int team, int cell) {
  int kind = 0, number = cell / kTileRows;
  if (number >= tiles[0]) number -= tiles[0], kind = 1;
  if (kind == 1 && number >= tiles[1]) number -= tiles[1], kind = 2;
  return place_of_row(q, d, kind, d.first[team][kind] + number, cell % kTileRows);
}

template <class T>
__device__ __forceinline__ void store_row(const single_product &q, int token, int place, float sum) {
  store_output<T>(q, token, place, sum);
}

template <class T>
__device__ __forceinline__ void store_row(const product_group &q, int token, int place, float sum) {
  const auto &member = q.members[place >> kPartShift];
  const int row = place & ((1 << kPartShift) - 1);
  if (member.bias) sum += to_float(static_cast<const T *>(member.bias)[row]);
  static_cast<T *>(member.out)[(size_t)token * member.layout.rows() + row] = static_cast<T>(sum);
}

template <class Q>
__device__ __forceinline__ void store_sum(const Q &q, int32_t type, int token, int place, float sum) {
  if (type == LOWRA_FLOAT16) {
    store_row<fp16>(q, token, place, sum);
  } else {
    store_row<bf16>(q, token, place, sum);
  }
}

// The blocks of a cluster; before Hopper a team is one block.
struct team_blocks {
#if __CUDA_ARCH__ >= 900
  __device__ __forceinline__ static int rank() { return cooperative_groups::cluster_group::block_rank(); }
  __device__ __forceinline__ static int id() {
    int id;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(id));
    return id;
  }
  __device__ __forceinline__ static void arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;"); }
  __device__ __forceinline__ static void wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
  __device__ __forceinline__ static void sync() { cooperative_groups::cluster_group::sync(); }
  __device__ __forceinline__ static float *of_rank(float *shared, int rank) {
    return cooperative_groups::cluster_group::map_shared_rank(shared, rank);
  }
#else
  __device__ __forceinline__ static int rank() { return 0; }
  __device__ __forceinline__ static int id() { return blockIdx.x; }
  __device__ __forceinline__ static void arrive() {}
  __device__ __forceinline__ static void wait() {}
  __device__ __forceinline__ static void sync() { __syncthreads(); }
  __device__ __forceinline__ static float *of_rank(float *shared, int) { return shared; }
#endif
};

// S: a setup.
template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    product_small_kernel(const __grid_constant__ typename S::PRODUCT q, const __grid_constant__ typename S::DIVISION d,
                         int32_t type) {
  constexpr int TOKENS = S::TOKENS, kCells = S::kCells;
  extern __shared__ uint4 memory[];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const bool alone = d.splits == 1;
  const int rank = alone ? 0 : team_blocks::rank(), team = alone ? (int)blockIdx.x : team_blocks::id();
  if (!alone) team_blocks::arrive();
  const int begin = rank * d.slice, end = min(begin + d.slice, q.in_features), chunks = d.slice / kChunkColumns;
  const int tiles[kKinds] = {d.first[team + 1][0] - d.first[team][0], d.first[team + 1][1] - d.first[team][1],
                             d.first[team + 1][2] - d.first[team][2]};
  const int all_tiles = tiles[0] + tiles[1] + tiles[2];
  const int units = tiles[0] * d.kinds[0].units + tiles[1] * d.kinds[1].units + tiles[2] * d.kinds[2].units;
  uint4 *plain = memory, *folded = plain + chunks * S::kStride;
  float *sums = reinterpret_cast<float *>(folded + chunks * S::kStride);            // [tile + warp][token][row]
  float *parts = sums + (d.most_tiles + kWarps) * kCells;                           // [block][tile][token][row]
  int *places = reinterpret_cast<int *>(parts + d.splits * d.most_tiles * kCells);  // row of W, -1 for none
  int *spans = places + d.most_tiles * kTileRows;                                   // first and last warp of a tile
  // Each warp has at least one unit, or none.
  int unit = units < kWarps ? min(units, warp) : units * warp / kWarps;
  const int last_unit = units < kWarps ? min(units, warp + 1) : units * (warp + 1) / kWarps;
  tile_spot spot = spot_of_unit(d, tiles, unit < last_unit ? unit : 0);
  lane_tile<S> tile;
  tile.place(q, d, spot, team, begin, lane);
  if (unit < last_unit) tile.ask_for_codes(lane % 4);
  if (warp >= kWarps - kKinds && lane == 0) ask_for_facts(q, d, warp - (kWarps - kKinds), team, rank);
  if constexpr (S::INPUT == LOWRA_NORMED) {
    const uint16_t *weight = static_cast<const uint16_t *>(q.input.weight);
    if (thread == 0) prefetch_to_l2(weight, weight + q.in_features);
  }
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const x_piece<S::INPUT> first_piece = fetch_x<S>(q, d, begin, end, thread);
  float factors[TOKENS] = {};
  if constexpr (S::INPUT == LOWRA_NORMED) {
    const bool stores = team == 0 && rank == 0;
    if (type == LOWRA_FLOAT16) {
      norm_factors<S, fp16, kThreads>(q, stores, factors);
    } else {
      norm_factors<S, bf16, kThreads>(q, stores, factors);
    }
  }
  const int cell = kThreads - 1 - thread;  // one of the rows of the team; stored in `places` later
  const int cell_place = cell < all_tiles * kTileRows ? row_of_weight(q, d, tiles, team, cell) : -1;
  uint32_t next[2][4] = {};
  if (unit < last_unit) {
    tile.fetch_levels();
    tile.fetch(spot.kind, lane % 4, next);
  }
  uint4 *wanted_plain = tiles[0] + tiles[1] > 0 ? plain : nullptr, *wanted_folded = tiles[2] > 0 ? folded : nullptr;
  if (type == LOWRA_FLOAT16) {
    stage_x<S, fp16>(q, d, begin, end, kThreads, factors, first_piece, wanted_plain, wanted_folded);
  } else {
    stage_x<S, bf16>(q, d, begin, end, kThreads, factors, first_piece, wanted_plain, wanted_folded);
  }
  __syncthreads();
  uint32_t b[2][4] = {};
  const uint32_t plain_at = (uint32_t)__cvta_generic_to_shared(plain);
  const uint32_t folded_at = (uint32_t)__cvta_generic_to_shared(folded);
  while (unit < last_unit) {
    const int count = min(last_unit - unit, spot.units - spot.unit);
    float total[S::kMmas][4] = {};
    if (spot.kind == 2) {
      sum_units<1, S>(q, begin, spot.unit, count, folded_at, lane, tile, next, b, total);
    } else if (spot.kind == 1) {
      sum_units<2, S>(q, begin, spot.unit, count, plain_at, lane, tile, next, b, total);
    } else {
      sum_units<4, S>(q, begin, spot.unit, count, plain_at, lane, tile, next, b, total);
    }
    float *mine = sums + (spot.number + warp) * kCells;
    if (lane == 0 && spot.unit == 0) spans[2 * spot.number] = warp;
    if (lane == 0 && spot.unit + count == spot.units) spans[2 * spot.number + 1] = warp;
    unit += count;
    if (unit < last_unit) {
      spot = spot_of_unit(d, tiles, unit);
      tile.place(q, d, spot, team, begin, lane);
      tile.fetch_levels();
      tile.fetch(spot.kind, lane % 4, next);
    }
#pragma unroll
    for (int p = 0; p < S::kMmas; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (TOKENS == 1 && i % 2 == 1) continue;
        float value = total[p][i];
        if (S::LANES == 1) value += __shfl_xor_sync(0xffffffffu, value, 1);
        value += __shfl_xor_sync(0xffffffffu, value, 2);
        const int token = S::kPerMma * p + (S::LANES == 1 ? 0 : lane % 2 * 2) + i % 2;
        if (lane % 4 < S::LANES) mine[token * kTileRows + lane / 4 + i / 2 * 8] = value;
      }
    }
  }
  for (int i = cell; i < all_tiles * kTileRows; i += kThreads) {
    places[i] = i == cell ? cell_place : row_of_weight(q, d, tiles, team, i);
  }
  __syncthreads();
  if (!alone) team_blocks::wait();  // the other blocks have started: their memory can be written
  // A block adds up what its warps have and hands each sum to the block that will store it.
  for (int i = thread; i < all_tiles * kCells; i += kThreads) {
    const int number = i / kCells, token = i / kTileRows % TOKENS;
    float sum = 0.f;
#pragma unroll 1
    for (int w = spans[2 * number]; w <= spans[2 * number + 1]; ++w) sum += sums[w * kCells + i];
    if (!alone) {
      *team_blocks::of_rank(parts + rank * d.most_tiles * kCells + i, i / kTileRows % d.splits) = sum;
    } else if (token < q.tokens && places[number * kTileRows + i % kTileRows] >= 0) {
      store_sum(q, type, token, places[number * kTileRows + i % kTileRows], sum);
    }
  }
  if (alone) return;
  team_blocks::sync();
  for (int i = thread; i < all_tiles * kCells; i += kThreads) {
    const int token = i / kTileRows % TOKENS, stored = places[i / kCells * kTileRows + i % kTileRows];
    if (i / kTileRows % d.splits != rank || token >= q.tokens || stored < 0) continue;
    float sum = 0.f;
#pragma unroll 1
    for (int s = 0; s < d.splits; ++s) sum += parts[s * d.most_tiles * kCells + i];
    store_sum(q, type, token, stored, sum);
  }
}

// Teams take tiles so that their units come out as even as whole tiles allow: the largest tiles are dealt first, the
// smaller ones level them out.
void divide_rows(const tile_counts &counts, int teams, division &d) {
  int left[kKinds] = {counts.tiles4, counts.tiles2, counts.tiles1}, taken[kKinds] = {};
  d.most_tiles = 0;
  for (int team = 0; team < teams; ++team) {
    const int64_t rest = teams - team;
    int64_t even = 0, have = 0;  // units of the kinds so far: of all teams left, and of this one
    int tiles = 0;
    for (int kind = 0; kind < kKinds; ++kind) {
      d.first[team][kind] = taken[kind];
      const int64_t units = d.kinds[kind].units;
      even += left[kind] * units;
      const int64_t missing = even - have * rest;
      const int64_t nearest = missing > 0 ? (2 * missing + units * rest) / (2 * units * rest) : 0;
      const int64_t wanted = rest == 1 ? left[kind] : nearest;
      const int take = wanted < left[kind] ? (int)wanted : left[kind];
      have += take * units;
      left[kind] -= take, taken[kind] += take, tiles += take;
    }
    if (tiles > d.most_tiles) d.most_tiles = tiles;
  }
  for (int kind = 0; kind < kKinds; ++kind) d.first[teams][kind] = taken[kind];
}

template <class S>
size_t shared_bytes(const division &d) {
  const size_t chunks = d.slice / kChunkColumns;
  return 2 * chunks * S::kStride * 16 + (size_t)(d.most_tiles + kWarps) * S::kCells * 4 +
         (size_t)d.splits * d.most_tiles * S::kCells * 4 + (size_t)d.most_tiles * (kTileRows * 4 + 8);
}

// That a launch does not ask for: of norm_factors, for either type of x.
template <class S>
constexpr size_t kStaticBytes = S::INPUT == LOWRA_NORMED ? 2 * S::TOKENS * kWarps * sizeof(float) : 0;

// The columns of a block: whole units of 1-bit rows.
void divide_columns(const product &q, int splits, division &d) {
  const int steps = (q.in_features + kUnitBits - 1) / kUnitBits;
  d.slice = (steps + splits - 1) / splits * kUnitBits;
  d.splits = (q.in_features + d.slice - 1) / d.slice;
  d.per_token = divisor_of((uint32_t)d.slice / 8);
  const rows_layout &l = q.layout;
  const int firsts[kKinds] = {0, l.rows4, l.rows4 + l.rows2}, counts[kKinds] = {l.rows4, l.rows2, l.rows1};
  const int strides[kKinds] = {l.bytes4, l.bytes2, l.bytes1};
  size_t codes = 0, levels = 0;
  for (int kind = 0; kind < kKinds; ++kind) {
    const int bits = 4 >> kind, units = d.slice * bits / kUnitBits;
    d.kinds[kind] = {firsts[kind], counts[kind], strides[kind], units, divisor_of((uint32_t)units), codes, levels};
    codes += (size_t)counts[kind] * strides[kind];
    levels += (size_t)counts[kind] << bits;
  }
}

// The units of the team that has most, about: whole tiles of the largest kind, half a tile of another above the
// average.
int most_units(const product &q, const tile_counts &counts, int processors, int splits) {
  division d;
  divide_columns(q, splits, d);
  const int tiles[kKinds] = {counts.tiles4, counts.tiles2, counts.tiles1}, teams = processors / splits;
  int64_t units = 0, most = 0;  // units: of the kinds so far
  for (int kind = 0; kind < kKinds; ++kind) {
    if (tiles[kind] == 0) continue;
    const int64_t tile = d.kinds[kind].units, before = units;
    units += tiles[kind] * tile;
    const int64_t here = before == 0 ? (tiles[kind] + teams - 1) / teams * tile : units / teams + tile / 2;
    if (here > most) most = here;
  }
  return (int)most;
}

// Teams of two blocks share the rows out more evenly, teams of one need no exchange of sums, which takes as long as the
// units below. With more tokens a unit takes longer, and a team of one makes more of x ready for itself alone.
int splits_of(const product &q, const tile_counts &counts, const device_limits &limits) {
  if (!limits.clusters) return 1;
  if (q.tokens > 4 || (q.tokens > 2 && counts.total() < 4 * limits.processors)) return 2;
  const int exchange = q.tokens <= 2 ? 10 : 5;
  const int more = most_units(q, counts, limits.processors, 1) - most_units(q, counts, limits.processors, 2);
  return more <= exchange ? 1 : 2;
}

// The tiles of all weights of a product, and where those of each weight begin.
tile_counts tiles_of_all(const single_product &q, division &) { return tiles_of(q.layout, kTileRows); }

tile_counts tiles_of_all(const product_group &q, group_division &d) {
  int tiles[kKinds] = {};
  for (int part = 0; part < q.parts; ++part) {
    const rows_layout &l = q.members[part].layout;
    const int firsts[kKinds] = {0, l.rows4, l.rows4 + l.rows2}, counts[kKinds] = {l.rows4, l.rows2, l.rows1};
    const int strides[kKinds] = {l.bytes4, l.bytes2, l.bytes1};
    size_t codes = 0, levels = 0;
    for (int kind = 0; kind < kKinds; ++kind) {
      d.parts[part][kind] = {firsts[kind], counts[kind], tiles[kind], codes, levels};
      tiles[kind] += (counts[kind] + kTileRows - 1) / kTileRows;
      codes += (size_t)counts[kind] * strides[kind];
      levels += (size_t)counts[kind] << (4 >> kind);
    }
  }
  return {tiles[0], tiles[1], tiles[2]};
}

template <class S>
int launch(const typename S::PRODUCT &q, int32_t type, cudaStream_t stream) {
  device_limits limits;
  if (const int status = limits_of_current_device(limits)) return status;
  typename S::DIVISION d;
  const tile_counts counts = tiles_of_all(q, d);
  // A team's sums must fit into shared memory, and clusters of more than two blocks would leave multiprocessors idle.
  constexpr int kMostTiles = 32;
  const int fewest = (counts.total() + kMostTiles - 1) / kMostTiles, most_splits = limits.clusters ? 2 : 1;
  for (int splits = splits_of(q, counts, limits); splits <= most_splits; ++splits) {
    divide_columns(q, splits, d);
    int teams = limits.processors / d.splits;
    if (teams < fewest) teams = fewest;
    if (teams > counts.total()) teams = counts.total();
    if (teams > kMaxTeams) return LOWRA_UNSUPPORTED;
    divide_rows(counts, teams, d);
    const size_t bytes = shared_bytes<S>(d);
    if (bytes + kStaticBytes<S> > (size_t)limits.shared_bytes) continue;
    return launch_early(product_small_kernel<S>, dim3(teams * d.splits), dim3(kThreads), bytes, (unsigned)d.splits,
                        stream, q, d, type);
  }
  return LOWRA_UNSUPPORTED;
}

template <bool DEFAULT_FORM>
int choose(const single_product &q, int32_t type, cudaStream_t stream) {
  if (q.tokens == 1) return launch<setup<1, 1, DEFAULT_FORM>>(q, type, stream);
  if (q.tokens == 2) return launch<setup<2, 1, DEFAULT_FORM>>(q, type, stream);
  if (q.group_shift >= 6) {
    if (q.tokens <= 4) return launch<setup<4, 2, DEFAULT_FORM>>(q, type, stream);
    return launch<setup<8, 2, DEFAULT_FORM>>(q, type, stream);
  }
  if (q.tokens <= 4) return launch<setup<4, 1, false>>(q, type, stream);
  return launch<setup<8, 1, false>>(q, type, stream);
}

}  // namespace

template <int INPUT>
static int choose_tokens(const product_group &q, int32_t type, cudaStream_t stream) {
  if (q.tokens == 1) return launch<setup<1, 1, true, product_group, INPUT>>(q, type, stream);
  if (q.tokens == 2) return launch<setup<2, 1, true, product_group, INPUT>>(q, type, stream);
  if (q.tokens <= 4) return launch<setup<4, 2, true, product_group, INPUT>>(q, type, stream);
  return LOWRA_UNSUPPORTED;
}

int product_small_group(const lowra_packed *weights, const void *const *bias, void *const *out, int count,
                        const lowra_input &input, const product &base, int32_t type, cudaStream_t stream) {
  product_group q = {};
  static_cast<product &>(q) = base;
  q.input = input;
  q.parts = count;
  for (int i = 0; i < count; ++i) {
    const lowra_packed &w = weights[i];
    q.members[i] = {w.codes,       w.row_order,       static_cast<const uint8_t *>(w.scales),
                    w.scale_steps, w.levels,          bias[i],
                    out[i],        layout_of(w.shape)};
  }
  if (input.kind == LOWRA_NORMED) return choose_tokens<LOWRA_NORMED>(q, type, stream);
  if (input.kind == LOWRA_GATED) return choose_tokens<LOWRA_GATED>(q, type, stream);
  return choose_tokens<LOWRA_PLAIN>(q, type, stream);
}

int product_small(const product &given, int32_t type, cudaStream_t stream) {
  const single_product q = {given};
  const bool default_form = q.packed.scale_type == LOWRA_UINT8 && q.group_shift == 6 && q.groups % 2 == 0 &&
                            reinterpret_cast<uintptr_t>(q.packed.scales) % 2 == 0;
  return default_form ? choose<true>(q, type, stream) : choose<false>(q, type, stream);
}

}  // namespace lowra
