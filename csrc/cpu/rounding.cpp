#include "cpu/rounding.h"

#include "cpu/places.h"

#include <algorithm>

rounded_x::rounded_x(const lowra_shape &shape, const row_kernels &kernels, const float *x, int64_t stride,
                     int64_t tokens) {
  const int64_t columns = std::min<int64_t>(shape.group_size, kPartColumns);
  const int64_t parts = (shape.in_features + columns - 1) / columns, groups = group_count(shape);
  const int64_t byte_stride = (stride + 255) / 256 * 256;
  const bool by_tables = shape.rows1 > 0, by_bytes = shape.rows2 + shape.rows4 > 0;
  const auto scratch = [&](int64_t bytes) -> void * {
    memory_.emplace_back((bytes + 3) / 4);
    return memory_.back().data();
  };
  const auto floats = [&](int64_t count) { return static_cast<float *>(scratch(4 * count)); };
  auto *tables = by_tables ? static_cast<uint8_t *>(scratch(tokens * 8 * stride)) : nullptr;
  float *steps = floats(tokens * parts), *sums = floats(tokens * parts), *offsets = floats(tokens * parts);
  auto *scratch_parts = static_cast<int16_t *>(scratch(2 * stride));
  auto *unarranged = static_cast<int8_t *>(scratch(byte_stride));
  int8_t *bytes[5] = {};
  float *byte_steps[5] = {}, *byte_sums = by_bytes ? floats(tokens * groups) : nullptr;
  for (const int bits : {2, 4}) {
    if (!by_bytes) break;
    bytes[bits] = static_cast<int8_t *>(scratch(tokens * byte_stride));
    byte_steps[bits] = floats(tokens * byte_stride * bits / 32);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    rounded_token own{tables ? tables + t * 8 * stride : nullptr,
                      steps + t * parts,
                      sums + t * parts,
                      offsets + t * parts,
                      scratch_parts,
                      unarranged,
                      {},
                      {},
                      byte_sums + t * groups,
                      byte_stride};
    for (const int bits : {2, 4}) {
      if (!by_bytes) break;
      own.bytes[bits] = bytes[bits] + t * byte_stride;
      own.byte_steps[bits] = byte_steps[bits] + t * byte_stride * bits / 32;
    }
    if (!kernels.round_x(x + t * stride, stride, shape.in_features, shape.group_size, own)) return;
  }
  integers_ = {tables, steps, sums, offsets, {}, {}, byte_sums, byte_stride};
  std::copy(bytes, bytes + 5, integers_.bytes);
  std::copy(byte_steps, byte_steps + 5, integers_.byte_steps);
  taken_ = true;
}
