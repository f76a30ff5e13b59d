// Products of few tokens with x in integers; included after product.inl by rows_avx2.cpp.
//
// 1 bit: x in 13 bits. Four columns of it have 16 sums of a subset, offset so that none is negative; a sum stands as
// two digits of 7 bits in two tables of 16 bytes. Thirty-two rows stand in the bytes of a register, and four bits of
// each choose by one permutation of bytes; the digits of two tables are added as bytes, and these to sums of 16 bits.
//   w = l0 + (l1 - l0) b
//
// 2 and 4 bits: x in 8 bits. A permutation of bytes turns codes into levels in 7 bits (4 bits: two digits of 7) above
// the row's least one, and bytes are multiplied with those of x.
//   w = least + step (128 digit1 + digit0)

namespace {

enum { kByteRows = 32, kFloats = 8, kRegisters = kByteRows / kFloats, kCacheLine = 64 };
enum { kBytesAtOnce = 16, kDigit = 127, kAhead = 2048 };

// Row of element `lane` of register `number` that `look_up` leaves.
int row_in(int number, int lane) {
  return (number & 1) * 8 + (number >> 1) + (lane < 4 ? 2 * lane : 16 + 2 * (lane - 4));
}

// Turns the index of a byte by two bits: that of register i, byte j of 16 is 16 i + j. Four registers come from four.
inline __attribute__((always_inline)) void turn(int i, __m256i a, __m256i b, __m256i c, __m256i d, __m256i *to) {
  const __m256i first = _mm256_unpacklo_epi8(a, c), second = _mm256_unpackhi_epi8(a, c);
  const __m256i third = _mm256_unpacklo_epi8(b, d), fourth = _mm256_unpackhi_epi8(b, d);
  to[4 * i] = _mm256_unpacklo_epi8(first, third);
  to[4 * i + 1] = _mm256_unpackhi_epi8(first, third);
  to[4 * i + 2] = _mm256_unpacklo_epi8(second, fourth);
  to[4 * i + 3] = _mm256_unpackhi_epi8(second, fourth);
}

// 16 bytes of 32 rows, from starts + first, to 16 columns: byte i of each row in register i.
inline __attribute__((always_inline)) void load_columns(const uint8_t *const *starts, int64_t first, __m256i *columns) {
  const auto load_rows = [&](int r) {
    const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(starts[r] + first)));
    return _mm256_inserti128_si256(low, _mm_loadu_si128((const __m128i *)(starts[r + 16] + first)), 1);
  };
  __m256i half[16];
  for (int i = 0; i < 4; ++i) turn(i, load_rows(i), load_rows(i + 4), load_rows(i + 8), load_rows(i + 12), half);
  for (int i = 0; i < 4; ++i) turn(i, half[i], half[i + 4], half[i + 8], half[i + 12], columns);
}

__m256i both_halves(const uint8_t *bytes) {
  return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)bytes));
}

// Sums of 32 rows over `count` registers of bits, by their tables.
inline __attribute__((always_inline)) void look_up(const __m256i *bits, const uint8_t *tables, int count,
                                                   __m256i *sums) {
  const __m256i nibble = _mm256_set1_epi8(15);
  // of each digit: 16-bit words of two bytes as one number, and of their upper bytes
  __m256i low = _mm256_setzero_si256(), low_odd = low, high = low, high_odd = low;
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    const uint8_t *own = tables + 64 * i;
    const __m256i first = _mm256_and_si256(bits[i], nibble);
    const __m256i second = _mm256_and_si256(_mm256_srli_epi16(bits[i], 4), nibble);
    const __m256i lower = _mm256_add_epi8(_mm256_shuffle_epi8(both_halves(own), first),
                                          _mm256_shuffle_epi8(both_halves(own + 32), second));
    const __m256i upper = _mm256_add_epi8(_mm256_shuffle_epi8(both_halves(own + 16), first),
                                          _mm256_shuffle_epi8(both_halves(own + 48), second));
    low = _mm256_add_epi16(low, lower);
    low_odd = _mm256_add_epi16(low_odd, _mm256_srli_epi16(lower, 8));
    high = _mm256_add_epi16(high, upper);
    high_odd = _mm256_add_epi16(high_odd, _mm256_srli_epi16(upper, 8));
  }
  low = _mm256_sub_epi16(low, _mm256_slli_epi16(low_odd, 8));
  high = _mm256_sub_epi16(high, _mm256_slli_epi16(high_odd, 8));
  const __m256i digits = _mm256_set1_epi32(1 | (kDigit + 1) << 16);
  sums[0] = _mm256_madd_epi16(_mm256_unpacklo_epi16(low, high), digits);
  sums[1] = _mm256_madd_epi16(_mm256_unpackhi_epi16(low, high), digits);
  sums[2] = _mm256_madd_epi16(_mm256_unpacklo_epi16(low_odd, high_odd), digits);
  sums[3] = _mm256_madd_epi16(_mm256_unpackhi_epi16(low_odd, high_odd), digits);
}

