// Registers of x86 for registers.inl. WIDE(name) is the instruction of that name for the widest registers.

namespace {

#if defined(__AVX512BW__)
#define WIDE(name) _mm512_##name
typedef __m512i bytes;
enum { kRegister = 64, kRowsAtOnce = 4 };

bytes load_bytes(const void *from) { return _mm512_loadu_si512(from); }
// The first `count` of them, a multiple of 16, and zeros.
bytes load_first_bytes(const void *from, int64_t count) {
  return _mm512_maskz_loadu_epi32((__mmask16)((1u << count / 4) - 1), from);
}
bytes repeated(__m128i quarter) { return _mm512_broadcast_i32x4(quarter); }
// Element `first` and what follows of rows 0, 16, 32 and 48 (floats: 0, 4, 8 and 12), 16 bytes of each.
template <class Element>
inline __attribute__((always_inline)) bytes load_quarters(const Element *const *rows, int64_t first) {
  enum { kApart = 16 / sizeof(Element) };
  const auto row = [&](int i) { return _mm_loadu_si128((const __m128i *)(rows[i * kApart] + first)); };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(row(2)), row(3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
floats as_floats(bytes v) { return _mm512_castsi512_ps(v); }
floats load_first(const float *from, int64_t count) {
  return _mm512_maskz_loadu_ps((__mmask16)(count >= kLanes ? 0xffff : (1u << count) - 1), from);
}
bytes lane_numbers() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }
// Float index[lane] of v, whose first eight alone are chosen from.
floats permuted(floats v, bytes index) { return _mm512_permutexvar_ps(index, v); }
floats load_for_lanes(const float *from) { return _mm512_castps256_ps512(_mm256_loadu_ps(from)); }

#else
#define WIDE(name) _mm256_##name
typedef __m256i bytes;
enum { kRegister = 32, kRowsAtOnce = 1 };

bytes load_bytes(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
bytes load_first_bytes(const void *from, int64_t) {  // it can be 16 alone
  return _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)from));
}
bytes repeated(__m128i half) { return _mm256_broadcastsi128_si256(half); }
template <class Element>
inline __attribute__((always_inline)) bytes load_quarters(const Element *const *rows, int64_t first) {
  enum { kApart = 16 / sizeof(Element) };
  const auto row = [&](int i) { return _mm_loadu_si128((const __m128i *)(rows[i * kApart] + first)); };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
}
floats as_floats(bytes v) { return _mm256_castsi256_ps(v); }
bytes lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
floats load_first(const float *from, int64_t count) {
  const __m256i most = _mm256_set1_epi32(count > kLanes ? (int)kLanes : (int)count);
  return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(most, lane_numbers()));
}
floats permuted(floats v, bytes index) { return _mm256_permutevar8x32_ps(v, index); }
floats load_for_lanes(const float *from) { return _mm256_loadu_ps(from); }
#endif

bytes repeated_byte(uint8_t value) { return WIDE(set1_epi8)((char)value); }
bytes load_table(const uint8_t *from) { return repeated(_mm_load_si128((const __m128i *)from)); }
bytes look_up(bytes table, bytes index) { return WIDE(shuffle_epi8)(table, index); }
bytes upper_nibbles(bytes v) { return WIDE(srli_epi16)(v, 4) & repeated_byte(15); }
bytes add_bytes(bytes a, bytes b) { return WIDE(add_epi8)(a, b); }
bytes add_halves(bytes a, bytes b) { return WIDE(add_epi16)(a, b); }
bytes upper_bytes(bytes halves) { return WIDE(srli_epi16)(halves, 8); }
// Halves less their upper bytes, of which sums stand in `odd`.
bytes without_upper(bytes halves, bytes odd) { return WIDE(sub_epi16)(halves, WIDE(slli_epi16)(odd, 8)); }
// low + 128 high as words, of the lower four halves of each quarter and of the upper four.
void join_digits(bytes low, bytes high, bytes *words) {
  const bytes digits = WIDE(set1_epi32)(1 | 128 << 16);
  words[0] = WIDE(madd_epi16)(WIDE(unpacklo_epi16)(low, high), digits);
  words[1] = WIDE(madd_epi16)(WIDE(unpackhi_epi16)(low, high), digits);
}
// low + 64 high
bytes join_words(bytes low, bytes high) { return WIDE(add_epi32)(low, WIDE(slli_epi32)(high, 6)); }
bytes interleaved_lower(bytes a, bytes b) { return WIDE(unpacklo_epi8)(a, b); }
bytes interleaved_upper(bytes a, bytes b) { return WIDE(unpackhi_epi8)(a, b); }
floats interleaved_lower(floats a, floats b) { return WIDE(unpacklo_ps)(a, b); }
floats interleaved_upper(floats a, floats b) { return WIDE(unpackhi_ps)(a, b); }
floats to_floats(bytes words) { return WIDE(cvtepi32_ps)(words); }
floats filled(float value) { return WIDE(set1_ps)(value); }
floats multiplied(floats a, floats b) { return WIDE(mul_ps)(a, b); }
void store(float *to, floats v) { WIDE(storeu_ps)(to, v); }

// For `permuted`, the group of each lane among those of a register whose lanes have 2^log_columns columns each.
bytes lane_groups(int log_columns, int log_group) {
  return WIDE(srl_epi32)(WIDE(slli_epi32)(lane_numbers(), log_columns), _mm_cvtsi32_si128(log_group));
}

// Sums of four products of neighbouring bytes in each word, unsigned times signed. The unsigned ones are at most 127:
// two products have a sum of 16 bits.
#if defined(__AVX512VNNI__)
bytes add_dot(bytes sum, bytes a, bytes b) { return _mm512_dpbusd_epi32(sum, a, b); }
bytes dot(bytes a, bytes b) { return add_dot(bytes{}, a, b); }
#elif defined(__AVXVNNI__)
bytes add_dot(bytes sum, bytes a, bytes b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
bytes dot(bytes a, bytes b) { return add_dot(bytes{}, a, b); }
#else
bytes sums_of_pairs(bytes halves) { return WIDE(madd_epi16)(halves, WIDE(set1_epi16)(1)); }
bytes dot(bytes a, bytes b) { return sums_of_pairs(WIDE(maddubs_epi16)(a, b)); }
bytes add_dot(bytes sum, bytes a, bytes b) { return WIDE(add_epi32)(sum, dot(a, b)); }
#endif

// dot(a, b) + dot(c, d), where the unsigned ones are at most 63: four products have a sum of 16 bits.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
bytes dot_of_two(bytes a, bytes b, bytes c, bytes d) { return add_dot(dot(a, b), c, d); }
#else
bytes dot_of_two(bytes a, bytes b, bytes c, bytes d) {
  return sums_of_pairs(add_halves(WIDE(maddubs_epi16)(a, b), WIDE(maddubs_epi16)(c, d)));
}
#endif

}  // namespace
