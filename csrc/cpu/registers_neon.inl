// Registers of ARM for registers.inl, where each function is said what it does for x86 too: one quarter is the whole.
// Words and halves stand in the same type as bytes, so that the loops above them have one text.

namespace {

typedef uint8x16_t bytes;
enum { kRegister = 16, kRowsAtOnce = 1 };

bytes load_bytes(const void *from) { return vld1q_u8((const uint8_t *)from); }
bytes load_first_bytes(const void *from, int64_t) { return load_bytes(from); }  // rows end on a whole register
template <class Element>
inline __attribute__((always_inline)) bytes load_quarters(const Element *const *rows, int64_t first) {
  return load_bytes(rows[0] + first);
}
floats as_floats(bytes v) { return vreinterpretq_f32_u8(v); }
floats load_first(const float *from, int64_t count) {
  float own[kLanes] = {0};
  memcpy(own, from, sizeof(float) * (size_t)(count < kLanes ? count : (int64_t)kLanes));
  return load(own);
}
floats permuted(floats v, bytes index) { return as_floats(vqtbl1q_u8(vreinterpretq_u8_f32(v), index)); }
floats load_for_lanes(const float *from) { return load(from); }

bytes repeated_byte(uint8_t value) { return vdupq_n_u8(value); }
bytes load_table(const uint8_t *from) { return load_bytes(from); }
bytes look_up(bytes table, bytes index) { return vqtbl1q_u8(table, index); }
bytes upper_nibbles(bytes v) { return vshrq_n_u8(v, 4); }
uint16x8_t halves_of(bytes v) { return vreinterpretq_u16_u8(v); }
bytes add_bytes(bytes a, bytes b) { return vaddq_u8(a, b); }
bytes add_halves(bytes a, bytes b) { return vreinterpretq_u8_u16(vaddq_u16(halves_of(a), halves_of(b))); }
bytes upper_bytes(bytes halves) { return vreinterpretq_u8_u16(vshrq_n_u16(halves_of(halves), 8)); }
bytes without_upper(bytes halves, bytes odd) {
  return vreinterpretq_u8_u16(vsubq_u16(halves_of(halves), vshlq_n_u16(halves_of(odd), 8)));
}
void join_digits(bytes low, bytes high, bytes *words) {
  const uint16x8_t a = halves_of(low), b = halves_of(high);
  words[0] = vreinterpretq_u8_u32(vmlal_n_u16(vmovl_u16(vget_low_u16(a)), vget_low_u16(b), 128));
  words[1] = vreinterpretq_u8_u32(vmlal_n_u16(vmovl_u16(vget_high_u16(a)), vget_high_u16(b), 128));
}
bytes join_words(bytes low, bytes high) {
  const uint32x4_t above = vshlq_n_u32(vreinterpretq_u32_u8(high), 6);
  return vreinterpretq_u8_u32(vaddq_u32(vreinterpretq_u32_u8(low), above));
}
bytes interleaved_lower(bytes a, bytes b) { return vzip1q_u8(a, b); }
bytes interleaved_upper(bytes a, bytes b) { return vzip2q_u8(a, b); }
floats interleaved_lower(floats a, floats b) { return vzip1q_f32(a, b); }
floats interleaved_upper(floats a, floats b) { return vzip2q_f32(a, b); }
floats to_floats(bytes words) { return vcvtq_f32_s32(vreinterpretq_s32_u8(words)); }
floats filled(float value) { return vdupq_n_f32(value); }
floats multiplied(floats a, floats b) { return vmulq_f32(a, b); }
void store(float *to, floats v) { vst1q_f32(to, v); }

bytes lane_groups(int log_columns, int log_group) {
  uint8_t index[kRegister];
  for (int i = 0; i < kRegister; ++i) index[i] = (uint8_t)(4 * (((i / 4) << log_columns) >> log_group) + i % 4);
  return vld1q_u8(index);
}

#if defined(__ARM_FEATURE_DOTPROD)
bytes add_dot(bytes sum, bytes a, bytes b) {
  const int8x16_t left = vreinterpretq_s8_u8(a), right = vreinterpretq_s8_u8(b);
  return vreinterpretq_u8_s32(vdotq_s32(vreinterpretq_s32_u8(sum), left, right));
}
bytes dot(bytes a, bytes b) { return add_dot(repeated_byte(0), a, b); }
bytes dot_of_two(bytes a, bytes b, bytes c, bytes d) { return add_dot(dot(a, b), c, d); }
#else
// Two products have a sum of 16 bits, but they must be of neighbours.
int16x8_t pairs_of_products(bytes a, bytes b) {
  const int8x16_t left = vreinterpretq_s8_u8(a), right = vreinterpretq_s8_u8(b);
  return vpaddq_s16(vmull_s8(vget_low_s8(left), vget_low_s8(right)), vmull_high_s8(left, right));
}
bytes dot(bytes a, bytes b) { return vreinterpretq_u8_s32(vpaddlq_s16(pairs_of_products(a, b))); }
bytes add_dot(bytes sum, bytes a, bytes b) {
  return vreinterpretq_u8_s32(vpadalq_s16(vreinterpretq_s32_u8(sum), pairs_of_products(a, b)));
}
bytes dot_of_two(bytes a, bytes b, bytes c, bytes d) {
  return vreinterpretq_u8_s32(vpaddlq_s16(vaddq_s16(pairs_of_products(a, b), pairs_of_products(c, d))));
}
#endif

}  // namespace
