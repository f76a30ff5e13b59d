// Decode x product on Hopper (sm_90a), up to 64 tokens. Reference: reference.linear, up to the order of the float32 sums.
//
// The weight is operand A of wgmma, decoded in registers as in fragments.cuh; x is operand B in shared memory. A
// warpgroup takes 64 rows of one precision and all tokens, and decodes the next columns while the tensor cores work on
// the last ones. One more warpgroup copies x through a ring of stages. It passes x through registers, because the
// columns that meet in one wgmma are 64 apart (fragments.cuh), and there the exchange costs nothing: four units of 16
// bytes come in, and word i of each goes out in unit i.
//
// The blocks of a cluster split the columns and add up their sums through distributed shared memory.
#include "product.cuh"
#include "wgmma.cuh"

namespace lowra {
namespace {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupRows = 64;
constexpr int kDecoders = 3;        // warpgroups that decode
constexpr int kThreads = kGroupThreads * (kDecoders + 1);
constexpr int kStages = 8;          // half tiles of x in shared memory
constexpr int kMaxSplits = 8;
// Registers of a thread: a launch gives 128 to each, and copying x takes fewer than decoding.
constexpr int kCopyRegisters = 104, kDecodeRegisters = 136;

// TOKENS: 8 to 64.
template <int TOKENS>
struct block_shape {
  static constexpr int kBlockBytes = TOKENS * 128;  // 64 columns of all tokens
  static constexpr int kStageBytes = 2 * kBlockBytes;
  static constexpr int kX = kStages * kStageBytes, kSums = TOKENS * kDecoders * kGroupRows * 4;
  static constexpr int kBarriers = kX > kSums ? kX : kSums;  // where they lie
  static constexpr int kBytes = kBarriers + 2 * kStages * 8;
};

// Tiles of 64 rows are dealt out to the blocks one by one, 4-bit ones first, so that the dear ones do not meet in a few.
__device__ __forceinline__ int tile_of_group(int group) { return blockIdx.y + group * gridDim.y; }

// Past the first-level cache: x was written by the kernel before, and each block reads it once.
__device__ __forceinline__ uint4 load_x(const void *at) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

// Unit `unit` (0 to 3, 8 columns of x each) of the columns of all four lanes of a quad in half a tile, into the blocks of a
// stage: word i of each goes into unit i. `row`: where the first block keeps this token.
__device__ __forceinline__ void store_units(const uint4 (&in)[4], uint8_t *row, size_t block_bytes, int unit, int token) {
  const uint4 out[4] = {make_uint4(in[0].x, in[1].x, in[2].x, in[3].x), make_uint4(in[0].y, in[1].y, in[2].y, in[3].y),
                        make_uint4(in[0].z, in[1].z, in[2].z, in[3].z), make_uint4(in[0].w, in[1].w, in[2].w, in[3].w)};
  row += unit / 2 * block_bytes;
#pragma unroll
  for (int i = 0; i < 4; ++i) *reinterpret_cast<uint4 *>(row + ((unit % 2 * 4 + i) ^ (token % 8)) * 16) = out[i];
}

// The copying warpgroup: columns [begin, end) of x, half a tile at a time, zeros from `end` to the end of the tile and
// for tokens that do not exist.
template <int TOKENS, class T>
__device__ __forceinline__ void copy_x(const product &q, int begin, int end, uint8_t *x, uint32_t full,
                                       uint32_t empty) {
  using shape = block_shape<TOKENS>;
  constexpr int kSets = TOKENS >= 32 ? TOKENS / 32 : 1;  // of four units, for a thread and stage
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kGroupThreads / 32;
  // Eight lanes that store together have four tokens and two neighbouring units, and so all banks.
  const int unit = lane / 8 % 2 * 2 + lane % 2, token = warp * 8 + lane / 16 * 4 + lane / 2 % 4;
  const T *source = static_cast<const T *>(q.x) + (size_t)token * q.in_features + 8 * unit;
  uint8_t *target = x + warp * 1024 + token % 8 * 128;
  const auto load_half = [&](int column, uint4(&loaded)[kSets][4]) {
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const bool exists = token + 32 * s < TOKENS && token + 32 * s < q.tokens;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int at = column + kLaneColumns * t;
        loaded[s][t] = make_uint4(0, 0, 0, 0);
        if (exists && at < end) loaded[s][t] = load_x(source + (size_t)32 * s * q.in_features + at);
      }
    }
  };
  ring_place<kStages> ring;
  const auto store_half = [&](const uint4(&loaded)[kSets][4]) {
    barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      if (token + 32 * s >= TOKENS) continue;
      uint8_t *stage = target + ring.stage * shape::kStageBytes + 4 * s * 1024;
      store_units(loaded[s], stage, shape::kBlockBytes, unit, token);
    }
    fence_stores_for_tensor_cores();
    __syncwarp();
    if (lane == 0) barrier_arrive(full + 8 * ring.stage);
    ring.advance();
  };
  uint4 first[kSets][4], second[kSets][4];  // one is on its way while the other is stored
  load_half(begin, first);
