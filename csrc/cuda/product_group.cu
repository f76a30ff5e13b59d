// Products of several weights with one x in one launch, up to 8 tokens: a step of decoding.
#include <algorithm>

#include "product_small.cuh"

namespace lowra {

namespace {

template <int INPUT, bool ADAPTED>
int choose_tokens(const product_group &q, int32_t type, cudaStream_t stream) {
  if (q.tokens == 1) return launch<setup<1, 1, true, product_group, INPUT, ADAPTED>>(q, type, stream);
  if (q.tokens == 2) return launch<setup<2, 1, true, product_group, INPUT, ADAPTED>>(q, type, stream);
  if (q.tokens <= 4) return launch<setup<4, 2, true, product_group, INPUT, ADAPTED>>(q, type, stream);
  // Every block would normalise or gate all of x: with more tokens that takes longer than a launch of its own.
  if constexpr (INPUT == LOWRA_PLAIN) {
    if (q.tokens <= 8) return launch<setup<8, 2, true, product_group, INPUT, ADAPTED>>(q, type, stream);
  }
  return LOWRA_UNSUPPORTED;
}

template <bool ADAPTED>
int choose_input(const product_group &q, int32_t type, cudaStream_t stream) {
  if (q.input.kind == LOWRA_NORMED) return choose_tokens<LOWRA_NORMED, ADAPTED>(q, type, stream);
  if (q.input.kind == LOWRA_GATED) return choose_tokens<LOWRA_GATED, ADAPTED>(q, type, stream);
  return choose_tokens<LOWRA_PLAIN, ADAPTED>(q, type, stream);
}

}  // namespace

int product_small_group(const lowra_packed *weights, const void *const *bias, void *const *out, int count,
                        const lowra_input &input, const lowra_adapters *adapters, const product &base, int32_t type,
                        cudaStream_t stream) {
  product_group q = {};
  static_cast<product &>(q) = base;
  q.input = input;
  q.parts = count;
  for (int i = 0; i < count; ++i) {
    const lowra_packed &w = weights[i];
    q.members[i] = {w.codes,       w.row_order,       static_cast<const uint8_t *>(w.scales),
                    w.scale_steps, w.levels,          bias[i],
                    out[i],        layout_of(w.shape)};
  }
  if (!adapters) return choose_input<false>(q, type, stream);
  q.adapters = *adapters;
  for (const lowra_adapter &adapter : adapters->of) {
    q.ranks += adapter.rank;
    q.most_ranks = std::max(q.most_ranks, adapter.rank);
  }
  return choose_input<true>(q, type, stream);
}

}  // namespace lowra
