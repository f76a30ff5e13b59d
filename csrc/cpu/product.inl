// Products of packed rows with few tokens; included after rows.inl by the file of each instruction set. Weights are
// decoded in registers: a row has 2^bits levels, so a word of codes is shifted by another number of bits in each lane,
// and a permutation of the row's levels, times the scale of the group, takes its index from the lowest bits of a lane.
//
// The weights are those of `dequantize_row` in float32, to the last bit. Lane l of kLanes sums the products of the
// columns k = l (mod kLanes) in ascending order, each by one fused multiply-add; the lanes are added last.

namespace {

void load_scales(const lowra_packed &p, int64_t first, int64_t count, float *out) {
  if (p.scale_type == LOWRA_FLOAT32) {
    memcpy(out, (const float *)p.scales + first, sizeof(float) * (size_t)count);
  } else if (p.scale_type == LOWRA_UINT8) {
    const uint8_t *root = (const uint8_t *)p.scales + first;
    for (int64_t i = 0; i < count;) {  // runs that share a step, so that the inner loop vectorises
      const float step = p.scale_steps[(first + i) / LOWRA_SCALE_BLOCK];
      const int64_t left = LOWRA_SCALE_BLOCK - (first + i) % LOWRA_SCALE_BLOCK,
                    end = left < count - i ? i + left : count;
      for (; i < end; ++i) {
        const float c = (float)root[i];
        out[i] = c * c * step;
      }
    }
  } else {
    const uint16_t *half = (const uint16_t *)p.scales + first;
    for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(half[i]);
  }
}

// Any group size, one decoded row at a time.
void product_by_row(const product_rows &p) {
  enum { kSums = 16 };
  const int64_t groups = (p.in_features + p.group_size - 1) / p.group_size;
  for (int64_t k = p.in_features; k < p.x_stride; ++k) p.row[k] = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    dequantize_row(p.codes + r * p.row_bytes, p.in_features, p.group_size, p.bits, p.scales + r * groups,
                   p.levels + (r << p.bits), p.row, LOWRA_FLOAT32);
    for (int64_t t = 0; t < p.tokens; ++t) {
      const float *x = p.x + t * p.x_stride;
      float sums[kSums] = {0};
      for (int64_t k = 0; k < p.x_stride; k += kSums) {
        for (int i = 0; i < kSums; ++i) sums[i] += p.row[k + i] * x[k + i];
      }
      for (int half = kSums / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
      }
      p.sums[r * p.tokens + t] = sums[0];
    }
  }
}

#if defined(__AVX512BW__) || defined(__AVX2__) || (defined(__aarch64__) && !defined(LOWRA_NO_VECTORS))
#define LOWRA_VECTORS

uint32_t load_word(const uint8_t *bytes) {
  uint32_t word;
  memcpy(&word, bytes, 4);
  return word;
}
#endif

#if defined(__AVX512BW__)
typedef __m512 floats;
enum { kLanes = 16, kAccumulators = 16 };

floats load(const float *from) { return _mm512_loadu_ps(from); }
floats zeros() { return _mm512_setzero_ps(); }
floats fused(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
float sum_of(floats v) { return _mm512_reduce_add_ps(v); }

struct table {
  floats entries;
};

table table_of(const float *levels) { return {load(levels)}; }
table scaled(const table &t, float scale) { return {_mm512_mul_ps(t.entries, _mm512_set1_ps(scale))}; }

// Weights [16 part, 16 part + 16) of the kUnit whose codes begin at `codes`. A permutation within 128 bits looks at two
// bits of a lane, one over the register at four, so the codes above need not be masked away.
template <int BITS>
floats decode_part(const uint8_t *codes, int part, const table &t) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  if (BITS == 4) {  // two words: lanes 0-7 shift the first, lanes 8-15 the second
    const __m512i low = _mm512_set1_epi32((int)load_word(codes + 8 * part));
    const __m512i both = _mm512_mask_set1_epi32(low, 0xff00, (int)load_word(codes + 8 * part + 4));
    const __m512i shift = _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(7)), 2);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(both, shift), t.entries);
  }
  const __m512i word = _mm512_set1_epi32((int)load_word(BITS == 2 ? codes + 4 * part : codes));
  const __m512i shift = BITS == 2 ? _mm512_add_epi32(lane, lane) : _mm512_add_epi32(lane, _mm512_set1_epi32(16 * part));
  return _mm512_permutevar_ps(t.entries, _mm512_srlv_epi32(word, shift));
}

#elif defined(__AVX2__)
typedef __m256 floats;
enum { kLanes = 8, kAccumulators = 8 };

