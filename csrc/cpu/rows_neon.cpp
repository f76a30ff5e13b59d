#if defined(__aarch64__)
#include "rows.inl"
#include "product.inl"
#include "decoding.inl"

const row_kernels rows_neon = {"neon", quantize_row, dequantize_row, load_scales, product, nullptr,  0,
                               0,      nullptr,      nullptr,        add_norm,    attend,  dense_row};
#endif