#pragma unroll 1
  for (int column = begin; column < end; column += kTileColumns) {
    load_half(column + kLaneColumns / 2, second);
    store_half(first);
    load_half(column + kTileColumns, first);
    store_half(second);
  }
}

// The two rows of a lane, `lane / 4` and `lane / 4 + 8` of its warp's 16, as offsets of 32 bits: registers are scarce here.
// Rows past the end of a precision repeat its last row; their sums are never stored.
template <int BITS>
struct fragment_rows {
  uint32_t codes[2], first_scale[2];
  row_levels<BITS> levels[2];

  __device__ __forceinline__ void place(const product &q, const tile_place &tile, int warp, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(tile.first_row + warp * kTileRows + lane / 4 + 8 * h, tile.last_row);
      const row_place at = place_of<0>(q.layout, row);
      codes[h] = (uint32_t)at.code_offset;
      first_scale[h] = (uint32_t)row * q.groups;
      levels[h].place(q.packed.levels + at.table_offset);
    }
  }

  // Columns [column, column + 32): BITS words of each row, zero from `end` on (a multiple of 32).
  __device__ __forceinline__ void fetch(const product &q, int column, int end, uint32_t (&words)[2][BITS]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint8_t *at = q.packed.codes + (codes[h] + column * BITS / 8);
#pragma unroll
      for (int i = 0; i < BITS; ++i) words[h][i] = 0;
      if (column < end) load_codes(at, words[h]);
    }
  }

  __device__ __forceinline__ void fetch(const product &q, int column, int end, raw_scale (&scales)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scales[h] = {0, 0.f};
      if (column < end) scales[h] = fetch_scale(q.packed, first_scale[h] + (column >> q.group_shift));
    }
  }
};

// Columns of a lane in half tile `half` of a slice.
__device__ __forceinline__ int lane_column(int begin, int half, int lane) {
  return begin + half / 2 * kTileColumns + half % 2 * 32 + lane % 4 * kLaneColumns;
}

