// The packed format and the C interface of lowra's native libraries.
//
// This header is the one place where the bit order stands (README.md repeats it byte by byte for readers).
//
// A linear weight W [out_features N, in_features K] is stored row by row ("a row" = one output channel):
//   rows are sorted by precision, first all 4-bit rows, then 2-bit, then 1-bit, each class in the order of W;
//   the codes of a row lie contiguously, code k of a b-bit row in bits [(k * b) % 8, (k * b) % 8 + b) of byte k * b /
//   8, lowest bits first; every row starts on a multiple of LOWRA_ROW_ALIGNMENT bytes, the padding is zero.
// Beside the codes, all in packed row order:
//   scales [N, groups], groups = ceil(K / group_size): the absmax of each group, as float32, float16, or one byte c
//     that stands for c * c * step, where step is float32 and shared by LOWRA_SCALE_BLOCK consecutive scales;
//   levels float16: 16 for each 4-bit row, then 4 for each 2-bit row, then 2 for each 1-bit row; a row's levels
//     ascend unless they were trained.
// The value of a weight is float32(level[code]) * scale, rounded once to the output type.
#ifndef LOWRA_H
#define LOWRA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LOWRA_FORMAT_VERSION 1
#define LOWRA_INTERFACE_VERSION 3  // of the functions and structs below: libraries.py takes no library of another one
#define LOWRA_ROW_ALIGNMENT 16     // bytes: one vector load of a GPU thread never crosses into the next row
#define LOWRA_SCALE_BLOCK 256      // scales that share one float32 step
#define LOWRA_MAX_GROUP_SIZE 256
#define LOWRA_CPU_MOST_TOKENS 16  // of lowra_cpu_product
#define LOWRA_CPU_MOST_DIM 512    // of lowra_cpu_attention
#define LOWRA_MOST_GROUPED 3      // weights of lowra_cuda_product_group

enum lowra_status {
  LOWRA_OK = 0,
  LOWRA_BAD_SHAPE = 1,  // negative counts, a group size that is not a multiple of 8 or above the maximum, sizes whose
                        // products do not fit into 64 bits
  LOWRA_BAD_TYPE = 2,   // an element or scale type that is not listed below
  LOWRA_NULL_POINTER = 3,
  LOWRA_CUDA_ERROR = 4,     // a launch failed; lowra_cuda_error() has the runtime's words
  LOWRA_UNSUPPORTED = 5,    // a shape this kernel does not cover; the caller takes the reference
  LOWRA_NOT_FORCED = 6,     // the environment's LOWRA_PRODUCT names a kernel that does not cover this product, or none
  LOWRA_MISALIGNED = 7,     // a pointer that is no multiple of the size of its elements; for CUDA also codes on no
                            // multiple of LOWRA_ROW_ALIGNMENT, or levels on none of 4
  LOWRA_BAD_ROW_ORDER = 8,  // a row number outside the weight, or one that stands twice; only the CPU functions look
  LOWRA_NO_MEMORY = 9,      // no scratch memory on the CPU
  LOWRA_NO_CODE = 10,       // the CUDA library has no code for this chip; lowra_cuda_error() has the runtime's words
};

enum lowra_type {
  LOWRA_FLOAT32 = 0,
  LOWRA_FLOAT16 = 1,
  LOWRA_BFLOAT16 = 2,
  LOWRA_UINT8 = 3,
  LOWRA_FLOAT8 = 4
};  // float8: e5m2

// Shape of one packed weight. rows of each precision, in packed order: [0, rows4), [rows4, rows4 + rows2), the rest
// 1-bit.
typedef struct lowra_shape {
  int64_t rows4, rows2, rows1;
  int64_t in_features;  // K
  int64_t group_size;
} lowra_shape;

// Everything a product or a dequantisation reads. Pointers are to the memory of the library's device.
typedef struct lowra_packed {
  lowra_shape shape;
  const uint8_t *codes;      // rows padded as described above
  const int32_t *row_order;  // [N] packed row -> row of W
  const void *scales;        // [N, groups] of scale_type
  const float *scale_steps;  // [ceil(N * groups / 256)], only for LOWRA_UINT8
  const uint16_t *levels;    // float16 bits
  int32_t scale_type;        // LOWRA_FLOAT32, LOWRA_FLOAT16 or LOWRA_UINT8
} lowra_packed;

