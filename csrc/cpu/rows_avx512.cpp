#if defined(__x86_64__)
#include "rows.inl"
#include "product.inl"
#include "lookup.inl"

const row_kernels rows_avx512 = {"avx512", quantize_row, dequantize_row, load_scales, product_or_tables, make_tables, 4,
                                 4,        nullptr};
#endif