// A decoding warpgroup: sum += its 64 rows times columns [begin, end) of x.
template <int BITS, int TOKENS, class T>
__device__ __forceinline__ void sum_columns(const product &q, const tile_place &place, int begin, int end, uint32_t x,
                                            uint32_t full, uint32_t empty, float (&sum)[TOKENS / 2]) {
  using shape = block_shape<TOKENS>;
  constexpr int kParts = BITS == 1 ? 2 : 1;  // of a word: see fragments.cuh
  constexpr int kUnits = BITS == 4 ? 1 : 2;  // of x in a part, two wgmma each
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kGroupThreads / 32;
  const int halves = (end - begin + kTileColumns - 1) / kTileColumns * 2;
  const int scale_step = q.group_shift == 5 ? 1 : 2;  // half tiles under one table
  fragment_rows<BITS> rows;
  rows.place(q, place, warp, lane);
  uint32_t words[2][2][BITS];  // [half][row]: those of the next half tile are on their way
  raw_scale scales[2];
  rows.fetch(q, lane_column(begin, 0, lane), end, words[0]);
  rows.fetch(q, lane_column(begin, 1, lane), end, words[1]);
  rows.fetch(q, lane_column(begin, 0, lane), end, scales);
  value_table<BITS> table[2];
  ring_place<kStages> ring;
  int used = -1;  // stage of the half tile before, not yet given back
  const auto multiply_half = [&](int half, uint32_t (&codes)[2][BITS]) {
    if (half % scale_step == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) table[h] = build_table<BITS, T>(rows.levels[h], finish_scale(q.packed, scales[h]));
      rows.fetch(q, lane_column(begin, half + scale_step, lane), end, scales);
    }
    const uint64_t operand = swizzled_operand(x + ring.stage * shape::kStageBytes);
    uint32_t a[BITS * kParts][2][4 * kUnits];  // operands: those of one part are decoded while the last one's are read
#pragma unroll
    for (int w = 0; w < BITS; ++w) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint32_t(&now)[2][4 * kUnits] = a[w * kParts + part];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (part == 0) decode<false>(table[h], codes[h][w], now[h]);
          if (part == 1) decode<true>(table[h], codes[h][w], now[h]);
        }
        if (w == 0 && part == 0) barrier_wait(full + 8 * ring.stage, ring.parity);
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
        if (w == 0 && part == 0) {
          if (used >= 0 && lane == 0) barrier_arrive(empty + 8 * used);
          used = ring.stage;
        }
      }
    }
    rows.fetch(q, lane_column(begin, half + 2, lane), end, codes);
    ring.advance();
  };
#pragma unroll 1
  for (int half = 0; half < halves; half += 2) {
    multiply_half(half, words[0]);
    multiply_half(half + 1, words[1]);
  }
  wgmma_wait<0>();
}

// The blocks of a cluster share out the tokens, eight at a time. `sums` is the shared address, in every block, of
// [eight tokens][thread]: four sums as wgmma leaves them, two tokens of one row and then of the other.
template <int TOKENS, class T>
__device__ __forceinline__ void add_up(const product &q, const tile_place &place, uint32_t sums) {
  const int splits = gridDim.x, lane = threadIdx.x % 32;
  const int row = place.first_row + threadIdx.x % kGroupThreads / 32 * kTileRows + lane / 4;
  T *out[2];
  float bias[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int stored_row = __ldg(q.packed.row_order + min(row + 8 * h, place.last_row));
    out[h] = static_cast<T *>(q.out) + stored_row;
    bias[h] = q.bias ? to_float(static_cast<const T *>(q.bias)[stored_row]) : 0.f;
  }
  cluster_sync();
#pragma unroll 2
  for (int eight = blockIdx.x; 8 * eight < q.tokens; eight += splits) {
    float4 part[kMaxSplits];
#pragma unroll
    for (int s = 0; s < kMaxSplits; ++s) {
      part[s] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (s < splits) {
        part[s] = load_from_cluster(address_in_block(sums + (eight * kDecoders * kGroupThreads + threadIdx.x) * 16, s));
      }
    }
    float total[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int s = 0; s < kMaxSplits; ++s) {
      total[0] += part[s].x, total[1] += part[s].y, total[2] += part[s].z, total[3] += part[s].w;
    }
    const int token = 8 * eight + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_if<T>(token + i % 2 < q.tokens && row + i / 2 * 8 <= place.last_row,
                  out[i / 2] + (size_t)(token + i % 2) * q.layout.rows(), total[i] + bias[i / 2]);
    }
  }
}

