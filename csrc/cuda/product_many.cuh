// Decode x product on Hopper (sm_90a) for more than 64 tokens. Reference: reference.linear, up to the order of the
// float32 sums.
//
// A tile of the output is TOKENS tokens x ROWS rows of W, summed over steps of 64 columns. Some warps decode: a thread
// writes the 64 weights of one row and step, 128 bytes, to shared memory, where two warpgroups multiply them with x,
// half of the tokens each. Both operands come from shared memory, so decoding and multiplying never wait for one
// another's registers; a ring of stages lies between them.
//
// Rows of a tile are neighbours in W, whatever their precision, so that the outputs of a token are one stretch of
// memory. (Rows in packed order would be written two bytes at a time to places far apart.) Within a precision packed
// rows keep the order of W, so those of a tile are three runs, found by bisection (tile_rows.cuh).
//
// Blocks work in pairs (clusters). For up to 128 tokens a pair takes neighbouring tiles of rows; each block copies half
// of x for both. For more tokens it takes the same rows and neighbouring tiles of tokens; each block decodes half of
// the rows and sends them to the other. Where pairs are too few for the chip, several of them in one cluster share the
// columns of their tiles, and at the end add up each other's sums.
#pragma once

#include <cuda.h>

#include "product.cuh"
#include "tile_rows.cuh"
#include "tile_sums.cuh"
#include "wgmma.cuh"

namespace lowra {

constexpr int kMaxSplitShift = 2;  // a cluster has at most 8 blocks
constexpr int kMaxTurns = 4;       // of warps that share a task, each at a stage of its own
constexpr int kAhead = 2;          // steps of a warp whose codes have been asked for
constexpr int kSharedBytes = 226 << 10;
// With tiles of 256 tokens, of 168 at the launch: a multiplying thread has 176 sums.
constexpr int kMultiplyRegisters = 208, kDecodeRegisters = 88;

// TOKENS: in a tile, 128 or 256. ROWS: of W in a tile, a multiple of 16. A launch picks those that fill the chip best.
// SHARED: whether a pair shares the rows of W, or x.
template <int TOKENS, int ROWS, bool SHARED>
struct tile_shape {
  // Sums of 256 tokens leave registers for half as many decoding warps, which have twice as long for a step.
  static constexpr int kDecodeWarps = TOKENS == 128 ? 8 : 4, kDecodeThreads = 32 * kDecodeWarps;
  static constexpr int kThreads = 32 * kMultiplyWarps + kDecodeThreads;
  static constexpr int kTokenBytes = TOKENS * kStepBytes, kStageBytes = kTokenBytes + ROWS * kStepBytes;
  static constexpr int kSlotsBytes = kAhead * code_slot<kDecodeThreads>::kBytes;
  static constexpr int kStages = (kSharedBytes - kSlotsBytes) / kStageBytes;
  static constexpr int kOwnRows = SHARED ? ROWS / kPair : ROWS;  // that a block decodes
  static constexpr int kOwnBytes = kOwnRows * kStepBytes;
  static constexpr int kTasks = (kOwnRows + 31) / 32;  // see task
  static constexpr int kSlots = kStages * kStageBytes, kBarriers = kSlots + kSlotsBytes;
  static constexpr int kDone = kBarriers + 2 * kStages * 8, kRunPlace = kDone + kStages * 4;
  static constexpr int kBytes = kRunPlace + 2 * kRuns * 4;
  static_assert(kTasks <= 4 && kMaxTurns <= kStages && kBytes <= 227 << 10, "");
  static_assert(TOKENS * ROWS * 4 <= kSlots, "add_up");
};

struct tile_grid {
  int token_tiles, tile_pairs;
  int split_shift;  // log2 of the splits: pairs of blocks that share a work's columns, and then have no other work