// Rows and columns of W.
typedef struct lowra_part {
  int64_t first_row, rows, first_column, columns;
} lowra_part;

// Weighted Lloyd-Max of every row of a weight [rows, in_features] at 4, 2 and 1 bits (bitsandbytes/backends/lowra/
// lloyd.py is the specification).
typedef struct lowra_lloyd {
  const float *initial_levels;      // [22]: 16, 4 and 2
  const float *initial_thresholds;  // [19]: 15, 3 and 1
  int64_t rows, in_features, group_size;
  int32_t iterations;
  int32_t squared;  // weight of a group in the search: absmax squared, or absmax
} lowra_lloyd;

static inline int64_t lowra_row_bytes(int64_t in_features, int bits) {
  int64_t bytes = (in_features * bits + 7) / 8;
  return (bytes + LOWRA_ROW_ALIGNMENT - 1) / LOWRA_ROW_ALIGNMENT * LOWRA_ROW_ALIGNMENT;
}

#ifdef __cplusplus
static_assert(sizeof(lowra_shape) == 40, "lowra_shape is mirrored by ctypes in libraries.py");
static_assert(sizeof(lowra_packed) == 88, "lowra_packed is mirrored by ctypes in libraries.py");
static_assert(sizeof(lowra_part) == 32, "lowra_part is mirrored by ctypes in libraries.py");
static_assert(sizeof(lowra_lloyd) == 48, "lowra_lloyd is mirrored by ctypes in libraries.py");
static_assert(LOWRA_ROW_ALIGNMENT % 16 == 0, "kernels load 16 bytes at once");
static_assert(LOWRA_SCALE_BLOCK == 256, "the checkpoint format fixes the block of double-quantised scales");
static_assert(255 * 255 * 2 < (1 << 24), "c * c is exact in float32");
#endif

#if defined(_WIN32)
#define LOWRA_API __declspec(dllexport)
#else
#define LOWRA_API __attribute__((visibility("default")))
#endif

LOWRA_API int lowra_format_version(void);
LOWRA_API int lowra_interface_version(void);

// No function below trusts its sizes and pointers further than it must: a status other than LOWRA_OK says what is wrong
// before anything is read or written. That the memory is as large as the sizes say is the caller's word.

// codes and absmax of `weight` [N, K]; row i of the packed order is row row_order[i] of `weight`. thresholds (float32)
// in packed order: 15 for each 4-bit row, 3 for each 2-bit row, 1 for each 1-bit row. A code is the number of
// thresholds t with t * absmax < w. absmax is float32 [N, groups] in packed order.
LOWRA_API int lowra_cpu_quantize(const lowra_shape *shape, const void *weight, int32_t weight_type,
                                 const int32_t *row_order, const float *thresholds, uint8_t *codes, float *absmax,
                                 int32_t threads);

// A part of the weight, rows in the order of W: out [part.rows, part.columns] of out_type. first_column a multiple of
// LOWRA_MAX_GROUP_SIZE.
LOWRA_API int lowra_cpu_dequantize(const lowra_packed *packed, const lowra_part *part, void *out, int32_t out_type,
                                   int32_t threads);

// out [tokens, N] = x [tokens, K] times the transposed weight, plus bias [N] unless null; all of `type`. Up to
// LOWRA_CPU_MOST_TOKENS tokens. Weights and x are taken as float32, sums are kept in float32 and rounded once; their
// order is in docs/lab/kernels/cpu.md.
LOWRA_API int lowra_cpu_product(const lowra_packed *packed, const void *x, int64_t tokens, const void *bias, void *out,
                                int32_t type, int32_t threads);

// out[i] [tokens, N_i] = x times the transposed weight i, plus bias[i] unless null, of `count` weights (up to
// LOWRA_MOST_GROUPED) with the same columns in groups of the same size, and x rounded to integers once for all of them,
// for 1 to 4 tokens (docs/lab/kernels/cpu.md has the error). LOWRA_UNSUPPORTED, before anything is written, where the
// instruction set in use has no such kernels, for more tokens, for group sizes other than 32, 64, 128 and 256, and for
// an x that has no steps: one that is not finite, or of a magnitude beyond 1e30 or below 1e-30.
LOWRA_API int lowra_cpu_product_group(const lowra_packed *weights, int32_t count, const void *x, int64_t tokens,
                                      const void *const *bias, void *const *out, int32_t type, int32_t threads);

