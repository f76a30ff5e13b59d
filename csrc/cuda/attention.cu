// Attention of one new token of each sequence over a cache: norm and rotary embedding of its query and key, both put in
// the cache, and the weighted sum of the values. Reference: decoding.py.
//
// A block takes kSlots slots (512, 256 or 128 by the width of a head) of one key-value head and all query heads that
// read it. Of a slot a team of LANES lanes loads 16 bytes each, keys and values alike, so both are asked for before the
// first is used. Blocks leave their sums, not yet divided, in the workspace, and the last one to finish combines them:
// one launch, however long the cache. The grid covers the cache as a whole, because a CUDA graph fixes it; blocks
// beyond the tokens there are end at once.
#include "decoding.cuh"

namespace lowra {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kEach = 8;  // slots of a team
// Heads whose sums of all warps lie in shared memory: wide ones take half of what Turing has.
__host__ __device__ constexpr int heads_at_once(int lanes, int code) { return lanes == 32 && code < kAmpere ? 2 : 4; }

// A head's query or key in shared memory, float32: normalised if wanted, then rotated. By one warp.
template <class T>
__device__ __forceinline__ void make_ready(const lowra_attention &a, const T *source, const T *norm, const T *cosine,
                                           const T *sine, float *values) {
  const int lane = threadIdx.x % 32, half = a.rotary_dim / 2;
  constexpr int kPairs = 4;  // of a lane, up to a rotary_dim of 256
  // Asked for before the values are waited for.
  float cosines[kPairs][2], sines[kPairs][2];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int i = lane + 32 * p;
    if (i >= half) continue;
    cosines[p][0] = to_float(cosine[i]), cosines[p][1] = to_float(cosine[i + half]);
    sines[p][0] = to_float(sine[i]), sines[p][1] = to_float(sine[i + half]);
  }
  float squares = 0.f;
  for (int i = lane; i < a.dim; i += 32) {
    values[i] = to_float(source[i]);
    squares += values[i] * values[i];
  }
  if (norm) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, step);
    const float factor = rsqrtf(squares / a.dim + a.epsilon);
    for (int i = lane; i < a.dim; i += 32) values[i] = to_float(weighted(values[i] * factor, norm[i], a.one_plus));
  }
  __syncwarp();
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int i = lane + 32 * p;
    if (i >= half) continue;
    const float low = values[i], high = values[i + half];
    // each product and the sum are rounded, as PyTorch's operations in T round them
    const float low_cos = to_float(static_cast<T>(low * cosines[p][0]));
    const float high_cos = to_float(static_cast<T>(high * cosines[p][1]));
    const float low_sin = to_float(static_cast<T>(low * sines[p][1]));
    const float high_sin = to_float(static_cast<T>(-high * sines[p][0]));
    values[i] = to_float(static_cast<T>(low_cos + high_sin));
    values[i + half] = to_float(static_cast<T>(high_cos + low_sin));
  }
  __syncwarp();
}

// By registers: an array that is written at a place known at run time would lie in memory.
__device__ __forceinline__ uint4 chosen(bool first, const uint4 &a, const uint4 &b) {
  return make_uint4(first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w);
}

