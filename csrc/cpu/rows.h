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

// Consecutive packed rows of one precision, and what they are multiplied with.
struct product_rows {
  const uint8_t *codes;  // of the first row
  int64_t row_bytes;
  const uint16_t *levels;
  const float *scales;  // [rows, groups]
  int bits;
  int64_t rows, in_features, group_size, tokens;
  const float *x;  // [tokens, x_stride], x_stride a multiple of kUnit, zeros from in_features on
  int64_t x_stride;
  const float *tables;      // of make_tables for these bits, or null
  const float *group_sums;  // [tokens, groups], of x; with tables
  float *lanes;             // [kProductRows, groups padded to kLanePadding], scratch with tables
  float *row;               // [x_stride], scratch
  float *sums;              // [rows, tokens], the result
};

using product_rows_fn = void (*)(const product_rows &part);

// Tables of x for a product with rows of 1 or 2 bits, 4 * tokens * x_stride floats on a multiple of 64 bytes.
using make_tables_fn = void (*)(int bits, const float *x, int64_t x_stride, int64_t tokens, float *tables);

constexpr int64_t kLanePadding = 16;

struct row_kernels {
  const char *name;  // as LOWRA_CPU names it
  quantize_row_fn quantize;
  dequantize_row_fn dequantize;
  load_scales_fn load_scales;
  product_rows_fn product;
  make_tables_fn make_tables;            // null where there are none
  int64_t table_tokens1, table_tokens2;  // up to which rows of 1 and of 2 bits are quicker by tables
};

extern const row_kernels rows_generic;
#if defined(__x86_64__)
extern const row_kernels rows_avx2;
extern const row_kernels rows_avx512;
#elif defined(__aarch64__)
extern const row_kernels rows_neon;
#endif

// Those of the best instruction set here, or of the one that lowra_cpu_instructions named.
const row_kernels &kernels();

#endif
