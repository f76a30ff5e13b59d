// Products of few tokens with x in integers; included after product.inl by the files of x86 and of ARM.
//
// 1 bit (byte_tables.inl): x in 13 bits. Four columns of it have 16 sums of a subset, offset so that none is negative;
// a sum stands as two digits of 7 bits in two tables of 16 bytes. As many rows stand in the bytes of a register, and
// four bits of each choose by one permutation of bytes; the digits of two tables are added as bytes, and these to sums
// of 16 bits.
//   w = l0 + (l1 - l0) b
//
// 2 and 4 bits (levels.inl): x in 8 bits. A permutation of bytes turns codes into levels in 7 bits (4 bits: two digits
// of 6) above the row's least one, and bytes are multiplied with those of x.
//   w = least + step (64 digit1 + digit0)

#include "registers.inl"

namespace {

enum { kDigit = 127 };

int32_t rounded(float value) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: with it added a float is an integer, rounded to even
  return (int32_t)float_bits(value + magic) - (int32_t)float_bits(magic);
}

}  // namespace

#include "byte_tables.inl"
#include "levels.inl"

namespace {

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

// Those of the columns of a register of codes that stand first in a byte of it come first, then the second ones.
template <int BITS>
void arrange_bytes(const int8_t *from, int64_t count, int8_t *to) {
  enum { kPlaces = 8 / BITS };
  for (int64_t k = 0; k < count; k += kRegister * kPlaces) {
    for (int place = 0; place < kPlaces; ++place) {
      for (int i = 0; i < kRegister; ++i) to[k + kRegister * place + i] = from[k + kPlaces * i + place];
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

template <int TOKENS>
void product_of_integers(const product_rows &p) {
  if (p.bits == 1) {
    for (int64_t row = 0; row < p.rows; row += kByteRows) product_by_bytes<TOKENS>(p, row);
  } else if (p.bits == 2) {
    product_by_levels<2, TOKENS>(p);
  } else {
    product_by_levels<4, TOKENS>(p);
  }
}

void product_in_integers(const product_rows &p) {
  if (p.tokens == 1) return product_of_integers<1>(p);
  if (p.tokens == 2) return product_of_integers<2>(p);
  if (p.tokens == 3) return product_of_integers<3>(p);
  product_of_integers<4>(p);
}

}  // namespace
