// Dequantise: dense [N, K] in the order of W from packed rows, or a part of it. Reference: reference.dequantize.
//
// A warp takes 1024 neighbouring weights of one row, a lane 8 of them at a time, four times over with all loads issued
// first: reads are a tenth of the traffic, so the kernel is laid out for its 16-byte stores. What else counts is the
// order in which memory sees the rows (row_blocks) and that no warp waits for it (ask_for_block).
#include "common.cuh"

namespace lowra {
namespace {

constexpr int kRows = 8;    // rows of a block, a warp each
constexpr int kChunks = 4;  // chunks of 8 weights of a lane
constexpr int kSpan = 32 * kChunks;
constexpr int kResident = 8;  // blocks on one multiprocessor
// sm_86, sm_89 and sm_120 have room for 1536 threads, sm_75 for 1024.
constexpr int kMinBlocks = kCode == 0 || (kCode >= kHopper && kCode < 120) ? kResident : kCode < kAmpere ? 4 : 6;

// Out: element type of the dense weight; 16-bit types are selected two at a time by byte permutation, float32 one by
// one.
template <class Out>
__device__ __forceinline__ void store_chunk(Out *row, int first, int end, bool vector,
                                            const uint32_t (&words)[2 * sizeof(Out)]) {
  constexpr int kWords = 2 * sizeof(Out);
  if (vector && first + 8 <= end) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      *reinterpret_cast<uint4 *>(row + first + i * 4 / sizeof(Out)) =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  } else {
    const Out *value = reinterpret_cast<const Out *>(words);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (first + i < end) row[first + i] = value[i];
    }
  }
}

// The codes of a span as they are loaded, 128 bytes of the row an instruction: word i of the span is words[i / 32] of
// lane i % 32. Narrower loads, each lane its own bytes, cost more in the way to the cache than the shuffles here.
template <int BITS>
struct span_codes {
  uint32_t words[BITS];

  // first: first chunk. Past the end of the row there are zeros.
  __device__ __forceinline__ void load(const uint8_t *codes, int first, int in_features) {
#pragma unroll
    for (int i = 0; i < BITS; ++i) {
      const int word = first * BITS / 4 + 32 * i + threadIdx.x;
      words[i] = word * (32 / BITS) < in_features ? __ldg(reinterpret_cast<const uint32_t *>(codes) + word) : 0u;
    }
  }

  // The 8 codes of chunk 32 * c + lane, in the low 8 * BITS bits; all 32 lanes must be here.
  __device__ __forceinline__ uint32_t chunk(int c) const {
    const int lane = threadIdx.x;
    if constexpr (BITS == 4) return words[c];
    if constexpr (BITS == 2) return __shfl_sync(0xffffffffu, words[c / 2], c % 2 * 16 + lane / 2) >> (lane % 2 * 16);
    return __shfl_sync(0xffffffffu, words[0], c * 8 + lane / 4) >> (lane % 4 * 8);
  }
};

// What a lane needs to decode one chunk. 16-bit outputs of 1- and 2-bit rows: the group's values, already rounded, as
// bytes to select from (`table`); otherwise the group's scale. `level`: the row's levels, one register each for 1 and 2
// bits; with 4 bits lane i of each half-warp holds level i, and a shuffle looks one up.
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
      for (int i = 0; i < BITS; ++i) {
        const uint32_t both = __ldg(reinterpret_cast<const uint32_t *>(levels) + i);
        const float2 two = __half22float2(*reinterpret_cast<const __half2 *>(&both));
        level[2 * i] = two.x, level[2 * i + 1] = two.y;
      }
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
  int first_chunk, end;  // columns of the part begin at chunk first_chunk and end before column `end`
  int columns;           // of the part
  int first_row, rows;   // of the part
  bool all_rows;
  int group_shift;  // log2 of the chunks in a group, 0 where that is no power of two
  small_divisor chunks_per_group;
  bool vector;  // rows of the output start on multiples of 16 bytes
};

// Blocks of rows, each of one precision, spread evenly over the grid: rows of all precisions that are near each other
// in W are then written at about the same time. Precision after precision, only every third or twentieth row of a
// stretch of memory would be written at a time, which costs a tenth of the write bandwidth.
struct row_blocks {
  int total;
  uint64_t share4, share2;  // 2^32 times the share of 4-bit blocks in all, and of 2-bit ones in the others
};

inline row_blocks blocks_of(const rows_layout &l) {
  const auto blocks = [](int rows) { return (rows + kRows - 1) / kRows; };
  const auto share = [](uint64_t part, uint64_t all) { return all ? ((part << 32) + all - 1) / all : 0; };
  const int blocks4 = blocks(l.rows4), blocks2 = blocks(l.rows2), others = blocks2 + blocks(l.rows1);
  return {blocks4 + others, share(blocks4, blocks4 + others), share(blocks2, others)};
}

