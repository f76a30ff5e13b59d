#if defined(__x86_64__)
#include "rows.inl"

const row_kernels rows_avx512 = {quantize_row, dequantize_row};
#endif
