// Which of the row kernels this processor runs.

#include "lowra.h"
#include "cpu/rows.h"

#include <atomic>
#include <cstring>

namespace {

bool runs_here([[maybe_unused]] const row_kernels &kernels) {
#if defined(__x86_64__)
  if (&kernels == &rows_avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (&kernels == &rows_avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
  }
#endif
  return true;
}

constexpr const row_kernels *kAll[] = {
#if defined(__x86_64__)
    &rows_avx512, &rows_avx2,
#elif defined(__aarch64__)
    &rows_neon,
#endif
    &rows_generic};

// The first that runs here and has the name, if one is given.
const row_kernels *find(const char *name) {
  for (const row_kernels *kernels : kAll) {
    if ((!name || std::strcmp(name, kernels->name) == 0) && runs_here(*kernels)) return kernels;
  }
  return nullptr;
}

std::atomic<const row_kernels *> named{nullptr};

}  // namespace

const row_kernels &kernels() {
  static const row_kernels &best = *find(nullptr);
  const row_kernels *chosen = named.load(std::memory_order_relaxed);
  return chosen ? *chosen : best;
}

int lowra_cpu_instructions(const char *name) {
  const row_kernels *chosen = find(name);
  if (!chosen) return LOWRA_UNSUPPORTED;
  named = name ? chosen : nullptr;
  return LOWRA_OK;
}
