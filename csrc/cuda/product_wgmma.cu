// Decode x product on Hopper (sm_90a), up to 64 tokens. Reference: reference.linear, up to the order of the float32
// sums.
//
// The weight is operand A of wgmma, decoded in registers as in fragments.cuh; x is operand B in shared memory. A
// warpgroup takes 64 rows of one precision and all tokens, and decodes the next columns while the tensor cores work on
// the last ones. One more warpgroup copies x through a ring of stages. It passes x through registers, because the
// columns that meet in one wgmma are 64 apart (fragments.cuh), and there the exchange costs nothing: four units of 16
// bytes come in, and word i of each goes out in unit i.
//
// The blocks of a cluster split the columns (cluster_sums.cuh). Half of the time of a small weight is spent at the two
// ends of a block, so addresses are computed, and what is read first is asked for in the L2 cache, while the kernel
// before runs.
#include "cluster_sums.cuh"
#include "fragment_rows.cuh"

namespace lowra {
namespace {

constexpr int kThreads = kGroupThreads * (kDecoders + 1);
constexpr int kStages = 3;  // tiles of x in shared memory
// Registers of a thread: a launch gives 128 to each, and copying x takes fewer than decoding.
constexpr int kCopyRegisters = 104, kDecodeRegisters = 136;

// TOKENS: 8 to 64.
template <int TOKENS>
struct block_shape {
  static constexpr int kBlockBytes = TOKENS * 128;    // 64 columns of all tokens
  static constexpr int kHalfBytes = 2 * kBlockBytes;  // half a tile of x
  static constexpr int kStageBytes = 2 * kHalfBytes;
  static constexpr int kCopyWarps = TOKENS > 8 ? kGroupWarps : 2;  // those with tokens of x, four at a time
  static constexpr int kBarriers = kStages * kStageBytes;          // where they lie
  static constexpr int kSums = kBarriers + (2 * kStages + kDecoders + 1) / 2 * 16;
  // Of a block, one of `splits`: the first of them has as many tokens to add up as any.
  static int bytes(int splits) { return kSums + eights_of_block(TOKENS, splits, 0) * splits * kSumBytes; }
};

// Tiles of 64 rows are dealt out to the blocks one by one, 4-bit ones first, so that the dear ones do not meet in a
// few.
__device__ __forceinline__ int tile_of_group(int group) { return blockIdx.y + group * gridDim.y; }

// Past the first-level cache: x was written by the kernel before, and each block reads it once.
__device__ __forceinline__ uint4 load_x(const void *at) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

// Unit `unit` (0 to 3, 8 columns of x each) of the columns of all four lanes of a quad in half a tile, into the blocks
// of a stage: word i of each goes into unit i. `row`: where the first block keeps this token.
__device__ __forceinline__ void store_units(const uint4 (&in)[4], uint8_t *row, size_t block_bytes, int unit,
                                            int token) {
  const uint4 out[4] = {make_uint4(in[0].x, in[1].x, in[2].x, in[3].x), make_uint4(in[0].y, in[1].y, in[2].y, in[3].y),
                        make_uint4(in[0].z, in[1].z, in[2].z, in[3].z), make_uint4(in[0].w, in[1].w, in[2].w, in[3].w)};
  row += unit / 2 * block_bytes;
#pragma unroll
  for (int i = 0; i < 4; ++i) *reinterpret_cast<uint4 *>(row + ((unit % 2 * 4 + i) ^ (token % 8)) * 16) = out[i];
}

// The copying warpgroup: x a tile at a time, zeros from the end of the slice to the end of its last tile and for tokens
// that do not exist.
template <int TOKENS, class T>
__device__ __forceinline__ void copy_x(const product &q, const column_slice &slice, uint8_t *x, uint32_t full,
                                       uint32_t empty) {
  using shape = block_shape<TOKENS>;
  constexpr int kWarpTokens = TOKENS / shape::kCopyWarps;
  constexpr int kSets = kWarpTokens >= 8 ? kWarpTokens / 8 : 1;  // of four units, for a thread and part of a tile
  constexpr int kParts = kWarpTokens / 4 / kSets;                // of a tile
  // A load takes 64 columns of four tokens, whole lines of memory: two units for each half of the tile. Eight lanes
  // that store together have four tokens and two neighbouring units, and so all banks.
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kGroupThreads / 32;
  if (warp >= shape::kCopyWarps) return;
  const int unit = lane / 8 * 2 + lane % 2, token = warp * kWarpTokens + lane / 2 % 4;
  const int whole_end = slice.whole_end();
  const T *source = static_cast<const T *>(q.x) + (size_t)token * q.in_features + 8 * unit;
  const auto load = [&](int column, int lane_columns, int end, int part, uint4(&loaded)[kSets][4]) {
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const int more = 4 * (part * kSets + s);  // tokens
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int at = column + lane_columns * t;
        const bool wanted = token + more < q.tokens && at + 8 * unit < end && 8 * unit < lane_columns;
        loaded[s][t] = make_uint4(0, 0, 0, 0);
        if (wanted) loaded[s][t] = load_x(source + (size_t)more * q.in_features + at);
      }
    }
  };
  const auto load_part = [&](int column, int part, uint4(&loaded)[kSets][4]) {
    load(column, kLaneColumns, whole_end, part, loaded);
  };
  ring_place<kStages> ring;
  const auto store_part = [&](int part, const uint4(&loaded)[kSets][4]) {
    if (part == 0) barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const int row = token + 4 * (part * kSets + s);
      uint8_t *half = x + ring.stage * shape::kStageBytes + unit / 4 * shape::kHalfBytes;
      store_units(loaded[s], half + row / 8 * 1024 + row % 8 * 128, shape::kBlockBytes, unit % 4, row);
    }
    if (part + 1 < kParts) return;
    fence_stores_for_tensor_cores();
    __syncwarp();
    barrier_arrive_as_warp(full + 8 * ring.stage);
    ring.advance();
  };
  uint4 first[kSets][4], second[kSets][4];  // one is on its way while the other is stored
  wait_for_earlier_kernels();
  let_later_kernels_start();
  load_part(slice.begin, 0, first);
