#if defined(__x86_64__)
#include "rows.inl"

const row_kernels rows_avx2 = {quantize_row, dequantize_row};
#endif
