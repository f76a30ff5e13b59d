// Rows handed out to threads in turns.
#ifndef LOWRA_CPU_THREADS_H
#define LOWRA_CPU_THREADS_H

#include "cpu/pool.h"
#include "lowra.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

// Calls make_worker() once for each thread; the worker it returns is then called there with piece after piece (a row,
// or a few), `pieces_per_turn` of them before it asks for more. `weights` is the work of all together: below
// `weights_per_thread` to wake a thread costs more than what it would do. Workers are made here and must not throw: an
// exception in a thread would end the process.
template <class MakeWorker>
void for_each_piece(int64_t pieces, int64_t pieces_per_turn, int64_t weights, int64_t weights_per_thread,
                    int32_t threads, MakeWorker make_worker) {
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, weights / weights_per_thread));
  std::vector<decltype(make_worker())> workers;
  workers.reserve(count);
  for (int64_t i = 0; i < count; ++i) workers.push_back(make_worker());
  std::atomic<int64_t> next{0};
  run_on_threads(count, [&](int64_t number) {
    auto &work = workers[number];
    for (;;) {
      const int64_t first = next.fetch_add(pieces_per_turn);
      if (first >= pieces) return;
      for (int64_t piece = first; piece < std::min(first + pieces_per_turn, pieces); ++piece) work(piece);
    }
  });
}

template <class MakeWorker>
void for_each_row(int64_t rows, int64_t weights, int64_t weights_per_thread, int32_t threads, MakeWorker make_worker) {
  for_each_piece(rows, 8, weights, weights_per_thread, threads, make_worker);
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