template <int TOKENS, class T>
__global__ void __launch_bounds__(kThreads, 1) product_wgmma_kernel(const __grid_constant__ product q, int slice) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using shape = block_shape<TOKENS>;
  extern __shared__ __align__(1024) uint8_t memory[];  // stages of x, and then the sums in their place
  const uint32_t x = shared_address(memory), full = x + shape::kBarriers, empty = full + 8 * kStages;
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / kGroupThreads, 0);
  const int begin = blockIdx.x * slice, end = min(begin + slice, q.in_features);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + 8 * s, kGroupThreads / 32);
      barrier_init(empty + 8 * s, kDecoders * kGroupThreads / 32);
    }
  }
  wait_for_earlier_kernels();
  let_later_kernels_start();
  __syncthreads();
  if (group == kDecoders) {
    give_registers<kCopyRegisters>();
    copy_x<TOKENS, T>(q, begin, end, memory, full, empty);
  } else {
    take_registers<kDecodeRegisters>();
    const int tile = tile_of_group(group), tiles = q.tiles.total();
    // A warpgroup without rows repeats the last ones, so that all of a block give back their stages.
    const tile_place place = tile_at(q.layout, q.tiles, kGroupRows, min(tile, tiles - 1));
    float sum[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) sum[i] = 0.f;
    if (place.bits == 1) {
      sum_columns<1, TOKENS, T>(q, place, begin, end, x, full, empty, sum);
    } else if (place.bits == 2) {
      sum_columns<2, TOKENS, T>(q, place, begin, end, x, full, empty, sum);
    } else {
      sum_columns<4, TOKENS, T>(q, place, begin, end, x, full, empty, sum);
    }
    asm volatile("bar.sync 1, %0;" ::"n"(kDecoders * kGroupThreads) : "memory");  // x is done with
    float4 *sums = reinterpret_cast<float4 *>(memory) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; ++i) {
      sums[i * kDecoders * kGroupThreads] = make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
    }
    if (tile < tiles) {
      add_up<TOKENS, T>(q, place, x);
    } else {
      cluster_sync();
    }
    // A block must not leave while others read its sums. What this one read has been used by now, and so has arrived.
    cluster_sync_relaxed();
  }
#endif
}

// How many clusters of `splits` blocks run at once. Asked for once: the query costs more than the launch.
template <int TOKENS, class T>
int clusters_of(int splits) {
  static thread_local int known[kMaxSplits + 1];
  if (known[splits] == 0) {
    known[splits] = clusters_at_once(product_wgmma_kernel<TOKENS, T>, splits, kThreads, block_shape<TOKENS>::kBytes);
  }
  return known[splits];
}

// The number of splits that gives a multiprocessor the least to do.
template <int TOKENS, class T>
int best_splits(int clusters, int steps) {
  int best = 1, least = INT32_MAX;
  for (int splits = 1; splits <= kMaxSplits && splits <= steps; ++splits) {
    const int at_once = clusters_of<TOKENS, T>(splits), waves = (clusters + at_once - 1) / at_once;
    const int cost = waves * ((steps + splits - 1) / splits + 2);  // + 2: a block's start and end take two tiles' time
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

// TOKENS, T: as above.
template <int TOKENS, class T>
int launch(product q, cudaStream_t stream) {
  q.tiles = tiles_of(q.layout, kGroupRows);
  const int blocks = (q.tiles.total() + kDecoders - 1) / kDecoders;
  const int steps = (q.in_features + kTileColumns - 1) / kTileColumns;
  const int splits = best_splits<TOKENS, T>(blocks, steps);
  const int slice = (steps + splits - 1) / splits * kTileColumns;
  return launch_early(product_wgmma_kernel<TOKENS, T>, dim3(splits, blocks), dim3(kThreads), block_shape<TOKENS>::kBytes,
                      splits, stream, q, slice);
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
  if (!fits || limits.major != 9) return LOWRA_UNSUPPORTED;  // sm_90a code runs on no other chip
  return type == LOWRA_FLOAT16 ? choose<fp16>(q, stream) : choose<bf16>(q, stream);
}

}  // namespace lowra
