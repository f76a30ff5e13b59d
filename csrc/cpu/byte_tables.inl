// Rows of 1 bit by tables of bytes; included by integers.inl, which says what for.

namespace {

enum { kByteRows = kRegister, kParts = 4, kBytesAtOnce = 16, kLineBytes = 64 };

// Row of element `lane` of register `number` that `look_up_bytes` leaves.
int row_in(int number, int lane) { return (number & 1) * 8 + (number >> 1) + lane / 4 * 16 + lane % 4 * 2; }

// Turns the index of a byte by two bits: that of register i, byte j of 16 is 16 i + j. Four registers come from four.
inline __attribute__((always_inline)) void turn(int i, bytes a, bytes b, bytes c, bytes d, bytes *to) {
  const bytes first = interleaved_lower(a, c), second = interleaved_upper(a, c);
  const bytes third = interleaved_lower(b, d), fourth = interleaved_upper(b, d);
  to[4 * i] = interleaved_lower(first, third);
  to[4 * i + 1] = interleaved_upper(first, third);
  to[4 * i + 2] = interleaved_lower(second, fourth);
  to[4 * i + 3] = interleaved_upper(second, fourth);
}

// 16 bytes of kByteRows rows, from starts + first, to 16 columns: byte i of each row in register i.
inline __attribute__((always_inline)) void load_byte_columns(const uint8_t *const *starts, int64_t first,
                                                             bytes *columns) {
  const auto rows = [&](int r) { return load_quarters(starts + r, first); };
  bytes half[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) turn(i, rows(i), rows(i + 4), rows(i + 8), rows(i + 12), half);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) turn(i, half[i], half[i + 4], half[i + 8], half[i + 12], columns);
}

// Sums of kByteRows rows over `count` registers of bits, by their tables.
inline __attribute__((always_inline)) void look_up_bytes(const bytes *bits, const uint8_t *tables, int count,
                                                         bytes *sums) {
  const auto table = [&](int at) { return load_table(tables + at); };
  // of each digit: 16-bit words of two bytes as one number, and of their upper bytes
  bytes low = repeated_byte(0), low_odd = low, high = low, high_odd = low;
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i, tables += 64) {
    const bytes first = lower_nibbles(bits[i]), second = upper_nibbles(bits[i]);
    const bytes lower = add_bytes(look_up(table(0), first), look_up(table(32), second));
    const bytes upper = add_bytes(look_up(table(16), first), look_up(table(48), second));
    low = add_halves(low, lower);
    low_odd = add_halves(low_odd, upper_bytes(lower));
    high = add_halves(high, upper);
    high_odd = add_halves(high_odd, upper_bytes(upper));
  }
  join_digits(without_upper(low, low_odd), without_upper(high, high_odd), sums);
  join_digits(low_odd, high_odd, sums + 2);
}

