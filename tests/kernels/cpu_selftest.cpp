// Holds the CPU library's products and dequantisation against sums in float64, for every instruction set that runs
// here. test_cpu_selftest.py builds and runs it, for another processor under an emulator, and with sanitizers. Prints
// one line for each instruction set; ends with 1 where a value is beyond its bound.

#include "lowra.h"
#include "cpu/halves.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

struct weight {
  lowra_packed packed{};
  std::vector<uint8_t> codes, roots;
  std::vector<int32_t> order;
  std::vector<float> scales, steps;
  std::vector<uint16_t> halves, levels;
  std::vector<double> dense, largest;  // [N, K] in the order of W
};

weight make(const lowra_shape &shape, int32_t scale_type, std::mt19937 &random) {
  weight w;
  const int64_t rows = shape.rows4 + shape.rows2 + shape.rows1, k = shape.in_features;
  const int64_t groups = (k + shape.group_size - 1) / shape.group_size;
  std::uniform_real_distribution<float> level(-1, 1), scale(0.1f, 2);
  for (int64_t i = 0; i < rows; ++i) w.order.push_back(static_cast<int32_t>(i));
  std::shuffle(w.order.begin(), w.order.end(), random);
  for (int64_t i = 0; i < rows * groups; ++i) {
    w.roots.push_back(static_cast<uint8_t>(random() % 256));
    w.halves.push_back(static_cast<uint16_t>(float_to_half(scale(random))));
    w.scales.push_back(scale(random));
  }
  for (int64_t i = 0; i < (rows * groups + 255) / 256; ++i) w.steps.push_back(scale(random) / 65025);
  w.dense.resize(rows * k);
  w.largest.resize(rows * k);
  for (int64_t row = 0; row < rows; ++row) {
    const int bits = row < shape.rows4 ? 4 : row < shape.rows4 + shape.rows2 ? 2 : 1;
    const size_t first = w.codes.size();
    w.codes.resize(first + lowra_row_bytes(k, bits));
    std::vector<float> own;
    double most = 0;
    for (int i = 0; i < 1 << bits; ++i) {
      w.levels.push_back(static_cast<uint16_t>(float_to_half(level(random))));
      own.push_back(half_to_float(w.levels.back()));
      most = std::fmax(most, std::fabs(own.back()));
    }
    for (int64_t column = 0; column < k; ++column) {
      const unsigned code = random() % (1u << bits);
      w.codes[first + column * bits / 8] |= static_cast<uint8_t>(code << (column * bits % 8));
      const int64_t place = row * groups + column / shape.group_size;
      const float root = w.roots[place];
      const float factor = scale_type == LOWRA_UINT8     ? root * root * w.steps[place / 256]
                           : scale_type == LOWRA_FLOAT16 ? half_to_float(w.halves[place])
                                                         : w.scales[place];
      w.dense[w.order[row] * k + column] = own[code] * factor;
      w.largest[w.order[row] * k + column] = most * factor;
    }
  }
  const void *scales = scale_type == LOWRA_UINT8     ? static_cast<const void *>(w.roots.data())
                       : scale_type == LOWRA_FLOAT16 ? static_cast<const void *>(w.halves.data())
                                                     : w.scales.data();
  w.packed = {shape, w.codes.data(), w.order.data(), scales, w.steps.data(), w.levels.data(), scale_type};
  return w;
}

bool check(const weight &w, int64_t tokens, int32_t type, std::mt19937 &random) {
  const int64_t k = w.packed.shape.in_features, rows = static_cast<int64_t>(w.order.size());
  std::normal_distribution<float> normal;
  std::vector<float> x(tokens * k), bias(rows), out(tokens * rows);  // narrow types take the first half
  std::vector<double> exact_x(tokens * k), exact_bias(rows);
  const auto fill = [&](std::vector<float> &values, std::vector<double> &exact) {
    for (size_t i = 0; i < values.size(); ++i) {
      store_element(normal(random), type, static_cast<int64_t>(i), values.data());
      exact[i] = load_element(values.data(), type, static_cast<int64_t>(i));
    }
  };
  fill(x, exact_x);
  fill(bias, exact_bias);
  if (lowra_cpu_product(&w.packed, x.data(), tokens, bias.data(), out.data(), type, 2) != LOWRA_OK) return false;
  std::vector<float> coarse(tokens * rows);
  const void *biases[] = {bias.data()};
  void *outs[] = {coarse.data()};
  const int status = lowra_cpu_product_group(&w.packed, 1, x.data(), tokens, biases, outs, type, 2);
  if (status != LOWRA_OK && status != LOWRA_UNSUPPORTED) return false;
  const double unit = type == LOWRA_FLOAT32 ? 0x1p-24 : type == LOWRA_FLOAT16 ? 0x1p-11 : 0x1p-8;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t row = 0; row < rows; ++row) {
      double exact = exact_bias[row], size = std::fabs(exact);
      for (int64_t column = 0; column < k; ++column) {
        exact += exact_x[t * k + column] * w.dense[row * k + column];
        size += std::fabs(exact_x[t * k + column]) * w.largest[row * k + column];
      }
      const double found = load_element(out.data(), type, t * rows + row);
      const double bound = unit * std::fabs(exact) + size * (static_cast<double>(k) / 4 + 8) * 0x1p-24 + 1e-7;
      if (!(std::fabs(found - exact) <= bound)) return false;
      const double rounded = load_element(coarse.data(), type, t * rows + row);
      if (status == LOWRA_OK && !(std::fabs(rounded - exact) <= bound + 0.05 * size)) return false;
    }
  }
  const size_t element = type == LOWRA_FLOAT32 ? 4 : 2;
  std::vector<char> whole(element * rows * k), expected(element);
  const lowra_part part = {0, rows, 0, k};
  if (lowra_cpu_dequantize(&w.packed, &part, whole.data(), type, 2) != LOWRA_OK) return false;
  for (int64_t i = 0; i < rows * k; ++i) {
    store_element(static_cast<float>(w.dense[i]), type, 0, expected.data());
    if (!std::equal(expected.begin(), expected.end(), whole.begin() + element * i)) return false;
  }
  return true;
}

