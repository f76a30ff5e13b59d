// Body of rows_generic.cpp, rows_avx2.cpp, rows_avx512.cpp and rows_neon.cpp: the same code under other compiler flags.
// Only `decode` has hand-written variants; the loops of the quantiser are written so that the compiler vectorises them.
// Everything is static and plain C: an inline function of the standard library would be shared by the linker among the
// files, and an AVX-512 copy of it could end up on a processor that has none.

#include "halves.h"
#include "rows.h"

#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(LOWRA_NO_VECTORS)
#include <arm_neon.h>
#endif

namespace {

enum { kAhead = 8192 };  // bytes that weights are prefetched before they are read

void load_group(const void *weight, int32_t type, int64_t start, int count, float *out) {
  for (int k = 0; k < count; ++k) out[k] = load_element(weight, type, start + k);
}

void quantize_row(const void *weight, int32_t weight_type, int64_t in_features, int64_t group_size, int bits,
                  const float *thresholds, uint8_t *codes, float *absmax) {
  const int cuts = (1 << bits) - 1, per_byte = 8 / bits;
  memset(codes, 0, (size_t)lowra_row_bytes(in_features, bits));
  float normal[LOWRA_MAX_GROUP_SIZE];
  int32_t code[LOWRA_MAX_GROUP_SIZE];
  for (int64_t start = 0, group = 0; start < in_features; start += group_size, ++group) {
    const int count = (int)(in_features - start < group_size ? in_features - start : group_size);
    load_group(weight, weight_type, start, count, normal);
    uint32_t largest = 0;  // magnitudes of floats order like their bits, and an integer maximum vectorises
    for (int k = 0; k < count; ++k) {
      const uint32_t magnitude = float_bits(normal[k]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    float scale;
    memcpy(&scale, &largest, 4);
    absmax[group] = scale;
    for (int k = 0; k < count; ++k) code[k] = 0;
    for (int cut = 0; cut < cuts; ++cut) {
      const float edge = thresholds[cut] * scale;
      for (int k = 0; k < count; ++k) code[k] += normal[k] > edge;
    }
    uint8_t *bytes = codes + start * bits / 8;  // groups are multiples of 8 codes, so each starts on a byte
    for (int k = 0; k < count; ++k) bytes[k / per_byte] |= (uint8_t)(code[k] << (k % per_byte * bits));
  }
}

// count codes of BITS bits, from number `first` on -> table[code], stored as elements of `size` bytes (2 or 4).
template <int BITS>
void decode_scalar(const uint8_t *codes, int first, int count, const uint32_t *table, int size, void *out) {
  enum { kPerByte = 8 / BITS, kMask = (1 << BITS) - 1 };
  for (int k = first; k < count; ++k) {
    const uint32_t value = table[(codes[k / kPerByte] >> (k % kPerByte * BITS)) & kMask];
    if (size == 4) {
      ((uint32_t *)out)[k] = value;
    } else {
      ((uint16_t *)out)[k] = (uint16_t)value;
    }
  }
}

#if defined(__AVX512BW__)
template <int BITS>
void decode(const uint8_t *codes, int count, const uint32_t *table, int size, void *out) {
  const __m512i entries = _mm512_loadu_si512(table);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1);
  // With 4 bits sixteen codes fill two words: lanes 0-7 shift the first, lanes 8-15 the second.
  const __m512i shift =
      _mm512_mullo_epi32(BITS == 4 ? _mm512_and_si512(lane, _mm512_set1_epi32(7)) : lane, _mm512_set1_epi32(BITS));
  int k = 0;
  for (; k + 16 <= count; k += 16) {
    uint64_t word = 0;
    memcpy(&word, codes + k * BITS / 8, 2 * BITS);
    const __m512i low = _mm512_set1_epi32((int)(uint32_t)word);
    const __m512i both = _mm512_mask_set1_epi32(low, 0xff00, (int)(uint32_t)(word >> (BITS == 4 ? 32 : 0)));
    const __m512i index = _mm512_and_si512(_mm512_srlv_epi32(BITS == 4 ? both : low, shift), mask);
    const __m512i value = _mm512_permutexvar_epi32(index, entries);
    if (size == 4) {
      _mm512_storeu_si512((uint32_t *)out + k, value);
    } else {
      _mm256_storeu_si256((__m256i *)((uint16_t *)out + k), _mm512_cvtepi32_epi16(value));
    }
  }
  decode_scalar<BITS>(codes, k, count, table, size, out);
}
#elif defined(__AVX2__)
template <int BITS>
void decode(const uint8_t *codes, int count, const uint32_t *table, int size, void *out) {
  const __m256i low = _mm256_loadu_si256((const __m256i *)table);
  const __m256i high = _mm256_loadu_si256((const __m256i *)(table + 8));
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i shift = _mm256_mullo_epi32(lane, _mm256_set1_epi32(BITS));
  const __m256i mask = _mm256_set1_epi32((1 << BITS) - 1);
  int k = 0;
  for (; k + 8 <= count; k += 8) {
    uint32_t word = 0;
    memcpy(&word, codes + k * BITS / 8, BITS);
    const __m256i index = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)word), shift), mask);
    __m256i value = _mm256_permutevar8x32_epi32(low, index);
    if (BITS == 4) {
      const __m256i upper = _mm256_cmpgt_epi32(index, _mm256_set1_epi32(7));
      value = _mm256_blendv_epi8(value, _mm256_permutevar8x32_epi32(high, index), upper);
    }
    if (size == 4) {
      _mm256_storeu_si256((__m256i *)((uint32_t *)out + k), value);
    } else {
      const __m256i narrow = _mm256_permute4x64_epi64(_mm256_packus_epi32(value, value), 0x08);
      _mm_storeu_si128((__m128i *)((uint16_t *)out + k), _mm256_castsi256_si128(narrow));
    }
  }
  decode_scalar<BITS>(codes, k, count, table, size, out);
}
#else
template <int BITS>
void decode(const uint8_t *codes, int count, const uint32_t *table, int size, void *out) {
  if (size == 4) return decode_scalar<BITS>(codes, 0, count, table, 4, out);
  decode_scalar<BITS>(codes, 0, count, table, 2, out);
}
#endif

