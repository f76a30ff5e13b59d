// What lies between the products of a decoding step, and a dense head: checks and threads; decoding.inl has the work.

#include "lowra.h"
#include "checks.h"
#include "cpu/aligned.h"
#include "cpu/halves.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

#include <vector>

namespace {

constexpr int64_t kPerThread = 1 << 17;  // multiplications: some 10 us of a core

int bad_norm(const lowra_norm &norm, int64_t element) {
  if (norm.tokens < 0 || norm.features <= 0 || norm.tokens > INT64_MAX / 8 / norm.features) return LOWRA_BAD_SHAPE;
  if (norm.tokens == 0) return LOWRA_OK;
  if (norm.delta_weight && !norm.delta) return LOWRA_NULL_POINTER;
  return lowra::first_of(lowra::check_memory(norm.residual, element), lowra::check_memory(norm.weight, element),
                         lowra::check_memory(norm.out, element),
                         norm.delta ? lowra::check_memory(norm.delta, element) : LOWRA_OK,
                         norm.delta_weight ? lowra::check_memory(norm.delta_weight, element) : LOWRA_OK);
}

int bad_attention(const lowra_attention &a, int64_t element) {
  if (a.batch < 0 || a.heads <= 0 || a.kv_heads <= 0 || a.heads % a.kv_heads != 0 || a.dim <= 0 ||
      a.dim > LOWRA_CPU_MOST_DIM || a.rotary_dim < 0 || a.rotary_dim > a.dim || a.rotary_dim % 2 != 0 || a.slots <= 0 ||
      a.window < 0) {
    return LOWRA_BAD_SHAPE;
  }
  if (a.batch == 0) return LOWRA_OK;
  const auto check = [&](const void *pointer) { return lowra::check_memory(pointer, element); };
  if (const int status = lowra::first_of(
          check(a.query), check(a.key), check(a.value), check(a.keys), check(a.values), check(a.cosine), check(a.sine),
          check(a.out), a.query_norm ? check(a.query_norm) : LOWRA_OK, a.key_norm ? check(a.key_norm) : LOWRA_OK,
          lowra::check_memory(a.slot, 4), lowra::check_memory(a.first, 4))) {
    return status;
  }
  if (*a.slot < 0 || *a.slot >= a.slots) return LOWRA_BAD_SHAPE;
  for (int32_t i = 0; i < a.batch; ++i) {
    if (a.first[i] < 0 || a.first[i] > *a.slot) return LOWRA_BAD_SHAPE;
  }
  return LOWRA_OK;
}

}  // namespace

int lowra_cpu_add_norm(const lowra_norm *norm, int32_t type) {
  if (!norm) return LOWRA_NULL_POINTER;
  if (!lowra::is_float_type(type)) return LOWRA_BAD_TYPE;
  if (const int status = bad_norm(*norm, lowra::bytes_of(type))) return status;
  return without_exceptions([&] {
    std::vector<float> x(norm->features), delta(norm->features);
    for (int64_t t = 0; t < norm->tokens; ++t) kernels().add_norm(*norm, type, t, x.data(), delta.data());
    return LOWRA_OK;
  });
}

int lowra_cpu_attention(const lowra_attention *attention, int32_t type, int32_t threads) {
  if (!attention) return LOWRA_NULL_POINTER;
  const lowra_attention &a = *attention;
  if (!lowra::is_float_type(type)) return LOWRA_BAD_TYPE;
  if (const int status = bad_attention(a, lowra::bytes_of(type))) return status;
  return without_exceptions([&] {
    const int64_t heads = a.heads / a.kv_heads, seen = *a.slot + 1,
                  work = int64_t{a.batch} * a.heads * seen * a.dim * 2;
    for_each_piece(int64_t{a.batch} * a.kv_heads, 1, work, kPerThread, threads, [&] {
      return [&, scratch = std::vector<float>(heads * (seen + 2 * a.dim) + a.dim)](int64_t piece) mutable {
        kernels().attend(a, type, piece / a.kv_heads, piece % a.kv_heads, scratch.data());
      };
    });
    return LOWRA_OK;
  });
}

int lowra_cpu_dense_product(const void *weight, int64_t rows, int64_t in_features, const void *x, int64_t tokens,
                            void *out, int32_t type, int32_t threads) {
  if (lowra::bad_sizes(rows, in_features, 8) || tokens < 0 || tokens > LOWRA_CPU_MOST_TOKENS) return LOWRA_BAD_SHAPE;
  if (!lowra::is_float_type(type)) return LOWRA_BAD_TYPE;
  if (rows == 0 || tokens == 0) return LOWRA_OK;
  const size_t element = lowra::bytes_of(type);
  if (const int status = lowra::first_of(lowra::check_memory(weight, element), lowra::check_memory(x, element),
                                         lowra::check_memory(out, element))) {
    return status;
  }
  return without_exceptions([&] {
    aligned_floats wide(tokens * in_features);
    for (int64_t i = 0; i < tokens * in_features; ++i) wide.data()[i] = load_element(x, type, i);
    for_each_piece(rows, 64, rows * in_features * tokens, kPerThread, threads, [&] {
      return [&](int64_t row) {
        for (int64_t t = 0; t < tokens; ++t) {
          const float sum = kernels().dense_row(weight, type, row, wide.data() + t * in_features, in_features);
          store_element(sum, type, t * rows + row, out);
        }
      };
    });
    return LOWRA_OK;
  });
}