// LANES: of a team, the power of two from dim / 8 on. HEADS: query heads of a key-value head, rounded up.
template <class T, int LANES, int HEADS>
__global__ void __launch_bounds__(kThreads) attention_kernel(const __grid_constant__ lowra_attention a) {
  constexpr int kTeams = kThreads / LANES, kSlots = kEach * kTeams, kHeadsAtOnce = heads_at_once(LANES, kCode);
  extern __shared__ float shared[];
  __shared__ float scores[HEADS][kSlots], largest[HEADS], sums[HEADS];
  __shared__ bool is_last;
  const int heads = a.heads / a.kv_heads, kv_head = blockIdx.y, sequence = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % LANES, team = threadIdx.x / LANES;
  // Where the sequences stand and the cache are at rest: the launch just before makes the query, and no other is under
  // way.
  const int slot = *a.slot, first = a.first[sequence];
  const int oldest = a.window > 0 ? max(first, slot - a.window + 1) : first;
  const int begin = max(oldest, (int)blockIdx.x * kSlots), end = min(slot + 1, (int)(blockIdx.x + 1) * kSlots);
  const int before = blockIdx.x - oldest / kSlots, blocks = slot / kSlots - oldest / kSlots + 1;
  const size_t head_of_cache = (size_t)sequence * a.kv_heads + kv_head;
  T *keys = static_cast<T *>(a.keys) + head_of_cache * a.slots * a.dim;
  T *values = static_cast<T *>(a.values) + head_of_cache * a.slots * a.dim;
  const T *cosine = static_cast<const T *>(a.cosine) + (size_t)(slot - first) * a.rotary_dim;
  const T *sine = static_cast<const T *>(a.sine) + (size_t)(slot - first) * a.rotary_dim;
  const size_t of_token = head_of_cache * a.dim;
  const int column = lane * kVector;
  const bool inside = column < a.dim;
  // Asked for first: what follows up to the scores takes about as long as they need. The new token's come later.
  uint4 key[kEach], value[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = blockIdx.x * kSlots + team + i * kTeams;
    const bool wanted = inside && at >= begin && at < end && at != slot;
    key[i] = wanted ? *reinterpret_cast<const uint4 *>(keys + (size_t)at * a.dim + column) : make_uint4(0, 0, 0, 0);
    value[i] = wanted ? *reinterpret_cast<const uint4 *>(values + (size_t)at * a.dim + column) : make_uint4(0, 0, 0, 0);
  }
  wait_for_earlier_kernels();
  let_later_kernels_start();
  if (begin >= end) return;
  float *queries = shared, *new_key = shared + HEADS * a.dim;
  for (int h = warp; h < heads; h += kWarps) {
    const T *query = static_cast<const T *>(a.query) + ((size_t)sequence * a.heads + kv_head * heads + h) * a.dim;
    make_ready(a, query, static_cast<const T *>(a.query_norm), cosine, sine, queries + h * a.dim);
  }
  const bool has_new = end == slot + 1;
  if (has_new && warp == kWarps - 1) {
    make_ready(a, static_cast<const T *>(a.key) + of_token, static_cast<const T *>(a.key_norm), cosine, sine, new_key);
  }
  __syncthreads();
  if (has_new && inside && slot % kSlots % kTeams == team) {
    vector8<T> new_keys, new_values = load8<T>(static_cast<const T *>(a.value) + of_token, lane);
#pragma unroll
    for (int k = 0; k < kVector; ++k) new_keys.value[k] = static_cast<T>(new_key[column + k]);
    store8(keys + (size_t)slot * a.dim, lane, new_keys);
    store8(values + (size_t)slot * a.dim, lane, new_values);
    const uint4 own_key = *reinterpret_cast<const uint4 *>(new_keys.value);
    const uint4 own_value = *reinterpret_cast<const uint4 *>(new_values.value);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool own = i == slot % kSlots / kTeams;
      key[i] = chosen(own, own_key, key[i]);
      value[i] = chosen(own, own_value, value[i]);
    }
  }
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    if (h >= heads) break;
    float query[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) query[k] = inside ? queries[h * a.dim + column + k] : 0.f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const T *part = reinterpret_cast<const T *>(&key[i]);
      float dot = 0.f;
#pragma unroll
      for (int k = 0; k < kVector; ++k) dot += query[k] * to_float(part[k]);
#pragma unroll
      for (int step = LANES / 2; step > 0; step >>= 1) dot += __shfl_xor_sync(0xffffffffu, dot, step);
      if (lane == 0) {
        const int at = team + i * kTeams, absolute = blockIdx.x * kSlots + at;
        float score = dot * a.scaling;
        if (a.softcap > 0.f) score = a.softcap * tanhf(score / a.softcap);
        scores[h][at] = absolute >= begin && absolute < end ? score : -INFINITY;
      }
    }
  }
  __syncthreads();
  for (int h = warp; h < heads; h += kWarps) {
    float most = -INFINITY;
    for (int i = threadIdx.x % 32; i < kSlots; i += 32) most = fmaxf(most, scores[h][i]);
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    float sum = 0.f;
    for (int i = threadIdx.x % 32; i < kSlots; i += 32) {
      scores[h][i] = expf(scores[h][i] - most);
      sum += scores[h][i];
    }
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) largest[h] = most, sums[h] = sum;
  }
  T *out = static_cast<T *>(a.out) + ((size_t)sequence * a.heads + kv_head * heads) * a.dim;
  const int count = heads * a.dim;
  // Of a block in the workspace: its sums, then the largest score and the sum of weights of each head.
  const size_t stride = count + 2 * heads;
  const int most_blocks = (a.slots + kSlots - 1) / kSlots;
  float *parts = a.workspace + head_of_cache * most_blocks * stride;
  float *of_warps = shared;  // [warp][head][dim], where the queries were