#if defined(__AVX512BW__)
// Codes of a group as `values`, the scaled levels of its row repeated over the lanes, so that the lower BITS bits of an
// index choose and nothing is masked. Returns how many are decoded: all but what fills no register.
template <int BITS>
int decode_floats(const uint8_t *codes, int count, __m512 values, float *out) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i place = BITS == 4 ? _mm512_and_si512(lane, _mm512_set1_epi32(7)) : lane;
  const __m512i shift = _mm512_mullo_epi32(place, _mm512_set1_epi32(BITS));
  int k = 0;
  for (; k + 16 <= count; k += 16) {
    uint64_t word = 0;
    memcpy(&word, codes + k * BITS / 8, 2 * BITS);
    __m512i index = _mm512_set1_epi32((int)(uint32_t)word);
    if (BITS == 4) index = _mm512_mask_set1_epi32(index, 0xff00, (int)(uint32_t)(word >> 32));
    _mm512_storeu_ps(out + k, _mm512_permutexvar_ps(_mm512_srlv_epi32(index, shift), values));
  }
  return k;
}

// Where the lanes of 16 bits find their codes: the bytes of each, and by how much it is shifted.
struct lane_places {
  uint8_t bytes[64];
  uint16_t shifts[32];
};

constexpr lane_places places_of_lanes(int bits) {
  lane_places found{};
  for (int i = 0; i < 32; ++i) {
    const int first = bits == 4 ? i / 4 * 2 : bits == 2 ? i / 8 * 2 : i / 8;
    found.bytes[2 * i] = (uint8_t)first;
    found.bytes[2 * i + 1] = (uint8_t)(bits == 1 ? first : first + 1);
    found.shifts[i] = (uint16_t)(i % (bits == 4 ? 4 : 8) * bits);
  }
  return found;
}

// The same to bfloat16.
template <int BITS>
int decode_bfloats(const uint8_t *codes, int count, __m512 values, uint16_t *out) {
  static constexpr lane_places kPlaces = places_of_lanes(BITS);
  const __m512i order = _mm512_loadu_si512(kPlaces.bytes), shift = _mm512_loadu_si512(kPlaces.shifts);
  // float_to_bfloat
  const __m512i bits = _mm512_castps_si512(values),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 no_number = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, no_number, bits, _mm512_set1_epi32(0x400000));
  const __m256i once = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  const __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1);
  int k = 0;
  for (; k + 32 <= count; k += 32) {
    __m512i words;
    if (BITS == 4) {
      words = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(codes + k / 2)));
    } else {
      uint64_t word = 0;
      memcpy(&word, codes + k * BITS / 8, 4 * BITS);
      words = _mm512_set1_epi64((long long)word);
    }
    const __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(words, order), shift);
    _mm512_storeu_si512(out + k, _mm512_permutexvar_epi16(index, table));
  }
  return k;
}
#endif

template <int BITS>
void dequantize_bits(const uint8_t *codes, int64_t in_features, int64_t group_size, const float *scales,
                     const uint16_t *levels, void *out, int32_t out_type) {
  enum { kEntries = 1 << BITS };
  const int size = out_type == LOWRA_FLOAT32 ? 4 : 2;
  float level[16];
  for (int i = 0; i < 16; ++i) level[i] = i < kEntries ? half_to_float(levels[i]) : level[i - kEntries];
  uint32_t table[16] = {0};
  for (int64_t start = 0, group = 0; start < in_features; start += group_size, ++group) {
    const int count = (int)(in_features - start < group_size ? in_features - start : group_size);
    const uint8_t *own = codes + start * BITS / 8;
#if defined(__AVX512BW__)
    const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(level), _mm512_set1_ps(scales[group]));
    if (out_type == LOWRA_FLOAT32 && decode_floats<BITS>(own, count, values, (float *)out + start) == count) continue;
    if (out_type == LOWRA_BFLOAT16 && decode_bfloats<BITS>(own, count, values, (uint16_t *)out + start) == count)
      continue;
#endif
    // A group has at most 16 distinct values: scale and round those, not every weight.
    float value[kEntries];
    for (int i = 0; i < kEntries; ++i) value[i] = level[i] * scales[group];
    if (out_type == LOWRA_FLOAT32) {
      memcpy(table, value, sizeof(value));
    } else if (out_type == LOWRA_FLOAT16) {
      for (int i = 0; i < kEntries; ++i) table[i] = float_to_half(value[i]);
    } else {
      for (int i = 0; i < kEntries; ++i) table[i] = float_to_bfloat(value[i]);
    }
    decode<BITS>(own, count, table, size, (uint8_t *)out + start * size);
  }
}

void dequantize_row(const uint8_t *codes, int64_t in_features, int64_t group_size, int bits, const float *scales,
                    const uint16_t *levels, void *out, int32_t out_type) {
  if (bits == 4) return dequantize_bits<4>(codes, in_features, group_size, scales, levels, out, out_type);
  if (bits == 2) return dequantize_bits<2>(codes, in_features, group_size, scales, levels, out, out_type);
  dequantize_bits<1>(codes, in_features, group_size, scales, levels, out, out_type);
}

}  // namespace
