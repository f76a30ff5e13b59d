#define LOWRA_NO_VECTORS
#include "rows.inl"
#include "product.inl"
#include "decoding.inl"

const row_kernels rows_generic = {"generic", quantize_row, dequantize_row, load_scales, product, nullptr,  0,
                                  0,         nullptr,      nullptr,        add_norm,    attend,  dense_row};
