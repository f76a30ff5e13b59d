// How the rows and columns of a product with up to 8 tokens are shared out among the teams of product_small.cuh. On the
// host.
#pragma once

#include "few_tokens.cuh"

namespace lowra {

// Teams take tiles so that their units come out as even as whole tiles allow: the largest tiles are dealt first, the
// smaller ones level them out.
inline void divide_rows(const tile_counts &counts, int teams, division &d) {
  int left[kKinds] = {counts.tiles4, counts.tiles2, counts.tiles1}, taken[kKinds] = {};
  d.most_tiles = 0;
  for (int team = 0; team < teams; ++team) {
    const int64_t rest = teams - team;
    int64_t even = 0, have = 0;  // units of the kinds so far: of all teams left, and of this one
    int tiles = 0;
    for (int kind = 0; kind < kKinds; ++kind) {
      d.first[team][kind] = taken[kind];
      const int64_t units = d.kinds[kind].units;
      even += left[kind] * units;
      const int64_t missing = even - have * rest;
      const int64_t nearest = missing > 0 ? (2 * missing + units * rest) / (2 * units * rest) : 0;
      const int64_t wanted = rest == 1 ? left[kind] : nearest;
      const int take = wanted < left[kind] ? (int)wanted : left[kind];
      have += take * units;
      left[kind] -= take, taken[kind] += take, tiles += take;
    }
    if (tiles > d.most_tiles) d.most_tiles = tiles;
  }
  for (int kind = 0; kind < kKinds; ++kind) d.first[teams][kind] = taken[kind];
}

// The columns of a block: whole units of 1-bit rows.
inline void divide_columns(const product &q, int splits, division &d) {
  const int steps = (q.in_features + kUnitBits - 1) / kUnitBits;
  d.slice = (steps + splits - 1) / splits * kUnitBits;
  d.splits = (q.in_features + d.slice - 1) / d.slice;
  d.per_token = divisor_of((uint32_t)d.slice / 8);
  const rows_layout &l = q.layout;
  const int firsts[kKinds] = {0, l.rows4, l.rows4 + l.rows2}, counts[kKinds] = {l.rows4, l.rows2, l.rows1};
  const int strides[kKinds] = {l.bytes4, l.bytes2, l.bytes1};
  size_t codes = 0, levels = 0;
  for (int kind = 0; kind < kKinds; ++kind) {
    const int bits = 4 >> kind, units = d.slice * bits / kUnitBits;
    d.kinds[kind] = {firsts[kind], counts[kind], strides[kind], units, divisor_of((uint32_t)units), codes, levels};
    codes += (size_t)counts[kind] * strides[kind];
    levels += (size_t)counts[kind] << bits;
  }
}

// The units of the team that has most, about: whole tiles of the largest kind, half a tile of another above the
// average.
inline int most_units(const product &q, const tile_counts &counts, int processors, int splits) {
  division d;
  divide_columns(q, splits, d);
  const int tiles[kKinds] = {counts.tiles4, counts.tiles2, counts.tiles1}, teams = processors / splits;
  int64_t units = 0, most = 0;  // units: of the kinds so far
  for (int kind = 0; kind < kKinds; ++kind) {
    if (tiles[kind] == 0) continue;
    const int64_t tile = d.kinds[kind].units, before = units;
    units += tiles[kind] * tile;
    const int64_t here = before == 0 ? (tiles[kind] + teams - 1) / teams * tile : units / teams + tile / 2;
    if (here > most) most = here;
  }
  return (int)most;
}

// Teams of two blocks share the rows out more evenly, teams of one need no exchange of sums, which takes as long as the
// units below. With more tokens a unit takes longer, and a team of one makes more of x ready for itself alone.
inline int splits_of(const product &q, const tile_counts &counts, const device_limits &limits) {
  if (!limits.clusters) return 1;
  if (q.tokens > 4 || (q.tokens > 2 && counts.total() < 4 * limits.processors)) return 2;
  const int exchange = q.tokens <= 2 ? 10 : 5;
  const int more = most_units(q, counts, limits.processors, 1) - most_units(q, counts, limits.processors, 2);
  return more <= exchange ? 1 : 2;
}

// The tiles of all weights of a product, and where those of each weight begin.
inline tile_counts tiles_of_all(const single_product &q, division &) { return tiles_of(q.layout, kTileRows); }

inline tile_counts tiles_of_all(const product_group &q, group_division &d) {
  int tiles[kKinds] = {};
  for (int part = 0; part < q.parts; ++part) {
    const rows_layout &l = q.members[part].layout;
    const int firsts[kKinds] = {0, l.rows4, l.rows4 + l.rows2}, counts[kKinds] = {l.rows4, l.rows2, l.rows1};
    const int strides[kKinds] = {l.bytes4, l.bytes2, l.bytes1};
    size_t codes = 0, levels = 0;
    for (int kind = 0; kind < kKinds; ++kind) {
      d.parts[part][kind] = {firsts[kind], counts[kind], tiles[kind], codes, levels};
      tiles[kind] += (counts[kind] + kTileRows - 1) / kTileRows;
      codes += (size_t)counts[kind] * strides[kind];
      levels += (size_t)counts[kind] << (4 >> kind);
    }
  }
  return {tiles[0], tiles[1], tiles[2]};
}

}  // namespace lowra
