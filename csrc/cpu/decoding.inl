// What lies between the products of a decoding step, and a dense head; included after rows.inl by the file of each
// instruction set. Plain loops that compilers vectorise: sums of products are kept in kSums parts, whose number and
// order are the same everywhere. Values are rounded to their type where the modules of Transformers round them
// (bitsandbytes/backends/lowra/decoding.py).

#include <math.h>

namespace {

enum { kSums = 16, kMostDim = LOWRA_CPU_MOST_DIM };

// `count` values of a type from `first` on.
template <int32_t TYPE>
inline __attribute__((always_inline)) void widen(const void *from, int64_t first, int64_t count, float *to) {
#if defined(__F16C__)
  if (TYPE == LOWRA_FLOAT16) {
    const uint16_t *own = (const uint16_t *)from + first;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(own + i))));
    for (; i < count; ++i) to[i] = half_to_float(own[i]);
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) to[i] = load_element(from, TYPE, first + i);
}

// Rounded to a type.
template <int32_t TYPE>
float as(float value) {
  if (TYPE == LOWRA_FLOAT32) return value;
  if (TYPE == LOWRA_FLOAT16) return half_to_float((uint16_t)float_to_half(value));
  const uint32_t bits = float_to_bfloat(value) << 16;
  memcpy(&value, &bits, 4);
  return value;
}