#pragma unroll
  for (int from = 0; from < HEADS; from += kHeadsAtOnce) {
    if (from >= heads) break;
    __syncthreads();
#pragma unroll
    for (int h = from; h < from + kHeadsAtOnce && h < HEADS; ++h) {
      if (h >= heads) break;
      float total[kVector] = {};
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float share = scores[h][team + i * kTeams];
        const T *part = reinterpret_cast<const T *>(&value[i]);
#pragma unroll
        for (int k = 0; k < kVector; ++k) total[k] += share * to_float(part[k]);
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
#pragma unroll
        for (int step = LANES; step < 32; step <<= 1) total[k] += __shfl_xor_sync(0xffffffffu, total[k], step);
        if (inside && threadIdx.x % 32 < LANES) {
          of_warps[(warp * kHeadsAtOnce + h - from) * a.dim + column + k] = total[k];
        }
      }
    }
    __syncthreads();
    const int here = min(kHeadsAtOnce, heads - from) * a.dim;
    for (int i = threadIdx.x; i < here; i += kThreads) {
      float total = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += of_warps[w * kHeadsAtOnce * a.dim + i];
      const int at = from * a.dim + i;
      if (blocks == 1) {
        out[at] = static_cast<T>(total / sums[at / a.dim]);
      } else {
        parts[before * stride + at] = total;
      }
    }
  }
  if (blocks == 1) return;
  if (threadIdx.x < heads) {
    parts[before * stride + count + threadIdx.x] = largest[threadIdx.x];
    parts[before * stride + count + heads + threadIdx.x] = sums[threadIdx.x];
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int finished = atomicAdd(a.finished + head_of_cache, 1);
    is_last = finished == blocks - 1;
    if (is_last) a.finished[head_of_cache] = 0;  // for the next launch
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int h = i / a.dim;
    float most = -INFINITY, weight = 0.f, total = 0.f;
    for (int b = 0; b < blocks; ++b) most = fmaxf(most, __ldcg(parts + b * stride + count + h));
    for (int b = 0; b < blocks; ++b) {
      const float factor = expf(__ldcg(parts + b * stride + count + h) - most);
      weight += factor * __ldcg(parts + b * stride + count + heads + h);
      total += factor * __ldcg(parts + b * stride + i);
    }
    out[i] = static_cast<T>(total / weight);
  }
}

template <class T, int LANES, int HEADS>
int launch(const lowra_attention &a, cudaStream_t stream) {
  constexpr int kSlots = kEach * kThreads / LANES;
  device_limits limits;
  if (const int status = limits_of_current_device(limits)) return status;
  // Queries and key; sums of the warps.
  const int ready = (HEADS + 1) * a.dim, summed = kWarps * heads_at_once(LANES, limits.code) * a.dim;
  const size_t bytes = sizeof(float) * (ready > summed ? ready : summed);
  const dim3 grid((a.slots + kSlots - 1) / kSlots, a.kv_heads, a.batch);
  return launch_early(attention_kernel<T, LANES, HEADS>, grid, dim3(kThreads), bytes, 1, stream, a);
}

template <class T, int LANES>
int choose_heads(const lowra_attention &a, cudaStream_t stream) {
  const int heads = a.heads / a.kv_heads;
  if (heads == 1) return launch<T, LANES, 1>(a, stream);
  if (heads <= 4) return launch<T, LANES, 4>(a, stream);
  if (heads <= 8) return launch<T, LANES, 8>(a, stream);
  return LOWRA_UNSUPPORTED;
}

template <class T>
int choose_lanes(const lowra_attention &a, cudaStream_t stream) {
  if (a.dim <= 64) return choose_heads<T, 8>(a, stream);
  if (a.dim <= 128) return choose_heads<T, 16>(a, stream);
  return choose_heads<T, 32>(a, stream);
}

}  // namespace
}  // namespace lowra

int lowra_cuda_attention(const lowra_attention *attention, int32_t type, void *stream) {
  using namespace lowra;
  if (!attention) return LOWRA_NULL_POINTER;
  const lowra_attention &a = *attention;
  if (a.batch < 0 || a.heads <= 0 || a.kv_heads <= 0 || a.heads % a.kv_heads != 0 || a.dim <= 0 || a.slots <= 0 ||
      a.rotary_dim < 0 || a.rotary_dim > a.dim || a.rotary_dim % 2 != 0) {
    return LOWRA_BAD_SHAPE;
  }
  if (type != LOWRA_FLOAT16 && type != LOWRA_BFLOAT16) return LOWRA_BAD_TYPE;
  if (a.batch == 0) return LOWRA_OK;
  if (const int status = first_of(check_memory(a.query, 2), check_memory(a.key, 2), check_memory(a.value, 2),
                                  check_memory(a.keys, 2), check_memory(a.values, 2), check_memory(a.cosine, 2),
                                  check_memory(a.sine, 2), check_memory(a.slot, 4), check_memory(a.first, 4),
                                  check_memory(a.workspace, 4), check_memory(a.finished, 4), check_memory(a.out, 2))) {
    return status;
  }
  if (a.dim % kVector != 0 || a.dim > 256 || a.batch > 65535 || a.kv_heads > 65535 || !aligned16(a.keys) ||
      !aligned16(a.values) || !aligned16(a.value)) {
    return LOWRA_UNSUPPORTED;
  }
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return type == LOWRA_FLOAT16 ? choose_lanes<fp16>(a, on) : choose_lanes<bf16>(a, on);
}
