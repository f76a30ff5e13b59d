// Products of several weights with one x in one launch, up to 8 tokens: a step of decoding.
#include <algorithm>

#include "product_small.cuh"

namespace lowra {

namespace {

template <adapter_form FORM, class T>
int choose_tokens(const product_group &q, cudaStream_t stream) {
  if (q.tokens == 1) return launch<setup<1, 1, true, T, product_group, FORM>>(q, stream);
  if (q.tokens == 2) return launch<setup<2, 1, true, T, product_group, FORM>>(q, stream);
  if constexpr (FORM != adapter_form::simple) {
    if (q.tokens <= 4) return launch<setup<4, 2, true, T, product_group, FORM>>(q, stream);
    if (q.input.kind != LOWRA_PLAIN && q.tokens > kMostMadeTokens) return LOWRA_UNSUPPORTED;
    if (q.tokens <= 8) return launch<setup<8, 2, true, T, product_group, FORM>>(q, stream);
  }
  return LOWRA_UNSUPPORTED;
}

template <adapter_form FORM>
int choose_type(const product_group &q, int32_t type, cudaStream_t stream) {
  return type == LOWRA_FLOAT16 ? choose_tokens<FORM, fp16>(q, stream) : choose_tokens<FORM, bf16>(q, stream);
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
  if (!adapters) return choose_type<adapter_form::none>(q, type, stream);
  q.adapters = *adapters;
  q.b_in_16 = true;
  int most_ranks = 0;
  for (const lowra_adapter &adapter : adapters->of) {
    q.ranks += adapter.rank, q.own += adapter.own;
    q.b_in_16 = q.b_in_16 && adapter.rank % 8 == 0 && aligned16(adapter.b);
    most_ranks = std::max(most_ranks, adapter.rank);
  }
  q.per_piece = divisor_of((uint32_t)std::max(q.ranks, 1));
  q.b_stride = q.b_in_16 ? (most_ranks / 8 | 1) * 2 : most_ranks / 4 | 1;
  const int pieces = (q.in_features + kPieceColumns - 1) / kPieceColumns;
  const int at_once = q.tokens <= 2 ? 1 : 8;  // cells that a thread looks at together
  while (q.sharing < 5 && at_once << q.sharing < pieces && (2 << q.sharing) * q.own * q.tokens <= kThreads) ++q.sharing;
  const bool one_look = pieces <= 1 << q.sharing && q.own * q.tokens << q.sharing <= kThreads;
  if (!q.adapters.gains && q.b_in_16 && one_look) {
    const int status = choose_type<adapter_form::simple>(q, type, stream);
    if (status != LOWRA_UNSUPPORTED) return status;
  }
  return choose_type<adapter_form::any>(q, type, stream);
}

}  // namespace lowra