inline __attribute__((always_inline)) float sum_of_products(const float *a, const float *b, int64_t count) {
  float sums[kSums] = {0};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int j = 0; j < kSums; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (int j = 0; i < count; ++i, ++j) sums[j] += a[i] * b[i];
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

// x [count] over its root mean square, times weights; x is of a type and becomes so again.
template <int32_t TYPE>
void normalize(float *x, int64_t count, const void *weight, float epsilon, bool one_plus) {
  const float factor = 1.0f / sqrtf(sum_of_products(x, x, count) / (float)count + epsilon);
  if (one_plus) {
    for (int64_t i = 0; i < count; ++i) x[i] = as<TYPE>(x[i] * factor * (1.0f + load_element(weight, TYPE, i)));
  } else {
    for (int64_t i = 0; i < count; ++i) x[i] = as<TYPE>(load_element(weight, TYPE, i) * as<TYPE>(x[i] * factor));
  }
}

template <int32_t TYPE>
void add_norm_as(const lowra_norm &norm, int64_t token, float *x, float *delta) {
  const int64_t first = token * norm.features, count = norm.features;
  widen<TYPE>(norm.residual, first, count, x);
  if (norm.delta) {
    widen<TYPE>(norm.delta, first, count, delta);
    if (norm.delta_weight) normalize<TYPE>(delta, count, norm.delta_weight, norm.epsilon, norm.one_plus);
    for (int64_t i = 0; i < count; ++i) x[i] = as<TYPE>(x[i] + delta[i]);
    for (int64_t i = 0; i < count; ++i) store_element(x[i], TYPE, first + i, norm.residual);
  }
  normalize<TYPE>(x, count, norm.weight, norm.epsilon, norm.one_plus);
  for (int64_t i = 0; i < count; ++i) store_element(x[i], TYPE, first + i, norm.out);
}

// One token of lowra_cpu_add_norm. x, delta: [features], scratch.
void add_norm(const lowra_norm &norm, int32_t type, int64_t token, float *x, float *delta) {
  if (type == LOWRA_FLOAT32) return add_norm_as<LOWRA_FLOAT32>(norm, token, x, delta);
  if (type == LOWRA_FLOAT16) return add_norm_as<LOWRA_FLOAT16>(norm, token, x, delta);
  add_norm_as<LOWRA_BFLOAT16>(norm, token, x, delta);
}

// Rotary embedding of the first columns of a head.
template <int32_t TYPE>
void rotate(float *x, const lowra_attention &a, int64_t position) {
  float turned[kMostDim], cosine[kMostDim], sine[kMostDim];
  const int64_t width = a.rotary_dim, half = width / 2;
  widen<TYPE>(a.cosine, position * width, width, cosine);
  widen<TYPE>(a.sine, position * width, width, sine);
  for (int64_t i = 0; i < half; ++i) turned[i] = as<TYPE>(x[i] * cosine[i]) + as<TYPE>(-x[i + half] * sine[i]);
  for (int64_t i = half; i < width; ++i) turned[i] = as<TYPE>(x[i] * cosine[i]) + as<TYPE>(x[i - half] * sine[i]);
  for (int64_t i = 0; i < width; ++i) x[i] = as<TYPE>(turned[i]);
}

// e^x for x <= 0, within 2e-7 of it; 0 below -87.
inline __attribute__((always_inline)) float exponential(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: with it added a float is an integer
  const float clamped = x < -87.0f ? -87.0f : x, shifted = clamped * 1.44269504f + magic;
  const float whole = shifted - magic, rest = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
  float power = 1.9875691500e-4f;
  power = power * rest + 1.3981999507e-3f;
  power = power * rest + 8.3334519073e-3f;
  power = power * rest + 4.1665795894e-2f;
  power = power * rest + 1.6666665459e-1f;
  power = power * rest + 5.0000001201e-1f;
  power = power * rest * rest + rest + 1.0f;
  const uint32_t bits = float_bits(power) + ((float_bits(shifted) - float_bits(magic)) << 23);
  float value;
  memcpy(&value, &bits, 4);
  return x < -87.0f ? 0.0f : value;
}

// One sequence and key-value head of lowra_cpu_attention. scratch: heads / kv_heads * (slots + 2 dim) + dim floats.
template <int32_t TYPE>
void attend_as(const lowra_attention &a, int64_t sequence, int64_t kv_head, float *scratch) {
  const int64_t dim = a.dim, heads = a.heads / a.kv_heads, slot = *a.slot, position = slot - a.first[sequence];
  const int64_t cache = (sequence * a.kv_heads + kv_head) * a.slots * dim;
  const int64_t from_window = a.window > 0 && slot - a.window + 1 > 0 ? slot - a.window + 1 : 0;
  const int64_t begin = a.first[sequence] > from_window ? a.first[sequence] : from_window, count = slot + 1 - begin;
  float *const wide = scratch, *const queries = wide + dim, *const sums = queries + heads * dim,
               *const scores = sums + heads * dim;

  widen<TYPE>(a.key, (sequence * a.kv_heads + kv_head) * dim, dim, wide);
  if (a.key_norm) normalize<TYPE>(wide, dim, a.key_norm, a.epsilon, a.one_plus);
  rotate<TYPE>(wide, a, position);
  for (int64_t i = 0; i < dim; ++i) store_element(wide[i], TYPE, cache + slot * dim + i, a.keys);
  const size_t element = TYPE == LOWRA_FLOAT32 ? 4 : 2, row = element * (size_t)dim;
  memcpy((char *)a.values + element * (cache + slot * dim),
         (const char *)a.value + row * (sequence * a.kv_heads + kv_head), row);
  for (int64_t head = 0; head < heads; ++head) {
    float *query = queries + head * dim;
    widen<TYPE>(a.query, (sequence * a.heads + kv_head * heads + head) * dim, dim, query);
    if (a.query_norm) normalize<TYPE>(query, dim, a.query_norm, a.epsilon, a.one_plus);
    rotate<TYPE>(query, a, position);
  }

  for (int64_t i = 0; i < count; ++i) {
    widen<TYPE>(a.keys, cache + (begin + i) * dim, dim, wide);
    for (int64_t head = 0; head < heads; ++head) {
      const float score = a.scaling * sum_of_products(queries + head * dim, wide, dim);
      scores[head * count + i] = a.softcap > 0 ? a.softcap * tanhf(score / a.softcap) : score;
    }
  }
  for (int64_t head = 0; head < heads; ++head) {
    float *own = scores + head * count, most = own[0], parts[kSums] = {0};
    for (int64_t i = 1; i < count; ++i) most = own[i] > most ? own[i] : most;
    for (int64_t i = 0; i < count; ++i) own[i] = exponential(own[i] - most);
    for (int64_t i = 0; i < count; ++i) parts[i % kSums] += own[i];
    float sum = 0;
    for (int j = 0; j < kSums; ++j) sum += parts[j];
    for (int64_t i = 0; i < count; ++i) own[i] /= sum;
    for (int64_t i = 0; i < dim; ++i) sums[head * dim + i] = 0;
  }
  for (int64_t i = 0; i < count; ++i) {
    widen<TYPE>(a.values, cache + (begin + i) * dim, dim, wide);
    for (int64_t head = 0; head < heads; ++head) {
      const float share = scores[head * count + i];
      float *own = sums + head * dim;
      for (int64_t k = 0; k < dim; ++k) own[k] += share * wide[k];
    }
  }
  const int64_t out = (sequence * a.heads + kv_head * heads) * dim;
  for (int64_t i = 0; i < heads * dim; ++i) store_element(sums[i], TYPE, out + i, a.out);
}

void attend(const lowra_attention &a, int32_t type, int64_t sequence, int64_t kv_head, float *scratch) {
  if (type == LOWRA_FLOAT32) return attend_as<LOWRA_FLOAT32>(a, sequence, kv_head, scratch);
  if (type == LOWRA_FLOAT16) return attend_as<LOWRA_FLOAT16>(a, sequence, kv_head, scratch);
  attend_as<LOWRA_BFLOAT16>(a, sequence, kv_head, scratch);
}

template <int32_t TYPE>
float dense_row_as(const void *weight, int64_t first, const float *x, int64_t count) {
  enum { kAtOnce = 2 * kSums, kSize = TYPE == LOWRA_FLOAT32 ? 4 : 2 };
  float sum = 0, wide[kAtOnce], sums[kSums] = {0};
  int64_t i = 0;
  for (; i + kAtOnce <= count; i += kAtOnce) {
    for (int64_t line = 0; line < kAtOnce * kSize; line += 64) {
      __builtin_prefetch((const char *)weight + (first + i) * kSize + kAhead + line);
    }
    widen<TYPE>(weight, first + i, kAtOnce, wide);
    for (int k = 0; k < kAtOnce; k += kSums) {
      for (int j = 0; j < kSums; ++j) sums[j] += wide[k + j] * x[i + k + j];
    }
  }
  for (int j = 0; j < kSums; ++j) sum += sums[j];
  for (; i < count; ++i) sum += load_element(weight, TYPE, first + i) * x[i];
  return sum;
}

// Row `row` of a dense weight times x [count].
float dense_row(const void *weight, int32_t type, int64_t row, const float *x, int64_t count) {
  if (type == LOWRA_FLOAT32) return dense_row_as<LOWRA_FLOAT32>(weight, row * count, x, count);
  if (type == LOWRA_FLOAT16) return dense_row_as<LOWRA_FLOAT16>(weight, row * count, x, count);
  return dense_row_as<LOWRA_BFLOAT16>(weight, row * count, x, count);
}

}  // namespace