// For every 8 columns of x [x_stride] in 13 bits the first digits and the second of the lower four, and of the upper.
void make_byte_tables(const int16_t *x, int64_t x_stride, uint8_t *tables) {
  const __m256i digit = _mm256_set1_epi16(kDigit);
  const __m256i entry = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m256i chosen[4];
  for (int i = 0; i < 4; ++i) {
    const __m256i bit = _mm256_set1_epi16((short)(1 << i));
    chosen[i] = _mm256_cmpeq_epi16(_mm256_and_si256(entry, bit), bit);
  }
  for (int64_t k = 0; k < x_stride; k += 4, tables += 32) {
    __m256i sum = _mm256_setzero_si256();
    int least = 0;
    for (int i = 0; i < 4; ++i) {
      least += x[k + i] < 0 ? x[k + i] : 0;
      sum = _mm256_add_epi16(sum, _mm256_and_si256(chosen[i], _mm256_set1_epi16(x[k + i])));
    }
    sum = _mm256_sub_epi16(sum, _mm256_set1_epi16((short)least));
    const __m256i both = _mm256_packus_epi16(_mm256_and_si256(sum, digit), _mm256_srli_epi16(sum, 7));
    _mm256_store_si256((__m256i *)tables, _mm256_permute4x64_epi64(both, 0xd8));
  }
}

float largest_of(const float *x, int64_t count) {
  uint32_t largest = 0;  // magnitudes of floats order like their bits, and an integer maximum vectorises
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t magnitude = float_bits(x[k]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  float value;
  memcpy(&value, &largest, 4);
  return value;
}

int32_t rounded(float value) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: with it added a float is an integer, rounded to even
  return (int32_t)float_bits(value + magic) - (int32_t)float_bits(magic);
}

// The 256 / BITS bytes of a register of codes, by their place in a byte of it.
template <int BITS>
void arrange_bytes(const int8_t *from, int64_t count, int8_t *to) {
  enum { kPlaces = 8 / BITS };
  for (int64_t k = 0; k < count; k += 32 * kPlaces) {
    for (int place = 0; place < kPlaces; ++place) {
      for (int i = 0; i < 32; ++i) to[k + 32 * place + i] = from[k + kPlaces * i + place];
    }
  }
}

