// Decode x product for 9 to 64 tokens. Reference: reference.linear, up to the order of the float32 sums.
//
// A block takes 128 rows of one precision, 16 for each warp, and a slice of the columns; x of 512 columns at a time goes
// to shared memory in the order in which the decoded weights come out, so that a lane fetches operand B of two mma with
// one 16-byte load. On Hopper the blocks of a cluster split the columns and add up their sums through distributed shared
// memory: every block then reads only its part of x, and one launch serves.
#include <cooperative_groups.h>

#include "product.cuh"

namespace lowra {
namespace {

constexpr int kWarps = 8;
constexpr int kBlockRows = kWarps * kTileRows;
constexpr int kColumns = 512;             // columns of x in shared memory: four lanes x 16 bytes of 1-bit codes
constexpr int kUnits = kColumns * 2 / 16; // 16-byte units of one token's columns
constexpr int kMaxSplits = 8;

// Where unit `unit` of a token's columns lies. The lanes that load together (two tokens, the four lanes of a quad) read
// units that are multiples of 4 apart; without the exclusive-or they would share banks.
// BITS: the columns between the lanes of a quad depend on it.
template <int BITS>
__device__ __forceinline__ int unit_place(int token, int unit) {
  constexpr int kUnitsPerChunk = 128 / BITS / 8;
  return token * kUnits + (unit ^ ((unit / kUnitsPerChunk) % 4 | (token % 2) << 2));
}

// Columns [base, base + kColumns) of x, paired for BITS, to `staged`; zero past the last token and column.
template <int BITS, int TOKENS>
__device__ __forceinline__ void stage(const product &q, int base, int end, uint4 *staged, int thread) {
  constexpr int kPerByte = 8 / BITS, kUnitsPerWord = kPerByte / 2;  // 4 P columns of 2 bytes are P / 2 units
  constexpr int kBlocks = kUnits / kUnitsPerWord;
  for (int i = thread; i < TOKENS * kBlocks; i += 32 * kWarps) {
    const int token = i / kBlocks, unit = i % kBlocks * kUnitsPerWord, column = base + unit * 8;
    uint32_t natural[2 * kPerByte], paired[2 * kPerByte];
#pragma unroll
    for (int u = 0; u < kUnitsPerWord; ++u) {
      const uint16_t *source = static_cast<const uint16_t *>(q.x) + (size_t)token * q.in_features + column + 8 * u;
      const uint4 raw = token < q.tokens && column < end ? __ldg(reinterpret_cast<const uint4 *>(source))
                                                         : make_uint4(0, 0, 0, 0);
      natural[4 * u] = raw.x, natural[4 * u + 1] = raw.y, natural[4 * u + 2] = raw.z, natural[4 * u + 3] = raw.w;
    }
#pragma unroll
    for (int r = 0; r < kPerByte; ++r) {
      paired[2 * r] = partner<kPerByte>(natural, r);
      paired[2 * r + 1] = partner<kPerByte>(natural + kPerByte, r);
    }
#pragma unroll
    for (int u = 0; u < kUnitsPerWord; ++u) {
      staged[unit_place<BITS>(token, unit + u)] =
          make_uint4(paired[4 * u], paired[4 * u + 1], paired[4 * u + 2], paired[4 * u + 3]);
    }
  }
}

// NT: tiles of 8 tokens; the sums are registers, so their number must be known to the compiler.
template <int BITS, int NT, class T>
__device__ __forceinline__ void sum_columns(const product &q, const tile_place &tile, int begin, int end, uint4 *staged,
                                            float (&sum)[NT][4]) {
  constexpr int kPerByte = 8 / BITS, kChunk = 16 * kPerByte, kWordsPerStep = BITS, kUnitsPerWord = kPerByte / 2;
  const int lane = threadIdx.x, warp = threadIdx.y, quad = lane % 4;
  lane_rows<BITS> rows;
  rows.place(q.packed, q.layout, q.groups, tile.first_row + warp * kTileRows, tile.last_row, lane);
  uint4 next[2];
  auto load = [&](int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      next[h] = column < end ? __ldg(reinterpret_cast<const uint4 *>(rows.codes[h] + column / kPerByte))
                             : make_uint4(0, 0, 0, 0);
    }
  };
  load(begin + quad * kChunk);
  for (int base = begin; base < end; base += kColumns) {
    __syncthreads();
    stage<BITS, 8 * NT>(q, base, end, staged, warp * 32 + lane);
    __syncthreads();
    for (int part = 0; part < kColumns; part += 4 * kChunk) {
      const int offset = part + quad * kChunk;
      const uint4 chunk[2] = {next[0], next[1]};
      load(base + offset + 4 * kChunk);
#pragma unroll
      for (int step = 0; step < kChunk / kStep; ++step) {
        const int column = offset + step * kStep;
        value_table<BITS> table[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int group = min(base + column, q.in_features - 1) >> q.group_shift;
          table[h] = build_table<BITS, T>(rows.levels[h], load_scale(q.packed, rows.first_scale[h] + group));
        }
#pragma unroll
        for (int w = 0; w < kWordsPerStep; ++w) {
          uint32_t a[2][2 * kPerByte];
#pragma unroll
          for (int h = 0; h < 2; ++h) decode(table[h], word_of(chunk[h], step * kWordsPerStep + w), a[h]);
#pragma unroll
          for (int u = 0; u < kUnitsPerWord; ++u) {
            const int unit = column / 8 + w * kUnitsPerWord + u;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              const uint4 b = staged[unit_place<BITS>(8 * n + lane / 4, unit)];
              mma<T>(sum[n], a[0][4 * u], a[1][4 * u], a[0][4 * u + 1], a[1][4 * u + 1], b.x, b.y);
              mma<T>(sum[n], a[0][4 * u + 2], a[1][4 * u + 2], a[0][4 * u + 3], a[1][4 * u + 3], b.z, b.w);
            }
          }
        }
      }
    }
  }
}

