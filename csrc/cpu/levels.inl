// Rows of 2 and 4 bits by the digits of their levels; included by integers.inl, which says what for.

namespace {

// The levels of a row in digits, for codes in four bits of an index, and what they stand for.
struct level_digits {
  bytes tables[2];  // 2 bits: of the lower code and of the upper one; 4 bits: the lower digit and the upper one
  float least, step;
};

#if defined(__aarch64__)
template <int BITS>
level_digits digits_of(const uint16_t *levels) {
  enum { kLevels = 1 << BITS };
  float level[kLevels], least = half_to_float(levels[0]), most = least;
  for (int i = 0; i < kLevels; ++i) {
    level[i] = half_to_float(levels[i]);
    least = level[i] < least ? level[i] : least;
    most = level[i] > most ? level[i] : most;
  }
  const float range = most - least, finest = BITS == 2 ? 127.0f : 16383.0f, inverse = range > 0 ? finest / range : 0;
  uint8_t digits[2][16];
  for (int i = 0; i < 16; ++i) {
    if (BITS == 2) {
      digits[0][i] = (uint8_t)rounded((level[i % kLevels] - least) * inverse);
      digits[1][i] = (uint8_t)rounded((level[i / 4 % kLevels] - least) * inverse);
    } else {
      const int32_t number = rounded((level[i % kLevels] - least) * inverse);
      digits[0][i] = (uint8_t)(number & kDigit);
      digits[1][i] = (uint8_t)(number >> 7);
    }
  }
  return {{load_bytes(digits[0]), load_bytes(digits[1])}, least, range / finest};
}
#else
template <int BITS>
level_digits digits_of(const uint16_t *levels) {
  enum { kParts = BITS == 2 ? 1 : 4 };
  __m128 level[kParts];
  for (int i = 0; i < kParts; ++i) level[i] = _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(levels + 4 * i)));
  __m128 least = level[0], most = level[0];
  for (int i = 1; i < kParts; ++i) {
    least = _mm_min_ps(least, level[i]);
    most = _mm_max_ps(most, level[i]);
  }
  least = _mm_min_ps(least, _mm_movehl_ps(least, least));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  level_digits found;
  found.least = _mm_cvtss_f32(_mm_min_ss(least, _mm_movehdup_ps(least)));
  const float range = _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most))) - found.least;
  const float finest = BITS == 2 ? 127.0f : 16383.0f;
  found.step = range / finest;
  const __m128 inverse = _mm_set1_ps(range > 0 ? finest / range : 0.0f), lowest = _mm_set1_ps(found.least);
  __m128i numbers[4];
  for (int i = 0; i < kParts; ++i) numbers[i] = _mm_cvtps_epi32(_mm_mul_ps(_mm_sub_ps(level[i], lowest), inverse));
  if (BITS == 2) {
    const __m128i all = _mm_packus_epi16(_mm_packs_epi32(numbers[0], numbers[0]), _mm_setzero_si128());
    const __m128i upper = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    found.tables[0] = repeated(_mm_shuffle_epi32(all, 0));
    found.tables[1] = repeated(_mm_shuffle_epi8(all, upper));
  } else {
    const __m128i first = _mm_packs_epi32(numbers[0], numbers[1]),
                  second = _mm_packs_epi32(numbers[2 % kParts], numbers[3 % kParts]);
    const __m128i digit = _mm_set1_epi16(kDigit);
    const __m128i low = _mm_packus_epi16(_mm_and_si128(first, digit), _mm_and_si128(second, digit));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 7), _mm_srli_epi16(second, 7));
    found.tables[0] = repeated(low);
    found.tables[1] = repeated(high);
  }
  return found;
}
#endif

// Adds the products of a register of codes of each row; lane e of `sums` gets those of its 32 / BITS columns.
template <int BITS, int ROWS, int TOKENS>
inline __attribute__((always_inline)) void add_levels(const bytes *codes, const level_digits *levels,
                                                      const floats *scales, const integer_x &x, int64_t column,
                                                      floats sums[][TOKENS]) {
  bytes index[ROWS][2], digits[ROWS][TOKENS][2];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    index[r][0] = lower_nibbles(codes[r]);
    index[r][1] = upper_nibbles(codes[r]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // 2 bits: places of a byte; 4 bits: of a place its two digits
    const int digit = BITS == 4 ? i % 2 : 0;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const bytes found = look_up(levels[r].tables[i % 2], index[r][i / 2]);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) {
        const int8_t *own = x.bytes[BITS] + t * x.byte_stride + column;
        const bytes values = load_bytes(own + kRegister * (BITS == 2 ? i : i / 2));
        digits[r][t][digit] = i == digit ? dot(found, values) : add_dot(digits[r][t][digit], found, values);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; ++t) {
    const floats steps = load(x.byte_steps[BITS] + (t * x.byte_stride + column) * BITS / 32);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const bytes sum = BITS == 2 ? digits[r][t][0] : join_words(digits[r][t][0], digits[r][t][1]);
      sums[r][t] = fused(to_floats(sum), multiplied(scales[r], steps), sums[r][t]);
    }
  }
}