// Scales of kByteRows rows, the last one's where there are fewer, to [groups, kByteRows] in the order of row_in.
void arrange_scales(const float *scales, int64_t groups, int64_t rows, float *lanes) {
  for (int number = 0; number < kParts; ++number, lanes += kLanes) {
    const float *own[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = row_in(number, lane);
      own[lane] = scales + (row < rows ? row : rows - 1) * groups;
    }
    int64_t group = 0;
    for (; group + 4 <= groups; group += 4) {
      floats a[4], b[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {  // every fourth lane's four scales, in quarters
        a[i] = as_floats(load_quarters(own + i, group));
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        b[2 * i] = interleaved_lower(a[i], a[i + 2]);
        b[2 * i + 1] = interleaved_upper(a[i], a[i + 2]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        store(lanes + (group + 2 * i) * kByteRows, interleaved_lower(b[i], b[i + 2]));
        store(lanes + (group + 2 * i + 1) * kByteRows, interleaved_upper(b[i], b[i + 2]));
      }
    }
    for (; group < groups; ++group) {
      for (int lane = 0; lane < kLanes; ++lane) lanes[group * kByteRows + lane] = own[lane][group];
    }
  }
}

// Up to kByteRows rows of 1 bit from `row` on.
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
  floats whole[TOKENS][kParts], set[TOKENS][kParts];  // scaled sums of x, and of x where the bit is set
  for (int t = 0; t < TOKENS; ++t) {
    for (int i = 0; i < kParts; ++i) whole[t][i] = set[t][i] = zeros();
  }
  for (int64_t chunk = 0; chunk < p.in_features; chunk += 8 * kBytesAtOnce) {
    const int64_t first = chunk / 8;
    // the next rows lie behind these; the processor does not see it, for it sees as many streams as there are rows
    for (int i = 0; i < kByteRows * kBytesAtOnce; i += kLineBytes) {
      __builtin_prefetch(starts[0] + kByteRows * (p.row_bytes + first) + i);
    }
    bytes bits[kBytesAtOnce];
    load_byte_columns(starts, first, bits);
    const int64_t end = chunk + 8 * kBytesAtOnce < p.x_stride ? chunk + 8 * kBytesAtOnce : p.x_stride;
    for (int64_t k = chunk; k < end; k += columns) {
      const int64_t left = end - k < columns ? end - k : columns, part = k / columns;
      const float *lanes = p.lanes + part / per_group * kByteRows;
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) {
        bytes sums[kParts];
        look_up_bytes(bits + (k - chunk) / 8, x.tables + 8 * (t * p.x_stride + k), (int)(left / 8), sums);
        const int64_t own = t * parts + part;
        const floats step = filled(x.steps[own]), offset = filled(x.offsets[own]), sum = filled(x.sums[own]);
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) {
          const floats scale = load(lanes + i * kLanes);
          whole[t][i] = fused(sum, scale, whole[t][i]);
          set[t][i] = fused(fused(to_floats(sums[i]), step, offset), scale, set[t][i]);
        }
      }
    }
  }
  const uint16_t *levels = p.levels + 2 * row;
  for (int i = 0; i < kParts; ++i) {
    for (int t = 0; t < TOKENS; ++t) {
      float all[kLanes], ones[kLanes];
      store(all, whole[t][i]);
      store(ones, set[t][i]);
      for (int lane = 0; lane < kLanes; ++lane) {
        const int r = row_in(i, lane);
        if (r >= rows) continue;
        const float low = half_to_float(levels[2 * r]), high = half_to_float(levels[2 * r + 1]);
        p.sums[(row + r) * p.tokens + t] = low * all[lane] + (high - low) * ones[lane];
      }
    }
  }
}

// For every 8 columns of x [x_stride] in 13 bits the first digits and the second of the lower four, and of the upper.
#if defined(__aarch64__)
void make_byte_tables(const int16_t *x, int64_t x_stride, uint8_t *tables) {
  for (int64_t k = 0; k < x_stride; k += 4, tables += 32) {
    int least = 0;
    uint16x8_t lower = vdupq_n_u16(0), upper = lower;  // entries 0 to 7, and those with the fourth column
    for (int i = 0; i < 4; ++i) {
      static const uint16_t kChosen[4][8] = {{0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff},
                                             {0, 0, 0xffff, 0xffff, 0, 0, 0xffff, 0xffff},
                                             {0, 0, 0, 0, 0xffff, 0xffff, 0xffff, 0xffff},
                                             {0}};
      const uint16x8_t value = vdupq_n_u16((uint16_t)x[k + i]), chosen = vandq_u16(value, vld1q_u16(kChosen[i]));
      lower = vaddq_u16(lower, chosen);
      upper = vaddq_u16(upper, i < 3 ? chosen : value);
      least += x[k + i] < 0 ? x[k + i] : 0;
    }
    lower = vsubq_u16(lower, vdupq_n_u16((uint16_t)least));
    upper = vsubq_u16(upper, vdupq_n_u16((uint16_t)least));
    const uint8x16_t digit = vdupq_n_u8(kDigit);
    vst1q_u8(tables, vandq_u8(vcombine_u8(vmovn_u16(lower), vmovn_u16(upper)), digit));
    vst1q_u8(tables + 16, vcombine_u8(vshrn_n_u16(lower, 7), vshrn_n_u16(upper, 7)));
  }
}
#else
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
#endif

}  // namespace