bool round_x(const float *x, int64_t x_stride, int64_t in_features, int64_t group_size, const rounded_token &out) {
  const int64_t columns = group_size < kPartColumns ? group_size : (int64_t)kPartColumns;
  for (int64_t first = 0, part = 0; first < in_features; first += columns, ++part) {
    const int64_t end = x_stride - first < columns ? x_stride : first + columns;
    const float largest = largest_of(x + first, end - first);
    if (!(largest <= kLargestRounded && (largest == 0 || largest >= kLeastRounded))) return false;
    const float step = largest / 4095, inverse = largest > 0 ? 4095 / largest : 0;
    int32_t sum = 0, negative = 0;
    for (int64_t k = first; k < end; ++k) {
      const int32_t q = rounded(x[k] * inverse);
      out.parts[k] = (int16_t)q;
      sum += q;
      negative += q < 0 ? q : 0;
    }
    out.steps[part] = step;
    out.sums[part] = (float)sum * step;
    out.offsets[part] = (float)negative * step;
  }
  if (out.tables) make_byte_tables(out.parts, x_stride, out.tables);
  if (!out.bytes[2]) return true;
  for (int64_t first = 0; first < x_stride; first += kStepColumns) {
    const float largest = largest_of(x + first, kStepColumns);
    // a step's columns may be less than a part's by more than float32 can invert
    const float step = largest / 127, inverse = largest >= kLeastRounded ? 127 / largest : 0;
    int32_t sum = 0;
    for (int64_t k = first; k < first + kStepColumns; ++k) {
      const int32_t q = rounded(x[k] * inverse);
      out.unarranged[k] = (int8_t)q;
      sum += q;
    }
    out.byte_steps[2][first / kStepColumns] = step;
    out.byte_steps[4][2 * first / kStepColumns] = out.byte_steps[4][2 * first / kStepColumns + 1] = step;
    if (first < in_features) out.byte_sums[first / group_size] += (float)sum * step;
  }
  arrange_bytes<2>(out.unarranged, out.byte_stride, out.bytes[2]);
  arrange_bytes<4>(out.unarranged, out.byte_stride, out.bytes[4]);
  return true;
}

// Scales of 32 rows, the last one's where there are fewer, to [groups, 32] in the order of row_in.
void arrange_scales(const float *scales, int64_t groups, int64_t rows, float *lanes) {
  for (int number = 0; number < kRegisters; ++number, lanes += kFloats) {
    const float *own[kFloats];
    for (int lane = 0; lane < kFloats; ++lane) {
      const int row = row_in(number, lane);
      own[lane] = scales + (row < rows ? row : rows - 1) * groups;
    }
    int64_t group = 0;
    for (; group + 4 <= groups; group += 4) {
      __m256 a[4], b[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(own[i] + group));
        a[i] = _mm256_insertf128_ps(low, _mm_loadu_ps(own[i + 4] + group), 1);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        b[2 * i] = _mm256_unpacklo_ps(a[i], a[i + 2]);
        b[2 * i + 1] = _mm256_unpackhi_ps(a[i], a[i + 2]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        _mm256_storeu_ps(lanes + (group + 2 * i) * kByteRows, _mm256_unpacklo_ps(b[i], b[i + 2]));
        _mm256_storeu_ps(lanes + (group + 2 * i + 1) * kByteRows, _mm256_unpackhi_ps(b[i], b[i + 2]));
      }
    }
    for (; group < groups; ++group) {
      for (int lane = 0; lane < kFloats; ++lane) lanes[group * kByteRows + lane] = own[lane][group];
    }
  }
}

