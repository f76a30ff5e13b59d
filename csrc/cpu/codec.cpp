// CPU codec: walks the rows of a packed weight on several threads; the work on one row is in rows.inl.

#include "lowra.h"
#include "checks.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

#include <cstring>
#include <vector>

namespace {

// Below this many weights per thread the start of a thread costs more than its work.
constexpr int64_t kWeightsPerThread = 1 << 16;

const row_kernels &kernels() {
#if defined(__x86_64__)
  static const row_kernels &best =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
          ? rows_avx512
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") ? rows_avx2
                                                                         : rows_generic;
  return best;
#else
  return rows_generic;
#endif
}

// Where packed row i begins in the codes and in a per-row table of 2^bits + extra entries.
struct row_place {
  int bits;
  int64_t code_offset, table_offset;
};

row_place place_of(const lowra_shape &shape, int64_t row, int extra) {
  const int64_t bytes4 = lowra_row_bytes(shape.in_features, 4), bytes2 = lowra_row_bytes(shape.in_features, 2);
  if (row < shape.rows4) return {4, row * bytes4, row * (16 + extra)};
  const int64_t codes4 = shape.rows4 * bytes4, table4 = shape.rows4 * (16 + extra);
  row -= shape.rows4;
  if (row < shape.rows2) return {2, codes4 + row * bytes2, table4 + row * (4 + extra)};
  row -= shape.rows2;
  return {1, codes4 + shape.rows2 * bytes2 + row * lowra_row_bytes(shape.in_features, 1),
          table4 + shape.rows2 * (4 + extra) + row * (2 + extra)};
}

// Whether every row is there once. In a weight of usual size this costs a thousandth of what follows.
bool is_row_order(const int32_t *order, int64_t rows) {
  std::vector<uint8_t> seen(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t row = order[i];
    if (row < 0 || row >= rows || seen[row]) return false;
    seen[row] = 1;
  }
  return true;
}

void load_scales(const lowra_packed &p, int64_t first, int64_t count, float *out) {
  if (p.scale_type == LOWRA_FLOAT32) {
    std::memcpy(out, static_cast<const float *>(p.scales) + first, sizeof(float) * count);
  } else if (p.scale_type == LOWRA_UINT8) {
    const uint8_t *root = static_cast<const uint8_t *>(p.scales);
    for (int64_t i = 0; i < count; ++i) {
      const float c = root[first + i];
      out[i] = c * c * p.scale_steps[(first + i) / LOWRA_SCALE_BLOCK];
    }
  } else {
    const uint16_t *half = static_cast<const uint16_t *>(p.scales);
    for (int64_t i = 0; i < count; ++i) {
      // float16 scales are few; the compiler's own conversion is quick enough here.
      _Float16 value;
      std::memcpy(&value, half + first + i, 2);
      out[i] = static_cast<float>(value);
    }
  }
}

}  // namespace

int lowra_format_version(void) { return LOWRA_FORMAT_VERSION; }

int lowra_interface_version(void) { return LOWRA_INTERFACE_VERSION; }

int lowra_cpu_quantize(const lowra_shape *shape, const void *weight, int32_t weight_type, const int32_t *row_order,
                       const float *thresholds, uint8_t *codes, float *absmax, int32_t threads) {
  if (!shape) return LOWRA_NULL_POINTER;
  if (lowra::bad_shape(*shape)) return LOWRA_BAD_SHAPE;
  if (!lowra::is_float_type(weight_type)) return LOWRA_BAD_TYPE;
  const int64_t rows = lowra::row_count(*shape), in_features = shape->in_features;
  if (rows == 0) return LOWRA_OK;
  const int64_t element = static_cast<int64_t>(lowra::bytes_of(weight_type));
  if (const int status = lowra::first_of(lowra::check_memory(weight, element), lowra::check_memory(row_order, 4),
                                         lowra::check_memory(thresholds, 4), lowra::check_memory(codes, 1),
                                         lowra::check_memory(absmax, 4))) {
    return status;
  }
  return without_exceptions([&] {
    if (!is_row_order(row_order, rows)) return LOWRA_BAD_ROW_ORDER;
    const int64_t groups = (in_features + shape->group_size - 1) / shape->group_size;
    const quantize_row_fn quantize_row = kernels().quantize;
    for_each_row(rows, rows * in_features, kWeightsPerThread, threads, [&] {
      return [&](int64_t row) {
        const row_place place = place_of(*shape, row, -1);
        const uint8_t *source = static_cast<const uint8_t *>(weight) + row_order[row] * in_features * element;
        quantize_row(source, weight_type, in_features, shape->group_size, place.bits, thresholds + place.table_offset,
                     codes + place.code_offset, absmax + row * groups);
      };
    });
    return LOWRA_OK;
  });
}

int lowra_cpu_dequantize(const lowra_packed *packed, void *out, int32_t out_type, int32_t threads) {
  if (!packed) return LOWRA_NULL_POINTER;
  const lowra_shape &shape = packed->shape;
  if (lowra::bad_shape(shape)) return LOWRA_BAD_SHAPE;
  if (!lowra::is_float_type(out_type)) return LOWRA_BAD_TYPE;
  const int64_t element = static_cast<int64_t>(lowra::bytes_of(out_type)), rows = lowra::row_count(shape);
  if (const int status = lowra::check_memory(*packed, 1, 2)) return status;
  if (rows == 0) return LOWRA_OK;
  if (const int status = lowra::check_memory(out, element)) return status;
  return without_exceptions([&] {
    if (!is_row_order(packed->row_order, rows)) return LOWRA_BAD_ROW_ORDER;
    const int64_t groups = (shape.in_features + shape.group_size - 1) / shape.group_size;
    const dequantize_row_fn dequantize_row = kernels().dequantize;
    for_each_row(rows, rows * shape.in_features, kWeightsPerThread, threads, [&] {
      return [&, scales = std::vector<float>(static_cast<size_t>(groups))](int64_t row) mutable {
        load_scales(*packed, row * groups, groups, scales.data());
        const row_place place = place_of(shape, row, 0);
        uint8_t *target = static_cast<uint8_t *>(out) + packed->row_order[row] * shape.in_features * element;
        dequantize_row(packed->codes + place.code_offset, shape.in_features, shape.group_size, place.bits,
                       scales.data(), packed->levels + place.table_offset, target, out_type);
      };
    });
    return LOWRA_OK;
  });
}
