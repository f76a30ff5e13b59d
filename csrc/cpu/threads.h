// Rows handed out to threads in turns.
#ifndef LOWRA_CPU_THREADS_H
#define LOWRA_CPU_THREADS_H

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// Calls make_worker() once on each thread; the worker it returns is then called with row after row. `weights` is the
// work of all rows together: below `weights_per_thread` the start of a thread costs more than what it would do.
template <class MakeWorker>
void for_each_row(int64_t rows, int64_t weights, int64_t weights_per_thread, int32_t threads, MakeWorker make_worker) {
  constexpr int64_t kRowsPerTurn = 8;
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, weights / weights_per_thread));
  std::atomic<int64_t> next{0};
  auto turns = [&] {
    auto work = make_worker();
    for (;;) {
      const int64_t first = next.fetch_add(kRowsPerTurn);
      if (first >= rows) return;
      for (int64_t row = first; row < std::min(first + kRowsPerTurn, rows); ++row) work(row);
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; ++i) others.emplace_back(turns);
  turns();
  for (auto &other : others) other.join();
}

#endif
