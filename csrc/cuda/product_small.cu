// The product of one weight with up to 8 tokens.
#include "product_small.cuh"

namespace lowra {
namespace {

template <bool DEFAULT_FORM>
int choose(const single_product &q, int32_t type, cudaStream_t stream) {
  if (q.tokens == 1) return launch<setup<1, 1, DEFAULT_FORM>>(q, type, stream);
  if (q.tokens == 2) return launch<setup<2, 1, DEFAULT_FORM>>(q, type, stream);
  if (q.group_shift >= 6) {
    if (q.tokens <= 4) return launch<setup<4, 2, DEFAULT_FORM>>(q, type, stream);
    return launch<setup<8, 2, DEFAULT_FORM>>(q, type, stream);
  }
  if (q.tokens <= 4) return launch<setup<4, 1, false>>(q, type, stream);
  return launch<setup<8, 1, false>>(q, type, stream);
}

}  // namespace

int product_small(const product &given, int32_t type, cudaStream_t stream) {
  const single_product q = {given};
  const bool default_form = q.packed.scale_type == LOWRA_UINT8 && q.group_shift == 6 && q.groups % 2 == 0 &&
                            reinterpret_cast<uintptr_t>(q.packed.scales) % 2 == 0;
  return default_form ? choose<true>(q, type, stream) : choose<false>(q, type, stream);
}

}  // namespace lowra