// Makes the functions above use the kernels of one instruction set ("avx512vnni", "avx512", "avxvnni", "avx2",
// "neon" or "generic"), or with null, as at the start, the best of this processor. LOWRA_UNSUPPORTED where it has no
// such kernels.
LOWRA_API int lowra_cpu_instructions(const char *name);

// levels [rows, 22], thresholds [rows, 19], errors [rows, 3], all float32.
LOWRA_API int lowra_cpu_lloyd_max(const lowra_lloyd *search, const void *weight, int32_t weight_type, float *levels,
                                  float *thresholds, float *errors, int32_t threads);

// The CUDA library. Every pointer but those to structs is to memory of the current device; `stream` is a cudaStream_t.
// No call synchronises or allocates, so row_order is taken as it is: its caller has made sure that it names every row
// once. Rows of a weight with group sizes that a kernel does not cover answer LOWRA_UNSUPPORTED before anything is
// launched; the caller then takes the PyTorch reference.

// As lowra_cpu_quantize. Group sizes 8, 16, 32, 64, 128 and 256.
LOWRA_API int lowra_cuda_quantize(const lowra_shape *shape, const void *weight, int32_t weight_type,
                                  const int32_t *row_order, const float *thresholds, uint8_t *codes, float *absmax,
                                  void *stream);

// 8-bit scales of absmax [count]: scales [count] and scale_steps [ceil(count / 256)].
LOWRA_API int lowra_cuda_encode_scales(const float *absmax, int64_t count, uint8_t *scales, float *scale_steps,
                                       void *stream);

// As lowra_cpu_dequantize. Every shape. With row_order = 0, 1, 2, ... the rows come out in packed order.
LOWRA_API int lowra_cuda_dequantize(const lowra_packed *packed, const lowra_part *part, void *out, int32_t out_type,
                                    void *stream);

// out [tokens, N] = x [tokens, K] times the transposed weight, plus bias [N] unless null; all of `type` (float16 or
// bfloat16). Group sizes 32, 64, 128 and 256, K a multiple of 32; above 64 tokens only on Hopper, group sizes from 64
// on, K a multiple of 64 and N one of 4. The environment variable LOWRA_PRODUCT (small, tensor, wgmma, many or dense),
// read at the first call, names the kernel of every product in place of the quickest.
LOWRA_API int lowra_cuda_product(const lowra_packed *packed, const void *x, int64_t tokens, const void *bias, void *out,
                                 int32_t type, void *stream);

enum lowra_activation { LOWRA_SILU = 0, LOWRA_GELU_TANH = 1 };

// What the x of a product is made of: of `first` alone; of first + second, normalised; or of activation(first) *
// second.
enum lowra_input_kind { LOWRA_PLAIN = 0, LOWRA_NORMED = 1, LOWRA_GATED = 2 };

typedef struct lowra_input {
  const void *first;   // [tokens, K]
  const void *second;  // [tokens, K]; null for LOWRA_PLAIN, and where LOWRA_NORMED adds nothing
  const void *weight;  // [K], of the norm
  void *sum;           // [tokens, K], only with LOWRA_NORMED: first + second; no other memory of the call
  float epsilon;
  int32_t one_plus;  // the norm's weights are added to 1 (Gemma)
  int32_t activation, kind;
} lowra_input;

// A LoRA adapter: scaling B (A x) is added to a product. A and B are of the type of x.
typedef struct lowra_adapter {
  const void *a;  // [rank, K]
  const void *b;  // [N, rank]
  int32_t rank;   // a multiple of 4; 0 for no adapter
  int32_t own;    // of these, as many as the token has that has most: a multiple of 4, `rank` without gains
  float scaling;
} lowra_adapter;

// The adapters of a group's weights, and memory in which the blocks of its kernel pass sums to each other. Two launches
// that may run at the same time need other memory.
typedef struct lowra_adapters {
  lowra_adapter of[LOWRA_MOST_GROUPED];
  uint64_t *cells;          // ranks of all adapters * tokens * pieces, zeros before the first launch; pieces: ceil(K /
                            // 512), rounded up to a power of two or, from 32 on, to a multiple of 32
  const int32_t *launches;  // on the device; with `launch` added, a number that no launch with these cells has had
  const float *gains;    // [ranks of all adapters, tokens] or null: factors of A x; -0 makes 0 of whatever it is, and
                         // what has 0 is neither made nor taken: all of four ranks, or none
  const int32_t *fours;  // [`own` of all adapters / 4, tokens], with gains: fours of ranks that are a token's own,
                         // counted over all adapters; -1 past the last of each
  int32_t launch;
} lowra_adapters;