#pragma unroll 1
  for (int column = slice.begin; column < whole_end; column += (3 - kParts) * kTileColumns) {
    if constexpr (kParts == 2) {
      load_part(column, 1, second);
      store_part(0, first);
      load_part(column + kTileColumns, 0, first);
      store_part(1, second);
    } else {
      load_part(column + kTileColumns, 0, second);
      store_part(0, first);
      load_part(column + 2 * kTileColumns, 0, first);
      if (column + kTileColumns < whole_end) store_part(0, second);
    }
  }
  if (whole_end >= slice.end) return;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    load(whole_end, kLaneColumns / 2, slice.end, part, first);
    store_part(part, first);
  }
}

// A decoding warpgroup: sum += its 64 rows times the columns of x.
template <int BITS, int TOKENS, class T>
__device__ __forceinline__ void sum_columns(const product &q, const tile_place &place, const column_slice &slice,
                                            uint32_t x, uint32_t full, uint32_t empty, float (&sum)[TOKENS / 2]) {
  using shape = block_shape<TOKENS>;
  constexpr int kParts = BITS == 1 ? 2 : 1;  // of a word: see fragments.cuh
  constexpr int kUnits = BITS == 4 ? 1 : 2;  // of x in a part, two wgmma each
  // Codes of both halves of a tile come by one load, a tile ahead: the first-level cache takes a line a cycle, and a
  // warp's 16 rows are 16 lines, however few bytes are wanted of each. With 4 bits the widest load, 16 bytes, is half a
  // tile.
  constexpr bool kWhole = BITS < 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kGroupThreads / 32, halves = slice.halves();
  const int table_halves = q.group_shift == 5 ? 1 : 2;  // half tiles under one table
  fragment_rows<BITS> rows;
  rows.place(q, place, warp, lane);
  rows.ask_for(q, slice, lane);
  wait_for_earlier_kernels();
  rows.read_levels(q);
  uint32_t words[2][2][BITS];        // [half][row]
  uint32_t next_words[2][2 * BITS];  // of the next tile, if whole
  raw_scale scales[2];               // of the next table
  const auto fetch_tile = [&](int half) {
    const int column = slice.lane_column(half, lane);
    if constexpr (!kWhole) {
      rows.fetch_codes(q, column, slice.end, words[0]);
      rows.fetch_codes(q, column + 32, slice.end, words[1]);
    } else if (slice.is_half(slice.begin + half / 2 * kTileColumns)) {
      uint32_t one[2][BITS];
      rows.fetch_codes(q, column, slice.end, one);
#pragma unroll
      for (int i = 0; i < 2 * BITS; ++i) next_words[i / BITS][i % BITS] = one[i / BITS][i % BITS];
    } else {
      rows.fetch_codes(q, column, slice.end, next_words);
    }
  };
  const auto take_tile = [&] {
#pragma unroll
    for (int i = 0; i < 4 * BITS; ++i) {
      if constexpr (kWhole) words[i / BITS % 2][i / BITS / 2][i % BITS] = next_words[i / BITS / 2][i % (2 * BITS)];
    }
  };
  fetch_tile(0);
  rows.fetch_scales(q, slice.lane_column(0, lane), slice.end, scales);
  value_table<BITS> table[2];
  ring_place<kStages> ring;
  int used = -1;  // stage of the tile before, not yet given back
  const auto multiply_half = [&](int half, int parity) {
    // With 4 bits the compiler must not know the answer: it would read levels ahead and run out of registers.
    const bool new_table = BITS == 4 ? half % table_halves == 0 : parity == 0 || table_halves == 1;
    if (new_table) {
#pragma unroll
      for (int h = 0; h < 2; ++h) table[h] = build_table<BITS, T>(rows.levels[h], finish_scale(q.packed, scales[h]));
      rows.fetch_scales(q, slice.lane_column(half + table_halves, lane), slice.end, scales);
    }
    const uint64_t operand = swizzled_operand(x + ring.stage * shape::kStageBytes + parity * shape::kHalfBytes);
    uint32_t a[BITS * kParts][2][4 * kUnits];  // operands: those of one part are decoded while the last one's are read
#pragma unroll
    for (int w = 0; w < BITS; ++w) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const bool first = w == 0 && part == 0 && parity == 0;
        uint32_t (&now)[2][4 * kUnits] = a[w * kParts + part];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (part == 0) decode<false>(table[h], words[parity][h][w], now[h]);
          if (part == 1) decode<true>(table[h], words[parity][h][w], now[h]);
        }
        if (first) barrier_wait(full + 8 * ring.stage, ring.parity);
        wgmma_fence();
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const int unit = BITS == 1 ? part + 2 * u : w * kUnits + u;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int r = 4 * u + 2 * i, at = unit / 2 * shape::kBlockBytes + unit % 2 * 64 + i * 32;
            wgmma<TOKENS, T>::add(sum, now[0][r], now[1][r], now[0][r + 1], now[1][r + 1], operand + at / 16);
          }
        }
        wgmma_commit();
        wgmma_wait<1>();  // all products but these are done, so the stage before is free
        if (first) {
          if (used >= 0) barrier_arrive_as_warp(empty + 8 * used);
          used = ring.stage;
        }
      }
    }
    if constexpr (!kWhole) rows.fetch_codes(q, slice.lane_column(half + 2, lane), slice.end, words[parity]);
    if (parity == 1) ring.advance();
  };
