// x in shared memory for a product with up to 8 tokens: made of what the product is given, scaled, and once more for
// rows of 1 bit (few_tokens.cuh).
#pragma once

#include "few_tokens.cuh"

namespace lowra {

// 8 values of one token for a thread: one unit of a chunk, see stage_x. raw: of what x is made of.
template <class S>
struct x_piece {
  int token, unit;
  uint2 raw[S::MADE ? 3 : 1][2];
};

__device__ __forceinline__ void load_two(const void *base, size_t index, uint2 (&out)[2]) {
  const uint16_t *source = static_cast<const uint16_t *>(base) + index;
  out[0] = __ldg(reinterpret_cast<const uint2 *>(source));
  out[1] = __ldg(reinterpret_cast<const uint2 *>(source + 16));
}

// number: of the piece, token by token. None past the last.
template <class S>
__device__ __forceinline__ x_piece<S> fetch_x(const typename S::PRODUCT &q, const division &d, int begin, int end,
                                              int number) {
  x_piece<S> piece = {};
  if (number >= d.slice / 8 * q.tokens) return piece;
  piece.token = S::TOKENS == 1 ? 0 : (int)d.per_token.divide(number);
  piece.unit = number - piece.token * (d.slice / 8);
  const int column = begin + piece.unit / 4 * 32 + piece.unit % 4 * 4;  // and 16 further on
  if (column < end) {
    const size_t at = (size_t)piece.token * q.in_features + column;
    load_two(q.x, at, piece.raw[0]);
    if constexpr (S::MADE) {
      if (q.input.second) load_two(q.input.second, at, piece.raw[1]);
      if (q.input.weight) load_two(q.input.weight, column, piece.raw[2]);
    }
  }
  return piece;
}

// The values of a piece. factor: of its token's norm.
template <class S>
__device__ __forceinline__ void values_of(const typename S::PRODUCT &q, const x_piece<S> &piece, float factor,
                                          float (&x)[8]) {
  using T = typename S::T;
  const T *first = reinterpret_cast<const T *>(piece.raw[0]);
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = to_float(first[k]);
  if constexpr (S::MADE) {
    const T *second = reinterpret_cast<const T *>(piece.raw[1]), *weight = reinterpret_cast<const T *>(piece.raw[2]);
    if (q.input.kind == LOWRA_NORMED) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const T sum = static_cast<T>(x[k] + to_float(second[k]));  // without a second part its zeros are added
        x[k] = to_float(weighted(to_float(sum) * factor, weight[k], q.input.one_plus));
      }
    } else if (q.input.kind == LOWRA_GATED) {
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] = to_float(gated(first[k], second[k], q.input.activation));
    }
  }
}

// The norms' factors of all tokens, in shared memory; the block that `stores` writes first + second. THREADS: of the
// block.
template <class S, int THREADS>
__device__ __forceinline__ void norm_factors(const typename S::PRODUCT &q, bool stores, float (&factors)[S::TOKENS]) {
  using T = typename S::T;
  __shared__ float of_warps[S::TOKENS][THREADS / 32];
  const int vectors = q.in_features / kVector;
#pragma unroll
  for (int token = 0; token < S::TOKENS; ++token) {
    float squares = 0.f;
    if (token < q.tokens) {
      for (int i = threadIdx.x; i < vectors; i += THREADS) {
        const size_t at = (size_t)token * vectors + i;
        vector8<T> sum = load8<T>(q.input.first, at);
        if (q.input.second) {
          const vector8<T> second = load8<T>(q.input.second, at);
#pragma unroll
          for (int k = 0; k < kVector; ++k) {
            sum.value[k] = static_cast<T>(to_float(sum.value[k]) + to_float(second.value[k]));
          }
        }
        if (stores) store8(q.input.sum, at, sum);
#pragma unroll
        for (int k = 0; k < kVector; ++k) squares += to_float(sum.value[k]) * to_float(sum.value[k]);
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, step);
    if (threadIdx.x % 32 == 0) of_warps[token][threadIdx.x / 32] = squares;
  }
  __syncthreads();
#pragma unroll
  for (int token = 0; token < S::TOKENS; ++token) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) sum += of_warps[token][i];
    factors[token] = rsqrtf(sum / q.in_features + q.input.epsilon);
  }
}

// x of a block's columns [begin, end) in shared memory: [chunk][token] units of 16 bytes, zeros from `end` on. Word j
// of a chunk's half holds columns j and j + 16 of its 32; unit 8 holds the sums of both halves, the power of two that
// was divided out, and the sum of both sums (the sums are divided as well). `folded`: column j is multiplied by fold(j
// % 8). plain, folded: null where no row of the block needs them; without `folded` there are no sums. next: piece
// threadIdx.x, fetched.
template <class S>
__device__ __forceinline__ void stage_x(const typename S::PRODUCT &q, const division &d, int begin, int end,
                                        int threads, const float (&factors)[S::TOKENS], x_piece<S> next, uint4 *plain,
                                        uint4 *folded) {
  const int count = d.slice / 8 * q.tokens;  // a multiple of 64, so a warp is never divided
  for (int number = threadIdx.x; number < count; number += threads) {
    const x_piece<S> now = next;
    next = fetch_x<S>(q, d, begin, end, number + threads);
    float factor_of_token = factors[0];
#pragma unroll
    for (int token = 1; token < S::TOKENS; ++token) {
      if (token == now.token) factor_of_token = factors[token];
    }
    float x[8], largest = 0.f;
    values_of<S>(q, now, factor_of_token, x);
#pragma unroll
    for (int k = 0; k < 8; ++k) largest = fmaxf(largest, fabsf(x[k]));
#pragma unroll
    for (int step = 1; step < 8; step <<= 1) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    // The largest comes to lie in [2^7, 2^8). An infinity or NaN stays one, and its neighbours do not matter then.
    const uint32_t exponent = max(__float_as_uint(largest) >> 23, 8u);
    const float factor = __uint_as_float((261u - exponent) << 23), power = __uint_as_float((exponent - 7u) << 23);
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] *= factor;
    const int at = now.unit / 8 * S::kStride + now.token * kChunkUnits, odd_part = now.unit % 2;
    alignas(16) __half2 both[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) both[k] = __floats2half2_rn(x[k], x[4 + k]);
    if (plain) {
      plain[at + now.unit % 8] = *reinterpret_cast<const uint4 *>(both);
      if (now.unit % 8 == 0) *reinterpret_cast<float4 *>(plain + at + 8) = make_float4(0.f, 0.f, power, 0.f);
    }
    if (folded) {
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < 8; ++k) sum += x[k];
#pragma unroll
      for (int step = 1; step < 4; step <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      const float other = __shfl_xor_sync(0xffffffffu, sum, 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        both[k] = __hmul2(both[k], odd_part ? __float2half2_rn(fold(4 + k)) : __float2half2_rn(fold(k)));
      }
      folded[at + now.unit % 8] = *reinterpret_cast<const uint4 *>(both);
      if (now.unit % 8 == 0) *reinterpret_cast<float4 *>(folded + at + 8) = make_float4(sum, other, power, sum + other);
    }
  }
}

}  // namespace lowra