// Up to 32 rows of 1 bit from `row` on.
template <int TOKENS>
void product_by_bytes(const product_rows &p, int64_t row) {
  const integer_x &x = *p.integers;
  const int64_t rows = p.rows - row < kByteRows ? p.rows - row : (int64_t)kByteRows;
  const int64_t groups = (p.in_features + p.group_size - 1) / p.group_size;
  const int64_t columns = p.group_size < kPartColumns ? p.group_size : (int64_t)kPartColumns;
  const int64_t parts = (p.in_features + columns - 1) / columns, per_group = p.group_size / columns;
  const uint8_t *starts[kByteRows];
  for (int r = 0; r < kByteRows; ++r) starts[r] = p.codes + (row + (r < rows ? r : rows - 1)) * p.row_bytes;
  arrange_scales(p.scales + row * groups, groups, rows, p.lanes);
  __m256 whole[TOKENS][kRegisters], set[TOKENS][kRegisters];  // scaled sums of x, and of x where the bit is set
  for (int t = 0; t < TOKENS; ++t) {
    for (int i = 0; i < kRegisters; ++i) whole[t][i] = set[t][i] = _mm256_setzero_ps();
  }
  for (int64_t chunk = 0; chunk < p.in_features; chunk += 8 * kBytesAtOnce) {
    const int64_t first = chunk / 8;
    if (first % kCacheLine == 0) {  // the processor does not see where 32 rows lead, and which come after them
      for (int r = 0; r < kByteRows; ++r) {
        _mm_prefetch((const char *)(starts[r] + first + kCacheLine), _MM_HINT_T0);
        _mm_prefetch((const char *)(starts[r] + first + kByteRows * p.row_bytes), _MM_HINT_T1);
      }
    }
    __m256i bits[kBytesAtOnce];
    load_columns(starts, first, bits);
    const int64_t end = chunk + 8 * kBytesAtOnce < p.x_stride ? chunk + 8 * kBytesAtOnce : p.x_stride;
    for (int64_t k = chunk; k < end; k += columns) {
      const int64_t left = end - k < columns ? end - k : columns, part = k / columns;
      const float *lanes = p.lanes + part / per_group * kByteRows;
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) {
        __m256i sums[kRegisters];
        look_up(bits + (k - chunk) / 8, x.tables + 8 * (t * p.x_stride + k), (int)(left / 8), sums);
        const int64_t own = t * parts + part;
        const __m256 step = _mm256_broadcast_ss(x.steps + own), offset = _mm256_broadcast_ss(x.offsets + own);
        const __m256 sum = _mm256_broadcast_ss(x.sums + own);
#pragma GCC unroll 4
        for (int i = 0; i < kRegisters; ++i) {
          const __m256 scale = _mm256_loadu_ps(lanes + i * kFloats);
          whole[t][i] = _mm256_fmadd_ps(sum, scale, whole[t][i]);
          set[t][i] = _mm256_fmadd_ps(_mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i]), step, offset), scale, set[t][i]);
        }
      }
    }
  }
  const uint16_t *levels = p.levels + 2 * row;
  for (int i = 0; i < kRegisters; ++i) {
    for (int t = 0; t < TOKENS; ++t) {
      float all[kFloats], ones[kFloats];
      _mm256_storeu_ps(all, whole[t][i]);
      _mm256_storeu_ps(ones, set[t][i]);
      for (int lane = 0; lane < kFloats; ++lane) {
        const int r = row_in(i, lane);
        if (r >= rows) continue;
        const float low = half_to_float(levels[2 * r]), high = half_to_float(levels[2 * r + 1]);
        p.sums[(row + r) * p.tokens + t] = low * all[lane] + (high - low) * ones[lane];
      }
    }
  }
}

// The levels of a row in digits, for codes in four bits of an index, and what they stand for.
struct level_digits {
  __m256i tables[2];  // 2 bits: of the lower code and of the upper one; 4 bits: the lower digit and the upper one
  float least, step;
};

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
    found.tables[0] = _mm256_broadcastd_epi32(all);
    found.tables[1] = _mm256_broadcastsi128_si256(_mm_shuffle_epi8(all, upper));
  } else {
    const __m128i first = _mm_packs_epi32(numbers[0], numbers[1]),
                  second = _mm_packs_epi32(numbers[2 % kParts], numbers[3 % kParts]);
    const __m128i digit = _mm_set1_epi16(kDigit);
    const __m128i low = _mm_packus_epi16(_mm_and_si128(first, digit), _mm_and_si128(second, digit));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 7), _mm_srli_epi16(second, 7));
    found.tables[0] = _mm256_broadcastsi128_si256(low);
    found.tables[1] = _mm256_broadcastsi128_si256(high);
  }
  return found;
}

// Adds the products of 256 / BITS columns; element e of `sums` gets those of 32 / BITS of them.
template <int BITS, int TOKENS>
inline __attribute__((always_inline)) void add_levels(__m256i codes, const level_digits &levels, __m256 scale,
                                                      const integer_x &x, int64_t column, __m256 *sums) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), high = _mm256_set1_epi16(kDigit + 1);
  const __m256i index[2] = {_mm256_and_si256(codes, nibble), _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble)};
  __m256i found[4];  // 2 bits: of the places of a byte; 4 bits: of a place its two digits
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) found[i] = _mm256_shuffle_epi8(levels.tables[i % 2], index[i / 2]);
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; ++t) {
    const int8_t *own = x.bytes[BITS] + t * x.byte_stride + column;
    __m256i products[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i values = _mm256_load_si256((const __m256i *)(own + 32 * (BITS == 2 ? i : i / 2)));
      const __m256i pairs = _mm256_maddubs_epi16(found[i], values);
      products[i] = _mm256_madd_epi16(pairs, BITS == 4 && i % 2 ? high : ones);
    }
    const __m256i sum =
        _mm256_add_epi32(_mm256_add_epi32(products[0], products[1]), _mm256_add_epi32(products[2], products[3]));
    const __m256 steps = _mm256_load_ps(x.byte_steps[BITS] + (t * x.byte_stride + column) * BITS / 32);
    sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scale, steps), sums[t]);
  }
}

