// What the blocks of product_wgmma do with their sums: each sends its own to where they are added up, which costs one
// way between multiprocessors and needs no barrier of the cluster.
#pragma once

#include "product.cuh"
#include "wgmma.cuh"

namespace lowra {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupWarps = kGroupThreads / 32;
constexpr int kGroupRows = 64;
constexpr int kDecoders = 3;                               // warpgroups that decode
constexpr int kMaxSplits = 8;                              // blocks of a cluster
constexpr int kSumBytes = kDecoders * kGroupThreads * 16;  // of eight tokens, from one block

// The blocks of a cluster share out the tokens, eight at a time: block b takes the b-th eight, and so on. What a block
// gets lies as [its eights][from which block][decoding warpgroup][warp][pair of tokens][row % 8], four sums each as
// wgmma leaves them: two tokens of one row, and of the row 8 further on. In this order neither writing nor reading
// meets a bank twice.

// How many eights of `tokens` block `block` of `splits` takes.
__host__ __device__ __forceinline__ int eights_of_block(int tokens, int splits, int block) {
  return ((tokens + 7) / 8 - block + splits - 1) / splits;
}

// Makes the barrier at which a decoding warpgroup waits for the bytes of the other blocks. Called by one thread.
__device__ __forceinline__ void expect_sums(uint32_t barrier, int tokens) {
  const int splits = gridDim.x;
  barrier_init(barrier, 1);
  barrier_expect(barrier, eights_of_block(tokens, splits, blockIdx.x) * (splits - 1) * kGroupThreads * 16);
}

// A warpgroup's sums to all blocks, its own included. sums, barrier: shared addresses, the same in every block.
template <int TOKENS>
__device__ __forceinline__ void send_sums(const float (&sum)[TOKENS / 2], int tokens, uint32_t sums, uint32_t barrier) {
  const int splits = gridDim.x, lane = threadIdx.x % 32;
  sums += blockIdx.x * kSumBytes + (threadIdx.x / 32 * 32 + lane % 4 * 8 + lane / 4) * 16;
  int block = 0;
#pragma unroll
  for (int i = 0; i < TOKENS / 8; ++i) {
    if (8 * i < tokens) {
      if (block == (int)blockIdx.x) {
        shared_store(sums, sum + 4 * i);
      } else {
        send_to_block(address_in_block(sums, block), sum + 4 * i, address_in_block(barrier, block));
      }
    }
    if (++block == splits) block = 0, sums += splits * kSumBytes;
  }
}

// Adds up what has come, in the order of the columns, and stores it. A warp stores 32 rows of a token together:
// neighbours in packed order lie close in W. place: the 64 rows of this warpgroup.
template <class T>
__device__ __forceinline__ void collect_sums(const product &q, const tile_place &place, uint32_t sums,
                                             uint32_t barrier) {
  const int splits = gridDim.x, group = threadIdx.x / kGroupThreads, warp = threadIdx.x % kGroupThreads / 32;
  const int row = warp % 2 * 32 + threadIdx.x % 32, packed_row = place.first_row + row;
  const int pair = warp / 2 * 2;  // of tokens, and the next one
  const bool exists = packed_row <= place.last_row;
  const int stored_row = __ldg(q.packed.row_order + min(packed_row, place.last_row));
  const float bias = q.bias ? to_float(static_cast<const T *>(q.bias)[stored_row]) : 0.f;
  T *out = static_cast<T *>(q.out) + stored_row;
  sums += (group * kGroupThreads + row / 16 * 32 + pair * 8 + row % 8) * 16 + row % 16 / 8 * 8;
  named_barrier(1 + group, kGroupThreads);  // this block's own sums
  barrier_wait_in_cluster(barrier, 0);      // the others'
#pragma unroll 2
  for (int eight = blockIdx.x; 8 * eight < q.tokens; eight += splits) {
    uint32_t part[kMaxSplits][2][2];
#pragma unroll
    for (int s = 0; s < kMaxSplits; ++s) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        part[s][p][0] = part[s][p][1] = 0;
        if (s < splits) shared_load(sums + s * kSumBytes + p * 128, part[s][p]);
      }
    }
    sums += splits * kSumBytes;
#pragma unroll
    for (int p = 0; p < 2; ++p) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float total = 0.f;
#pragma unroll
        for (int s = 0; s < kMaxSplits; ++s) total += __uint_as_float(part[s][p][i]);
        const int token = 8 * eight + 2 * (pair + p) + i;
        store_if<T>(token < q.tokens && exists, out + (size_t)token * q.layout.rows(), total + bias);
      }
    }
  }
}

}  // namespace lowra
