// Rows of 2 and 4 bits by the digits of their levels; included by integers.inl, which says what for.

namespace {

enum { kDigitRows = 8 };
constexpr float kFinest2 = 127, kFinest4 = 4095;  // numbers above the least level
enum { kLevelDigit = 63 };                        // of 4 bits; four products of such a digit have a sum of 16 bits

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
  const float range = most - least, finest = BITS == 2 ? kFinest2 : kFinest4, inverse = range > 0 ? finest / range : 0;
  uint8_t digits[2][16];
  for (int i = 0; i < 16; ++i) {
    if (BITS == 2) {
      digits[0][i] = (uint8_t)rounded((level[i % kLevels] - least) * inverse);
      digits[1][i] = (uint8_t)rounded((level[i / 4 % kLevels] - least) * inverse);
    } else {
      const int32_t number = rounded((level[i % kLevels] - least) * inverse);
      digits[0][i] = (uint8_t)(number & kLevelDigit);
      digits[1][i] = (uint8_t)(number >> 6);
    }
  }
  return {{load_bytes(digits[0]), load_bytes(digits[1])}, least, range / finest};
}
#else
template <int BITS>
level_digits digits_of(const uint16_t *levels) {
  static_assert(BITS == 4, "digits of 2 bits are those of row_digits<2>");
  __m128 level[4];
  for (int i = 0; i < 4; ++i) level[i] = _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(levels + 4 * i)));
  __m128 least = level[0], most = level[0];
  for (int i = 1; i < 4; ++i) {
    least = _mm_min_ps(least, level[i]);
    most = _mm_max_ps(most, level[i]);
  }
  least = _mm_min_ps(least, _mm_movehl_ps(least, least));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  level_digits found;
  found.least = _mm_cvtss_f32(_mm_min_ss(least, _mm_movehdup_ps(least)));
  const float range = _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most))) - found.least;
  found.step = range / kFinest4;
  const __m128 inverse = _mm_set1_ps(range > 0 ? kFinest4 / range : 0.0f), lowest = _mm_set1_ps(found.least);
  __m128i numbers[4];
  for (int i = 0; i < 4; ++i) numbers[i] = _mm_cvtps_epi32(_mm_mul_ps(_mm_sub_ps(level[i], lowest), inverse));
  const __m128i first = _mm_packs_epi32(numbers[0], numbers[1]), second = _mm_packs_epi32(numbers[2], numbers[3]);
  const __m128i digit = _mm_set1_epi16(kLevelDigit);
  found.tables[0] = repeated(_mm_packus_epi16(_mm_and_si128(first, digit), _mm_and_si128(second, digit)));
  found.tables[1] = repeated(_mm_packus_epi16(_mm_srli_epi16(first, 6), _mm_srli_epi16(second, 6)));
  return found;
}
#endif

// The digits of up to kDigitRows consecutive rows: they take long, and wait for nothing that a row's loop does.
template <int BITS>
struct row_digits {
  level_digits all[kDigitRows];

  void make(const uint16_t *levels, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) all[r] = digits_of<BITS>(levels + (r << BITS));
  }
  level_digits of(int64_t r) const { return all[r]; }
};

#if !defined(__aarch64__)
// Rows of 2 bits in the quarters of registers, two in each.
template <>
struct row_digits<2> {
  uint32_t numbers[kDigitRows];  // four bytes of a row each; those of even rows come first
  float least[4 * kDigitRows], step[4 * kDigitRows];

