// The product of one weight with up to 8 tokens.
#include "product_small.cuh"

namespace lowra {
namespace {

template <bool DEFAULT_FORM, class T>
int choose(const single_product &q, cudaStream_t stream) {
  if (q.tokens == 1) return launch<setup<1, 1, DEFAULT_FORM, T>>(q, stream);
  if (q.tokens == 2) return launch<setup<2, 1, DEFAULT_FORM, T>>(q, stream);
  if (q.group_shift >= 6) {
    if (q.tokens <= 4) return launch<setup<4, 2, DEFAULT_FORM, T>>(q, stream);
    return launch<setup<8, 2, DEFAULT_FORM, T>>(q, stream);
  }
  if (q.tokens <= 4) return launch<setup<4, 1, false, T>>(q, stream);
  return launch<setup<8, 1, false, T>>(q, stream);
}

}  // namespace

int product_small(const product &given, int32_t type, cudaStream_t stream) {
  const single_product q = {given};
  const bool default_form = q.packed.scale_type == LOWRA_UINT8 && q.group_shift == 6 && q.groups % 2 == 0 &&
                            reinterpret_cast<uintptr_t>(q.packed.scales) % 2 == 0;
  if (type == LOWRA_FLOAT16) return default_form ? choose<true, fp16>(q, stream) : choose<false, fp16>(q, stream);
  return default_form ? choose<true, bf16>(q, stream) : choose<false, bf16>(q, stream);
}

}  // namespace lowra