template <int NT, class T>
__global__ void __launch_bounds__(32 * kWarps) product_tensor_kernel(const __grid_constant__ product q, int slice) {
  extern __shared__ uint4 staged[];
  const int lane = threadIdx.x, warp = threadIdx.y, splits = gridDim.x, split = blockIdx.x;
  const tile_place tile = tile_at(q.layout, q.tiles, kBlockRows, blockIdx.y);
  const int begin = split * slice, end = min(begin + slice, q.in_features);
  float sum[NT][4] = {};
  if (tile.bits == 1) {
    sum_columns<1, NT, T>(q, tile, begin, end, staged, sum);
  } else if (tile.bits == 2) {
    sum_columns<2, NT, T>(q, tile, begin, end, staged, sum);
  } else {
    sum_columns<4, NT, T>(q, tile, begin, end, staged, sum);
  }
  // x is done with: its memory takes the sums, [token][row], one float of padding for each token.
  constexpr int kStride = kBlockRows + 1;
  float *sums = reinterpret_cast<float *>(staged);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 8 * n + 2 * (lane % 4) + i % 2, row = warp * kTileRows + lane / 4 + i / 2 * 8;
      sums[token * kStride + row] = sum[n][i];
    }
  }
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
#else
  __syncthreads();
#endif
  // The blocks of a cluster share out the tokens.
  for (int cell = warp * 32 + lane; cell < 8 * NT * kBlockRows; cell += 32 * kWarps) {
    const int token = cell / kBlockRows, row = tile.first_row + cell % kBlockRows;
    if (token % splits != split || token >= q.tokens || row > tile.last_row) continue;
    float total = 0.f;
    for (int s = 0; s < splits; ++s) {
#if __CUDA_ARCH__ >= 900
      total += cluster.map_shared_rank(sums, s)[token * kStride + cell % kBlockRows];
#else
      total += sums[token * kStride + cell % kBlockRows];
#endif
    }
    store_output<T>(q, token, row, total);
  }
#if __CUDA_ARCH__ >= 900
  cluster.sync();  // a block must not leave while others read its sums
#endif
}

// NT, T: as above.
template <int NT, class T>
int launch(product q, cudaStream_t stream) {
  q.tiles = tiles_of(q.layout, kBlockRows);
  const int tiles = q.tiles.total();
  int device = 0, major = 0, processors = 0;
  if (int status = keep_error(cudaGetDevice(&device))) return status;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int blocks = (q.in_features + kColumns - 1) / kColumns;  // slices are whole multiples of kColumns
  int splits = 1;
  if (major >= 9) {
    while (splits < kMaxSplits && tiles * splits < 2 * processors && 2 * splits <= blocks) splits *= 2;
  }
  const int slice = (blocks + splits - 1) / splits * kColumns;
  constexpr int kX = 8 * NT * kColumns * 2, kSums = 8 * NT * (kBlockRows + 1) * 4, kBytes = kX > kSums ? kX : kSums;
  auto *kernel = product_tensor_kernel<NT, T>;
  if (int status = keep_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes))) {
    return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(splits, tiles);
  config.blockDim = dim3(32, kWarps);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = splits, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = major >= 9 ? 1 : 0;
  return keep_error(cudaLaunchKernelEx(&config, kernel, q, slice));
}

template <class T>
int choose(const product &q, cudaStream_t stream) {
  if (q.tokens <= 8) return launch<1, T>(q, stream);
  if (q.tokens <= 16) return launch<2, T>(q, stream);
  if (q.tokens <= 32) return launch<4, T>(q, stream);
  return launch<8, T>(q, stream);
}

}  // namespace

int product_tensor(const product &q, int32_t type, cudaStream_t stream) {
  return type == LOWRA_FLOAT16 ? choose<fp16>(q, stream) : choose<bf16>(q, stream);
}

}  // namespace lowra
