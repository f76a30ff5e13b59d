// Decode x product for up to 8 tokens, of one weight or of a group. Reference: reference.linear.
//
// A team of one block or two (a cluster, which splits the columns) takes a share of all rows, 4-, 2- and 1-bit rows
// alike. Its work is counted in units of 64 bytes of 16 rows, whose cost hardly depends on the precision, and its warps
// share them evenly. So a launch fills the chip once, and x is made ready once for each multiprocessor.
#pragma once

#include <cooperative_groups.h>

#include "stored_rows.cuh"
#include "team_shares.cuh"

namespace lowra {

// total += `count` units of one tile. unit: of this block's columns. x: address of the staged x.
// tile: where `next` comes from; next: codes of the first unit, fetched. On return both stand at the last unit.
// in_last: called in the middle of the last of them.
template <int BITS, class S, class IN_LAST>
__device__ __forceinline__ void sum_units(const typename S::PRODUCT &q, int begin, int unit, int count, uint32_t x,
                                          int lane, lane_tile<S> &tile, uint32_t (&next)[2][4], uint32_t (&b)[2][4],
                                          float (&total)[S::kMmas][4], const IN_LAST &in_last) {
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
      if (i == kBlocks / 2 && count == 1) in_last();
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

// A block's units before those of a warp: each warp has at least one, or none, and then none after it has any.
__device__ __forceinline__ int first_unit(int units, int warp) {
  return units < kWarps ? min(units, warp) : units * warp / kWarps;
}
// How many warps come before this one when those with fewer units come first.
__device__ __forceinline__ int spare_place(int units, int warp) {
  const int more = units % kWarps;  // so many warps have one more than the others
  const int before = units < kWarps ? min(units, warp) : more * warp / kWarps;
  const bool has_more = first_unit(units, warp + 1) - first_unit(units, warp) > units / kWarps;
  return has_more ? kWarps - more + before : warp - before;
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
__global__ void __launch_bounds__(kThreads, 1) product_small_kernel(const __grid_constant__ typename S::PRODUCT q,
                                                                    const __grid_constant__ typename S::DIVISION d) {
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
  adapter_memory adapters;
  if constexpr (S::ADAPTED) adapters.lie_at<S>(q, spans + (d.most_tiles + 1) / 2 * 4);
  int unit = first_unit(units, warp);
  const int last_unit = first_unit(units, warp + 1);
  shared_row_sums<S> row_sums = {q, plain, begin, end, lane};
  // Before the codes, which all warps ask for: what A is multiplied into is waited for by every block.
  if constexpr (S::ADAPTED) row_sums.ask_for_first(team, (int)gridDim.x / d.splits, spare_place(units, warp));
  tile_spot spot = spot_of_unit(d, tiles, unit < last_unit ? unit : 0);
  lane_tile<S> tile;
  tile.place(q, d, spot, team, begin, lane);
  if (unit < last_unit) tile.ask_for_codes(lane % 4);
  if (warp >= kWarps - kKinds && lane == 0) ask_for_facts(q, d, warp - (kWarps - kKinds), team, rank);
  if constexpr (S::MADE) {
    const uint16_t *weight = static_cast<const uint16_t *>(q.input.weight);
    if (weight && thread == 0) prefetch_to_l2(weight, weight + q.in_features);
  }
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const x_piece<S> first_piece = fetch_x<S>(q, d, begin, end, thread);
  if constexpr (S::ADAPTED) row_sums.fetch_first(thread);
  float factors[TOKENS] = {};
  if constexpr (S::MADE) {
    if (q.input.kind == LOWRA_NORMED) norm_factors<S, kThreads>(q, team == 0 && rank == 0, factors);
  }
  const int cell = kThreads - 1 - thread;  // one of the rows of the team; stored in `places` later
  // Blocks of a team share out the tiles of one token; of several they share out tokens.
  const bool stores_cell = alone || TOKENS > 1 || (cell / kTileRows & (d.splits - 1)) == rank;
  const int cell_place = stores_cell && cell < all_tiles * kTileRows ? row_of_weight(q, d, tiles, team, cell) : -1;
  uint32_t next[2][4] = {};
  if (unit < last_unit) {
    tile.fetch_levels();
    tile.fetch(spot.kind, lane % 4, next);
  }
  uint4 *wanted_plain = S::ADAPTED || tiles[0] + tiles[1] > 0 ? plain : nullptr,
        *wanted_folded = tiles[2] > 0 ? folded : nullptr;
  stage_x<S>(q, d, begin, end, kThreads, factors, first_piece, wanted_plain, wanted_folded);
  if constexpr (S::ADAPTED) {  // now that what this waits for is there
    row_sums.put_fours(thread, adapters);
    if (cell_place >= 0) {
      uint2 *target = adapters.b + cell * q.b_stride;
      row_sums.ask_for_b(part_of_place(cell_place), row_of_place(cell_place), target);
    }
  }
  __syncthreads();
  if constexpr (S::ADAPTED) row_sums.put_own(adapters);
  uint32_t b[2][4] = {};
  const uint32_t plain_at = (uint32_t)__cvta_generic_to_shared(plain);
  const uint32_t folded_at = (uint32_t)__cvta_generic_to_shared(folded);
  while (unit < last_unit) {
    const int count = min(last_unit - unit, spot.units - spot.unit);
    float total[S::kMmas][4] = {};
    const auto in_last = [&] {
      if constexpr (S::ADAPTED) {
        if (unit + count == last_unit) row_sums.look_early();
      }
    };
    if (spot.kind == 2) {
      sum_units<1, S>(q, begin, spot.unit, count, folded_at, lane, tile, next, b, total, in_last);
    } else if (spot.kind == 1) {
      sum_units<2, S>(q, begin, spot.unit, count, plain_at, lane, tile, next, b, total, in_last);
    } else {
      sum_units<4, S>(q, begin, spot.unit, count, plain_at, lane, tile, next, b, total, in_last);
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
  if constexpr (S::ADAPTED) {
    row_sums.take_all(adapters);
    wait_for_copies<0>();
  }
  __syncthreads();
  if (!alone) team_blocks::wait();  // the other blocks have started: their memory can be written
  // A block adds up what its warps have and hands each sum to the block that will store it.
  constexpr int ROWS = S::kRowsAtOnce;
  for (int i = thread * ROWS; i < all_tiles * kCells; i += kThreads * ROWS) {
    const int number = i / kCells;
    float sum[ROWS] = {};
#pragma unroll 1
    for (int w = spans[2 * number]; w <= spans[2 * number + 1]; ++w) add_rows(sums + w * kCells + i, sum);
    if (!alone) {
      put_rows(team_blocks::of_rank(parts + rank * d.most_tiles * kCells + i, i / kTileRows % d.splits), sum);
    } else {
      store_cells<S>(q, i, places, sum, adapters);
    }
  }
  if (alone) return;
  team_blocks::sync();
  for (int at = thread * ROWS;; at += kThreads * ROWS) {
    const int i = (at / kTileRows * d.splits + rank) * kTileRows + at % kTileRows;  // of those that this block stores
    if (i >= all_tiles * kCells) break;
    float sum[ROWS] = {};
#pragma unroll 1
    for (int s = 0; s < d.splits; ++s) add_rows(parts + s * d.most_tiles * kCells + i, sum);
    store_cells<S>(q, i, places, sum, adapters);
  }
}

template <class S>
size_t shared_bytes(const typename S::PRODUCT &q, const division &d) {
  const size_t chunks = d.slice / kChunkColumns;
  return 2 * chunks * S::kStride * 16 + (size_t)(d.most_tiles + kWarps) * S::kCells * 4 +
         (size_t)d.splits * d.most_tiles * S::kCells * 4 + (size_t)d.most_tiles * kTileRows * 4 +
         (size_t)(d.most_tiles + 1) / 2 * 16 + inner_bytes(q);
}

// That a launch does not ask for: of norm_factors.
template <class S>
constexpr size_t kStaticBytes = S::MADE ? S::TOKENS * kWarps * sizeof(float) : 0;

template <class S>
int launch(const typename S::PRODUCT &q, cudaStream_t stream) {
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
    size_t bytes = shared_bytes<S>(q, d);
    if (bytes + kStaticBytes<S> > (size_t)limits.shared_bytes) continue;
    typename S::PRODUCT own = q;
    if constexpr (S::ADAPTED) {
      own.b_is_shared = bytes + bytes_of_b(q, d.most_tiles) + kStaticBytes<S> <= (size_t)limits.shared_bytes;
      if (own.b_is_shared) bytes += bytes_of_b(q, d.most_tiles);
      const int pieces = q.ranks * ((d.slice + kPieceColumns - 1) / kPieceColumns);
      if (S::SIMPLE && (!own.b_is_shared || pieces > teams * kWarps)) return LOWRA_UNSUPPORTED;
    }
    return launch_early(product_small_kernel<S>, dim3(teams * d.splits), dim3(kThreads), bytes, (unsigned)d.splits,
                        stream, own, d);
  }
  return LOWRA_UNSUPPORTED;
}

}  // namespace lowra
