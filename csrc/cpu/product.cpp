// Products of a packed weight with few tokens, without a dense weight: rows are handed out to threads in blocks, and
// product.inl multiplies a block.

#include "lowra.h"
#include "checks.h"
#include "cpu/aligned.h"
#include "cpu/halves.h"
#include "cpu/places.h"
#include "cpu/rounding.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int64_t kWeightsPerThread = 1 << 17;  // times tokens: some 10 us of a core

// Rows of one precision that a thread multiplies before it asks for more.
struct block {
  int64_t first, rows;
};

std::vector<block> blocks_of(const lowra_shape &shape, int64_t rows_per_block) {
  std::vector<block> blocks;
  int64_t first = 0;
  for (const int64_t count : {shape.rows4, shape.rows2, shape.rows1}) {
    for (int64_t done = 0; done < count; done += rows_per_block) {
      blocks.push_back({first + done, std::min(rows_per_block, count - done)});
    }
    first += count;
  }
  return blocks;
}

bool is_group_of_registers(int64_t size) { return size == 32 || size == 64 || size == 128 || size == 256; }

// The tables of a product, for those of its rows that are quicker by them.
class x_tables {
 public:
  x_tables(const lowra_packed &packed, const row_kernels &kernels, const float *x, int64_t stride, int64_t tokens) {
    const lowra_shape &shape = packed.shape;
    const int64_t size = shape.group_size, groups = group_count(shape);
    const bool one = shape.rows1 >= kRowsForTables && tokens <= kernels.table_tokens1;
    const bool two = shape.rows2 >= kRowsForTables && tokens <= kernels.table_tokens2;
    if (tokens == 0 || !(one || two) || !is_group_of_registers(size)) return;
    sums_.resize(static_cast<size_t>(tokens * groups));
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t group = 0; group < groups; ++group) {
        float sum = 0, largest = 0;
        for (int64_t k = group * size; k < std::min(group * size + size, stride); ++k) {
          sum += x[t * stride + k];
          largest = std::max(largest, std::fabs(x[t * stride + k]));
        }
        // what has no finite sum is left to products that add nothing but weights times x
        if (!(sum - sum == 0) || largest > kLargest) return;
        sums_[t * groups + group] = sum;
      }
    }
    for (const int bits : {1, 2}) {
      if (!(bits == 1 ? one : two)) continue;
      memory_.emplace_back(4 * tokens * stride);
      tables_[bits] = memory_.back().data();
      kernels.make_tables(bits, x, stride, tokens, memory_.back().data());
    }
  }
  const float *of(int bits) const { return bits <= 2 ? tables_[bits] : nullptr; }
  const float *group_sums() const { return sums_.data(); }

 private:
  static constexpr int64_t kRowsForTables = 64;  // fewer do not pay for them
  static constexpr float kLargest = 1e36f;       // 256 of them have a sum
  std::vector<aligned_floats> memory_;
  std::vector<float> sums_;
  const float *tables_[3] = {nullptr, nullptr, nullptr};
};

enum class input { as_it_is, in_integers };

