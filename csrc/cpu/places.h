// Where the rows of a packed weight lie.
#ifndef LOWRA_CPU_PLACES_H
#define LOWRA_CPU_PLACES_H

#include "lowra.h"

#include <cstdint>
#include <vector>

inline int64_t group_count(const lowra_shape &shape) {
  return (shape.in_features + shape.group_size - 1) / shape.group_size;
}

// Where packed row i begins in the codes and in a per-row table of 2^bits + extra entries.
struct row_place {
  int bits;
  int64_t code_offset, table_offset;
};

inline row_place place_of(const lowra_shape &shape, int64_t row, int extra) {
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
inline bool is_row_order(const int32_t *order, int64_t rows) {
  std::vector<uint8_t> seen(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t row = order[i];
    if (row < 0 || row >= rows || seen[row]) return false;
    seen[row] = 1;
  }
  return true;
}

// The packed row of each row of W; empty where the order does not name every row once.
inline std::vector<int32_t> places_of(const int32_t *order, int64_t rows) {
  std::vector<int32_t> places(static_cast<size_t>(rows), -1);
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t row = order[i];
    if (row < 0 || row >= rows || places[row] >= 0) return {};
    places[row] = static_cast<int32_t>(i);
  }
  return places;
}

#endif
