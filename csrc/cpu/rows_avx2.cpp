#if defined(__x86_64__)
#include "rows.inl"
#include "product.inl"
#include "decoding.inl"
#include "integers.inl"

const row_kernels rows_avx2 = {"avx2", quantize_row, dequantize_row,      load_scales, product, nullptr,  0,
                               0,      round_x,      product_in_integers, add_norm,    attend,  dense_row};
#endif