#pragma unroll 1
  for (int half = 0; half + 1 < halves; half += 2) {
    take_tile();
    if constexpr (kWhole) fetch_tile(half + 2);
    multiply_half(half, 0);
    multiply_half(half + 1, 1);
  }
  if (halves % 2 > 0) {
    take_tile();
    multiply_half(halves - 1, 0);
  }
  wgmma_wait<0>();
}

template <int TOKENS, class T>
__global__ void __launch_bounds__(kThreads, 1) product_wgmma_kernel(const __grid_constant__ product q, int columns) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using shape = block_shape<TOKENS>;
  extern __shared__ __align__(1024) uint8_t memory[];  // stages of x, barriers, sums
  const uint32_t x = shared_address(memory), full = x + shape::kBarriers, empty = full + 8 * kStages;
  const uint32_t sums = x + shape::kSums, sent = empty + 8 * kStages;  // sent: a barrier for each decoding warpgroup
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / kGroupThreads, 0);
  const int begin = blockIdx.x * columns;
  const column_slice slice = {begin, min(begin + columns, q.in_features)};
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + 8 * s, shape::kCopyWarps * kWarpArrivals);
      barrier_init(empty + 8 * s, kDecoders * kGroupWarps * kWarpArrivals);
    }
    for (int g = 0; g < kDecoders; ++g) expect_sums(sent + 8 * g, q.tokens);
    fence_barriers_for_cluster();
  }
  __syncthreads();
  cluster_arrive();
  if (group == kDecoders) {
    give_registers<kCopyRegisters>();
    copy_x<TOKENS, T>(q, slice, memory, full, empty);
    cluster_wait();
  } else {
    take_registers<kDecodeRegisters>();
    const int tile = tile_of_group(group), tiles = q.tiles.total();
    // A warpgroup without rows repeats the last ones, so that all of a block give back their stages.
    const tile_place place = tile_at(q.layout, q.tiles, kGroupRows, min(tile, tiles - 1));
    float sum[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) sum[i] = 0.f;
    if (place.bits == 1) {
      sum_columns<1, TOKENS, T>(q, place, slice, x, full, empty, sum);
    } else if (place.bits == 2) {
      sum_columns<2, TOKENS, T>(q, place, slice, x, full, empty, sum);
    } else {
      sum_columns<4, TOKENS, T>(q, place, slice, x, full, empty, sum);
    }
    cluster_wait();  // all blocks have begun, and made their barriers
    if (tile < tiles) {
      send_sums<TOKENS>(sum, q.tokens, sums, sent + 8 * group);
      collect_sums<T>(q, place, sums, sent + 8 * group);  // ends when all that is sent to this block has come
    }
  }
