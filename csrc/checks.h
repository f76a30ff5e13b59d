// What every function of the C interface asks of its arguments before it touches memory. On the host only.
#ifndef LOWRA_CHECKS_H
#define LOWRA_CHECKS_H

#include "lowra.h"

#include <stddef.h>

namespace lowra {

// Row numbers are int32. A weight takes 4 bytes at most, a row beyond that less than 128.
constexpr int64_t kMostRows = INT32_MAX, kMostWeights = INT64_MAX / 128;

// Sizes that are no weight's, or whose products would not fit into 64 bits.
inline bool bad_sizes(int64_t rows, int64_t in_features, int64_t group_size) {
  return rows < 0 || rows > kMostRows || in_features <= 0 || in_features > kMostWeights / (rows > 0 ? rows : 1) ||
         group_size <= 0 || group_size % 8 != 0 || group_size > LOWRA_MAX_GROUP_SIZE;
}

inline bool bad_shape(const lowra_shape &s) {
  // each first, so that their sum cannot overflow
  return s.rows4 < 0 || s.rows2 < 0 || s.rows1 < 0 || s.rows4 > kMostRows || s.rows2 > kMostRows ||
         s.rows1 > kMostRows || bad_sizes(s.rows4 + s.rows2 + s.rows1, s.in_features, s.group_size);
}

inline int64_t row_count(const lowra_shape &s) { return s.rows4 + s.rows2 + s.rows1; }

// A part that does not lie in a weight of so many rows and columns, or begins where no kernel decodes.
inline bool bad_part(const lowra_part &part, int64_t rows, int64_t columns) {
  return part.rows < 0 || part.rows > rows || part.first_row < 0 || part.first_row > rows - part.rows ||
         part.columns < 0 || part.columns > columns || part.first_column < 0 ||
         part.first_column > columns - part.columns || part.first_column % LOWRA_MAX_GROUP_SIZE != 0;
}

inline bool is_float_type(int32_t type) {
  return type == LOWRA_FLOAT32 || type == LOWRA_FLOAT16 || type == LOWRA_BFLOAT16;
}

inline size_t bytes_of(int32_t type) { return type == LOWRA_FLOAT32 ? 4 : type == LOWRA_UINT8 ? 1 : 2; }

inline bool aligned(const void *pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// What a function may touch: memory that is there, on a multiple of `bytes`.
inline int check_memory(const void *pointer, size_t bytes) {
  if (!pointer) return LOWRA_NULL_POINTER;
  return aligned(pointer, bytes) ? LOWRA_OK : LOWRA_MISALIGNED;
}

// The first status that is not LOWRA_OK.
inline int first_of() { return LOWRA_OK; }
template <class... Statuses>
int first_of(int status, Statuses... others) {
  return status != LOWRA_OK ? status : first_of(others...);
}

// Types and memory of a weight whose shape has been checked; one without rows needs none. code_bytes, level_bytes: what
// the addresses of codes and levels are multiples of.
inline int check_memory(const lowra_packed &p, size_t code_bytes, size_t level_bytes) {
  const bool stepped = p.scale_type == LOWRA_UINT8;
  if (!stepped && p.scale_type != LOWRA_FLOAT32 && p.scale_type != LOWRA_FLOAT16) return LOWRA_BAD_TYPE;
  if (row_count(p.shape) == 0) return LOWRA_OK;
  return first_of(check_memory(p.codes, code_bytes), check_memory(p.row_order, 4),
                  check_memory(p.scales, bytes_of(p.scale_type)), stepped ? check_memory(p.scale_steps, 4) : LOWRA_OK,
                  check_memory(p.levels, level_bytes));
}

}  // namespace lowra

#endif
