#include "rows.inl"

const row_kernels rows_generic = {quantize_row, dequantize_row};