  __host__ __device__ int splits() const { return 1 << split_shift; }
};

// Which block of its cluster a block is, and what it has to do.
struct block_role {
  int rank;                  // in the cluster; blocks 2 * i and 2 * i + 1 are a pair
  int split;                 // which of the pairs
  int first_step, end_step;  // of the columns
  int first_work, stride;
};

__device__ __forceinline__ block_role role_of(const product &q, const tile_grid &grid) {
  const int shift = grid.split_shift, steps = q.in_features / kStepColumns;
  block_role role;
  role.rank = blockIdx.x & ((kPair << shift) - 1), role.split = role.rank / kPair;
  role.first_step = steps * role.split >> shift, role.end_step = steps * (role.split + 1) >> shift;
  role.first_work = blockIdx.x / kPair >> shift, role.stride = gridDim.x / kPair >> shift;
  return role;
}

struct output_tile {
  int first_row, first_token;
};

// Token tiles of the same rows come one after another.
template <int TOKENS, int ROWS, bool SHARED>
__device__ __forceinline__ output_tile tile_of(const tile_grid &grid, int work) {
  const int rank = blockIdx.x % kPair, across = SHARED ? (grid.token_tiles + kPair - 1) / kPair : grid.token_tiles;
  const int rows = work / across, tokens = work % across;
  return {(SHARED ? rows : kPair * rows + rank) * ROWS, (SHARED ? kPair * tokens + rank : tokens) * TOKENS};
}

// What a decoding warp does for a tile: 32 of the rows that this block decodes, in their sorted order, in every
// `turns`-th step from step `turn` on.
struct task {
  int bits;  // the most among these rows; 0: nothing
  int index;
  int turn, turns;
};

// The `warps` left over go to the tasks that take longest. first_bits: of each task. tasks: at most 4.
__device__ __forceinline__ task task_of(const int (&first_bits)[4], int tasks, int warp, int warps) {
  int cost[4], turns[4], used = tasks;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    cost[t] = t >= tasks ? 0 : first_bits[t] == 4 ? 8 : first_bits[t] == 2 ? 7 : 4;
    turns[t] = t < tasks;
  }
#pragma unroll 1
  for (; used < warps; ++used) {
    int best = -1, most = 0, shared = 1;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (turns[t] < kMaxTurns && cost[t] * shared > most * turns[t]) best = t, most = cost[t], shared = turns[t];
    }
    if (best < 0) break;
#pragma unroll
    for (int t = 0; t < 4; ++t) turns[t] += t == best;
  }
  task mine = {0, 0, 0, 1};
  int before = 0;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    if (warp >= before && warp < before + turns[t]) mine = {first_bits[t], t, warp - before, turns[t]};
    before += turns[t];
  }
  return mine;
}

// What a decoding warp knows of its block and tile.
struct decoding {
  const CUtensorMap *x;
  uint32_t memory, full, empty, done;  // shared addresses: stages, barriers, counts of finished tasks
  int tasks;                           // of a step in this block
  output_tile tile;
  uint32_t expected;  // bytes that copies bring in a step
  block_role role;
};

// One more task of a stage is done. The last one's warp sends the rows of this block to the other.
template <int TOKENS, int ROWS>
__device__ __forceinline__ void send_rows(const decoding &to, uint32_t stage, uint32_t full, uint32_t done) {
  using shape = tile_shape<TOKENS, ROWS, true>;
  if (shared_add(done, 1) != to.tasks - 1) return;
  shared_store(done, 0u);
  fence_stores_for_tensor_cores();
  const int other = to.role.rank ^ 1;
  const uint32_t rows = stage + shape::kTokenBytes + to.role.rank % kPair * shape::kOwnBytes;
  copy_to_block(address_in_block(rows, other), rows, shape::kOwnBytes, address_in_block(full, other));
}

// Every step of a tile that is this warp's turn. leads: it asks for x. BITS: 0 for a block without rows.
template <int BITS, int TOKENS, int ROWS, bool SHARED, class T>
__device__ __forceinline__ void decode_steps(const product &q, const task &mine, bool leads, const int *runs,
                                             const decoding &to,
                                             ring_place<tile_shape<TOKENS, ROWS, SHARED>::kStages> ring) {
  using shape = tile_shape<TOKENS, ROWS, SHARED>;
  const int lane = threadIdx.x % 32, first = to.role.first_step + mine.turn, end = to.role.end_step;
  constexpr int kSlotBytes = code_slot<shape::kDecodeThreads>::kBytes;
  const uint32_t slots = to.memory + shape::kSlots;
  tile_row<BITS == 0 ? 1 : BITS, shape::kDecodeThreads> row;
  if constexpr (BITS > 0) {
    row.place(q, runs, 32 * mine.index + lane, to.tile.first_row);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) row.ask_for(q, first + i * mine.turns, end, slots + i * kSlotBytes);
  }
  ring.advance(mine.turn);
  ring_place<kAhead> ahead;
