// Dequantise: dense [N, K] in the order of W from packed rows. Reference: reference.dequantize.
//
// A warp takes 1024 neighbouring weights of one row, a lane 8 of them at a time, four times over with all loads issued
// first: reads are a tenth of the traffic, so the kernel is laid out for its 16-byte stores. Putting rows back into the
// order of W costs nothing, since a row is contiguous on both sides.
#include "common.cuh"

namespace lowra {
namespace {

constexpr int kWarps = 8;   // warps of a block, each on its own row
constexpr int kChunks = 4;  // chunks of 8 weights that a lane has in flight
constexpr int kSpan = 32 * kChunks;

// Out: element type of the dense weight; 16-bit types are selected two at a time by byte permutation, float32 one by one.
template <class Out>
__device__ __forceinline__ void store_chunk(Out *row, int first, int in_features, bool vector,
                                            const uint32_t (&words)[2 * sizeof(Out)]) {
  constexpr int kWords = 2 * sizeof(Out);
  if (vector && first + 8 <= in_features) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      *reinterpret_cast<uint4 *>(row + first + i * 4 / sizeof(Out)) =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  } else {
    const Out *value = reinterpret_cast<const Out *>(words);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (first + i < in_features) row[first + i] = value[i];
    }
  }
}

// The 8 codes of a chunk lie in BITS bytes.
template <int BITS>
__device__ __forceinline__ uint32_t load_codes(const uint8_t *codes, int chunk) {
  if constexpr (BITS == 4) return __ldg(reinterpret_cast<const uint32_t *>(codes) + chunk);
  if constexpr (BITS == 2) return __ldg(reinterpret_cast<const uint16_t *>(codes) + chunk);
  return __ldg(codes + chunk);
}

// What a lane needs to decode one chunk. 16-bit outputs of 1- and 2-bit rows: the group's values, already rounded, as bytes
// to select from (`table`); otherwise the group's scale. `level`: the row's levels, one register each for 1 and 2 bits; with
// 4 bits lane i of each half-warp holds level i, and a shuffle looks one up.
template <int BITS, class Out>
struct decoder {
  static constexpr bool kTable = BITS < 4 && sizeof(Out) == 2;
  float level[4];
  uint32_t table[2];
  float scale;

  __device__ __forceinline__ void load_levels(const uint16_t *levels) {
    if constexpr (BITS == 4) level[0] = half_bits_to_float(__ldg(levels + threadIdx.x % 16));
    if constexpr (BITS < 4) {
#pragma unroll
      for (int i = 0; i < 1 << BITS; ++i) level[i] = half_bits_to_float(__ldg(levels + i));
    }
  }

  // From the scale of a group to its table: levels are scaled and rounded, not weights.
  __device__ __forceinline__ void set_scale(float value) {
    scale = value;
    if constexpr (kTable) {
      const uint32_t first = pack<Out>(level[0] * value, level[1] * value);
      if constexpr (BITS == 1) table[0] = first;
      if constexpr (BITS == 2) {
        const uint32_t second = pack<Out>(level[2] * value, level[3] * value);
        table[0] = permute(first, second, 0x6420);  // low bytes of the four values
        table[1] = permute(first, second, 0x7531);  // high bytes
      }
    }
  }

  // What lane `lane` has set.
  __device__ __forceinline__ decoder of_lane(int lane) const {
    decoder other = *this;
    if constexpr (!kTable) other.scale = __shfl_sync(0xffffffffu, scale, lane);
    if constexpr (kTable) other.table[0] = __shfl_sync(0xffffffffu, table[0], lane);
    if constexpr (kTable && BITS == 2) other.table[1] = __shfl_sync(0xffffffffu, table[1], lane);
    return other;
  }

