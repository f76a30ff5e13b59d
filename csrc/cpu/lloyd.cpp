// Weighted Lloyd-Max on the CPU: each row is sorted once, prefix sums give any cell's moments as differences, and an
// iteration is a binary search per threshold. bitsandbytes/backends/lowra/lloyd.py is the specification.

#include "lowra.h"
#include "checks.h"
#include "cpu/halves.h"
#include "cpu/threads.h"

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int64_t kWeightsPerThread = 1 << 14;
constexpr int kMaxLevels = 16;

struct moments {  // sums of v, v x and v x^2
  double mass = 0, first = 0, second = 0;
};

struct codebook {
  int count;  // levels
  double levels[kMaxLevels], thresholds[kMaxLevels - 1];
};

// Scratch of one thread and the search on one row.
class row_search {
 public:
  explicit row_search(const lowra_lloyd &search)
      : search_(search),
        x_(search.in_features),
        spare_(search.in_features),
        importance_(search.in_features),
        true_importance_(search.in_features),
        keys_(search.in_features),
        order_(search.in_features),
        spare_keys_(search.in_features),
        spare_order_(search.in_features),
        true_(search.in_features + 1),
        searched_(search.squared ? 0 : search.in_features + 1) {}

  void load_row(const void *weight, int32_t type, int64_t row) {
    const int64_t count = search_.in_features;
    std::vector<float> &normal = spare_;
    for (int64_t k = 0; k < count; ++k) normal[k] = load_element(weight, type, row * count + k);
    for (int64_t start = 0; start < count; start += search_.group_size) {
      const int64_t end = std::min(start + search_.group_size, count);
      float absmax = 0;
      for (int64_t k = start; k < end; ++k) absmax = std::max(absmax, std::fabs(normal[k]));
      for (int64_t k = start; k < end; ++k) {
        normal[k] = absmax > 0 ? normal[k] / absmax : 0.0f;
        true_importance_[k] = static_cast<double>(absmax) * absmax;
        importance_[k] = search_.squared ? true_importance_[k] : absmax;
      }
    }
    sort(normal);
    accumulate(normal, true_importance_, true_);
    if (!search_.squared) accumulate(normal, importance_, searched_);
    for (int64_t i = 0; i < count; ++i) x_[i] = normal[order_[i]];
  }

  // Improves `book` and returns its error in the dequantised domain.
  double run(codebook &book) const {
    const std::vector<moments> &sums = search_.squared ? true_ : searched_;
    moments cells[kMaxLevels];
    fill_cells(book, sums, cells);
    double error = error_of(book, cells);
    for (int32_t i = 0; i < search_.iterations; ++i) {
      codebook candidate = book;
      for (int c = 0; c < book.count; ++c)
        if (cells[c].mass > 0) candidate.levels[c] = cells[c].first / cells[c].mass;
      for (int c = 0; c + 1 < book.count; ++c)
        candidate.thresholds[c] = (candidate.levels[c] + candidate.levels[c + 1]) / 2;
      moments new_cells[kMaxLevels];
      fill_cells(candidate, sums, new_cells);
      const double new_error = error_of(candidate, new_cells);
      if (!(new_error < error)) break;
      book = candidate;
      error = new_error;
      std::memcpy(cells, new_cells, sizeof(cells));
    }
    if (search_.squared) return error;
    fill_cells(book, true_, cells);
    return error_of(book, cells);
  }

 private:
  // Ascending order of `normal`: radix sort, 8 bits at a time, on keys that order like the floats.
  void sort(const std::vector<float> &normal) {
    const int64_t count = search_.in_features;
    for (int64_t k = 0; k < count; ++k) {
      uint32_t bits;
      std::memcpy(&bits, &normal[k], 4);
      keys_[k] = bits ^ (bits & 0x80000000u ? 0xffffffffu : 0x80000000u);
      order_[k] = static_cast<int32_t>(k);
    }
    for (int shift = 0; shift < 32; shift += 8) {
      int64_t start[257] = {0};
      for (int64_t k = 0; k < count; ++k) ++start[((keys_[k] >> shift) & 255) + 1];
      for (int d = 0; d < 256; ++d) start[d + 1] += start[d];
      for (int64_t k = 0; k < count; ++k) {
        const int64_t place = start[(keys_[k] >> shift) & 255]++;
        spare_keys_[place] = keys_[k];
        spare_order_[place] = order_[k];
      }
      std::swap(keys_, spare_keys_);
      std::swap(order_, spare_order_);
    }
  }