int multiply(const lowra_packed *packed, const void *x, int64_t tokens, const void *bias, void *out, int32_t type,
             int32_t threads, input taken) {
  if (!packed) return LOWRA_NULL_POINTER;
  const lowra_shape &shape = packed->shape;
  if (lowra::bad_shape(shape) || tokens < 0 || tokens > LOWRA_CPU_MOST_TOKENS) return LOWRA_BAD_SHAPE;
  const int64_t rows = lowra::row_count(shape), in_features = shape.in_features;
  if (!lowra::is_float_type(type)) return LOWRA_BAD_TYPE;
  const int64_t element = static_cast<int64_t>(lowra::bytes_of(type));
  if (const int status = lowra::check_memory(*packed, 1, 2)) return status;
  if (rows == 0 || tokens == 0) return LOWRA_OK;
  if (const int status = lowra::first_of(lowra::check_memory(x, element), lowra::check_memory(out, element),
                                         bias ? lowra::check_memory(bias, element) : LOWRA_OK)) {
    return status;
  }
  return without_exceptions([&] {
    if (!is_row_order(packed->row_order, rows)) return LOWRA_BAD_ROW_ORDER;
    const row_kernels &chosen = kernels();
    const bool integers = taken == input::in_integers;
    if (integers && !(chosen.round_x && is_group_of_registers(shape.group_size))) return LOWRA_UNSUPPORTED;
    const int64_t groups = group_count(shape), stride = (in_features + kUnit - 1) / kUnit * kUnit;
    aligned_floats wide(tokens * stride);
    for (int64_t t = 0; t < tokens; ++t) {
      float *row = wide.data() + t * stride;  // its end stays zero
      for (int64_t k = 0; k < in_features; ++k) row[k] = load_element(x, type, t * in_features + k);
    }
    const int64_t work = rows * in_features * tokens, scale_bytes = lowra::bytes_of(packed->scale_type);
    // as many as share tables, but some blocks for each thread
    const int64_t rows_per_block = rows >= 16 * kProductRows ? kProductRows : kProductRows / (integers ? 2 : 4);
    const std::vector<block> blocks = blocks_of(shape, rows_per_block);
    // of which one is of no tokens
    const rounded_x rounded(shape, chosen, wide.data(), stride, integers ? tokens : 0);
    if (integers && !rounded.integers()) return LOWRA_UNSUPPORTED;
    const x_tables tables(*packed, chosen, wide.data(), stride, integers ? 0 : tokens);
    for_each_piece(static_cast<int64_t>(blocks.size()), 1, work, kWeightsPerThread, threads, [&] {
      return [&, scales = aligned_floats(rows_per_block * groups + 3),
              lanes = aligned_floats(rows_per_block * (groups + kLanePadding)), row = aligned_floats(stride),
              sums = std::vector<float>(rows_per_block * tokens)](int64_t number) mutable {
        const block &own = blocks[number];
        const row_place place = place_of(shape, own.first, 0);
        chosen.load_scales(*packed, own.first * groups, own.rows * groups, scales.data());
        const uint8_t *next =
            static_cast<const uint8_t *>(packed->scales) + (own.first + own.rows) * groups * scale_bytes;
        for (int64_t i = 0; i < rows_per_block * groups * scale_bytes; i += kLine) __builtin_prefetch(next + i);
        chosen.product({packed->codes + place.code_offset, lowra_row_bytes(in_features, place.bits),
                        packed->levels + place.table_offset, scales.data(), place.bits, own.rows, in_features,
                        shape.group_size, tokens, wide.data(), stride, tables.of(place.bits), tables.group_sums(),
                        integers ? rounded.integers() : nullptr, lanes.data(), row.data(), sums.data()});
        for (int64_t r = 0; r < own.rows; ++r) {
          const int64_t target = packed->row_order[own.first + r];
          const float shift = bias ? load_element(bias, type, target) : 0.0f;
          for (int64_t t = 0; t < tokens; ++t) {
            store_element(sums[r * tokens + t] + shift, type, t * rows + target, out);
          }
        }
      };
    });
    return LOWRA_OK;
  });
}

}  // namespace

int lowra_cpu_product(const lowra_packed *packed, const void *x, int64_t tokens, const void *bias, void *out,
                      int32_t type, int32_t threads) {
  return multiply(packed, x, tokens, bias, out, type, threads, input::as_it_is);
}

int lowra_cpu_product_in_integers(const lowra_packed *packed, const void *x, int64_t tokens, const void *bias,
                                  void *out, int32_t type, int32_t threads) {
  if (tokens > kIntegerTokens) return LOWRA_UNSUPPORTED;
  return multiply(packed, x, tokens, bias, out, type, threads, input::in_integers);
}