floats load(const float *from) { return _mm256_loadu_ps(from); }
floats zeros() { return _mm256_setzero_ps(); }
floats fused(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
float sum_of(floats v) {
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

struct table {
  floats low, high;  // high: entries 8 to 15, of 4 bits only
};

table table_of(const float *levels) { return {load(levels), load(levels + 8)}; }
table scaled(const table &t, float scale) {
  const __m256 factor = _mm256_set1_ps(scale);
  return {_mm256_mul_ps(t.low, factor), _mm256_mul_ps(t.high, factor)};
}

template <int BITS>
floats decode_part(const uint8_t *codes, int part, const table &t) {
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  if (BITS == 4) {
    const __m256i word = _mm256_set1_epi32((int)load_word(codes + 4 * part));
    const __m256i index = _mm256_srlv_epi32(word, _mm256_slli_epi32(lane, 2));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // by bit 3
  }
  const __m256i word = _mm256_set1_epi32((int)load_word(BITS == 2 ? codes + part / 2 * 4 : codes));
  const __m256i shift = BITS == 2 ? _mm256_add_epi32(_mm256_add_epi32(lane, lane), _mm256_set1_epi32(part % 2 * 16))
                                  : _mm256_add_epi32(lane, _mm256_set1_epi32(8 * part));
  return _mm256_permutevar_ps(t.low, _mm256_srlv_epi32(word, shift));
}

#elif defined(__aarch64__) && !defined(LOWRA_NO_VECTORS)

typedef float32x4_t floats;
enum { kLanes = 4, kAccumulators = 16 };

floats load(const float *from) { return vld1q_f32(from); }
floats zeros() { return vdupq_n_f32(0); }
floats fused(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
float sum_of(floats v) { return vaddvq_f32(v); }

struct table {
  floats quarter[4];  // the first one alone where a row has up to four levels
};

table table_of(const float *levels) { return {{load(levels), load(levels + 4), load(levels + 8), load(levels + 12)}}; }
table scaled(const table &t, float scale) {
  return {{vmulq_n_f32(t.quarter[0], scale), vmulq_n_f32(t.quarter[1], scale), vmulq_n_f32(t.quarter[2], scale),
           vmulq_n_f32(t.quarter[3], scale)}};
}

template <int BITS>
floats decode_part(const uint8_t *codes, int part, const table &t) {
  const int per_word = 32 / BITS, first = part * kLanes;
  const int32_t lane[4] = {0, -BITS, -2 * BITS, -3 * BITS};
  const int32x4_t shift = vaddq_s32(vld1q_s32(lane), vdupq_n_s32(-(first % per_word) * BITS));
  const uint32x4_t word = vdupq_n_u32(load_word(codes + first / per_word * 4));
  const uint32x4_t code = vandq_u32(vshlq_u32(word, shift), vdupq_n_u32((1u << BITS) - 1));
  // byte 4 code + i of the table for byte i of a lane
  const uint8x16_t index = vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100u), code, vdupq_n_u32(0x04040404u)));
  if (BITS == 4) {
    const uint8x16x4_t bytes = {{vreinterpretq_u8_f32(t.quarter[0]), vreinterpretq_u8_f32(t.quarter[1]),
                                 vreinterpretq_u8_f32(t.quarter[2]), vreinterpretq_u8_f32(t.quarter[3])}};
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, index));
  }
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(t.quarter[0]), index));
}
#endif

#if defined(LOWRA_VECTORS)

// ROWS rows from `row` on with TOKENS tokens from `token` on.
template <int BITS, int ROWS, int TOKENS>
void product_block(const product_rows &p, int64_t row, int64_t token) {
  const int64_t groups = (p.in_features + p.group_size - 1) / p.group_size;
  const uint8_t *codes = p.codes + row * p.row_bytes;
  const float *scales = p.scales + row * groups, *x = p.x + token * p.x_stride;
  table levels[ROWS];
  floats sums[ROWS][TOKENS];
  for (int r = 0; r < ROWS; ++r) {
    float entries[16] = {0};
    for (int i = 0; i < 16; ++i) entries[i] = half_to_float(p.levels[((row + r) << BITS) + i % (1 << BITS)]);
    levels[r] = table_of(entries);
    for (int t = 0; t < TOKENS; ++t) sums[r][t] = zeros();
  }
  for (int64_t group = 0; group < groups; ++group) {
    table own[ROWS];
    for (int r = 0; r < ROWS; ++r) own[r] = scaled(levels[r], scales[r * groups + group]);
    const int64_t start = group * p.group_size;
    const int64_t end = start + p.group_size < p.in_features ? start + p.group_size : p.in_features;
    for (int64_t k = start; k < end; k += kUnit) {
#pragma GCC unroll 8
      for (int part = 0; part < kUnit / kLanes; ++part) {
        floats values[TOKENS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) values[t] = load(x + t * p.x_stride + k + part * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          if (TOKENS < 4 && part == 0) __builtin_prefetch(codes + (r + ROWS) * p.row_bytes + k * BITS / 8);
          const floats weights = decode_part<BITS>(codes + r * p.row_bytes + k * BITS / 8, part, own[r]);
#pragma GCC unroll 8
          for (int t = 0; t < TOKENS; ++t) sums[r][t] = fused(weights, values[t], sums[r][t]);
        }
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int t = 0; t < TOKENS; ++t) p.sums[(row + r) * p.tokens + token + t] = sum_of(sums[r][t]);
  }
}

template <int BITS, int TOKENS>
void product_tokens(const product_rows &p, int64_t token) {
  enum { kFit = kAccumulators / TOKENS, kRows = kFit > 4 ? 4 : kFit };
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) product_block<BITS, kRows, TOKENS>(p, row, token);
  for (; row < p.rows; ++row) product_block<BITS, 1, TOKENS>(p, row, token);
}

template <int BITS>
void product_bits(const product_rows &p) {
  int64_t token = 0;
  for (; token + 8 <= p.tokens; token += 8) product_tokens<BITS, 8>(p, token);
  for (; token + 4 <= p.tokens; token += 4) product_tokens<BITS, 4>(p, token);
  const int64_t left = p.tokens - token;
  if (left == 3) product_tokens<BITS, 3>(p, token);
  if (left == 2) product_tokens<BITS, 2>(p, token);
  if (left == 1) product_tokens<BITS, 1>(p, token);
}

void product(const product_rows &p) {
  if (p.group_size % kUnit != 0) return product_by_row(p);
  if (p.bits == 4) return product_bits<4>(p);
  if (p.bits == 2) return product_bits<2>(p);
  product_bits<1>(p);
}
#else
void product(const product_rows &p) { product_by_row(p); }
#endif

}  // namespace
