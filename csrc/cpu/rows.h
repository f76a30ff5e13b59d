// The work on one packed row, in one variant for each instruction set; codec.cpp picks one at run time.
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

struct row_kernels {
  quantize_row_fn quantize;
  dequantize_row_fn dequantize;
};

extern const row_kernels rows_generic;
#if defined(__x86_64__)
extern const row_kernels rows_avx2;
extern const row_kernels rows_avx512;
#endif

#endif
