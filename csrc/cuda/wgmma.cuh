// Hopper's asynchronous matrix product of a warpgroup (wgmma, sm_90a) and the barriers in shared memory that feed it.
#pragma once

#include "common.cuh"

namespace lowra {

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return (uint32_t)__cvta_generic_to_shared(pointer);
}

// Barrier `number` (0 is __syncthreads') of so many threads of a block.
__device__ __forceinline__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// So many arrivals at once.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Arrivals of a warp at a barrier. One lane's are enough after __syncwarp; but compute-sanitizer's racecheck follows a
// barrier only for the threads that arrive themselves, so in a build for it (cmake -DLOWRA_RACECHECK=ON) all lanes do.
#ifdef LOWRA_RACECHECK
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
// All lanes must be here.
__device__ __forceinline__ void barrier_arrive_as_warp(uint32_t barrier) {
  if (kWarpArrivals > 1 || threadIdx.x % 32 == 0) barrier_arrive(barrier);
}
// At an address of the cluster.
__device__ __forceinline__ void barrier_arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and lets the phase wait for so many bytes of copies.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// After barriers were made: other blocks of the cluster may use them once they have met at its barrier.
__device__ __forceinline__ void fence_barriers_for_cluster() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Returns once the phase of this parity is complete.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The same, for what other blocks of the cluster have sent.
__device__ __forceinline__ void barrier_wait_in_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Place in a ring of STAGES stages, each with a pair of barriers.
template <int STAGES>
struct ring_place {
  int stage = 0;
  uint32_t parity = 0;
  // One step. advance(1) does the same with other instructions than those product_wgmma was measured with.
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  // steps: at most STAGES.
  __device__ __forceinline__ void advance(int steps) {
    stage += steps;
    if (stage >= STAGES) stage -= STAGES, parity ^= 1;
  }
};

__device__ __forceinline__ void shared_store(uint32_t at, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
}
__device__ __forceinline__ void shared_store(uint32_t at, const uint32_t *four) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(four[0]), "r"(four[1]), "r"(four[2]), "r"(four[3])
               : "memory");
}
__device__ __forceinline__ void shared_store(uint32_t at, const float *four) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(at), "f"(four[0]), "f"(four[1]), "f"(four[2]), "f"(four[3])
               : "memory");
}
__device__ __forceinline__ uint32_t shared_load(uint32_t at) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
  return value;
}
__device__ __forceinline__ void shared_load(uint32_t at, uint32_t (&words)[2]) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(at) : "memory");
}
__device__ __forceinline__ void shared_load(uint32_t at, uint32_t (&words)[4]) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(at)
               : "memory");
}
// Returns what was there before. What this thread wrote before, threads that add later see.
__device__ __forceinline__ uint32_t shared_add(uint32_t at, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.cta.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(at), "r"(value) : "memory");
  return before;
}

