// Registers of bytes as the products in integers need them, beside the registers of floats of product.inl. WIDE(name)
// is the instruction of that name for the widest registers.

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
floats permuted(floats v, bytes index) { return _mm512_permutexvar_ps(index, v); }
floats load_first(const float *from, int64_t count) {
  return _mm512_maskz_loadu_ps((__mmask16)(count >= kLanes ? 0xffff : (1u << count) - 1), from);
}
floats load_eight(const float *from) { return _mm512_castps256_ps512(_mm256_loadu_ps(from)); }
bytes lane_numbers() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

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
floats permuted(floats v, bytes index) { return _mm256_permutevar8x32_ps(v, index); }
bytes lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
floats load_first(const float *from, int64_t count) {
  const __m256i most = _mm256_set1_epi32(count > kLanes ? (int)kLanes : (int)count);
  return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(most, lane_numbers()));
}
floats load_eight(const float *from) { return _mm256_loadu_ps(from); }
#endif

bytes lower_nibbles(bytes v) { return v & WIDE(set1_epi8)(15); }
bytes upper_nibbles(bytes v) { return lower_nibbles(WIDE(srli_epi16)(v, 4)); }
floats to_floats(bytes words) { return WIDE(cvtepi32_ps)(words); }
floats filled(float value) { return WIDE(set1_ps)(value); }

// The group of each lane among those of a register whose lanes have 2^log_columns columns each.
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
bytes dot(bytes a, bytes b) { return WIDE(madd_epi16)(WIDE(maddubs_epi16)(a, b), WIDE(set1_epi16)(1)); }
bytes add_dot(bytes sum, bytes a, bytes b) { return WIDE(add_epi32)(sum, dot(a, b)); }
#endif

}  // namespace
