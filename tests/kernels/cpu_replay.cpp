// Runs the CPU library over cases from a file, by every instruction set of this processor: test_cpu_arm.py writes the
// cases and holds the results against the PyTorch reference, so an emulated processor needs no Python of its own.
//
//     replay CASES RESULTS
//
// A case is ten int64 (rows of 4, 2 and 1 bits, in_features, group_size, scale type, type of x, tokens, bytes of codes,
// entries of `levels`), then row_order, thresholds, weight float32, codes, levels, scales, scale_steps, x and bias.
// Results, for each instruction set and case: codes and absmax of the weight, the dequantised codes in float32, the
// product, an int64 that says whether there is one in integers, and that. Prints the instruction sets.

#include "lowra.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

std::vector<char> taken(FILE *from, int64_t bytes) {
  std::vector<char> data(bytes);
  if (std::fread(data.data(), 1, bytes, from) != static_cast<size_t>(bytes)) std::exit(2);
  return data;
}

template <class Element>
const Element *as(const std::vector<char> &data) {
  return reinterpret_cast<const Element *>(data.data());
}

void require(int status) {
  if (status != LOWRA_OK) std::exit(3);
}

void replay(FILE *cases, FILE *results) {
  int64_t head[10];
  while (std::fread(head, 8, 10, cases) == 10) {
    const lowra_shape shape = {head[0], head[1], head[2], head[3], head[4]};
    const int32_t scale_type = static_cast<int32_t>(head[5]), type = static_cast<int32_t>(head[6]);
    const int64_t rows = head[0] + head[1] + head[2], k = head[3], tokens = head[7];
    const int64_t scales = rows * ((k + head[4] - 1) / head[4]), element = type == LOWRA_FLOAT32 ? 4 : 2;
    const auto order = taken(cases, 4 * rows), thresholds = taken(cases, 4 * (15 * head[0] + 3 * head[1] + head[2]));
    const auto weight = taken(cases, 4 * rows * k), codes = taken(cases, head[8]), levels = taken(cases, 2 * head[9]);
    const int64_t width = scale_type == LOWRA_UINT8 ? 1 : scale_type == LOWRA_FLOAT16 ? 2 : 4;
    const auto own_scales = taken(cases, width * scales);
    const auto steps = taken(cases, scale_type == LOWRA_UINT8 ? (scales + 255) / 256 * 4 : 0);
    const auto x = taken(cases, element * tokens * k), bias = taken(cases, element * rows);
    const auto write = [&](const std::vector<char> &data) { std::fwrite(data.data(), 1, data.size(), results); };

    std::vector<char> found(codes.size()), absmax(4 * scales);
    require(lowra_cpu_quantize(&shape, weight.data(), LOWRA_FLOAT32, as<int32_t>(order), as<float>(thresholds),
                               reinterpret_cast<uint8_t *>(found.data()), reinterpret_cast<float *>(absmax.data()), 2));
    write(found);
    write(absmax);
    const lowra_packed packed = {
        shape,     as<uint8_t>(codes), as<int32_t>(order), own_scales.data(), as<float>(steps), as<uint16_t>(levels),
        scale_type};
    std::vector<char> dense(4 * rows * k), out(element * tokens * rows);
    const lowra_part part = {0, rows, 0, k};
    require(lowra_cpu_dequantize(&packed, &part, dense.data(), LOWRA_FLOAT32, 2));
    write(dense);
    require(lowra_cpu_product(&packed, x.data(), tokens, bias.data(), out.data(), type, 2));
    write(out);
    const void *biases[] = {bias.data()};
    void *outs[] = {out.data()};
    const int status = lowra_cpu_product_group(&packed, 1, x.data(), tokens, biases, outs, type, 2);
    if (status != LOWRA_UNSUPPORTED) require(status);
    const int64_t integers = status == LOWRA_OK;
    std::fwrite(&integers, 8, 1, results);
    write(out);
  }
}

}  // namespace

int main(int, char **arguments) {
  FILE *results = std::fopen(arguments[2], "wb");
  for (const char *name : {"avx512vnni", "avx512", "avxvnni", "avx2", "neondot", "neon", "generic"}) {
    if (lowra_cpu_instructions(name) != LOWRA_OK) continue;
    std::puts(name);
    FILE *cases = std::fopen(arguments[1], "rb");
    replay(cases, results);
    std::fclose(cases);
  }
  return std::fclose(results);
}