#pragma unroll 1
  for (int step = first; step < end; step += mine.turns) {
    const uint32_t stage = to.memory + ring.stage * shape::kStageBytes, full = to.full + 8 * ring.stage;
    barrier_wait(to.empty + 8 * ring.stage, ring.parity ^ 1);
    if (leads && lane == 0) {
      if (shape::kTasks > to.tasks) barrier_arrive(full, (shape::kTasks - to.tasks) * kWarpArrivals);
      barrier_expect(full, to.expected);
      const int column = step * kStepColumns;
      if constexpr (SHARED) {
        load_tile(stage, to.x, column, to.tile.first_token, full);
      } else {
        const int half = to.role.rank % kPair * (TOKENS / kPair);
        load_tile_for_pair(stage + half * kStepBytes, to.x, column, to.tile.first_token + half, full, to.role.rank);
      }
    }
    if constexpr (BITS > 0) {
      const uint32_t slot = slots + ahead.stage * kSlotBytes;
      wait_for_copies<kAhead - 1>();
      row.template decode_step<T>(q, stage + shape::kTokenBytes, step, slot);
      __syncwarp();
      barrier_arrive_as_warp(full);
      if constexpr (SHARED) {
        if (lane == 0) send_rows<TOKENS, ROWS>(to, stage, full, to.done + 4 * ring.stage);
      }
      row.ask_for(q, step + kAhead * mine.turns, end, slot);
      ahead.advance(1);
    }
    ring.advance(mine.turns);
  }
}

// The decoding warps: every step of every tile of this block, W decoded and x asked for. x: its map.
template <int TOKENS, int ROWS, bool SHARED, class T>
__device__ __forceinline__ void decode_tiles(const product &q, const tile_grid &grid, const CUtensorMap *x,
                                             uint32_t memory, int *runs) {
  using shape = tile_shape<TOKENS, ROWS, SHARED>;
  const block_role role = role_of(q, grid);
  const int warp = threadIdx.x / 32 - kMultiplyWarps, lane = threadIdx.x % 32, rank = role.rank % kPair;
  const int steps = role.end_step - role.first_step, rows = q.layout.rows();
  const uint32_t full = memory + shape::kBarriers;
  ring_place<shape::kStages> ring;
  for (int work = role.first_work; work < grid.tile_pairs; work += role.stride) {
    const output_tile tile = tile_of<TOKENS, ROWS, SHARED>(grid, work);
    const int first = tile.first_row + (SHARED ? rank * shape::kOwnRows : 0);
    for (int i = warp; i < kRuns; i += shape::kDecodeWarps) {
      const int end = end_of_run(q, i, first, first + shape::kOwnRows);
      if (lane == 0) runs[i] = end;
    }
    // No warp may run ahead by a tile: a parity tells only neighbouring rounds of a barrier apart.
    asm volatile("bar.sync 1, %0;" ::"n"(shape::kDecodeThreads) : "memory");
    int first_bits[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) first_bits[t] = row_at(runs, 32 * t).bits;
    const int tasks = (max(0, min(shape::kOwnRows, rows - first)) + 31) / 32;
    const task mine = task_of(first_bits, tasks, warp, shape::kDecodeWarps);
    const int other = tile.first_row + (rank ^ 1) * shape::kOwnRows;
    const uint32_t sent = SHARED && other < rows ? shape::kOwnBytes : 0;
    const decoding to = {
        x,   memory, full, full + 8 * shape::kStages, memory + shape::kDone, tasks, tile, shape::kTokenBytes + sent,
        role};
    const bool leads = mine.index == 0;
    if (mine.bits == 1) decode_steps<1, TOKENS, ROWS, SHARED, T>(q, mine, leads, runs, to, ring);
    if (mine.bits == 2) decode_steps<2, TOKENS, ROWS, SHARED, T>(q, mine, leads, runs, to, ring);
    if (mine.bits == 4) decode_steps<4, TOKENS, ROWS, SHARED, T>(q, mine, leads, runs, to, ring);
    if (tasks == 0 && warp == 0) decode_steps<0, TOKENS, ROWS, SHARED, T>(q, mine, true, runs, to, ring);
    for (int i = steps % (2 * shape::kStages); i > 0; i -= shape::kStages) ring.advance(min(i, shape::kStages));
    // Two sets of runs in turn: when one is written again, all have passed the barrier after the other.
    runs += work / role.stride % 2 ? -kRuns : kRuns;
  }
  if (grid.split_shift > 0) {  // see add_up
    cluster_sync();
    cluster_sync();
  }
  cluster_arrive();
}

