// The work on packed rows, in one variant for each instruction set; dispatch.cpp picks one at run time.
#ifndef LOWRA_CPU_ROWS_H
#define LOWRA_CPU_ROWS_H

#include "lowra.h"

// One row of K weights: `weight` of `weight_type`, `thresholds` [2^bits - 1]; writes padded codes and `absmax`
// [groups].
using quantize_row_fn = void (*)(const void *weight, int32_t weight_type, int64_t in_features, int64_t group_size,
                                 int bits, const float *thresholds, uint8_t *codes, float *absmax);

// One row of codes to `out` of `out_type`; `scales` float32 [groups], `levels` float16 bits [2^bits].
using dequantize_row_fn = void (*)(const uint8_t *codes, int64_t in_features, int64_t group_size, int bits,
                                   const float *scales, const uint16_t *levels, void *out, int32_t out_type);

// Scales [first, first + count) of a weight as float32.
using load_scales_fn = void (*)(const lowra_packed &packed, int64_t first, int64_t count, float *out);

constexpr int64_t kProductRows = 64;  // at most, that a call of product_rows_fn takes
constexpr int64_t kUnit = 32;         // weights that a product takes at once; x is padded with zeros to a multiple

constexpr int64_t kPartColumns = 128;  // at most, that share a step of x in 13 bits
constexpr int64_t kStepColumns = 16;   // that share a step of x in 8 bits
constexpr int64_t kIntegerTokens = 4;  // at most, whose x is made integers
constexpr int64_t kScalesBeyond = 7;

// x as integers q times a float32 step: q = x / step, rounded to even, and step the largest |x| of some columns over
// the largest q. For rows of 1 bit q goes up to 4095 and has a step for min(group_size, kPartColumns) columns, a part;
// for those of 2 and 4 bits up to 127, with a step for kStepColumns.
struct integer_x {
  const uint8_t *tables;  // [tokens, 8 x_stride], see make_byte_tables
  const float *steps;     // [tokens, parts]
  const float *sums;      // [tokens, parts], of q, times the step
  const float *offsets;   // [tokens, parts], of negative q, times the step: what entries of the tables are above zero

  // by bits; [tokens, byte_stride], byte_stride a multiple of 256, zeros from in_features on, in the order of
  // arrange_bytes
  const int8_t *bytes[5];
  const float *byte_steps[5];  // by bits, of each 32 / bits columns
  const float *byte_sums;      // [tokens, groups], of q times their steps
  int64_t byte_stride;
};

// Consecutive packed rows of one precision, and what they are multiplied with.
struct product_rows {
  const uint8_t *codes;  // of the first row
  int64_t row_bytes;
  const uint16_t *levels;
  const float *scales;  // [rows, groups], and kScalesBeyond more may be read
  int bits;
  int64_t rows, in_features, group_size, tokens;
  const float *x;  // [tokens, x_stride], x_stride a multiple of kUnit, zeros from in_features on
  int64_t x_stride;
  const float *tables;        // of make_tables for these bits, or null
  const float *group_sums;    // [tokens, groups], of x; with tables
  const integer_x *integers;  // or null: x is taken as it is
  float *lanes;               // [kProductRows, groups padded to kLanePadding], scratch with tables of either kind
  float *row;                 // [x_stride], scratch
  float *sums;                // [rows, tokens], the result
};

using product_rows_fn = void (*)(const product_rows &part);

// Tables of x for a product with rows of 1 or 2 bits, 4 * tokens * x_stride floats on a multiple of 64 bytes.
using make_tables_fn = void (*)(int bits, const float *x, int64_t x_stride, int64_t tokens, float *tables);

constexpr float kLargestRounded = 1e30f, kLeastRounded = 1e-30f;  // of |x|: steps and their inverses are normal numbers

// Where one token of an integer_x is written, memory of zeros; tables and bytes may be null where no rows need them.
struct rounded_token {
  uint8_t *tables;
  float *steps, *sums, *offsets;
  int16_t *parts;      // [x_stride], scratch
  int8_t *unarranged;  // [byte_stride], scratch
  int8_t *bytes[5];
  float *byte_steps[5], *byte_sums;
  int64_t byte_stride;
};

// False where an x has no steps: it is not finite, or its magnitude is none between those above.
using round_x_fn = bool (*)(const float *x, int64_t x_stride, int64_t in_features, int64_t group_size,
                            const rounded_token &out);

constexpr int64_t kLanePadding = 16;

// decoding.inl says what their scratch is.
using add_norm_fn = void (*)(const lowra_norm &norm, int32_t type, int64_t token, float *x, float *delta);
using attend_fn = void (*)(const lowra_attention &attention, int32_t type, int64_t sequence, int64_t kv_head,
                           float *scratch);
using dense_row_fn = float (*)(const void *weight, int32_t type, int64_t row, const float *x, int64_t count);

struct row_kernels {
  const char *name;  // as LOWRA_CPU names it
  quantize_row_fn quantize;
  dequantize_row_fn dequantize;
  load_scales_fn load_scales;
  product_rows_fn product;
  make_tables_fn make_tables;            // null where there are none
  int64_t table_tokens1, table_tokens2;  // up to which rows of 1 and of 2 bits are quicker by tables
  round_x_fn round_x;                    // null where products take x as it is alone
  product_rows_fn product_in_integers;   // with round_x
  add_norm_fn add_norm;
  attend_fn attend;
  dense_row_fn dense_row;
};

extern const row_kernels rows_generic;
#if defined(__x86_64__)
extern const row_kernels rows_avx2;
extern const row_kernels rows_avxvnni;
extern const row_kernels rows_avx512;
extern const row_kernels rows_avx512vnni;
#elif defined(__aarch64__)
extern const row_kernels rows_neon;
extern const row_kernels rows_neondot;
#endif

// Those of the best instruction set here, or of the one that lowra_cpu_instructions named.
const row_kernels &kernels();

#endif