  void accumulate(const std::vector<float> &normal, const std::vector<double> &importance, std::vector<moments> &sums) {
    moments total;
    sums[0] = total;
    for (int64_t i = 0; i < search_.in_features; ++i) {
      const double v = importance[order_[i]], x = normal[order_[i]];
      total.mass += v;
      total.first += v * x;
      total.second += v * x * x;
      sums[i + 1] = total;
    }
  }

  void fill_cells(const codebook &book, const std::vector<moments> &sums, moments *cells) const {
    const float *end = x_.data() + x_.size();
    const float *edge = x_.data();
    for (int c = 0; c < book.count; ++c) {
      const moments low = sums[edge - x_.data()];
      // thresholds ascend, so each search starts where the last one ended
      edge = c + 1 < book.count ? std::upper_bound(edge, end, static_cast<float>(book.thresholds[c])) : end;
      const moments high = sums[edge - x_.data()];
      cells[c] = {high.mass - low.mass, high.first - low.first, high.second - low.second};
    }
  }

  static double error_of(const codebook &book, const moments *cells) {
    double error = 0;
    for (int c = 0; c < book.count; ++c) {
      const double level = book.levels[c];
      error += cells[c].second - 2 * level * cells[c].first + level * level * cells[c].mass;
    }
    return error > 0 ? error : 0;
  }

  const lowra_lloyd &search_;
  std::vector<float> x_, spare_;
  std::vector<double> importance_, true_importance_;
  std::vector<uint32_t> keys_;
  std::vector<int32_t> order_;
  std::vector<uint32_t> spare_keys_;
  std::vector<int32_t> spare_order_;
  std::vector<moments> true_, searched_;
};

}  // namespace

int lowra_cpu_lloyd_max(const lowra_lloyd *search, const void *weight, int32_t weight_type, float *levels,
                        float *thresholds, float *errors, int32_t threads) {
  if (!search) return LOWRA_NULL_POINTER;
  // columns are numbered in 32 bits while they are sorted
  if (lowra::bad_sizes(search->rows, search->in_features, search->group_size) || search->in_features > INT32_MAX ||
      search->iterations < 0) {
    return LOWRA_BAD_SHAPE;
  }
  if (!lowra::is_float_type(weight_type)) return LOWRA_BAD_TYPE;
  if (search->rows == 0) return LOWRA_OK;
  if (const int status = lowra::first_of(
          lowra::check_memory(weight, lowra::bytes_of(weight_type)), lowra::check_memory(search->initial_levels, 4),
          lowra::check_memory(search->initial_thresholds, 4), lowra::check_memory(levels, 4),
          lowra::check_memory(thresholds, 4), lowra::check_memory(errors, 4))) {
    return status;
  }
  return without_exceptions([&] {
    for_each_row(search->rows, search->rows * search->in_features, kWeightsPerThread, threads, [&] {
      return [&, work = row_search(*search)](int64_t row) mutable {
        work.load_row(weight, weight_type, row);
        int level_start = 0, threshold_start = 0;
        for (int place = 0, count = 16; place < 3; ++place, count = place == 1 ? 4 : 2) {
          codebook book;
          book.count = count;
          for (int c = 0; c < count; ++c) book.levels[c] = search->initial_levels[level_start + c];
          for (int c = 0; c + 1 < count; ++c) book.thresholds[c] = search->initial_thresholds[threshold_start + c];
          errors[row * 3 + place] = static_cast<float>(work.run(book));
          for (int c = 0; c < count; ++c) levels[row * 22 + level_start + c] = static_cast<float>(book.levels[c]);
          for (int c = 0; c + 1 < count; ++c)
            thresholds[row * 19 + threshold_start + c] = static_cast<float>(book.thresholds[c]);
          level_start += count;
          threshold_start += count - 1;
        }
      };
    });
    return LOWRA_OK;
  });
}