// out[i] [tokens, N_i] = x times the transposed weight i, plus bias[i] unless null, of `count` weights with the same
// columns in one launch: q, k and v, or gate and up; plus the term of an adapter where `adapters` is not null. Up to 8
// tokens, 4 where x is normed or gated; 8-bit scales of groups of 64, an even number in a row. weights, bias and out
// are arrays in host memory.
LOWRA_API int lowra_cuda_product_group(const lowra_packed *weights, int32_t count, const lowra_input *input,
                                       int64_t tokens, const void *const *bias, const lowra_adapters *adapters,
                                       void *const *out, int32_t type, void *stream);

// 1 where lowra_cuda_product is quicker on the current device than a dense product after lowra_cuda_dequantize, for a
// weight [rows, in_features] that it covers, else 0 (measured: docs/lab/kernels/measured.md).
LOWRA_API int32_t lowra_cuda_product_is_quicker(int64_t tokens, int64_t rows, int64_t in_features);

// What lies between the products of a decoding step (bitsandbytes/backends/lowra/decoding.py).

// residual += delta (normalised before that where delta_weight is given), out = the normalised residual.
typedef struct lowra_norm {
  void *residual;            // [tokens, features], changed in place
  const void *delta;         // [tokens, features] or null
  const void *delta_weight;  // [features] or null: a norm of delta itself, before it is added (Gemma 2 and 3)
  const void *weight;        // [features]
  void *out;                 // [tokens, features]
  int64_t tokens, features;  // features a multiple of 8, up to 16384
  float epsilon;
  int32_t one_plus;  // the weights are added to 1 (Gemma)
} lowra_norm;

LOWRA_API int lowra_cuda_add_norm(const lowra_norm *norm, int32_t type, void *stream);

// out [count] = activation(gate) * up. count a multiple of 8.
LOWRA_API int lowra_cuda_gate(const void *gate, const void *up, void *out, int64_t count, int32_t activation,
                              int32_t type, void *stream);

// Attention of one new token of each sequence, which is put in the cache first. All but the integers is of `type`. A
// cache is taken in parts of 512 slots for a dim up to 64, 256 up to 128, and 128 up to 256. On a GPU the cache, slot
// and first are read while the launch before it on the stream may still run, so that one must not write them.
typedef struct lowra_attention {
  const void *query;                    // [batch, heads, dim]
  const void *key, *value;              // [batch, kv_heads, dim]
  void *keys, *values;                  // cache [batch, kv_heads, slots, dim]
  const void *cosine, *sine;            // [positions, rotary_dim]
  const void *query_norm, *key_norm;    // [dim] or null
  const int32_t *slot;                  // of the new tokens, on the device
  const int32_t *first;                 // [batch] first slot of each sequence: what lies before is padding
  float *workspace;                     // [batch, kv_heads, parts, heads / kv_heads * (dim + 2)]
  int32_t *finished;                    // [batch, kv_heads] zeros, and zeros again afterwards
  void *out;                            // [batch, heads, dim]
  int32_t batch, heads, kv_heads, dim;  // heads at most 8 times kv_heads; dim a multiple of 8 up to 256
  int32_t rotary_dim, slots;
  int32_t window;                   // slots that a token sees, itself included; 0 for all
  int32_t one_plus;                 // as in lowra_norm
  float scaling, softcap, epsilon;  // softcap 0 for none
} lowra_attention;

LOWRA_API int lowra_cuda_attention(const lowra_attention *attention, int32_t type, void *stream);

// The same on the processor, for float32 too; any number of features and of query heads, a dim up to
// LOWRA_CPU_MOST_DIM. workspace and finished are not used. Sums in float32, rounded once.
LOWRA_API int lowra_cpu_add_norm(const lowra_norm *norm, int32_t type);
LOWRA_API int lowra_cpu_attention(const lowra_attention *attention, int32_t type, int32_t threads);

// out [tokens, rows] = x [tokens, in_features] times a dense transposed weight [rows, in_features], all of `type`: a
// head that is not packed. Up to LOWRA_CPU_MOST_TOKENS tokens. Sums in float32, rounded once.
LOWRA_API int lowra_cpu_dense_product(const void *weight, int64_t rows, int64_t in_features, const void *x,
                                      int64_t tokens, void *out, int32_t type, int32_t threads);

