// CPU codec: walks the rows of a packed weight on several threads; the work on one row is in rows.inl.

#include "lowra.h"
#include "checks.h"
#include "cpu/places.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

#include <cstring>
#include <vector>

namespace {

// Below this many weights per thread the start of a thread costs more than its work.
constexpr int64_t kWeightsPerThread = 1 << 16;

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
    const int64_t groups = group_count(*shape);
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

int lowra_cpu_dequantize(const lowra_packed *packed, const lowra_part *part, void *out, int32_t out_type,
                         int32_t threads) {
  if (!packed || !part) return LOWRA_NULL_POINTER;
  const lowra_shape &shape = packed->shape;
  if (lowra::bad_shape(shape)) return LOWRA_BAD_SHAPE;
  const int64_t rows = lowra::row_count(shape), in_features = shape.in_features;
  if (lowra::bad_part(*part, rows, in_features)) return LOWRA_BAD_SHAPE;
  if (!lowra::is_float_type(out_type)) return LOWRA_BAD_TYPE;
  const int64_t element = static_cast<int64_t>(lowra::bytes_of(out_type));
  if (const int status = lowra::check_memory(*packed, 1, 2)) return status;
  if (part->rows == 0 || part->columns == 0) return LOWRA_OK;
  if (const int status = lowra::check_memory(out, element)) return status;
  return without_exceptions([&] {
    const std::vector<int32_t> places = places_of(packed->row_order, rows);
    if (places.empty()) return LOWRA_BAD_ROW_ORDER;
    const int64_t first_group = part->first_column / shape.group_size;
    const int64_t start = first_group * shape.group_size, skipped = part->first_column - start;
    const int64_t columns = skipped + part->columns, groups = (columns + shape.group_size - 1) / shape.group_size;
    const row_kernels &chosen = kernels();
    for_each_row(part->rows, part->rows * columns, kWeightsPerThread, threads, [&] {
      return [&, scales = std::vector<float>(static_cast<size_t>(groups)),
              whole = std::vector<uint8_t>(static_cast<size_t>(skipped ? columns * element : 0))](int64_t i) mutable {
        const int64_t row = places[part->first_row + i];
        chosen.load_scales(*packed, row * group_count(shape) + first_group, groups, scales.data());
        const row_place place = place_of(shape, row, 0);
        uint8_t *target = static_cast<uint8_t *>(out) + i * part->columns * element;
        chosen.dequantize(packed->codes + place.code_offset + start * place.bits / 8, columns, shape.group_size,
                          place.bits, scales.data(), packed->levels + place.table_offset,
                          skipped ? whole.data() : target, out_type);
        if (skipped) std::memcpy(target, whole.data() + skipped * element, part->columns * element);
      };
    });
    return LOWRA_OK;
  });
}
