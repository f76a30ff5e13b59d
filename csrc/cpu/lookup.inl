// Products with few tokens by tables of partial sums, for 1 and 2 bits; included after product.inl by rows_avx512.cpp.
//
// Four columns of x have 16 sums of a subset of them. They lie in one register, and the same four bits of sixteen rows,
// one row in a lane, choose among them by one permutation: 64 weights of 1 bit are a shift, a permutation and an
// addition. The sums of a group are multiplied with the rows' scales, and at the end of a row with its levels:
//   1 bit:  w = l0 + (l1 - l0) b
//   2 bits: w = l0 + (l1 - l0) b0 + (l2 - l0) b1 + (l3 - l2 - l1 + l0) b0 b1
// Codes lie row by row: 64 bytes of 16 rows are transposed first, at a sixth of the cost of what follows.

namespace {

enum { kLookups = 8, kPlanes = 4 };  // tables of a unit; sums of a 2-bit row: x, b0, b1, b0 b1

void transpose(__m512i *rows) {
  __m512i pairs[16], quads[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    rows[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    rows[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

// Rows of `stride` bytes, 64 bytes of each from `first` on as far as it has `bytes`, to 16 columns. Rows from `count`
// on repeat the last one.
void load_columns(const void *from, int64_t stride, int64_t count, int64_t first, int64_t bytes, __m512i *columns) {
  const int64_t words = (bytes - first) / 4;
  const __mmask16 there = (__mmask16)(words >= 16 ? 0xffff : (1u << words) - 1);
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) {
    const int64_t row = r < count ? r : count - 1;
    columns[r] = _mm512_maskz_loadu_epi32(there, (const uint8_t *)from + row * stride + first);
  }
  transpose(columns);
}

// For each unit of x [tokens, x_stride] kLookups tables for each token. The four columns of a table of 1-bit rows are
// neighbours; the bits of 2-bit codes come from two words in turn, so there they are i, i + 16, i + 1 and i + 17.
void make_tables(int bits, const float *x, int64_t x_stride, int64_t tokens, float *tables) {
  for (int64_t k = 0; k < x_stride; k += kUnit) {
    for (int j = 0; j < kLookups; ++j) {
      const int second = bits == 1 ? 1 : 16, third = bits == 1 ? 2 : 1, start = bits == 1 ? 4 * j : 2 * j;
      for (int64_t t = 0; t < tokens; ++t, tables += kLanes) {
        const float *own = x + t * x_stride + k + start;
        const __m512 low = _mm512_add_ps(_mm512_maskz_broadcastss_ps(0xaaaa, _mm_load_ss(own)),
                                         _mm512_maskz_broadcastss_ps(0xcccc, _mm_load_ss(own + second)));
        const __m512 high = _mm512_add_ps(_mm512_maskz_broadcastss_ps(0xf0f0, _mm_load_ss(own + third)),
                                          _mm512_maskz_broadcastss_ps(0xff00, _mm_load_ss(own + second + third)));
        _mm512_store_ps(tables, _mm512_add_ps(low, high));
      }
    }
  }
}

// Sums of one group: planes[1..] of 16 rows, for each token.
template <int BITS, int TOKENS>
void look_up(const __m512i *columns, const float *tables, int units, __m512 sums[][TOKENS]) {
  enum { kBitPlanes = BITS == 1 ? 1 : 3 };
  for (int unit = 0; unit < units; ++unit) {
    __m512i bits[kBitPlanes];
    if (BITS == 1) {
      bits[0] = columns[unit];
    } else {
      const __m512i low = columns[2 * unit], high = columns[2 * unit + 1], even = _mm512_set1_epi32(0x55555555);
      // bits of `even` from the first, the others from the second
      bits[0] = _mm512_ternarylogic_epi32(even, low, _mm512_slli_epi32(high, 1), 0xca);
      bits[1 % kBitPlanes] = _mm512_ternarylogic_epi32(even, _mm512_srli_epi32(low, 1), high, 0xca);
      bits[2 % kBitPlanes] = _mm512_and_si512(bits[0], bits[1 % kBitPlanes]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kLookups; ++j) {
#pragma GCC unroll 3
      for (int plane = 0; plane < kBitPlanes; ++plane) {
        const __m512i index = _mm512_srli_epi32(bits[plane], 4 * j);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) {
          const __m512 table = _mm512_load_ps(tables + ((unit * kLookups + j) * TOKENS + t) * kLanes);
          sums[plane][t] = _mm512_add_ps(sums[plane][t], _mm512_permutexvar_ps(index, table));
        }
      }
    }
  }
}

// Level i of each of 16 rows, in lanes; 2^bits each.
template <int BITS>
void load_levels(const uint16_t *levels, int64_t rows, __m512 *out) {
  __m512 raw[1 << BITS];
  for (int i = 0; i < 1 << BITS; ++i) {
    const int64_t left = (rows << BITS) - i * kLanes;
    const __mmask16 there = (__mmask16)(left >= kLanes ? 0xffff : left <= 0 ? 0 : (1u << left) - 1);
    raw[i] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, levels + i * kLanes));
  }
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i places = _mm512_slli_epi32(lane, BITS);  // of level 0 among the raw ones, modulo 32
  for (int i = 0; i < 1 << BITS; ++i) {
    const __m512i index = _mm512_add_epi32(places, _mm512_set1_epi32(i));
    out[i] = _mm512_permutex2var_ps(raw[0], index, raw[1]);
    if (BITS == 2) {
      const __m512 upper = _mm512_permutex2var_ps(raw[2 % (1 << BITS)], index, raw[3 % (1 << BITS)]);
      out[i] = _mm512_mask_blend_ps(0xff00, out[i], upper);
    }
  }
}

template <int BITS, int TOKENS>
void product_by_tables(const product_rows &p) {
  enum { kBitPlanes = BITS == 1 ? 1 : 3, kChunk = 512 / BITS, kBlocks = kProductRows / kLanes };
  const int64_t groups = (p.in_features + p.group_size - 1) / p.group_size, blocks = (p.rows + kLanes - 1) / kLanes;
  const int64_t lanes_stride = (groups + kLanes - 1) / kLanes * kLanes * kLanes;
  __m512 totals[kBlocks][kPlanes][TOKENS];
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = block * kLanes;
    for (int64_t group = 0; group < groups; group += kLanes) {
      __m512i columns[16];
      load_columns(p.scales + row * groups, groups * 4, p.rows - row, group * 4, groups * 4, columns);
      float *lanes = p.lanes + block * lanes_stride + group * kLanes;
      for (int i = 0; i < kLanes; ++i) _mm512_store_si512(lanes + i * kLanes, columns[i]);
    }
    for (int plane = 0; plane < kPlanes; ++plane) {
      for (int t = 0; t < TOKENS; ++t) totals[block][plane][t] = _mm512_setzero_ps();
    }
  }
  // A chunk's tables stay in the first cache while all rows pass.
  for (int64_t chunk = 0; chunk < p.in_features; chunk += kChunk) {
    const int64_t end = chunk + kChunk < p.in_features ? chunk + kChunk : p.in_features;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = block * kLanes;
      __m512i columns[16];
      load_columns(p.codes + row * p.row_bytes, p.row_bytes, p.rows - row, chunk * BITS / 8, p.row_bytes, columns);
      // The processor does not see where 16 rows lead: the next block's, or the next chunk of the first one's.
      const uint8_t *next = p.codes + (block + 1 < blocks ? (row + kLanes) * p.row_bytes + chunk * BITS / 8
                                                          : (chunk + kChunk) * BITS / 8);
      for (int r = 0; r < kLanes; ++r) _mm_prefetch((const char *)(next + r * p.row_bytes), _MM_HINT_T0);
      __m512 own[1 + kBitPlanes][TOKENS];
      for (int plane = 0; plane <= kBitPlanes; ++plane) {
        for (int t = 0; t < TOKENS; ++t) own[plane][t] = totals[block][plane][t];
      }
      for (int64_t k = chunk; k < end; k += p.group_size) {
        const int64_t left = end - k < p.group_size ? end - k : p.group_size, group = k / p.group_size;
        __m512 sums[kBitPlanes][TOKENS];
        for (int plane = 0; plane < kBitPlanes; ++plane) {
          for (int t = 0; t < TOKENS; ++t) sums[plane][t] = _mm512_setzero_ps();
        }
        look_up<BITS, TOKENS>(columns + (k - chunk) * BITS / 32, p.tables + k / 4 * TOKENS * kLanes,
                              (int)((left + kUnit - 1) / kUnit), sums);
        const __m512 scale = _mm512_load_ps(p.lanes + block * lanes_stride + group * kLanes);
        for (int t = 0; t < TOKENS; ++t) {
          own[0][t] = _mm512_fmadd_ps(_mm512_set1_ps(p.group_sums[t * groups + group]), scale, own[0][t]);
          for (int plane = 0; plane < kBitPlanes; ++plane) {
            own[1 + plane][t] = _mm512_fmadd_ps(sums[plane][t], scale, own[1 + plane][t]);
          }
        }
      }
      for (int plane = 0; plane <= kBitPlanes; ++plane) {
        for (int t = 0; t < TOKENS; ++t) totals[block][plane][t] = own[plane][t];
      }
    }
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = block * kLanes, rows = p.rows - row < kLanes ? p.rows - row : (int64_t)kLanes;
    __m512 level[1 << BITS];
    load_levels<BITS>(p.levels + (row << BITS), rows, level);
    for (int t = 0; t < TOKENS; ++t) {
      const __m512 *total[kPlanes] = {totals[block][0] + t, totals[block][1] + t, totals[block][2] + t,
                                      totals[block][3] + t};
      __m512 sum = _mm512_fmadd_ps(_mm512_sub_ps(level[1], level[0]), *total[1], _mm512_mul_ps(level[0], *total[0]));
      if (BITS == 2) {
        const __m512 both = _mm512_sub_ps(level[3 % (1 << BITS)], level[2 % (1 << BITS)]);
        sum = _mm512_fmadd_ps(_mm512_sub_ps(level[2 % (1 << BITS)], level[0]), *total[2], sum);
        sum = _mm512_fmadd_ps(_mm512_sub_ps(both, _mm512_sub_ps(level[1], level[0])), *total[3], sum);
      }
      float out[kLanes];
      _mm512_storeu_ps(out, sum);
      for (int64_t r = 0; r < rows; ++r) p.sums[(row + r) * p.tokens + t] = out[r];
    }
  }
}

template <int BITS>
void product_by_tables(const product_rows &p) {
  if (p.tokens == 1) return product_by_tables<BITS, 1>(p);
  if (p.tokens == 2) return product_by_tables<BITS, 2>(p);
  if (p.tokens == 3) return product_by_tables<BITS, 3>(p);
  product_by_tables<BITS, 4>(p);
}

void product_or_tables(const product_rows &p) {
  if (!p.tables) return product(p);
  if (p.bits == 1) return product_by_tables<1>(p);
  product_by_tables<2>(p);
}

}  // namespace
