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

// Rows of one weight and one precision that a thread multiplies before it asks for more.
struct block {
  const lowra_packed *packed;
  const void *bias;
  void *out;
  int64_t first, rows;
};

bool is_group_of_registers(int64_t size) { return size == 32 || size == 64 || size == 128 || size == 256; }

// The tables of a product, for those of its rows that are quicker by them.
class x_tables {
 public:
  x_tables(const lowra_shape &shape, const row_kernels &kernels, const float *x, int64_t stride, int64_t tokens) {
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

// Sums [rows, tokens] of a block, plus bias, to out [tokens, N], each to its place in W. Rounded in place first, where
// the compiler finds a register's worth at a time.
template <int32_t TYPE, class Element>
void store_rows(const block &own, float *sums, int64_t tokens) {
  const int32_t *order = own.packed->row_order + own.first;
  const int64_t rows = lowra::row_count(own.packed->shape);
  for (int64_t r = 0; own.bias && r < own.rows; ++r) {
    const float shift = load_element(own.bias, TYPE, order[r]);
    for (int64_t t = 0; t < tokens; ++t) sums[r * tokens + t] += shift;
  }
  Element narrow[kProductRows * LOWRA_CPU_MOST_TOKENS];
  for (int64_t i = 0; i < own.rows * tokens; ++i) store_element(sums[i], TYPE, i, narrow);
  auto *out = static_cast<Element *>(own.out);
  for (int64_t r = 0; r < own.rows; ++r) {
    for (int64_t t = 0; t < tokens; ++t) out[t * rows + order[r]] = narrow[r * tokens + t];
  }
}

void store_rows(const block &own, float *sums, int64_t tokens, int32_t type) {
  if (type == LOWRA_FLOAT32) return store_rows<LOWRA_FLOAT32, float>(own, sums, tokens);
  if (type == LOWRA_FLOAT16) return store_rows<LOWRA_FLOAT16, uint16_t>(own, sums, tokens);
  store_rows<LOWRA_BFLOAT16, uint16_t>(own, sums, tokens);
}

// One product of a group.
struct member {
  const lowra_packed *packed;
  const void *bias;
  void *out;
};

// What is wrong with a product before its rows are looked at.
int check_member(const member &own, const lowra_shape &first, int64_t tokens, int32_t type) {
  const lowra_shape &shape = own.packed->shape;
  if (lowra::bad_shape(shape)) return LOWRA_BAD_SHAPE;
  if (shape.in_features != first.in_features || shape.group_size != first.group_size) return LOWRA_BAD_SHAPE;
  if (const int status = lowra::check_memory(*own.packed, 1, 2)) return status;
  if (lowra::row_count(shape) == 0 || tokens == 0) return LOWRA_OK;
  const int64_t element = static_cast<int64_t>(lowra::bytes_of(type));
  return lowra::first_of(lowra::check_memory(own.out, element),
                         own.bias ? lowra::check_memory(own.bias, element) : LOWRA_OK);
}

enum class input { as_it_is, in_integers };

// Products of one x with weights of as many columns, in groups of the same size.
int multiply(const std::vector<member> &members, const void *x, int64_t tokens, int32_t type, int32_t threads,
             input taken) {
  lowra_shape all{0, 0, 0, members[0].packed->shape.in_features, members[0].packed->shape.group_size};
  if (tokens < 0 || tokens > LOWRA_CPU_MOST_TOKENS) return LOWRA_BAD_SHAPE;
  if (!lowra::is_float_type(type)) return LOWRA_BAD_TYPE;
  for (const member &own : members) {
    if (const int status = check_member(own, all, tokens, type)) return status;
    all.rows4 += own.packed->shape.rows4;
    all.rows2 += own.packed->shape.rows2;
    all.rows1 += own.packed->shape.rows1;
  }
  const int64_t rows = lowra::row_count(all), in_features = all.in_features;
  if (rows == 0 || tokens == 0) return LOWRA_OK;
  if (const int status = lowra::check_memory(x, lowra::bytes_of(type))) return status;
  const row_kernels &chosen = kernels();
  const bool integers = taken == input::in_integers;
  if (integers && !(chosen.round_x && is_group_of_registers(all.group_size))) return LOWRA_UNSUPPORTED;
  // as many as share tables, but some blocks for each thread
  const int64_t rows_per_block = integers || rows >= 16 * kProductRows ? kProductRows : kProductRows / 4;
  std::vector<block> blocks;
  for (const member &own : members) {
    const lowra_shape &shape = own.packed->shape;
    if (!is_row_order(own.packed->row_order, lowra::row_count(shape))) return LOWRA_BAD_ROW_ORDER;
    int64_t first = 0;
    for (const int64_t count : {shape.rows4, shape.rows2, shape.rows1}) {
      for (int64_t done = 0; done < count; done += rows_per_block) {
        blocks.push_back({own.packed, own.bias, own.out, first + done, std::min(rows_per_block, count - done)});
      }
      first += count;
    }
  }
  const int64_t groups = group_count(all), stride = (in_features + kUnit - 1) / kUnit * kUnit;
  aligned_floats wide(tokens * stride);
  for (int64_t t = 0; t < tokens; ++t) {
    float *row = wide.data() + t * stride;  // its end stays zero
    for (int64_t k = 0; k < in_features; ++k) row[k] = load_element(x, type, t * in_features + k);
  }
  // of which one is of no tokens
  const rounded_x rounded(all, chosen, wide.data(), stride, integers ? tokens : 0);
  if (integers && !rounded.integers()) return LOWRA_UNSUPPORTED;
  const x_tables tables(all, chosen, wide.data(), stride, integers ? 0 : tokens);
  const int64_t work = rows * in_features * tokens;
  for_each_piece(static_cast<int64_t>(blocks.size()), 1, work, kWeightsPerThread, threads, [&] {
    return [&, scales = aligned_floats(rows_per_block * groups + kScalesBeyond),
            lanes = aligned_floats(rows_per_block * (groups + kLanePadding)), row = aligned_floats(stride),
            sums = std::vector<float>(rows_per_block * tokens)](int64_t number) mutable {
      const block &own = blocks[number];
      const lowra_packed &packed = *own.packed;
      const row_place place = place_of(packed.shape, own.first, 0);
      chosen.load_scales(packed, own.first * groups, own.rows * groups, scales.data());
      const int64_t scale_bytes = lowra::bytes_of(packed.scale_type);
      const uint8_t *next = static_cast<const uint8_t *>(packed.scales) + (own.first + own.rows) * groups * scale_bytes;
      for (int64_t i = 0; i < rows_per_block * groups * scale_bytes; i += kLine) __builtin_prefetch(next + i);
      (integers ? chosen.product_in_integers
                : chosen.product)({packed.codes + place.code_offset, lowra_row_bytes(in_features, place.bits),
                                   packed.levels + place.table_offset, scales.data(), place.bits, own.rows, in_features,
                                   all.group_size, tokens, wide.data(), stride, tables.of(place.bits),
                                   tables.group_sums(), rounded.integers(), lanes.data(), row.data(), sums.data()});
      store_rows(own, sums.data(), tokens, type);
    };
  });
  return LOWRA_OK;
}

}  // namespace

int lowra_cpu_product(const lowra_packed *packed, const void *x, int64_t tokens, const void *bias, void *out,
                      int32_t type, int32_t threads) {
  if (!packed) return LOWRA_NULL_POINTER;
  return without_exceptions([&] { return multiply({{packed, bias, out}}, x, tokens, type, threads, input::as_it_is); });
}

int lowra_cpu_product_group(const lowra_packed *weights, int32_t count, const void *x, int64_t tokens,
                            const void *const *bias, void *const *out, int32_t type, int32_t threads) {
  if (!weights || !bias || !out) return LOWRA_NULL_POINTER;
  if (count < 1 || count > LOWRA_MOST_GROUPED) return LOWRA_BAD_SHAPE;
  if (tokens > kIntegerTokens) return LOWRA_UNSUPPORTED;
  return without_exceptions([&] {
    std::vector<member> members;
    for (int32_t i = 0; i < count; ++i) members.push_back({weights + i, bias[i], out[i]});
    return multiply(members, x, tokens, type, threads, input::in_integers);
  });
}
