// Rows of 1 bit by tables of bytes; included by integers.inl, which says what for.

namespace {

enum { kByteRows = kRegister, kParts = 4, kBytesAtOnce = 16, kLineBytes = 64 };

// Row of element `lane` of register `number` that `look_up_bytes` leaves.
int row_in(int number, int lane) { return (number & 1) * 8 + (number >> 1) + lane / 4 * 16 + lane % 4 * 2; }

// Turns the index of a byte by two bits: that of register i, byte j of 16 is 16 i + j. Four registers come from four.
inline __attribute__((always_inline)) void turn(int i, bytes a, bytes b, bytes c, bytes d, bytes *to) {
  const bytes first = WIDE(unpacklo_epi8)(a, c), second = WIDE(unpackhi_epi8)(a, c);
  const bytes third = WIDE(unpacklo_epi8)(b, d), fourth = WIDE(unpackhi_epi8)(b, d);
  to[4 * i] = WIDE(unpacklo_epi8)(first, third);
  to[4 * i + 1] = WIDE(unpackhi_epi8)(first, third);
  to[4 * i + 2] = WIDE(unpacklo_epi8)(second, fourth);
  to[4 * i + 3] = WIDE(unpackhi_epi8)(second, fourth);
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
  const auto table = [&](int at) { return repeated(_mm_load_si128((const __m128i *)(tables + at))); };
  // of each digit: 16-bit words of two bytes as one number, and of their upper bytes
  bytes low = bytes{}, low_odd = low, high = low, high_odd = low;
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i, tables += 64) {
    const bytes first = lower_nibbles(bits[i]), second = upper_nibbles(bits[i]);
    const bytes lower = WIDE(add_epi8)(WIDE(shuffle_epi8)(table(0), first), WIDE(shuffle_epi8)(table(32), second));
    const bytes upper = WIDE(add_epi8)(WIDE(shuffle_epi8)(table(16), first), WIDE(shuffle_epi8)(table(48), second));
    low = WIDE(add_epi16)(low, lower);
    low_odd = WIDE(add_epi16)(low_odd, WIDE(srli_epi16)(lower, 8));
    high = WIDE(add_epi16)(high, upper);
    high_odd = WIDE(add_epi16)(high_odd, WIDE(srli_epi16)(upper, 8));
  }
  low = WIDE(sub_epi16)(low, WIDE(slli_epi16)(low_odd, 8));
  high = WIDE(sub_epi16)(high, WIDE(slli_epi16)(high_odd, 8));
  const bytes digits = WIDE(set1_epi32)(1 | (kDigit + 1) << 16);
  sums[0] = WIDE(madd_epi16)(WIDE(unpacklo_epi16)(low, high), digits);
  sums[1] = WIDE(madd_epi16)(WIDE(unpackhi_epi16)(low, high), digits);
  sums[2] = WIDE(madd_epi16)(WIDE(unpacklo_epi16)(low_odd, high_odd), digits);
  sums[3] = WIDE(madd_epi16)(WIDE(unpackhi_epi16)(low_odd, high_odd), digits);
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
        b[2 * i] = WIDE(unpacklo_ps)(a[i], a[i + 2]);
        b[2 * i + 1] = WIDE(unpackhi_ps)(a[i], a[i + 2]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        WIDE(storeu_ps)(lanes + (group + 2 * i) * kByteRows, WIDE(unpacklo_ps)(b[i], b[i + 2]));
        WIDE(storeu_ps)(lanes + (group + 2 * i + 1) * kByteRows, WIDE(unpackhi_ps)(b[i], b[i + 2]));
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
    if (first % kLineBytes == 0) {  // the processor does not see where so many rows lead, and which come after them
      for (int r = 0; r < kByteRows; ++r) {
        _mm_prefetch((const char *)(starts[r] + first + kLineBytes), _MM_HINT_T0);
        _mm_prefetch((const char *)(starts[r] + first + kByteRows * p.row_bytes), _MM_HINT_T1);
      }
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
      WIDE(storeu_ps)(all, whole[t][i]);
      WIDE(storeu_ps)(ones, set[t][i]);
      for (int lane = 0; lane < kLanes; ++lane) {
        const int r = row_in(i, lane);
        if (r >= rows) continue;
        const float low = half_to_float(levels[2 * r]), high = half_to_float(levels[2 * r + 1]);
        p.sums[(row + r) * p.tokens + t] = low * all[lane] + (high - low) * ones[lane];
      }
    }
  }
}

}  // namespace