// The scaled sum of x of each token, which the least level of a row stands before.
template <int TOKENS>
inline __attribute__((always_inline)) void add_whole(const float *scales, const float *x_sums, int64_t groups,
                                                     float least, floats *sums) {
  for (int t = 0; t < TOKENS; ++t, x_sums += groups) {
    floats whole = zeros();
    int64_t group = 0;
    for (; group + kLanes <= groups; group += kLanes) {
      whole = fused(load(scales + group), load(x_sums + group), whole);
    }
    if (group < groups) {
      const int64_t left = groups - group;
      whole = fused(load_first(scales + group, left), load_first(x_sums + group, left), whole);
    }
    sums[t] = multiplied(whole, filled(least));
  }
}

// ROWS rows of 2 or 4 bits from `row` on. `levels` are theirs, and become those of the next rows: what takes long and
// waits for nothing else comes before the loop.
template <int BITS, int ROWS, int TOKENS>
void product_by_levels(const product_rows &p, int64_t row, level_digits *levels) {
  enum { kColumns = 8 * kRegister / BITS };
  const integer_x &x = *p.integers;
  const int shift = __builtin_ctz((unsigned)p.group_size);
  const int64_t groups = (p.in_features + p.group_size - 1) >> shift;
  const float *scales = p.scales + row * groups;
  const uint8_t *codes = p.codes + row * p.row_bytes;
  const bytes group_of = lane_groups(BITS == 2 ? 4 : 3, shift);
  level_digits own_levels[ROWS];
  floats sums[ROWS][TOKENS], whole[ROWS][TOKENS], own[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    own_levels[r] = levels[r];
    if (row + ROWS + r < p.rows) levels[r] = digits_of<BITS>(p.levels + ((row + ROWS + r) << BITS));
    add_whole<TOKENS>(scales + r * groups, x.byte_sums, groups, own_levels[r].least, whole[r]);
    for (int t = 0; t < TOKENS; ++t) sums[r][t] = zeros();
  }
  bytes words[ROWS];
  const int64_t whole_columns = p.row_bytes / kRegister * kColumns;
  int64_t k = 0;
  const uint8_t *ahead = codes + kAhead;
  for (; k < whole_columns; k += kColumns) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const uint8_t *from = codes + r * p.row_bytes + k * BITS / 8;
      words[r] = load_bytes(from);
      own[r] = permuted(load_for_lanes(scales + r * groups + (k >> shift)), group_of);
    }
    if (ROWS * kRegister >= 64 || k % (2 * kColumns) == 0) {
#pragma GCC unroll 4
      for (int i = 0; i < ROWS * kRegister || i < 64; i += 64) __builtin_prefetch(ahead + i);
      ahead += ROWS * kRegister < 64 ? 64 : ROWS * kRegister;
    }
    add_levels<BITS, ROWS, TOKENS>(words, own_levels, own, x, k, sums);
  }
  if (p.row_bytes % kRegister) {
    for (int r = 0; r < ROWS; ++r) {
      words[r] = load_first_bytes(codes + r * p.row_bytes + k * BITS / 8, p.row_bytes % kRegister);
      const int64_t group = k >> shift;  // the next row's scales may be anything
      own[r] = permuted(load_first(scales + r * groups + group, groups - group), group_of);
    }
    add_levels<BITS, ROWS, TOKENS>(words, own_levels, own, x, k, sums);
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int t = 0; t < TOKENS; ++t) {
      p.sums[(row + r) * p.tokens + t] = sum_of(fused(sums[r][t], filled(own_levels[r].step), whole[r][t]));
    }
  }
}

template <int BITS, int ROWS, int TOKENS>
int64_t product_by_levels(const product_rows &p, int64_t row) {
  level_digits levels[ROWS];
  for (int r = 0; r < ROWS && row + r < p.rows; ++r) levels[r] = digits_of<BITS>(p.levels + ((row + r) << BITS));
  for (; row + ROWS <= p.rows; row += ROWS) product_by_levels<BITS, ROWS, TOKENS>(p, row, levels);
  return row;
}

template <int BITS, int TOKENS>
void product_by_levels(const product_rows &p) {
  const int64_t row = product_by_levels<BITS, TOKENS <= 2 ? kRowsAtOnce : 1, TOKENS>(p, 0);
  product_by_levels<BITS, 1, TOKENS>(p, row);
}

}  // namespace