  // 8 weights as words of the output; all 32 lanes must be here.
  __device__ __forceinline__ void decode(uint32_t codes, uint32_t (&words)[2 * sizeof(Out)]) const {
    if constexpr (kTable && BITS == 1) {
      const uint32_t base = permute(table[0], 0, 0x1010), flip = base ^ permute(table[0], 0, 0x3232);
      const uint32_t next = permute(codes, codes >> 1, 0x0040);  // byte 1 is one code further on than byte 0
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = (permute(next << (7 - 2 * i), 0, 0x9988) & flip) ^ base;  // the signs of the bytes become masks
      }
    } else if constexpr (kTable && BITS == 2) {
      const uint32_t next = permute(codes, codes >> 2, 0x5140);  // bytes 1 and 3 are one code further on than 0 and 2
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // A byte of the selector names byte c of the low bytes and byte c of the high ones.
        const uint32_t selector = ((next >> (4 * i)) & 0x03030303u) * 0x11u + 0x40404040u;
        words[i] = permute(table[0], table[1], selector);
        words[2 + i] = permute(table[0], table[1], selector >> 16);
      }
    } else {
      float value[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t code = (codes >> (BITS * i)) & ((1 << BITS) - 1);
        if constexpr (BITS == 4) value[i] = __shfl_sync(0xffffffffu, level[0], code, 16) * scale;
        if constexpr (BITS == 2) {
          value[i] = (code & 2 ? (code & 1 ? level[3] : level[2]) : (code & 1 ? level[1] : level[0])) * scale;
        }
        if constexpr (BITS == 1) value[i] = (code ? level[1] : level[0]) * scale;
      }
      if constexpr (sizeof(Out) == 4) {
#pragma unroll
        for (int i = 0; i < 8; ++i) words[i] = __float_as_uint(value[i]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = pack<Out>(value[2 * i], value[2 * i + 1]);
      }
    }
  }
};

struct dense_shape {
  int in_features, groups;
  int group_shift;  // log2 of the chunks in a group, 0 where that is no power of two
  small_divisor chunks_per_group;
  bool vector;  // rows of the output start on multiples of 16 bytes
};

// Reads scattered among writes cost several times as long as their bytes would alone, so rows are read in batches: the
// first blocks of a batch ask for the codes and scales of the next.
struct read_ahead {
  int row_blocks, askers;  // blocks of rows of a batch, and blocks that share its reads
};

template <int BITS, class Out>
__device__ __forceinline__ void dequantize_span(const lowra_packed &p, const row_place &place, size_t first_scale,
                                                const dense_shape &shape, Out *row) {
  const int lane = threadIdx.x, first = blockIdx.x * kSpan;
  const uint8_t *codes = p.codes + place.code_offset;
  uint32_t code[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = first + 32 * c + lane;
    code[c] = chunk * 8 < shape.in_features ? load_codes<BITS>(codes, chunk) : 0u;
  }
  decoder<BITS, Out> of_group;
  of_group.load_levels(p.levels + place.table_offset);
  if (shape.group_shift >= 2) {
    // Groups of 32, 64, 128 or 256: at most 32 in a span. Lane i finishes the scale of group i, the others ask for it.
    const int group = (first >> shape.group_shift) + lane;
    of_group.set_scale(group < shape.groups ? load_scale(p, first_scale + group) : 0.f);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      uint32_t words[2 * sizeof(Out)];
      of_group.of_lane((32 * c + lane) >> shape.group_shift).decode(code[c], words);
      store_chunk<Out>(row, (first + 32 * c + lane) * 8, shape.in_features, shape.vector, words);
    }
  } else {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = first + 32 * c + lane;
      of_group.set_scale(chunk * 8 < shape.in_features
                             ? load_scale(p, first_scale + shape.chunks_per_group.divide(chunk)) : 0.f);
      uint32_t words[2 * sizeof(Out)];
      of_group.decode(code[c], words);
      store_chunk<Out>(row, chunk * 8, shape.in_features, shape.vector, words);
    }
  }
}

__device__ __forceinline__ void prefetch_part(const uint8_t *begin, size_t bytes, int part, int parts) {
  const size_t share = bytes / parts + 16;
  prefetch_to_l2(begin + min(part * share, bytes), begin + min((part + 1) * share, bytes));
}

