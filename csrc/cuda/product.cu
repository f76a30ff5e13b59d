// Checks the arguments of a fused product and picks its kernel.
#include "product.cuh"

#include <cstdlib>
#include <cstring>

namespace lowra {
namespace {

constexpr int kFew = 64;  // tokens that need no product_many

// Up to how many tokens product_small is the quickest (docs/lab/kernels/product_small.md). Rows of 4 bits cost it more
// than others, and on Hopper product_wgmma is quicker from 5 tokens on unless it needs more than the chip holds at
// once.
int tokens_for_small(const lowra_shape &s, const device_limits &limits) {
  const bool mostly4 = 2 * s.rows4 > row_count(s), large = row_count(s) * s.in_features > 50'000'000;
  return mostly4 || (limits.hopper && !large) ? 4 : 8;
}

// The same of a group, which saves launches. Adapters would be several more.
int tokens_for_group(const lowra_shape &s, const lowra_adapters *adapters) {
  return adapters || 2 * s.rows4 <= row_count(s) ? 8 : 4;
}

// The kernel that the environment variable LOWRA_PRODUCT names for every product, so that two can be compared at one
// shape. `none`: it is not set. Read at the first product; afterwards it costs a load and a branch.
enum class force { none, small, tensor, wgmma, many, dense, unknown };

force forced_kernel() {
  static const force named = [] {
    const char *name = std::getenv("LOWRA_PRODUCT");
    if (!name || !*name) return force::none;
    if (std::strcmp(name, "small") == 0) return force::small;
    if (std::strcmp(name, "tensor") == 0) return force::tensor;
    if (std::strcmp(name, "wgmma") == 0) return force::wgmma;
    if (std::strcmp(name, "many") == 0) return force::many;
    return std::strcmp(name, "dense") == 0 ? force::dense : force::unknown;
  }();
  return named;
}

// A kernel whatever is quicker. LOWRA_UNSUPPORTED where it does not cover the product.
int run_forced(const product &q, int32_t type, cudaStream_t stream) {
  switch (forced_kernel()) {
    case force::small: return q.tokens <= 8 ? product_small(q, type, stream) : LOWRA_UNSUPPORTED;
    case force::tensor: return q.tokens <= kFew ? product_tensor(q, type, stream) : LOWRA_UNSUPPORTED;
    case force::wgmma: return q.tokens <= kFew ? product_wgmma(q, type, stream) : LOWRA_UNSUPPORTED;
    case force::many: return product_many(q, type, stream);
    default: return LOWRA_UNSUPPORTED;
  }
}

constexpr int kMostRanks = 4096;  // of all adapters of a group: their A x lies in shared memory

int check_adapters(const lowra_adapters &adapters, int count) {
  if (const int status = first_of(check_memory(adapters.cells, 8), check_memory(adapters.launches, 4))) return status;
  if (adapters.gains) {
    const int status = first_of(check_memory(adapters.gains, 4), check_memory(adapters.fours, 4));
    if (status) return status;
  }
  int64_t ranks = 0;
  for (int i = 0; i < LOWRA_MOST_GROUPED; ++i) {
    const lowra_adapter &own = adapters.of[i];
    if (own.rank < 0 || (i >= count && own.rank > 0)) return LOWRA_BAD_SHAPE;
    if (own.rank == 0) continue;
    if (const int status = first_of(check_memory(own.a, 2), check_memory(own.b, 2))) return status;
    if (own.rank % 4 != 0 || !aligned(own.a, 8) || !aligned(own.b, 8)) return LOWRA_UNSUPPORTED;
    if (own.own < 0 || own.own > own.rank || own.own % 4 != 0) return LOWRA_BAD_SHAPE;
    if (!adapters.gains && own.own != own.rank) return LOWRA_BAD_SHAPE;
    ranks += own.rank;
  }
  return ranks > kMostRanks ? LOWRA_UNSUPPORTED : LOWRA_OK;
}

// Checks the arguments of a product with one weight and fills in what follows from them.
int prepare(const lowra_packed &packed, const void *x, int64_t tokens, int32_t type, product &q) {
  const lowra_shape &s = packed.shape;
  if (bad_cuda_shape(s) || tokens < 0) return LOWRA_BAD_SHAPE;
  if (type != LOWRA_FLOAT16 && type != LOWRA_BFLOAT16) return LOWRA_BAD_TYPE;
  if (const int status = check_packed(packed)) return status;
  if (const int status = check_memory(x, 2)) return status;
  const bool power_of_two = (s.group_size & (s.group_size - 1)) == 0;
  if (s.group_size < 32 || !power_of_two || s.in_features % 32 != 0 || !aligned16(x) || !aligned16(packed.levels) ||
      tokens > kMostCounted) {
    return LOWRA_UNSUPPORTED;
  }
  q.packed = packed;
  q.layout = layout_of(s);
  q.x = x;
  q.tokens = (int)tokens, q.in_features = (int)s.in_features;
  q.groups = (int)((s.in_features + s.group_size - 1) / s.group_size);
  q.group_shift = __builtin_ctz((unsigned)s.group_size);
  return LOWRA_OK;
}

}  // namespace
}  // namespace lowra