struct block_place {
  int first, rows;  // packed rows
};

// Which of the blocks 0, 1, 2, ... are 4-bit ones: those after which index * share4 has passed one more multiple of
// 2^32. At the end it has passed one for each of them, since rounding up adds less than 2^32. Likewise the 2-bit ones.
__device__ __forceinline__ block_place place_block(const row_blocks &blocks, const rows_layout &l, uint32_t index) {
  const uint32_t index4 = (uint32_t)(index * blocks.share4 >> 32), other = index - index4;
  const uint32_t index2 = (uint32_t)(other * blocks.share2 >> 32);
  int first, begin, end;
  if ((uint32_t)((index + 1) * blocks.share4 >> 32) != index4) {
    first = index4 * kRows, begin = 0, end = l.rows4;
  } else if ((uint32_t)((other + 1) * blocks.share2 >> 32) != index2) {
    first = index2 * kRows, begin = l.rows4, end = l.rows4 + l.rows2;
  } else {
    first = (other - index2) * kRows, begin = l.rows4 + l.rows2, end = l.rows();
  }
  first += begin;
  return {first, min(kRows, end - first)};
}

// Asks for all that a block reads in the L2 cache, one range a lane: a load that has to go to memory waits for
// thousands of cycles behind the writes. The small tables count as much as the codes, since a warp waits for the
// slowest.
__device__ __forceinline__ void ask_for_block(const lowra_packed &p, const rows_layout &layout,
                                              const dense_shape &shape, const block_place &at) {
  const row_place place = place_of<0>(layout, at.first);
  const size_t groups = shape.groups, first_scale = at.first * groups, scales = at.rows * groups;
  const int scale_bytes = p.scale_type == LOWRA_UINT8 ? 1 : p.scale_type == LOWRA_FLOAT16 ? 2 : 4;
  const uint8_t *begin = nullptr;
  size_t bytes = 0;
  if (threadIdx.x == 0) {
    begin = p.codes + place.code_offset;
    bytes = (size_t)at.rows * place.stride;
  }
  if (threadIdx.x == 1) {
    begin = static_cast<const uint8_t *>(p.scales) + first_scale * scale_bytes;
    bytes = scales * scale_bytes;
  }
  if (threadIdx.x == 2) {
    begin = reinterpret_cast<const uint8_t *>(p.row_order + at.first);
    bytes = at.rows * sizeof(int32_t);
  }
  if (threadIdx.x == 3) {
    begin = reinterpret_cast<const uint8_t *>(p.levels + place.table_offset);
    bytes = (at.rows * sizeof(uint16_t)) << place.bits;
  }
  if (threadIdx.x == 4 && p.scale_type == LOWRA_UINT8) {
    const size_t first = first_scale / LOWRA_SCALE_BLOCK, last = (first_scale + scales - 1) / LOWRA_SCALE_BLOCK;
    begin = reinterpret_cast<const uint8_t *>(p.scale_steps + first);
    bytes = (last - first + 1) * sizeof(float);
  }
  prefetch_around(begin, begin + bytes);
}

template <int BITS, class Out>
__device__ __forceinline__ void dequantize_span(const lowra_packed &p, const row_place &place, int packed_row,
                                                const dense_shape &shape, Out *origin) {
  const int lane = threadIdx.x, first = shape.first_chunk + blockIdx.x * kSpan;
  const size_t first_scale = (size_t)packed_row * shape.groups;
  span_codes<BITS> codes;
  codes.load(p.codes + place.code_offset, first, shape.in_features);
  decoder<BITS, Out> of_group;
  of_group.load_levels(p.levels + place.table_offset);
  uint32_t words[2 * sizeof(Out)];
  if (shape.group_shift >= 2) {
    // Groups of 32, 64, 128 or 256: at most 32 in a span. Lane i finishes the scale of group i, the others ask for it.
    const int group = (first >> shape.group_shift) + lane;
    const bool used = lane < kSpan >> shape.group_shift && group < shape.groups;
    const float scale = used ? load_scale(p, first_scale + group) : 0.f;
    Out *row = origin + (size_t)__ldg(p.row_order + packed_row) * shape.columns;
    of_group.set_scale(scale);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      of_group.of_lane((32 * c + lane) >> shape.group_shift).decode(codes.chunk(c), words);
      store_chunk<Out>(row, (first + 32 * c + lane) * 8, shape.end, shape.vector, words);
    }
  } else {
    Out *row = origin + (size_t)__ldg(p.row_order + packed_row) * shape.columns;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = first + 32 * c + lane;
      of_group.set_scale(
          chunk * 8 < shape.in_features ? load_scale(p, first_scale + shape.chunks_per_group.divide(chunk)) : 0.f);
      of_group.decode(codes.chunk(c), words);
      store_chunk<Out>(row, chunk * 8, shape.end, shape.vector, words);
    }
  }
}

