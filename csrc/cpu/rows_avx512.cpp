#if defined(__x86_64__)
#include "rows.inl"
#include "product.inl"
#include "decoding.inl"
#include "lookup.inl"
#include "integers.inl"

const row_kernels rows_avx512 = {
    "avx512", quantize_row,        dequantize_row, load_scales, product_or_tables, make_tables, 4, 2,
    round_x,  product_in_integers, add_norm,       attend,      dense_row};
#endif