// What lies between the products, in memory of just its size: whether sums come out right with every type is asked in
// test_cpu_decoding.py, here alone whether attention to equal values gives these, and a dense product of ones its
// width.
bool check_decoding(int32_t type, std::mt19937 &random) {
  const size_t element = type == LOWRA_FLOAT32 ? 4 : 2;
  const auto memory = [&](int64_t count, float value) {
    std::vector<char> bytes(element * count);
    for (int64_t i = 0; i < count; ++i) store_element(value, type, i, bytes.data());
    return bytes;
  };
  bool right = true;
  for (const int64_t width : {1, 7, 31, 33, 300}) {
    std::vector<char> x = memory(3 * width, 1), weight = memory(5 * width, 1), out = memory(15, 0);
    right &= lowra_cpu_dense_product(weight.data(), 5, width, x.data(), 3, out.data(), type, 2) == LOWRA_OK;
    for (int i = 0; i < 15; ++i) right &= std::fabs(load_element(out.data(), type, i) - width) <= width * 0x1p-8;
    std::vector<char> residual = memory(3 * width, 1), normal = memory(3 * width, 0);
    const lowra_norm norm = {residual.data(), x.data(), weight.data(), weight.data(), normal.data(), 3, width,
                             1e-5f,           0};
    right &= lowra_cpu_add_norm(&norm, type) == LOWRA_OK;
    for (int i = 0; i < 3 * width; ++i) right &= std::fabs(load_element(normal.data(), type, i) - 1) < 0.01f;
  }
  for (const int32_t dim : {2, 7, 40, 130}) {
    const int32_t heads = 6, kv_heads = 2, slots = 9, batch = 2, rotary = dim / 2 * 2, slot = slots - 1;
    const int32_t first[] = {0, static_cast<int32_t>(random() % slots)};
    std::vector<char> query = memory(batch * heads * dim, 0.5f), key = memory(batch * kv_heads * dim, 0.25f),
                      value = memory(batch * kv_heads * dim, 2), keys = memory(batch * kv_heads * slots * dim, 1),
                      values = memory(batch * kv_heads * slots * dim, 2), cosine = memory(slots * rotary, 0.5f),
                      out = memory(batch * heads * dim, 0), norm = memory(dim, 1);
    const lowra_attention attention = {
        query.data(),  key.data(),  value.data(),    keys.data(), values.data(), cosine.data(),
        cosine.data(), norm.data(), norm.data(),     &slot,       first,         nullptr,
        nullptr,       out.data(),  batch,           heads,       kv_heads,      dim,
        rotary,        slots,       dim % 2 ? 4 : 0, 0,           0.3f,          dim % 2 ? 5.0f : 0.0f,
        1e-5f};
    right &= lowra_cpu_attention(&attention, type, 2) == LOWRA_OK;
    for (int i = 0; i < batch * heads * dim; ++i) right &= std::fabs(load_element(out.data(), type, i) - 2) < 0.02f;
  }
  return right;
}

}  // namespace

int main() {
  const lowra_shape shapes[] = {{1, 0, 0, 7, 32},      {0, 1, 0, 16, 64},      {3, 5, 7, 224, 64},
                                {9, 21, 35, 1056, 32}, {2, 70, 85, 1004, 128}, {0, 66, 67, 520, 256},
                                {2, 2, 2, 96, 24},     {5, 6, 7, 100, 8},      {16, 0, 0, 128, 64},
                                {0, 0, 33, 512, 64},   {0, 64, 1, 64, 64}};
  bool right = true;
  for (const char *name : {"avx512vnni", "avx512", "avxvnni", "avx2", "neondot", "neon", "generic"}) {
    if (lowra_cpu_instructions(name) != LOWRA_OK) continue;
    std::mt19937 random(1);
    int cases = 0, wrong = 0;
    for (const lowra_shape &shape : shapes) {
      for (const int64_t tokens : {1, 2, 3, 4, 5, 7, 16}) {
        const int32_t scale_type = (cases % 3) == 0 ? LOWRA_UINT8 : (cases % 3) == 1 ? LOWRA_FLOAT16 : LOWRA_FLOAT32;
        const weight w = make(shape, scale_type, random);
        wrong += !check(w, tokens, cases / 3 % 3, random);
        ++cases;
      }
    }
    for (const int32_t type : {LOWRA_FLOAT32, LOWRA_FLOAT16, LOWRA_BFLOAT16}) {
      wrong += !check_decoding(type, random);
      ++cases;
    }
    std::printf("%s: %d of %d wrong\n", name, wrong, cases);
    right = right && wrong == 0;
  }
  return right ? 0 : 1;
}