// The multiplying warpgroups: half of the tokens of every tile of this block, 64 in a product.
template <int TOKENS, int ROWS, bool SHARED, class T>
__device__ __forceinline__ void multiply_tiles(const product &q, const tile_grid &grid, uint32_t memory) {
  using shape = tile_shape<TOKENS, ROWS, SHARED>;
  constexpr int kParts = TOKENS / 128;
  const uint32_t full = memory + shape::kBarriers;
  const int lane = threadIdx.x % 32, first_part = threadIdx.x / 128 * kParts;
  const block_role role = role_of(q, grid);
  const int steps = role.end_step - role.first_step;
  // Lane r tells block r of the pair that a stage is free here: what comes into it comes from both.
  const auto empty_in = [&](int r) {
    return address_in_block(full + 8 * shape::kStages, kPair * role.split + r % kPair);
  };
  const uint32_t empty = empty_in(lane);
  const auto give_back = [&](int stage) {
    if (lane < kPair * kWarpArrivals) barrier_arrive_in_cluster(empty + 8 * stage);
    if (kWarpArrivals > 1) barrier_arrive_in_cluster(empty_in(lane + 1) + 8 * stage);
  };
  ring_place<shape::kStages> ring;
  for (int work = role.first_work; work < grid.tile_pairs; work += role.stride) {
    float sums[kParts][ROWS / 2];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < ROWS / 2; ++i) sums[part][i] = 0.f;
    }
    int used = 0;  // stage of the step before
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t stage = memory + ring.stage * shape::kStageBytes;
      const uint64_t tokens = swizzled_operand(stage + first_part * 64 * kStepBytes);
      const uint64_t weights = swizzled_operand(stage + shape::kTokenBytes);
      barrier_wait(full + 8 * ring.stage, ring.parity);
      fence_stores_for_tensor_cores();  // here, since decoding warps would wait at it for whatever they have under way
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStepColumns / 16; ++k) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          wgmma_shared<ROWS, T>::add(sums[part], tokens + part * (64 * kStepBytes >> 4) + 2 * k, weights + 2 * k);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) give_back(used);
      used = ring.stage;
      ring.advance(1);
    }
    wgmma_wait<0>();
    // The sums are read from here on: moved to before the wait, a read would put the tensor cores' work one after
    // another.
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < ROWS / 2; ++i) asm volatile("" : "+f"(sums[part][i])::"memory");
    }
    give_back(used);
    constexpr int kUnits = ROWS / 16;
    const unit_range units = {kUnits * role.split >> grid.split_shift, kUnits * (role.split + 1) >> grid.split_shift};
    if (grid.split_shift > 0) add_up<ROWS>(role.rank, grid.splits(), memory, units, sums);
    if (work + role.stride >= grid.tile_pairs) cluster_arrive();  // this block needs and sends nothing more
    const output_tile tile = tile_of<TOKENS, ROWS, SHARED>(grid, work);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      store_sums<ROWS, T>(q, tile.first_row, tile.first_token + 64 * (first_part + part), units, sums[part]);
    }
  }
}

template <int TOKENS, int ROWS, bool SHARED, class T>
__global__ void __launch_bounds__(tile_shape<TOKENS, ROWS, SHARED>::kThreads, 1)
    product_many_kernel(const __grid_constant__ product q, const __grid_constant__ CUtensorMap x, tile_grid grid) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using shape = tile_shape<TOKENS, ROWS, SHARED>;
  extern __shared__ __align__(1024) uint8_t stages[];
  const uint32_t memory = shared_address(stages), full = memory + shape::kBarriers;
  const bool multiplies = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) < kMultiplyWarps;
  if (threadIdx.x == 0) {
    for (int s = 0; s < shape::kStages; ++s) {
      barrier_init(full + 8 * s, 1 + shape::kTasks * kWarpArrivals);
      barrier_init(full + 8 * (shape::kStages + s), kPair * kMultiplyWarps * kWarpArrivals);
      shared_store(memory + shape::kDone + 4 * s, 0u);
    }
    fence_barriers_for_cluster();
  }
  cluster_sync();
  wait_for_earlier_kernels();
  let_later_kernels_start();
  if (multiplies) {
    if constexpr (TOKENS == 256) take_registers<kMultiplyRegisters>();
    multiply_tiles<TOKENS, ROWS, SHARED, T>(q, grid, memory);
  } else {
    if constexpr (TOKENS == 256) give_registers<kDecodeRegisters>();
    decode_tiles<TOKENS, ROWS, SHARED, T>(q, grid, &x, memory, reinterpret_cast<int *>(stages + shape::kRunPlace));
  }
  cluster_wait();  // a block must not leave while others still send to it or read from it
#endif
}

}  // namespace lowra