// Part `part` of `parts` of the codes and scales of packed rows [first, end), into the L2 cache.
__device__ __forceinline__ void ask_for_rows(const lowra_packed &p, const rows_layout &layout, const dense_shape &shape,
                                             int first, int end, int part, int parts) {
  end = min(end, layout.rows());
  if (first >= end) return;
  const row_place last = place_of<0>(layout, end - 1);
  const size_t from = place_of<0>(layout, first).code_offset;
  prefetch_part(p.codes + from, last.code_offset + last.stride - from, part, parts);
  const size_t groups = shape.groups * (p.scale_type == LOWRA_UINT8 ? 1 : p.scale_type == LOWRA_FLOAT16 ? 2 : 4);
  prefetch_part(static_cast<const uint8_t *>(p.scales) + first * groups, (end - first) * groups, part, parts);
}

template <class Out>
__global__ void __launch_bounds__(32 * kWarps)
    dequantize_kernel(const __grid_constant__ lowra_packed p, rows_layout layout, dense_shape shape, read_ahead ahead,
                      Out *out) {
  const int row = blockIdx.y * kWarps + threadIdx.y;
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    const int batch = blockIdx.y / ahead.row_blocks, rows = ahead.row_blocks * kWarps;
    const int part = (blockIdx.y - batch * ahead.row_blocks) * gridDim.x + blockIdx.x;
    if (part < ahead.askers) {
      if (batch == 0) ask_for_rows(p, layout, shape, 0, rows, part, ahead.askers);
      ask_for_rows(p, layout, shape, (batch + 1) * rows, (batch + 2) * rows, part, ahead.askers);
    }
  }
  wait_for_earlier_kernels();
  let_later_kernels_start();
  if (row >= layout.rows()) return;
  const row_place place = place_of<0>(layout, row);
  Out *target = out + (size_t)__ldg(p.row_order + row) * shape.in_features;
  const size_t first_scale = (size_t)row * shape.groups;
  if (place.bits == 1) {
    dequantize_span<1>(p, place, first_scale, shape, target);
  } else if (place.bits == 2) {
    dequantize_span<2>(p, place, first_scale, shape, target);
  } else {
    dequantize_span<4>(p, place, first_scale, shape, target);
  }
}

template <class Out>
int dequantize(const lowra_packed &p, void *out, cudaStream_t stream) {
  const lowra_shape &s = p.shape;
  const rows_layout layout = layout_of(s);
  const int chunks = (int)((s.in_features + 7) / 8);
  const dense_shape shape = {(int)s.in_features, (int)((s.in_features + s.group_size - 1) / s.group_size),
                             (s.group_size & (s.group_size - 1)) ? 0 : __builtin_ctz((unsigned)s.group_size / 8),
                             divisor_of((uint32_t)s.group_size / 8),
                             aligned16(out) && s.in_features * sizeof(Out) % 16 == 0};
  const dim3 grid((chunks + kSpan - 1) / kSpan, (layout.rows() + kWarps - 1) / kWarps), block(32, kWarps);
  device_limits limits;
  if (const int status = limits_of_current_device(limits)) return status;
  constexpr int64_t kBatch = 16 << 20;  // bytes written
  const int64_t row_bytes = s.in_features * sizeof(Out) * kWarps;
  const int row_blocks = kBatch / row_bytes < 1 ? 1 : (int)(kBatch / row_bytes);
  const int in_batch = (int)grid.x * (row_blocks < (int)grid.y ? row_blocks : (int)grid.y);
  const read_ahead ahead = {row_blocks, limits.processors < in_batch ? limits.processors : in_batch};
  return launch_early(dequantize_kernel<Out>, grid, block, 0, 1, stream, p, layout, shape, ahead,
                      static_cast<Out *>(out));
}

}  // namespace
}  // namespace lowra

int lowra_cuda_dequantize(const lowra_packed *packed, void *out, int32_t out_type, void *stream) {
  using namespace lowra;
  const int status = check_packed(*packed);
  if (row_count(packed->shape) == 0 && status != LOWRA_BAD_SHAPE) return LOWRA_OK;
  if (status != LOWRA_OK) return status;
  if (out_type < LOWRA_FLOAT32 || out_type > LOWRA_BFLOAT16) return LOWRA_BAD_TYPE;
  if (!out) return LOWRA_NULL_POINTER;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (out_type == LOWRA_FLOAT32) return dequantize<float>(*packed, out, on);
  if (out_type == LOWRA_FLOAT16) return dequantize<fp16>(*packed, out, on);
  return dequantize<bf16>(*packed, out, on);
}
