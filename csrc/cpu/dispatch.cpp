// Which of the row kernels this processor runs.

#include "lowra.h"
#include "cpu/rows.h"

#include <atomic>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

#if defined(__x86_64__)
// AVX-VNNI, for which older compilers have no name.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 4);
}
#elif defined(__aarch64__)
// Products of four bytes of ARMv8.2. A system that is not known to say whether it has them counts as one without.
bool has_dot_products() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & 1ul << 20;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}
#endif

bool runs_here([[maybe_unused]] const row_kernels &kernels) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (&kernels == &rows_avx512vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
  if (&kernels == &rows_avx512) return avx512;
  if (&kernels == &rows_avxvnni) return avx2 && has_avx_vnni();
  if (&kernels == &rows_avx2) return avx2;
#elif defined(__aarch64__)
  if (&kernels == &rows_neondot) return has_dot_products();
#endif
  return true;
}

constexpr const row_kernels *kAll[] = {
#if defined(__x86_64__)
    &rows_avx512vnni, &rows_avx512, &rows_avxvnni, &rows_avx2,
#elif defined(__aarch64__)
    &rows_neondot, &rows_neon,
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
