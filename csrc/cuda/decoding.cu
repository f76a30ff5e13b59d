// What lies between the products of a decoding step: residual and norm, and the gate of the feed-forward part.
// References: decoding.py. Values are rounded where Transformers' modules round them.
#include "decoding.cuh"

namespace lowra {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// The sum over a block, in every thread. shared: kWarps values, free again after the next barrier.
__device__ __forceinline__ float sum_of_block(float value, float *shared) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += shared[i];
  return sum;
}

// One block a token. VECTORS: of a thread.
template <class T, int VECTORS>
__global__ void __launch_bounds__(kThreads) add_norm_kernel(const __grid_constant__ lowra_norm n) {
  __shared__ float of_delta[kWarps], of_sum[kWarps];
  const int vectors = n.features / kVector;
  const size_t row = (size_t)blockIdx.x * vectors;
  wait_for_earlier_kernels();
  let_later_kernels_start();
  vector8<T> residual[VECTORS], delta[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int at = threadIdx.x + i * kThreads;
    if (at >= vectors) continue;
    residual[i] = load8<T>(n.residual, row + at);
    if (n.delta) delta[i] = load8<T>(n.delta, row + at);
  }
  if (n.delta && n.delta_weight) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      if (threadIdx.x + i * kThreads >= vectors) continue;
#pragma unroll
      for (int k = 0; k < kVector; ++k) squares += to_float(delta[i].value[k]) * to_float(delta[i].value[k]);
    }
    const float factor = rsqrtf(sum_of_block(squares, of_delta) / n.features + n.epsilon);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int at = threadIdx.x + i * kThreads;
      if (at >= vectors) continue;
      const vector8<T> weight = load8<T>(n.delta_weight, at);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        delta[i].value[k] = weighted(to_float(delta[i].value[k]) * factor, weight.value[k], n.one_plus);
      }
    }
  }
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int at = threadIdx.x + i * kThreads;
    if (at >= vectors) continue;
    if (n.delta) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        residual[i].value[k] = static_cast<T>(to_float(residual[i].value[k]) + to_float(delta[i].value[k]));
      }
      store8(n.residual, row + at, residual[i]);
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) squares += to_float(residual[i].value[k]) * to_float(residual[i].value[k]);
  }
  const float factor = rsqrtf(sum_of_block(squares, of_sum) / n.features + n.epsilon);
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int at = threadIdx.x + i * kThreads;
    if (at >= vectors) continue;
    const vector8<T> weight = load8<T>(n.weight, at);
    vector8<T> out;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      out.value[k] = weighted(to_float(residual[i].value[k]) * factor, weight.value[k], n.one_plus);
    }
    store8(n.out, row + at, out);
  }
}

template <class T>
int launch_norm(const lowra_norm &n, cudaStream_t stream) {
  const int vectors = (n.features / kVector + kThreads - 1) / kThreads;
  const dim3 grid((unsigned)n.tokens), block(kThreads);
  if (vectors <= 1) return launch_early(add_norm_kernel<T, 1>, grid, block, 0, 1, stream, n);
  if (vectors <= 2) return launch_early(add_norm_kernel<T, 2>, grid, block, 0, 1, stream, n);
  if (vectors <= 4) return launch_early(add_norm_kernel<T, 4>, grid, block, 0, 1, stream, n);
  return LOWRA_UNSUPPORTED;
}

constexpr int kGateThreads = 128;

template <class T>
__global__ void __launch_bounds__(kGateThreads)
    gate_kernel(const void *gate, const void *up, void *out, int64_t vectors, int32_t activation) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int64_t at = (int64_t)blockIdx.x * kGateThreads + threadIdx.x;
  if (at >= vectors) return;
  const vector8<T> g = load8<T>(gate, at), u = load8<T>(up, at);
  vector8<T> product;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    product.value[k] = gated(g.value[k], u.value[k], activation);
  }
  store8(out, at, product);
}

}  // namespace
}  // namespace lowra

int lowra_cuda_add_norm(const lowra_norm *norm, int32_t type, void *stream) {
  using namespace lowra;
  if (!norm) return LOWRA_NULL_POINTER;
  const lowra_norm &n = *norm;
  if (n.tokens < 0 || n.tokens > INT32_MAX || n.features <= 0) return LOWRA_BAD_SHAPE;
  if (type != LOWRA_FLOAT16 && type != LOWRA_BFLOAT16) return LOWRA_BAD_TYPE;
  if (n.tokens == 0) return LOWRA_OK;
  if (!n.residual || !n.weight || !n.out) return LOWRA_NULL_POINTER;
  if (n.features % kVector != 0 || !aligned16(n.residual) || !aligned16(n.delta) || !aligned16(n.delta_weight) ||
      !aligned16(n.weight) || !aligned16(n.out)) {
    return LOWRA_UNSUPPORTED;
  }
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return type == LOWRA_FLOAT16 ? launch_norm<fp16>(n, on) : launch_norm<bf16>(n, on);
}

int lowra_cuda_gate(const void *gate, const void *up, void *out, int64_t count, int32_t activation, int32_t type,
                    void *stream) {
  using namespace lowra;
  if (count < 0 || count / (kGateThreads * kVector) >= INT32_MAX) return LOWRA_BAD_SHAPE;
  if (type != LOWRA_FLOAT16 && type != LOWRA_BFLOAT16) return LOWRA_BAD_TYPE;
  if (activation != LOWRA_SILU && activation != LOWRA_GELU_TANH) return LOWRA_UNSUPPORTED;
  if (count == 0) return LOWRA_OK;
  if (!gate || !up || !out) return LOWRA_NULL_POINTER;
  if (count % kVector != 0 || !aligned16(gate) || !aligned16(up) || !aligned16(out)) return LOWRA_UNSUPPORTED;
  const int64_t vectors = count / kVector;
  const dim3 grid((unsigned)((vectors + kGateThreads - 1) / kGateThreads)), block(kGateThreads);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (type == LOWRA_FLOAT16)
    return launch_early(gate_kernel<fp16>, grid, block, 0, 1, on, gate, up, out, vectors, activation);
  return launch_early(gate_kernel<bf16>, grid, block, 0, 1, on, gate, up, out, vectors, activation);
}