int32_t lowra_cuda_product_is_quicker(int64_t tokens, int64_t rows, int64_t in_features) {
  using namespace lowra;
  if (forced_kernel() != force::none) return forced_kernel() != force::dense;
  if (tokens <= kFew) return true;
  device_limits limits;
  if (limits_of_current_device(limits) != LOWRA_OK || !limits.hopper) return false;
  return product_many_is_quicker(tokens, rows, in_features, limits.l2_bytes);
}

int lowra_cuda_product(const lowra_packed *packed, const void *x, int64_t tokens, const void *bias, void *out,
                       int32_t type, void *stream) {
  using namespace lowra;
  if (!packed) return LOWRA_NULL_POINTER;
  const lowra_shape &s = packed->shape;
  if (!bad_cuda_shape(s) && (row_count(s) == 0 || tokens == 0)) return LOWRA_OK;
  if (forced_kernel() == force::dense) return LOWRA_UNSUPPORTED;
  const bool forced = forced_kernel() != force::none;
  product q = {};
  if (const int status = prepare(*packed, x, tokens, type, q)) {
    return status == LOWRA_UNSUPPORTED && forced ? LOWRA_NOT_FORCED : status;
  }
  if (const int status = first_of(check_memory(out, 2), bias ? check_memory(bias, 2) : LOWRA_OK)) return status;
  q.bias = bias, q.out = out;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (forced) {
    const int status = run_forced(q, type, on);
    return status == LOWRA_UNSUPPORTED || status == LOWRA_NO_CODE ? LOWRA_NOT_FORCED : status;
  }
  if (tokens > kFew) return product_many(q, type, on);
  device_limits limits;
  if (const int status = limits_of_current_device(limits)) return status;
  if (tokens <= tokens_for_small(s, limits)) {
    const int status = product_small(q, type, on);
    if (status != LOWRA_UNSUPPORTED) return status;  // x did not fit into shared memory
  }
  const int status = product_wgmma(q, type, on);
  return status == LOWRA_UNSUPPORTED ? product_tensor(q, type, on) : status;
}

int lowra_cuda_product_group(const lowra_packed *weights, int32_t count, const lowra_input *input, int64_t tokens,
                             const void *const *bias, const lowra_adapters *adapters, void *const *out, int32_t type,
                             void *stream) {
  using namespace lowra;
  if (!weights || !input || !bias || !out) return LOWRA_NULL_POINTER;
  if (count < 1 || count > LOWRA_MOST_GROUPED || input->kind < LOWRA_PLAIN || input->kind > LOWRA_GATED) {
    return LOWRA_BAD_SHAPE;
  }
  if (forced_kernel() != force::none) return LOWRA_UNSUPPORTED;
  const bool normed = input->kind == LOWRA_NORMED, is_gated = input->kind == LOWRA_GATED;
  if ((normed && (!input->weight || !input->sum)) || (is_gated && !input->second)) return LOWRA_NULL_POINTER;
  if (!aligned16(input->second) || !aligned16(input->weight) || !aligned16(input->sum)) return LOWRA_UNSUPPORTED;
  if (is_gated && input->activation != LOWRA_SILU && input->activation != LOWRA_GELU_TANH) return LOWRA_UNSUPPORTED;
  if (adapters) {
    if (const int status = check_adapters(*adapters, count)) return status;
  }
  product q = {};
  for (int i = 0; i < count; ++i) {
    const lowra_shape &s = weights[i].shape;
    if (const int status = prepare(weights[i], input->first, tokens, type, q)) return status;
    if (const int status = first_of(check_memory(out[i], 2), bias[i] ? check_memory(bias[i], 2) : LOWRA_OK)) {
      return status;
    }
    const bool alike = s.in_features == weights[0].shape.in_features;
    const bool default_form = weights[i].scale_type == LOWRA_UINT8 && s.group_size == 64 && q.groups % 2 == 0 &&
                              reinterpret_cast<uintptr_t>(weights[i].scales) % 2 == 0;
    if (!alike || !default_form || row_count(s) == 0 || tokens == 0 || tokens > tokens_for_group(s, adapters)) {
      return LOWRA_UNSUPPORTED;
    }
  }
  return product_small_group(weights, bias, out, count, *input, adapters, q, type, static_cast<cudaStream_t>(stream));
}