// The copy engine fetches a box of `map` at (column, row) to `target`; the bytes count at `barrier`.
__device__ __forceinline__ void load_tile(uint32_t target, const void *map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          target),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// The same in this block, of rank `rank` in its cluster, and in the other one of its pair.
__device__ __forceinline__ void load_tile_for_pair(uint32_t target, const void *map, int column, int row,
                                                   uint32_t barrier, int rank) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], "
      "[%4], %5;" ::"r"(target),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"((uint16_t)(3 << (rank & ~1)))
      : "memory");
}
// The copy engine copies `bytes` of this block to another one's `target`; they count at that one's `barrier`. Both are
// addresses for the whole cluster.
__device__ __forceinline__ void copy_to_block(uint32_t target, uint32_t source, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
      "r"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// Ordinary stores to shared memory, of this thread or known to it through a barrier, become visible to the tensor cores
// and the copy engine.
__device__ __forceinline__ void fence_stores_for_tensor_cores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The barrier of a cluster, in two halves; memory accesses before the one are visible after the other.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Address, for the whole cluster, of what lies at a shared address in block `rank`.
__device__ __forceinline__ uint32_t address_in_block(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ float4 load_from_cluster(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
// Sends four values to `target`; their bytes count at `barrier`, in the same block. Both are addresses for the cluster.
__device__ __forceinline__ void send_to_block(uint32_t target, const float *four, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(target),
      "f"(four[0]), "f"(four[1]), "f"(four[2]), "f"(four[3]), "r"(barrier)
      : "memory");
}

// REGISTERS: of each thread of the calling warpgroup from here on.
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Operand B: rows of 128 bytes (64 columns of one token), eight of them a block of 1024 bytes, 16-byte units of row r
// exchanged by exclusive-or with r % 8. The address is that of the first of 16 columns in row 0; blocks are
// 1024-aligned.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t address) {
  return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 16 | (address >> 4);
}

// Registers written by ordinary instructions are ready for the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// PENDING: youngest committed groups that may still be under way.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// sum[64 x TOKENS] += a[64 x 16] * b[16 x TOKENS]; fragments as in mma.m16n8k16, a warp of the group has 16 rows.
// T: float16 or bfloat16.
template <int TOKENS, class T>
struct wgmma;

#define LOWRA_SUMS4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define LOWRA_SUMS8(i) LOWRA_SUMS4(i), LOWRA_SUMS4(i + 4)
#define LOWRA_SUMS16(i) LOWRA_SUMS8(i), LOWRA_SUMS8(i + 8)
#define LOWRA_SUMS32(i) LOWRA_SUMS16(i), LOWRA_SUMS16(i + 16)
#define LOWRA_NAMES4 "%0,%1,%2,%3"
#define LOWRA_NAMES8 LOWRA_NAMES4 ",%4,%5,%6,%7"
#define LOWRA_NAMES16 LOWRA_NAMES8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LOWRA_NAMES32 LOWRA_NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
// NAMES, A, B: names of the operands, numbered in this order; the rest are the registers of the sums.
#define LOWRA_WGMMA(TOKENS, TYPE, PTX_TYPE, NAMES, A, B, ...)                                                       \
  template <>                                                                                                       \
  struct wgmma<TOKENS, TYPE> {                                                                                      \
    static __device__ __forceinline__ void add(float (&sum)[TOKENS / 2], uint32_t a0, uint32_t a1, uint32_t a2,     \
                                               uint32_t a3, uint64_t b) {                                           \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32." PTX_TYPE "." PTX_TYPE " {" NAMES "}, {" A \
                   "}, " B ", 1, 1, 1, 0;"                                                                          \
                   : __VA_ARGS__                                                                                    \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                                                   \
    }                                                                                                               \
  };
#define LOWRA_WGMMA_TYPES(TOKENS, NAMES, A, B, ...)           \
  LOWRA_WGMMA(TOKENS, bf16, "bf16", NAMES, A, B, __VA_ARGS__) \
  LOWRA_WGMMA(TOKENS, fp16, "f16", NAMES, A, B, __VA_ARGS__)
LOWRA_WGMMA_TYPES(8, LOWRA_NAMES4, "%4,%5,%6,%7", "%8", LOWRA_SUMS4(0))
LOWRA_WGMMA_TYPES(16, LOWRA_NAMES8, "%8,%9,%10,%11", "%12", LOWRA_SUMS8(0))
LOWRA_WGMMA_TYPES(32, LOWRA_NAMES16, "%16,%17,%18,%19", "%20", LOWRA_SUMS16(0))
LOWRA_WGMMA_TYPES(64, LOWRA_NAMES32, "%32,%33,%34,%35", "%36", LOWRA_SUMS32(0))
#undef LOWRA_WGMMA_TYPES
#undef LOWRA_WGMMA

// sum[64 x ROWS] += a[64 x 16] * b[16 x ROWS], both in shared memory.
template <int ROWS, class T>
struct wgmma_shared;

#define LOWRA_NAMES48 LOWRA_NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define LOWRA_NAMES64 LOWRA_NAMES48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LOWRA_NAMES80 LOWRA_NAMES64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define LOWRA_NAMES88 LOWRA_NAMES80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define LOWRA_WGMMA(ROWS, TYPE, PTX_TYPE, NAMES, A, B, ...)                                                      \
  template <>                                                                                                    \
  struct wgmma_shared<ROWS, TYPE> {                                                                              \
    static __device__ __forceinline__ void add(float (&sum)[ROWS / 2], uint64_t a, uint64_t b) {                 \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #ROWS "k16.f32." PTX_TYPE "." PTX_TYPE " {" NAMES "}, " A \
                   ", " B ", 1, 1, 1, 0, 0;"                                                                     \
                   : __VA_ARGS__                                                                                 \
                   : "l"(a), "l"(b));                                                                            \
    }                                                                                                            \
  };
#define LOWRA_WGMMA_TYPES(ROWS, NAMES, A, B, ...)           \
  LOWRA_WGMMA(ROWS, bf16, "bf16", NAMES, A, B, __VA_ARGS__) \
  LOWRA_WGMMA(ROWS, fp16, "f16", NAMES, A, B, __VA_ARGS__)
LOWRA_WGMMA_TYPES(64, LOWRA_NAMES32, "%32", "%33", LOWRA_SUMS32(0))
LOWRA_WGMMA_TYPES(96, LOWRA_NAMES48, "%48", "%49", LOWRA_SUMS32(0), LOWRA_SUMS16(32))
LOWRA_WGMMA_TYPES(128, LOWRA_NAMES64, "%64", "%65", LOWRA_SUMS32(0), LOWRA_SUMS32(32))
LOWRA_WGMMA_TYPES(160, LOWRA_NAMES80, "%80", "%81", LOWRA_SUMS32(0), LOWRA_SUMS32(32), LOWRA_SUMS16(64))
LOWRA_WGMMA_TYPES(176, LOWRA_NAMES88, "%88", "%89", LOWRA_SUMS32(0), LOWRA_SUMS32(32), LOWRA_SUMS16(64),
                  LOWRA_SUMS8(80))
#undef LOWRA_WGMMA_TYPES
#undef LOWRA_WGMMA
#undef LOWRA_NAMES88
#undef LOWRA_NAMES80
#undef LOWRA_NAMES64
#undef LOWRA_NAMES48
#undef LOWRA_NAMES32
#undef LOWRA_NAMES16
#undef LOWRA_NAMES8
#undef LOWRA_NAMES4
#undef LOWRA_SUMS32
#undef LOWRA_SUMS16
#undef LOWRA_SUMS8
#undef LOWRA_SUMS4

}  // namespace lowra