// One row of 2 or 4 bits.
template <int BITS, int TOKENS>
void product_by_levels(const product_rows &p, int64_t row) {
  enum { kColumns = 256 / BITS };
  const integer_x &x = *p.integers;
  const int shift = __builtin_ctz((unsigned)p.group_size);
  const int64_t groups = (p.in_features + p.group_size - 1) >> shift;
  const float *scales = p.scales + row * groups;
  const uint8_t *codes = p.codes + row * p.row_bytes;
  const level_digits levels = digits_of<BITS>(p.levels + (row << BITS));
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i group_of = _mm256_srl_epi32(_mm256_slli_epi32(lane, BITS == 2 ? 4 : 3), _mm_cvtsi32_si128(shift));
  __m256 sums[TOKENS];
  for (int t = 0; t < TOKENS; ++t) sums[t] = _mm256_setzero_ps();
  const int64_t whole = p.row_bytes / 32 * kColumns;
  int64_t k = 0;
#pragma GCC unroll 2
  for (; k < whole; k += kColumns) {
    const __m256 four = _mm256_broadcast_ps((const __m128 *)(scales + (k >> shift)));
    const __m256i word = _mm256_loadu_si256((const __m256i *)(codes + k * BITS / 8));
    _mm_prefetch((const char *)(codes + k * BITS / 8 + kAhead), _MM_HINT_T0);
    add_levels<BITS, TOKENS>(word, levels, _mm256_permutevar8x32_ps(four, group_of), x, k, sums);
  }
  if (p.row_bytes % 32) {  // the last 16 bytes
    const __m256 four = _mm256_broadcast_ps((const __m128 *)(scales + (k >> shift)));
    const __m256i word = _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)(codes + k * BITS / 8)));
    add_levels<BITS, TOKENS>(word, levels, _mm256_permutevar8x32_ps(four, group_of), x, k, sums);
  }
  for (int t = 0; t < TOKENS; ++t) {
    float whole_x = 0;
    const float *own = x.byte_sums + t * groups;
    __m256 wide = _mm256_setzero_ps();
    int64_t group = 0;
    for (; group + kFloats <= groups; group += kFloats) {
      wide = _mm256_fmadd_ps(_mm256_loadu_ps(scales + group), _mm256_loadu_ps(own + group), wide);
    }
    for (; group < groups; ++group) whole_x += scales[group] * own[group];
    p.sums[row * p.tokens + t] = levels.least * (whole_x + sum_of(wide)) + levels.step * sum_of(sums[t]);
  }
}

template <int TOKENS>
void product_of_integers(const product_rows &p) {
  if (p.bits == 1) {
    for (int64_t row = 0; row < p.rows; row += kByteRows) product_by_bytes<TOKENS>(p, row);
  } else if (p.bits == 2) {
    for (int64_t row = 0; row < p.rows; ++row) product_by_levels<2, TOKENS>(p, row);
  } else {
    for (int64_t row = 0; row < p.rows; ++row) product_by_levels<4, TOKENS>(p, row);
  }
}

void product_or_integers(const product_rows &p) {
  if (!p.integers) return product(p);
  if (p.tokens == 1) return product_of_integers<1>(p);
  if (p.tokens == 2) return product_of_integers<2>(p);
  if (p.tokens == 3) return product_of_integers<3>(p);
  product_of_integers<4>(p);
}

}  // namespace