  void make(const uint16_t *levels, int64_t rows) {
    uint16_t own[4 * kDigitRows] = {0};
    if (rows < kDigitRows) levels = (const uint16_t *)memcpy(own, levels, 8 * (size_t)rows);
    const __m256 finest = _mm256_set1_ps(kFinest2);
    __m256i found[kDigitRows / 2];
    for (int i = 0; i < kDigitRows / 2; ++i) {
      const __m256 level = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(levels + 8 * i)));
      __m256 low = _mm256_min_ps(level, _mm256_permute_ps(level, 0xb1));
      __m256 high = _mm256_max_ps(level, _mm256_permute_ps(level, 0xb1));
      low = _mm256_min_ps(low, _mm256_permute_ps(low, 0x4e));
      high = _mm256_max_ps(high, _mm256_permute_ps(high, 0x4e));
      const __m256 range = _mm256_sub_ps(high, low);
      const __m256 some = _mm256_cmp_ps(range, _mm256_setzero_ps(), _CMP_GT_OQ);
      const __m256 inverse = _mm256_and_ps(some, _mm256_div_ps(finest, range));
      _mm256_storeu_ps(least + 8 * i, low);
      _mm256_storeu_ps(step + 8 * i, _mm256_div_ps(range, finest));
      found[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(level, low), inverse));
    }
    const __m256i first = _mm256_packs_epi32(found[0], found[1]), second = _mm256_packs_epi32(found[2], found[3]);
    _mm256_storeu_si256((__m256i *)numbers, _mm256_packus_epi16(first, second));
  }
  level_digits of(int64_t r) const {
    const __m128i upper = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const bytes own = WIDE(set1_epi32)((int)numbers[r % 2 * 4 + r / 2]);
    return {{own, look_up(own, repeated(upper))}, least[4 * r], step[4 * r]};
  }
};
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
  const auto values = [&](int t, int place) __attribute__((always_inline)) {
    return load_bytes(x.bytes[BITS] + t * x.byte_stride + column + kRegister * place);
  };
  if (BITS == 4) {
#pragma GCC unroll 2
    for (int digit = 0; digit < 2; ++digit) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const bytes first = look_up(levels[r].tables[digit], index[r][0]);
        const bytes second = look_up(levels[r].tables[digit], index[r][1]);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) digits[r][t][digit] = dot_of_two(first, values(t, 0), second, values(t, 1));
      }
    }
  } else {
#pragma GCC unroll 4
    for (int place = 0; place < 4; ++place) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const bytes found = look_up(levels[r].tables[place % 2], index[r][place / 2]);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) {
          bytes &sum = digits[r][t][0];
          sum = place == 0 ? dot(found, values(t, place)) : add_dot(sum, found, values(t, place));
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; ++t) {
    const floats steps = load(x.byte_steps[BITS] + (uint64_t)(t * x.byte_stride + column) * BITS / 32);
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

// The sum of the lanes of each of up to kDigitRows rows and of its tokens, to [rows, TOKENS].
template <int TOKENS>
inline __attribute__((always_inline)) void store_sums(const floats totals[][TOKENS], int64_t rows, float *sums) {
#if defined(__AVX2__) && !defined(__AVX512BW__)
  if (TOKENS == 1 && rows == kDigitRows) {
    const auto row = [&](int r) { return totals[r][0]; };
    const floats first = _mm256_hadd_ps(_mm256_hadd_ps(row(0), row(1)), _mm256_hadd_ps(row(2), row(3)));
    const floats second = _mm256_hadd_ps(_mm256_hadd_ps(row(4), row(5)), _mm256_hadd_ps(row(6), row(7)));
    const floats lower = _mm256_permute2f128_ps(first, second, 0x20);
    _mm256_storeu_ps(sums, _mm256_add_ps(lower, _mm256_permute2f128_ps(first, second, 0x31)));
    return;
  }
#endif
  for (int64_t r = 0; r < rows; ++r) {
    for (int t = 0; t < TOKENS; ++t) sums[r * TOKENS + t] = sum_of(totals[r][t]);
  }
}

// ROWS rows of 2 or 4 bits from `row` on, of which the first is number `own_row` of `digits`.
template <int BITS, int ROWS, int TOKENS>
inline __attribute__((always_inline)) void product_by_levels(const product_rows &p, int64_t row,
                                                             const row_digits<BITS> &digits, int64_t own_row,
                                                             floats totals[][TOKENS]) {
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
    own_levels[r] = digits.of(own_row + r);
    add_whole<TOKENS>(scales + r * groups, x.byte_sums, groups, own_levels[r].least, whole[r]);
    for (int t = 0; t < TOKENS; ++t) sums[r][t] = zeros();
  }
  bytes words[ROWS];
  const auto take = [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      words[r] = load_bytes(codes + r * p.row_bytes + k * BITS / 8);
      own[r] = permuted(load_for_lanes(scales + r * groups + (k >> shift)), group_of);
    }
    add_levels<BITS, ROWS, TOKENS>(words, own_levels, own, x, k, sums);
  };
  // a cache line at once, or a register of each row
  enum { kRegisters = ROWS * kRegister < 64 ? 64 / (ROWS * kRegister) : 1 };
  const int64_t whole_columns = p.row_bytes / kRegister * kColumns;
  const uint8_t *ahead = codes + kAhead;
  int64_t k = 0;
  for (; k + kRegisters * kColumns <= whole_columns; k += kRegisters * kColumns) {
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters * ROWS * kRegister; i += 64) __builtin_prefetch(ahead + i);
    ahead += kRegisters * ROWS * kRegister;
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; ++i) take(k + i * kColumns);
  }
  for (; k < whole_columns; k += kColumns) take(k);
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
      totals[own_row + r][t] = fused(sums[r][t], filled(own_levels[r].step), whole[r][t]);
    }
  }
}

template <int BITS, int ROWS, int TOKENS>
int64_t product_by_levels(const product_rows &p, int64_t row) {
  row_digits<BITS> digits;
  floats totals[kDigitRows][TOKENS];
  while (row + ROWS <= p.rows) {
    const int64_t left = (p.rows - row) / ROWS * ROWS, end = row + (left < kDigitRows ? left : (int64_t)kDigitRows);
    digits.make(p.levels + (row << BITS), end - row);
    const int64_t first = row;
    for (int64_t own_row = 0; row < end; row += ROWS, own_row += ROWS) {
      product_by_levels<BITS, ROWS, TOKENS>(p, row, digits, own_row, totals);
    }
    store_sums<TOKENS>(totals, end - first, p.sums + first * TOKENS);
  }
  return row;
}

template <int BITS, int TOKENS>
void product_by_levels(const product_rows &p) {
  const int64_t row = product_by_levels<BITS, TOKENS <= 2 ? kRowsAtOnce : 1, TOKENS>(p, 0);
  product_by_levels<BITS, 1, TOKENS>(p, row);
}

}  // namespace