// ahead: how many blocks of rows lie between one and the other that it asks for. origin: where column 0 of row 0 of W
// would stand. (Subtracting the part's first row and column in the kernel makes a call 1.5 us longer, whatever its
// size.)
template <class Out>
__global__ void __launch_bounds__(32 * kRows, kMinBlocks)
    dequantize_kernel(const __grid_constant__ lowra_packed p, rows_layout layout, dense_shape shape, row_blocks blocks,
                      int ahead, Out *origin) {
  const block_place at = place_block(blocks, layout, blockIdx.y);
  if (blockIdx.x == 0 && threadIdx.y == 0 && shape.all_rows) {
    // The first blocks ask for themselves too: they are on the chip before the earlier kernel ends.
    const int last = min((int)blockIdx.y + ahead, blocks.total - 1);
#pragma unroll 1
    for (int i = (int)blockIdx.y < ahead ? blockIdx.y : blockIdx.y + ahead; i <= last; i += ahead) {
      ask_for_block(p, layout, shape, place_block(blocks, layout, i));
    }
  }
  wait_for_earlier_kernels();
  let_later_kernels_start();
  if ((int)threadIdx.y >= at.rows) return;
  const int row = at.first + threadIdx.y;
  if (!shape.all_rows && (unsigned)(__ldg(p.row_order + row) - shape.first_row) >= (unsigned)shape.rows) return;
  const row_place place = place_of<0>(layout, row);
  if (place.bits == 1) {
    dequantize_span<1>(p, place, row, shape, origin);
  } else if (place.bits == 2) {
    dequantize_span<2>(p, place, row, shape, origin);
  } else {
    dequantize_span<4>(p, place, row, shape, origin);
  }
}

template <class Out>
int dequantize(const lowra_packed &p, const lowra_part &part, void *out, cudaStream_t stream) {
  const lowra_shape &s = p.shape;
  const rows_layout layout = layout_of(s);
  const int chunks = (int)((part.columns + 7) / 8);
  const dense_shape shape = {(int)s.in_features,
                             (int)((s.in_features + s.group_size - 1) / s.group_size),
                             (int)(part.first_column / 8),
                             (int)(part.first_column + part.columns),
                             (int)part.columns,
                             (int)part.first_row,
                             (int)part.rows,
                             part.rows == row_count(s),
                             (s.group_size & (s.group_size - 1)) ? 0 : __builtin_ctz((unsigned)s.group_size / 8),
                             divisor_of((uint32_t)s.group_size / 8),
                             aligned16(out) && part.columns * sizeof(Out) % 16 == 0};
  const row_blocks blocks = blocks_of(layout);
  const dim3 grid((chunks + kSpan - 1) / kSpan, blocks.total), block(32, kRows);
  device_limits limits;
  if (const int status = limits_of_current_device(limits)) return status;
  // As far ahead as there are blocks on the chip: those have asked for memory themselves already.
  const int on_chip = limits.processors * kResident / (int)grid.x, ahead = on_chip < 1 ? 1 : on_chip;
  const int64_t before = part.first_row * part.columns + part.first_column;  // elements from there to `out`
  Out *origin = reinterpret_cast<Out *>(reinterpret_cast<uintptr_t>(out) - before * sizeof(Out));
  return launch_early(dequantize_kernel<Out>, grid, block, 0, 1, stream, p, layout, shape, blocks, ahead, origin);
}

}  // namespace
}  // namespace lowra

int lowra_cuda_dequantize(const lowra_packed *packed, const lowra_part *part, void *out, int32_t out_type,
                          void *stream) {
  using namespace lowra;
  if (!packed || !part) return LOWRA_NULL_POINTER;
  const int status = check_packed(*packed);
  if (status == LOWRA_BAD_SHAPE) return status;
  const int64_t rows = row_count(packed->shape), columns = packed->shape.in_features;
  if (bad_part(*part, rows, columns)) return LOWRA_BAD_SHAPE;
  if (part->rows == 0 || part->columns == 0) return LOWRA_OK;
  if (status != LOWRA_OK) return status;
  if (!is_float_type(out_type)) return LOWRA_BAD_TYPE;
  if (const int bad = check_memory(out, bytes_of(out_type))) return bad;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (out_type == LOWRA_FLOAT32) return dequantize<float>(*packed, *part, out, on);
  if (out_type == LOWRA_FLOAT16) return dequantize<fp16>(*packed, *part, out, on);
  return dequantize<bf16>(*packed, *part, out, on);
}
