// Launches the kernel of product_many.cuh: how the tiles are cut, and how many blocks share one.
#include "product_many.cuh"

#include <cudaTypedefs.h>

#include <type_traits>

namespace lowra {
namespace {

// The map of x [tokens, in_features] for copies of `box_tokens` tokens x 64 columns, zeros past the ends.
template <class T>
int map_of(const product &q, int box_tokens, CUtensorMap &map) {
  static const auto encode = [] {
    void *function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  if (!encode) return LOWRA_UNSUPPORTED;
  const cuuint64_t sizes[2] = {(cuuint64_t)q.in_features, (cuuint64_t)q.tokens};
  const cuuint64_t row_bytes = sizes[0] * sizeof(T);
  const cuuint32_t box[2] = {kStepColumns, (cuuint32_t)box_tokens}, steps[2] = {1, 1};
  constexpr auto kType = std::is_same_v<T, fp16> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(&map, kType, 2, const_cast<void *>(q.x), sizes, &row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? LOWRA_OK : LOWRA_UNSUPPORTED;
}

struct plan {
  int tokens, rows;  // of a tile
  int split_shift;
  int waves;  // of clusters, one after another on the chip
};

// See SHARED of tile_shape.
bool shares_rows(const product &q) { return q.tokens > 128; }

tile_grid grid_of(const product &q, const plan &p) {
  const int token_tiles = (q.tokens + p.tokens - 1) / p.tokens;
  const int row_tiles = (q.layout.rows() + p.rows - 1) / p.rows;
  const auto pairs = [](int tiles) { return (tiles + kPair - 1) / kPair; };
  return {token_tiles, shares_rows(q) ? row_tiles * pairs(token_tiles) : pairs(row_tiles) * token_tiles, p.split_shift};
}

// Clusters of so many pairs (log2) that the chip holds at once: one block a multiprocessor, whichever kernel it is.
int clusters_of(int split_shift) {
  static thread_local int known[kMaxSplitShift + 1] = {};  // the query costs more than the launch
  int &count = known[split_shift];
  if (count == 0) {
    auto *kernel = product_many_kernel<128, 64, false, bf16>;
    count = clusters_at_once(kernel, kPair << split_shift, tile_shape<128, 64, false>::kThreads,
                             tile_shape<128, 64, false>::kBytes);
  }
  return count;
}

template <int TOKENS, int ROWS, bool SHARED, class T>
int launch(const product &q, const plan &p, cudaStream_t stream) {
  using shape = tile_shape<TOKENS, ROWS, SHARED>;
  CUtensorMap map;
  if (const int status = map_of<T>(q, SHARED ? TOKENS : TOKENS / kPair, map)) return status;
  auto *kernel = product_many_kernel<TOKENS, ROWS, SHARED, T>;
  const tile_grid grid = grid_of(q, p);
  const int at_once = clusters_of(0), blocks = kPair << p.split_shift;
  const int clusters = p.split_shift > 0 || grid.tile_pairs < at_once ? grid.tile_pairs : at_once;
  return launch_early(kernel, dim3(blocks * clusters), dim3(shape::kThreads), shape::kBytes, blocks, stream, q, map,
                      grid);
}

// With which a multiprocessor has the least to do. Cycles of a step are those of shared memory, 128 bytes each: x and W
// are written and x is read once, W for every 64 tokens; what a pair shares of W is read once more. A tile's start and
// end take some 4000, adding up the sums of several pairs some 2500.
plan best_plan(const product &q) {
  const bool shared = shares_rows(q);
  constexpr int kRows[] = {64, 96, 128, 160, 176};
  const int steps = q.in_features / kStepColumns;
  plan best = {};
  int64_t least = INT64_MAX;
  for (const int tokens : {128, 256}) {
    if (tokens == 256 && q.tokens <= 256) continue;
    for (int shift = 0; shift <= kMaxSplitShift && 1 << shift <= steps; ++shift) {
      for (const int rows : kRows) {
        if (!shared && rows > 128) continue;
        plan p = {tokens, rows, shift, 0};
        const int at_once = clusters_of(shift);
        p.waves = (grid_of(q, p).tile_pairs + at_once - 1) / at_once;
        const int64_t step = 2 * tokens + rows * (tokens / 64 + 1) + (shared ? rows / 2 : 0);
        const int64_t ends = shift > 0 ? 6500 : 4000;
        const int64_t cost = p.waves * (((steps - 1 >> shift) + 1) * step + ends);
        if (cost < least) least = cost, best = p;
      }
    }
  }
  return best;
}

template <int TOKENS, class T>
int choose_rows(const product &q, const plan &p, cudaStream_t stream) {
  if (p.rows == 64) return launch<TOKENS, 64, true, T>(q, p, stream);
  if (p.rows == 96) return launch<TOKENS, 96, true, T>(q, p, stream);
  if (p.rows == 128) return launch<TOKENS, 128, true, T>(q, p, stream);
  if (p.rows == 160) return launch<TOKENS, 160, true, T>(q, p, stream);
  return launch<TOKENS, 176, true, T>(q, p, stream);
}

template <class T>
int choose(const product &q, cudaStream_t stream) {
  const plan p = best_plan(q);
  if (p.tokens == 256) return choose_rows<256, T>(q, p, stream);
  if (shares_rows(q)) return choose_rows<128, T>(q, p, stream);
  if (p.rows == 64) return launch<128, 64, false, T>(q, p, stream);
  if (p.rows == 96) return launch<128, 96, false, T>(q, p, stream);
  return launch<128, 128, false, T>(q, p, stream);
}

}  // namespace

bool product_many_is_quicker(int64_t tokens, int64_t rows, int64_t in_features, int64_t l2_bytes) {
  // A dense weight that stays in the L2 cache costs little, and a second wave of tiles much (measured:
  // docs/lab/kernels/measured.md).
  const int64_t dense_bytes = 2 * rows * in_features;
  if (in_features % kStepColumns || dense_bytes <= l2_bytes / 2 || tokens > 512) return false;
  if (tokens <= 128) return true;
  product q = {};
  q.layout.rows1 = (int)rows, q.in_features = (int)in_features, q.tokens = (int)tokens;
  const plan p = best_plan(q);
  if (p.waves > 1 || dense_bytes <= l2_bytes / 4 * 3) return false;
  if (tokens <= 256) return true;
  // With 257 it takes nearly as long as with 512, the dense product half as long: the chip must be full, the tiles
  // large or their columns not shared, and little of the time spent at their ends.
  const bool full = 10 * grid_of(q, p).tile_pairs >= 9 * clusters_of(p.split_shift);
  const bool lasting = q.in_features >> p.split_shift >= 4096;
  return tokens > 416 && full && lasting && (p.rows == 176 || p.split_shift == 0);
}

int product_many(const product &q, int32_t type, cudaStream_t stream) {
  device_limits limits;
  if (const int status = limits_of_current_device(limits)) return status;
  const bool fits = (size_t)q.layout.rows() * q.groups <= UINT32_MAX;  // tile_row
  if (!fits || !limits.hopper) return LOWRA_UNSUPPORTED;
  if (q.in_features % kStepColumns || q.group_shift < 6 || q.layout.rows() % 4 ||
      reinterpret_cast<uintptr_t>(q.out) % 8) {
    return LOWRA_UNSUPPORTED;
  }
  return type == LOWRA_FLOAT16 ? choose<fp16>(q, stream) : choose<bf16>(q, stream);
}

}  // namespace lowra
