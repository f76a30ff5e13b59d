// Rows handed out to threads in turns.
#ifndef LOWRA_CPU_THREADS_H
#define LOWRA_CPU_THREADS_H

#include "lowra.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

// Calls make_worker() once for each thread; the worker it returns is then called there with row after row. `weights` is
// the work of all rows together: below `weights_per_thread` the start of a thread costs more than what it would do.
// Workers are made here and must not throw: an exception in a thread would end the process.
template <class MakeWorker>
void for_each_row(int64_t rows, int64_t weights, int64_t weights_per_thread, int32_t threads, MakeWorker make_worker) {
  constexpr int64_t kRowsPerTurn = 8;
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, weights / weights_per_thread));
  std::vector<decltype(make_worker())> workers;
  workers.reserve(count);
  for (int64_t i = 0; i < count; ++i) workers.push_back(make_worker());
  std::atomic<int64_t> next{0};
  auto turns = [&](int64_t number) {
    auto &work = workers[number];
    for (;;) {
      const int64_t first = next.fetch_add(kRowsPerTurn);
      if (first >= rows) return;
      for (int64_t row = first; row < std::min(first + kRowsPerTurn, rows); ++row) work(row);
    }
  };
  std::vector<std::thread> others;
  others.reserve(count);
  try {
    for (int64_t i = 1; i < count; ++i) others.emplace_back(turns, i);
  } catch (const std::system_error &) {
    // the system has no more threads: those that run do the same rows
  }
  turns(0);
  for (auto &other : others) other.join();
}

// The status of `run`, which may find no memory for its scratch: no exception may pass a C interface.
template <class Run>
int without_exceptions(Run run) {
  try {
    return run();
  } catch (const std::exception &) {
    return LOWRA_NO_MEMORY;
  }
}

#endif