#endif
}

// How many clusters of `splits` blocks run at once. Asked for once: the query costs more than the launch.
template <int TOKENS, class T>
int clusters_of(int splits) {
  static thread_local int known[kMaxSplits + 1];
  if (known[splits] == 0) {
    known[splits] =
        clusters_at_once(product_wgmma_kernel<TOKENS, T>, splits, kThreads, block_shape<TOKENS>::bytes(splits));
  }
  return known[splits];
}

// The number of splits that gives a multiprocessor the least to do. halves: of tiles of x.
template <int TOKENS, class T>
int best_splits(int clusters, int halves, int shared_bytes) {
  int best = 1, least = INT32_MAX;
  for (int splits = 1; splits <= kMaxSplits && splits <= halves; ++splits) {
    if (block_shape<TOKENS>::bytes(splits) > shared_bytes) continue;
    const int at_once = clusters_of<TOKENS, T>(splits), waves = (clusters + at_once - 1) / at_once;
    const int cost = waves * ((halves + splits - 1) / splits + 4);  // + 4: a block's start and end take two tiles' time
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

// TOKENS, T: as above.
template <int TOKENS, class T>
int launch(product q, cudaStream_t stream) {
  device_limits limits;
  if (const int status = limits_of_current_device(limits)) return status;
  q.tiles = tiles_of(q.layout, kGroupRows);
  const int blocks = (q.tiles.total() + kDecoders - 1) / kDecoders;
  const int halves = (q.in_features + kHalfColumns - 1) / kHalfColumns;
  const int splits = best_splits<TOKENS, T>(blocks, halves, limits.shared_bytes);
  const int columns = (halves + splits - 1) / splits * kHalfColumns;
  return launch_early(product_wgmma_kernel<TOKENS, T>, dim3(splits, blocks), dim3(kThreads),
                      block_shape<TOKENS>::bytes(splits), splits, stream, q, columns);
}

template <class T>
int choose(const product &q, cudaStream_t stream) {
  if (q.tokens <= 8) return launch<8, T>(q, stream);
  if (q.tokens <= 16) return launch<16, T>(q, stream);
  if (q.tokens <= 32) return launch<32, T>(q, stream);
  return launch<64, T>(q, stream);
}

}  // namespace

int product_wgmma(const product &q, int32_t type, cudaStream_t stream) {
  const rows_layout &l = q.layout;
  const size_t codes = (size_t)l.rows4 * l.bytes4 + (size_t)l.rows2 * l.bytes2 + (size_t)l.rows1 * l.bytes1;
  const bool fits = codes <= UINT32_MAX && (size_t)l.rows() * q.groups <= UINT32_MAX;  // fragment_rows
  device_limits limits;
  if (const int status = limits_of_current_device(limits)) return status;
  if (!fits || !limits.hopper) return LOWRA_UNSUPPORTED;
  return type == LOWRA_FLOAT16 ? choose<fp16>(q, stream) : choose<bf16>(q, stream);
}

}  // namespace lowra
