"""What lies between the products of a decoding step: references in plain PyTorch, and kernels in their place.

Plain functions and no ops: they serve inference alone, where an op's way through the dispatcher (25 us of the host, a
ctypes call 5) would be most of a prompt's time. Values are rounded where the modules of Transformers round them.
"""

import dataclasses
from collections.abc import Sequence

import torch

from . import checks, native, native_cpu, native_decoding
from .layout import PackedMatrix
from .ops import linear


@dataclasses.dataclass(frozen=True)
class Norm:
    """A root-mean-square norm.

    Attributes:
        weight: [features], of the type of what is normalised.
        epsilon: added to the mean square.
        one_plus: the weights are added to 1 and the product is rounded once (Gemma).
    """

    weight: torch.Tensor
    epsilon: float
    one_plus: bool = False


def normalized(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """x [..., features] over its root mean square, times the norm's weights; reference."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm.epsilon)
    if norm.one_plus:
        return (wide * (1.0 + norm.weight.float())).to(x.dtype)
    return norm.weight * wide.to(x.dtype)


def add_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, norm: Norm, delta_norm: Norm | None = None
) -> torch.Tensor:
    """Adds to the residual stream in place, and normalises it.

    Args:
        residual: [tokens, features], changed.
        delta: what is added, or None.
        norm: of the sum.
        delta_norm: of delta before it is added (Gemma 2 and 3), or None.

    Returns:
        the normalised sum, [tokens, features].
    """
    out = native_decoding.add_norm(residual, delta, norm, delta_norm)
    if out is not None:
        return out
    if delta is not None:
        residual.add_(delta if delta_norm is None else normalized(delta, delta_norm))
    return normalized(residual, norm)


def gate(opened: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(opened) * up, elementwise; activation "silu" or "gelu_tanh"."""
    if native.cuda_available() and opened.is_cuda:
        out = native_decoding.gate(opened, up, activation)
        if out is not None:
            return out
    functional = torch.nn.functional
    return (functional.silu(opened) if activation == "silu" else functional.gelu(opened, approximate="tanh")) * up


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first columns of x [..., dim]; cosine and sine [..., rotary_dim] of the same type."""
    width = cosine.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cosine + torch.cat((-high, low), dim=-1) * sine
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


@dataclasses.dataclass(frozen=True)
class Attention:
    """What the attention of a layer does with queries and keys.

    Attributes:
        heads, kv_heads, dim: query heads, key-value heads, and their width.
        scaling: of the scores.
        cosine, sine: [positions, rotary_dim], of the type of the queries.
        query_norm, key_norm: of each head, or None.
        window: slots that a token sees, itself included; 0 for all.
        softcap: scores are softcap * tanh(score / softcap); 0 for none.
    """

    heads: int
    kv_heads: int
    dim: int
    scaling: float
    cosine: torch.Tensor
    sine: torch.Tensor
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    window: int = 0
    softcap: float = 0.0


@dataclasses.dataclass
class Cache:
    """Keys and values of one layer, and where the sequences stand in them.

    Attributes:
        keys, values: [batch, kv_heads, slots, dim].
        slot: int32 [1], slot of the next token, the same for all sequences.
        first: int32 [batch], first slot of each sequence; what lies before is padding.
        workspace, finished: memory of the kernel, shared by all layers; see `workspace_of`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slot: torch.Tensor
    first: torch.Tensor
    workspace: torch.Tensor
    finished: torch.Tensor


def workspace_of(
    attention: Attention, batch: int, slots: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory that `attend` needs for caches of this size: float32 sums of the parts of a cache, and int32 counters."""
    # slots of the cache that a block of the kernel takes (csrc/lowra.h)
    parts = -(-slots // (512 if attention.dim <= 64 else 256 if attention.dim <= 128 else 128))
    each = attention.heads // attention.kv_heads * (attention.dim + 2)
    workspace = torch.empty(batch * attention.kv_heads * parts * each, dtype=torch.float32, device=device)
    return workspace, torch.zeros(batch * attention.kv_heads, dtype=torch.int32, device=device)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: Cache, attention: Attention
) -> torch.Tensor:
    """Attention of one new token of each sequence, which is put in the cache.

    Args:
        query: [batch, heads * dim]; key, value: [batch, kv_heads * dim]; before norm and rotary embedding.

    Returns:
        [batch, heads * dim].
    """
    out = native_decoding.attend(query, key, value, cache, attention)
    if out is not None:
        return out
    slot = int(cache.slot)
    positions = slot - cache.first.long()
    cosine, sine = attention.cosine[positions][:, None], attention.sine[positions][:, None]
    query, key = heads_of(query, key, attention)
    query, key = rotated(query, cosine, sine), rotated(key, cosine, sine)
    cache.keys[:, :, slot] = key
    cache.values[:, :, slot] = value.view(-1, attention.kv_heads, attention.dim)
    places = torch.arange(slot + 1, device=query.device)
    seen = places[None] >= cache.first[:, None]
    if attention.window:
        seen &= places[None] > slot - attention.window
    keys, values = cache.keys[:, :, : slot + 1], cache.values[:, :, : slot + 1]
    mask = seen[:, None, None]
    return weighted_values(query[:, :, None], keys, values, mask, attention).reshape(len(query), -1)


def heads_of(query: torch.Tensor, key: torch.Tensor, attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Query [..., heads, dim] and key [..., kv_heads, dim] of the projections' outputs, normalised where they are."""
    query = query.unflatten(-1, (attention.heads, attention.dim))
    key = key.unflatten(-1, (attention.kv_heads, attention.dim))
    if attention.query_norm is not None:
        query = normalized(query, attention.query_norm)
    if attention.key_norm is not None:
        key = normalized(key, attention.key_norm)
    return query, key


def weighted_values(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, attention: Attention
) -> torch.Tensor:
    """Softmax attention, sums in float32 or as PyTorch's kernel keeps them.

    Args:
        query: [batch, heads, tokens, dim]; keys, values: [batch, kv_heads, slots, dim].
        mask: bool [batch, 1, tokens, slots], True where a token sees a slot; None is causal with as many slots.

    Returns:
        [batch, tokens, heads, dim].
    """
    if not attention.softcap:
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and query.shape[2] > 1,
            scale=attention.scaling,
            enable_gqa=attention.heads != attention.kv_heads,
        )
        return out.transpose(1, 2)
    groups = attention.heads // attention.kv_heads
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = query @ keys.transpose(2, 3) * attention.scaling
    scores = attention.softcap * torch.tanh(scores / attention.softcap)
    if mask is None:
        mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril()
    shares = scores.float().masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (shares.to(query.dtype) @ values).transpose(1, 2)


_FEW_TOKENS = 4  # beyond, PyTorch's products of 16 bits on a CPU are the quicker ones

Weights = Sequence[tuple[PackedMatrix, torch.Tensor | None]]  # packed weights of as many columns, each with its bias


class Group(list[tuple[PackedMatrix, torch.Tensor | None]]):
    """`Weights` of a decoding step, which stay where they are while this is used.

    Attributes:
        exact: a CPU takes x as it is. Otherwise it rounds up to 4 tokens of an x of 16 bits to integers
            (`reference.linear_in_integers`) where it has kernels for that.
        prepared: what the CPU library is called with, by the type of x.
    """

    def __init__(self, weights: Weights, exact: bool = False):
        super().__init__(weights)
        self.exact = exact
        self.prepared: dict[torch.dtype, native_cpu.CpuGroup] = {}


@dataclasses.dataclass(frozen=True)
class LowRank:
    """One LoRA on a weight: scaling * B A x is added to the product.

    Attributes:
        a: [rank, K].
        b: [N, rank].
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclasses.dataclass(frozen=True)
class Gains:
    """By what A x of adapters is multiplied, where sequences go through different ones.

    Attributes:
        factors: float32 [ranks of all terms, tokens]. 0 makes 0 of whatever it is: of the ranks that are not a
            sequence's own. It is -0 where another of the same four ranks is.
        fours: int32 [sum of `own` / 4, tokens]: the fours of ranks that are a token's own, counted over all terms, in
            ascending order within each; -1 past its last.
        own: of each term, as many ranks as the token has that has most, in whole fours.
    """

    factors: torch.Tensor
    fours: torch.Tensor
    own: tuple[int, ...]

    @classmethod
    def of(cls, factors: torch.Tensor, ranks: Sequence[int]) -> "Gains":
        """factors: see there, without -0. ranks: of each term, 0 for none. Waits for the device."""
        marked, fours, own, begin = [], [], [], 0
        for of_term in factors.cpu().split(list(ranks)):
            whole = torch.nn.functional.pad(of_term, (0, 0, 0, -len(of_term) % 4)).unflatten(0, (-1, 4))
            wanted = (whole != 0).any(1)  # [fours, tokens]
            marked.append(torch.where((whole == 0) & wanted[:, None], -0.0, whole).flatten(0, 1)[: len(of_term)])
            most = int(wanted.sum(0).max()) if len(wanted) else 0
            in_front = wanted.byte().sort(dim=0, descending=True, stable=True)
            numbers = torch.where(in_front.values.bool(), in_front.indices + begin // 4, -1)
            fours.append(numbers[:most].to(torch.int32))
            own.append(4 * most)
            begin += len(of_term)
        device = factors.device
        return cls(torch.cat(marked).to(device), torch.cat(fours).contiguous().to(device), tuple(own))

    def of_first(self, tokens: int) -> "Gains":
        """Those of the first tokens, with room for what others have of their own."""
        return Gains(self.factors[:, :tokens].contiguous(), self.fours[:, :tokens].contiguous(), self.own)


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What is added to the products of a group.

    Attributes:
        terms: of each weight, or None.
        cells: int64, zeros at first, as many as `cells_of` says: memory of the kernel. Those of calls that may run at
            the same time must be others.
        launches: int32 [1], on the device; with `launch` added it must be another number at each call.
        launch: of this group among those that share the memory.
        gains: where sequences go through different adapters.
    """

    terms: Sequence[LowRank | None]
    cells: torch.Tensor
    launches: torch.Tensor
    launch: int
    gains: Gains | None = None


def cells_of(in_features: int, ranks: int) -> int:
    """Cells that a group needs whose adapters have so many ranks together."""
    return native_decoding.cells_of(in_features, ranks)


def linear_group(x: torch.Tensor, weights: Weights, adapters: Adapters | None = None) -> list[torch.Tensor]:
    """Products of x [tokens, K] with several packed weights, in one launch where a kernel covers them.

    Adapters' terms: the kernel keeps A x and the sum with the product in float32 and rounds once; elsewhere each is
    rounded to the type of x.
    """
    if (len(weights) > 1 or adapters is not None) and native.cuda_available() and x.is_cuda:
        outs = native_decoding.linear_group(x, weights, adapters)
        if outs is not None:
            return outs
    if adapters is None:
        outs = _rounded_products(x, weights)
        return [_product(x, packed, bias) for packed, bias in weights] if outs is None else outs
    outs = linear_group(x, weights)
    begin = 0
    for out, term in zip(outs, adapters.terms, strict=True):
        if term is None:
            continue
        inner, end = x @ term.a.T, begin + len(term.a)
        if adapters.gains is not None:
            gains = adapters.gains.factors[begin:end].T
            inner = torch.where(gains == 0, 0, gains * inner).to(x.dtype)
        out.addmm_(inner, term.b.T, alpha=term.scaling)
        begin = end
    return outs


def _rounded_products(x: torch.Tensor, weights: Weights) -> list[torch.Tensor] | None:
    """Products on the CPU with x in integers; None where that is not wanted, or not to be had."""
    if not (isinstance(weights, Group) and not weights.exact and x.is_cpu and native.cpu_available()):
        return None
    if x.dtype == torch.float32 or len(x) == 0:
        return None
    if x.dtype not in weights.prepared:
        for packed, bias in weights:
            checks.check_packed_once(packed, x.dtype)
            checks.check_operands_once(x, packed, bias)
        weights.prepared[x.dtype] = native_cpu.CpuGroup(weights)
    return weights.prepared[x.dtype](x)


def _product(x: torch.Tensor, packed: PackedMatrix, bias: torch.Tensor | None) -> torch.Tensor:
    """x [tokens, K] times a packed weight; on the CPU without an op, which takes as long as a small product."""
    if x.is_cpu and native.cpu_available() and 0 < len(x) <= native_cpu.MOST_TOKENS:
        checks.check_packed_once(packed, x.dtype)
        checks.check_operands_once(x, packed, bias)
        return native_cpu.product(x, packed, bias)
    return linear(x, packed, bias)


def dense_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [tokens, K] times the transposed dense weight [N, K]; sums in float32 or as PyTorch's kernel keeps them."""
    few = 0 < len(x) <= _FEW_TOKENS and x.is_cpu and native.cpu_available()
    if few and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16):
        return native_cpu.dense_product(x, weight)
    return torch.nn.functional.linear(x, weight)


def normed_linear_group(
    residual: torch.Tensor,
    delta: torch.Tensor | None,
    norm: Norm,
    weights: Weights,
    delta_norm: Norm | None = None,
    adapters: Adapters | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`linear_group` of what `add_norm` gives, in one launch with it where a kernel covers them.

    Returns:
        the products, and the residual stream with delta added: `residual` itself, changed, or another tensor.
    """
    if delta_norm is None and native.cuda_available() and residual.is_cuda:
        found = native_decoding.normed_linear_group(residual, delta, norm, weights, adapters)
        if found is not None:
            return found
    return linear_group(add_norm(residual, delta, norm, delta_norm), weights, adapters), residual


def gated_linear(
    opened: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    weights: Weights,
    adapters: Adapters | None = None,
) -> torch.Tensor:
    """The product of what `gate` gives with the one packed weight, in one launch with it where a kernel covers them."""
    if native.cuda_available() and opened.is_cuda:
        out = native_decoding.gated_linear(opened, up, activation, *weights[0], adapters)
        if out is not None:
            return out
    return linear_group(gate(opened, up, activation), weights, adapters)[0]
