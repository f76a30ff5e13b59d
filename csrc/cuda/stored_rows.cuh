// Where the rows of a team's tiles lie in the weights, and how their sums are stored (product_small.cuh).
#pragma once

#include "adapter_terms.cuh"

namespace lowra {

// The place of a row in `places`: its number in W and, above kPartShift, the weight of the group. -1 for none.
constexpr int kPartShift = 28;
static_assert(kMostParts << kPartShift > 0 && INT32_MAX / 8 < 1 << kPartShift, "a place is not negative");
__device__ __forceinline__ int part_of_place(int place) { return place >> kPartShift; }
__device__ __forceinline__ int row_of_place(int place) { return place & ((1 << kPartShift) - 1); }

__device__ __forceinline__ int place_of_row(const single_product &q, const division &d, int kind, int tile, int row) {
  row += tile * kTileRows;
  return row < d.kinds[kind].count ? __ldg(q.packed.row_order + d.kinds[kind].first + row) : -1;
}

__device__ __forceinline__ int place_of_row(const product_group &q, const group_division &d, int kind, int tile,
                                            int row) {
  const tile_owner owner = owner_of(q, d, kind, tile);
  const part_rows &rows = d.parts[owner.part][kind];
  row += owner.tile * kTileRows;
  if (row >= rows.count) return -1;
  return __ldg(q.members[owner.part].row_order + rows.first + row) | owner.part << kPartShift;
}

// Of row `cell` of the team's tiles.
template <class Q, class D>
__device__ __forceinline__ int row_of_weight(const Q &q, const D &d, const int (&tiles)[kKinds], int team, int cell) {
  int kind = 0, number = cell / kTileRows;
  if (number >= tiles[0]) number -= tiles[0], kind = 1;
  if (kind == 1 && number >= tiles[1]) number -= tiles[1], kind = 2;
  return place_of_row(q, d, kind, d.first[team][kind] + number, cell % kTileRows);
}

// Rounds and stores a token's sums of neighbouring rows of one tile. places: -1 for none. cell: which row of the team's
// tiles the first is.
template <class S, int ROWS>
__device__ __forceinline__ void store_sums(const single_product &q, int token, const int (&places)[ROWS], int,
                                           const float (&sums)[ROWS], const adapter_memory &) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (places[r] >= 0) store_output<typename S::T>(q, token, places[r], sums[r]);
  }
}

template <class S, int ROWS>
__device__ __forceinline__ void store_sums(const product_group &q, int token, const int (&places)[ROWS], int cell,
                                           float (&sums)[ROWS], const adapter_memory &memory) {
  using T = typename S::T;
  if (places[0] < 0) return;  // rows that a tile lacks are its last
  const int part = part_of_place(places[0]);
  const auto &member = q.members[part];
  int rows[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) rows[r] = places[r] < 0 ? 0 : row_of_place(places[r]);
  if constexpr (S::ADAPTED) add_adapter_terms<S, ROWS>(q, part, rows, token, cell, memory, sums);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (places[r] < 0) break;
    if (member.bias) sums[r] += to_float(static_cast<const T *>(member.bias)[rows[r]]);
    static_cast<T *>(member.out)[(size_t)token * member.layout.rows() + rows[r]] = static_cast<T>(sums[r]);
  }
}

// ROWS neighbouring values in shared memory, of this block or of another.
template <int ROWS>
__device__ __forceinline__ void add_rows(const float *from, float (&sums)[ROWS]) {
  if constexpr (ROWS == 4) {
    const float4 more = *reinterpret_cast<const float4 *>(from);
    sums[0] += more.x, sums[1] += more.y, sums[2] += more.z, sums[3] += more.w;
  } else {
    sums[0] += *from;
  }
}
template <int ROWS>
__device__ __forceinline__ void put_rows(float *to, const float (&sums)[ROWS]) {
  if constexpr (ROWS == 4) {
    *reinterpret_cast<float4 *>(to) = make_float4(sums[0], sums[1], sums[2], sums[3]);
  } else {
    *to = sums[0];
  }
}

// Stores S::kRowsAtOnce sums, of which the first is number i of [tile][token][row].
template <class S>
__device__ __forceinline__ void store_cells(const typename S::PRODUCT &q, int i, const int *places,
                                            float (&sums)[S::kRowsAtOnce], const adapter_memory &memory) {
  const int token = i / kTileRows % S::TOKENS, own = i / S::kCells * kTileRows + i % kTileRows;
  if (token >= q.tokens) return;
  int of_rows[S::kRowsAtOnce];
#pragma unroll
  for (int r = 0; r < S::kRowsAtOnce; ++r) of_rows[r] = places[own + r];
  store_sums<S>(q, token, of_rows, own, sums, memory);
}

}  // namespace lowra