#ifdef __cplusplus
static_assert(sizeof(lowra_input) == 48, "lowra_input is mirrored by ctypes in native_decoding.py");
static_assert(sizeof(lowra_adapters) == 136, "lowra_adapters is mirrored by ctypes in native_decoding.py");
static_assert(sizeof(lowra_norm) == 64, "lowra_norm is mirrored by ctypes in native_decoding.py");
static_assert(sizeof(lowra_attention) == 160, "lowra_attention is mirrored by ctypes in native_decoding.py");
#endif

// As lowra_cpu_lloyd_max; the initial levels and thresholds lie on the device too. A row must fit into the shared
// memory of a block (K <= 55,000 on an H200).
LOWRA_API int lowra_cuda_lloyd_max(const lowra_lloyd *search, const void *weight, int32_t weight_type, float *levels,
                                   float *thresholds, float *errors, void *stream);

// Gradients (bitsandbytes/backends/lowra/table_gradients.py) of the levels, float32 in the order of packed->levels, and
// of the scales, float32 [N, groups], unless null, from that of the dense weight [N, K] of `type`, rows in the order of
// W. K up to 97,000 where the scales' are asked for.
LOWRA_API int lowra_cuda_table_gradients(const lowra_packed *packed, const void *gradient, int32_t type,
                                         float *for_levels, float *for_scales, void *stream);

// Tables with changes that levels of a row, or scales of a group of columns, share (bitsandbytes/backends/lowra/
// shared_tables.py), all float32: levels [entries] of packed + level_shift [N], times e^level_gain [N] unless that is
// null, float16; and scales [N, groups] of packed times e^scale_gain [groups].
LOWRA_API int lowra_cuda_shared_tables(const lowra_packed *packed, const float *level_shift, const float *level_gain,
                                       const float *scale_gain, uint16_t *levels, float *scales, void *stream);

// Of x and gradient [tokens, in_features]: means [tokens, groups] of x over each group, all of `type`, and products
// float32 [parts, groups], the sums of x * gradient over each group and the tokens of each part. At most 65535 parts.
LOWRA_API int lowra_cuda_group_sums(const void *x, const void *gradient, int32_t type, int64_t tokens,
                                    int64_t in_features, int64_t group_size, void *means, float *products,
                                    int64_t parts, void *stream);

// products float32 [parts, out_features]: sums of gradient * output, both [tokens, out_features], over the tokens of
// each part. output: of `type`, or LOWRA_FLOAT8.
LOWRA_API int lowra_cuda_channel_sums(const void *gradient, int32_t type, const void *output, int32_t output_type,
                                      int64_t tokens, int64_t out_features, float *products, int64_t parts,
                                      void *stream);

// Gradients of the shared changes, float32, from those sums.
typedef struct lowra_shared_gradients {
  const void *of_means;      // [N, groups] of `type`, rows in the order of W: gradient of the output times the means
  const float *of_groups;    // [group_parts, groups], of lowra_cuda_group_sums
  const float *of_channels;  // [channel_parts, N], of lowra_cuda_channel_sums; unread without channel_parts
  const int32_t *row_order;  // [N]
  const float *scales;       // [N, groups], of lowra_cuda_shared_tables
  const float *level_gain;   // [N]; unread without channel_parts
  float *for_shift;          // [N], packed order, as below
  float *for_gain;           // [N]; unread without channel_parts
  float *for_scale_gain;     // [groups]
  int64_t rows, groups, group_size, group_parts, channel_parts;
  int32_t type;
} lowra_shared_gradients;

LOWRA_API int lowra_cuda_shared_gradients(const lowra_shared_gradients *given, void *stream);

// What the CUDA runtime said about the last launch of this thread that answered LOWRA_CUDA_ERROR or LOWRA_NO_CODE.
LOWRA_API const char *lowra_cuda_error(void);

// The compute capability that the code running on the current device was compiled for, 75 for 7.5; 0 where there is
// none (lowra_cuda_error). hopper: 1 where the kernels for Hopper (product_wgmma, product_many) run, else 0.
LOWRA_API int32_t lowra_cuda_code(int32_t *hopper);

#ifdef __cplusplus
}
#endif
#endif
