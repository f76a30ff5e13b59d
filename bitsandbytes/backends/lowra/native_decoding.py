"""ctypes calls of the kernels between the products of a decoding step, and on a GPU of products in one launch."""

import ctypes
from typing import TYPE_CHECKING

import torch

from . import checks, native
from .layout import PackedMatrix

if TYPE_CHECKING:
    from .decoding import Adapters, Attention, Cache, Norm, Weights

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_TYPES = {torch.float16: 1, torch.bfloat16: 2}
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
# csrc/lowra.h
_PLAIN, _NORMED, _GATED = 0, 1, 2
_MOST_TOKENS = 8
_MOST_MADE_TOKENS = 4  # where x is normed or gated
_CELL_COLUMNS = 512


class _Input(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("first", "second", "weight", "sum")),
        ("epsilon", _F),
        *((name, _I) for name in ("one_plus", "activation", "kind")),
    ]


class _Adapter(ctypes.Structure):
    _fields_ = [("a", _P), ("b", _P), ("rank", _I), ("own", _I), ("scaling", _F)]


class _Adapters(ctypes.Structure):
    _fields_ = [
        ("of", _Adapter * native.MOST_GROUPED),
        *((name, _P) for name in ("cells", "launches", "gains", "fours")),
        ("launch", _I),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("residual", "delta", "delta_weight", "weight", "out")),
        ("tokens", _L),
        ("features", _L),
        ("epsilon", _F),
        ("one_plus", _I),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("query", "key", "value", "keys", "values", "cosine", "sine")),
        *((name, _P) for name in ("query_norm", "key_norm", "slot", "first", "workspace", "finished", "out")),
        *((name, _I) for name in ("batch", "heads", "kv_heads", "dim", "rotary_dim", "slots", "window", "one_plus")),
        *((name, _F) for name in ("scaling", "softcap", "epsilon")),
    ]


def _covers(x: torch.Tensor) -> bool:
    """Whether kernels of its device take its type."""
    return native.cpu_available() if x.is_cpu else x.is_cuda and native.cuda_available() and x.dtype in _TYPES


def _finish(status: int, what: str, shape: tuple[int, ...]) -> bool:
    """Whether the kernel ran; False where it does not cover the shape.

    Raises:
        RuntimeError: it was refused or failed.
    """
    if not native.covered(status):
        return False
    native.check_status(status, f"{what} of {list(shape)}")
    return True


def add_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, norm: "Norm", delta_norm: "Norm | None"
) -> torch.Tensor | None:
    """`decoding.add_norm` on the library of the device; None where it does not cover the shape."""
    if not _covers(residual) or not residual.is_contiguous():
        return None
    if delta_norm is not None and (delta_norm.epsilon, delta_norm.one_plus) != (norm.epsilon, norm.one_plus):
        return None
    tokens, features = residual.shape
    out = torch.empty_like(residual)
    delta = None if delta is None else delta.contiguous()
    asked = _Norm(
        residual.data_ptr(),
        native.address_of(delta),
        None if delta_norm is None else delta_norm.weight.data_ptr(),
        norm.weight.data_ptr(),
        out.data_ptr(),
        tokens,
        features,
        norm.epsilon,
        norm.one_plus,
    )
    if residual.is_cpu:
        status = native.call_cpu("lowra_cpu_add_norm", ctypes.byref(asked), native.type_of(residual))
    else:
        status = native.call_cuda(
            "lowra_cuda_add_norm",
            residual.device,
            ctypes.byref(asked),
            _TYPES[residual.dtype],
            native.stream_of(residual),
        )
    return out if _finish(status, "a norm", (tokens, features)) else None


def gate(opened: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor | None:
    """`decoding.gate` on the CUDA library; None where it does not cover the shape."""
    if opened.dtype not in _TYPES:
        return None
    opened, up = opened.contiguous(), up.contiguous()
    out = torch.empty_like(opened)
    status = native.call_cuda(
        "lowra_cuda_gate",
        opened.device,
        opened.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        opened.numel(),
        _ACTIVATIONS[activation],
        _TYPES[opened.dtype],
        native.stream_of(opened),
    )
    return out if _finish(status, "a gate", tuple(opened.shape)) else None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: "Cache", attention: "Attention"
) -> torch.Tensor | None:
    """`decoding.attend` on the library of the device; None where it does not cover the shape."""
    norms = attention.query_norm, attention.key_norm
    if not _covers(query) or (norms[0] is None) != (norms[1] is None):
        return None
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    batch, kv_heads, slots, dim = cache.keys.shape
    out = torch.empty_like(query)
    norm = norms[0]
    asked = _Attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        cache.keys.data_ptr(),
        cache.values.data_ptr(),
        attention.cosine.data_ptr(),
        attention.sine.data_ptr(),
        *(None if each is None else each.weight.data_ptr() for each in norms),
        cache.slot.data_ptr(),
        cache.first.data_ptr(),
        cache.workspace.data_ptr(),
        cache.finished.data_ptr(),
        out.data_ptr(),
        batch,
        attention.heads,
        kv_heads,
        dim,
        attention.cosine.shape[-1],
        slots,
        attention.window,
        False if norm is None else norm.one_plus,
        attention.scaling,
        attention.softcap,
        0.0 if norm is None else norm.epsilon,
    )
    if query.is_cpu:
        threads = torch.get_num_threads()
        status = native.call_cpu("lowra_cpu_attention", ctypes.byref(asked), native.type_of(query), threads)
    else:
        status = native.call_cuda(
            "lowra_cuda_attention", query.device, ctypes.byref(asked), _TYPES[query.dtype], native.stream_of(query)
        )
    return out if _finish(status, "attention over a cache", (batch, kv_heads, slots, dim)) else None


def linear_group(x: torch.Tensor, weights: "Weights", adapters: "Adapters | None" = None) -> list[torch.Tensor] | None:
    """`decoding.linear_group` on the CUDA library; None where no kernel covers these weights together."""
    x = x.contiguous()
    return _group(x, _Input(x.data_ptr(), kind=_PLAIN), weights, adapters)


def normed_linear_group(
    residual: torch.Tensor,
    delta: torch.Tensor | None,
    norm: "Norm",
    weights: "Weights",
    adapters: "Adapters | None" = None,
) -> tuple[list[torch.Tensor], torch.Tensor] | None:
    """`decoding.normed_linear_group` on the CUDA library; None where no kernel covers these weights together."""
    if len(residual) > _MOST_MADE_TOKENS or not residual.is_contiguous():
        return None
    total = torch.empty_like(residual)
    delta = None if delta is None else delta.contiguous()
    addresses = residual.data_ptr(), native.address_of(delta), norm.weight.data_ptr(), total.data_ptr()
    outs = _group(residual, _Input(*addresses, norm.epsilon, norm.one_plus, kind=_NORMED), weights, adapters)
    return None if outs is None else (outs, total)


def gated_linear(
    opened: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    packed: PackedMatrix,
    bias: torch.Tensor | None,
    adapters: "Adapters | None" = None,
) -> torch.Tensor | None:
    """`decoding.gated_linear` on the CUDA library; None where no kernel covers the weight."""
    if len(opened) > _MOST_MADE_TOKENS:
        return None
    opened, up = opened.contiguous(), up.contiguous()
    asked = _Input(opened.data_ptr(), up.data_ptr(), activation=_ACTIVATIONS[activation], kind=_GATED)
    outs = _group(opened, asked, [(packed, bias)], adapters)
    return None if outs is None else outs[0]


def _terms(adapters: "Adapters", x: torch.Tensor, weights: "Weights") -> _Adapters | None:
    """The adapters of a group as the library takes them; None where it does not.

    Raises:
        ValueError: a factor or the memory is not of the size that these weights need.
    """
    (tokens, in_features), gains = x.shape, adapters.gains
    asked = _Adapters(
        cells=adapters.cells.data_ptr(),
        launches=adapters.launches.data_ptr(),
        gains=None if gains is None else gains.factors.data_ptr(),
        fours=None if gains is None else gains.fours.data_ptr(),
        launch=adapters.launch,
    )
    ranks = 0
    for i, (term, (packed, _)) in enumerate(zip(adapters.terms, weights, strict=True)):
        if term is None:
            continue
        rank = len(term.a)
        if term.a.shape != (rank, in_features) or term.b.shape != (packed.rows, rank):
            raise ValueError(
                f"An adapter of [{packed.rows}, rank] times [rank, {in_features}] was expected; it is "
                f"{list(term.b.shape)} times {list(term.a.shape)}."
            )
        for factor in (term.a, term.b):
            if factor.dtype != x.dtype or factor.device != x.device or not factor.is_contiguous():
                return None
        ranks += rank
        own = rank if gains is None else gains.own[i]
        asked.of[i] = _Adapter(term.a.data_ptr(), term.b.data_ptr(), rank, own, term.scaling)
    if adapters.cells.numel() < cells_of(in_features, ranks, tokens):
        raise ValueError(
            f"{ranks} rows of adapters and {tokens} tokens need {cells_of(in_features, ranks, tokens)} cells; there "
            f"are {adapters.cells.numel()}."
        )
    if gains is None:
        return asked
    if gains.factors.shape != (ranks, tokens) or gains.factors.dtype != torch.float32:
        raise ValueError(
            f"Gains of {ranks} rows of adapters for {tokens} tokens, in float32, were expected; they are "
            f"{list(gains.factors.shape)}, {gains.factors.dtype}."
        )
    on_device = gains.factors.device == x.device and gains.factors.is_contiguous()
    return asked if on_device and any(gains.own) else None


def cells_of(in_features: int, ranks: int, tokens: int = _MOST_TOKENS) -> int:
    """Words of 8 bytes that a group needs whose adapters have so many ranks together (csrc/lowra.h)."""
    pieces = -(-in_features // _CELL_COLUMNS)
    rounded = 1 << (pieces - 1).bit_length() if pieces <= 32 else -(-pieces // 32) * 32
    return rounded * ranks * tokens


def _group(
    x: torch.Tensor, asked: _Input, weights: "Weights", adapters: "Adapters | None"
) -> list[torch.Tensor] | None:
    """Products in one launch. x: [tokens, K], of which `asked` says what is made."""
    tokens, in_features = x.shape
    if x.dtype not in _TYPES or not 0 < tokens <= _MOST_TOKENS or len(weights) > native.MOST_GROUPED:
        return None
    if any(packed.in_features != in_features for packed, _ in weights):
        return None
    for packed, bias in weights:
        checks.check_packed_once(packed, x.dtype)
        checks.check_operands_once(x, packed, bias)
        checks.ascends(packed.row_order, packed.rows_4bit, packed.rows_2bit)
    terms = None if adapters is None else _terms(adapters, x, weights)
    if adapters is not None and terms is None:
        return None
    count = len(weights)
    structs = [native.packed_of(packed) for packed, _ in weights]
    outs = [x.new_empty(tokens, packed.rows) for packed, _ in weights]
    biases = [None if bias is None else bias.contiguous() for _, bias in weights]
    status = native.call_cuda(
        "lowra_cuda_product_group",
        x.device,
        ctypes.byref((type(structs[0]) * count)(*structs)),
        count,
        ctypes.byref(asked),
        tokens,
        ctypes.byref((_P * count)(*(native.address_of(bias) for bias in biases))),
        None if terms is None else ctypes.byref(terms),
        ctypes.byref((_P * count)(*(out.data_ptr() for out in outs))),
        _TYPES[x.dtype],
        native.stream_of(x),
    )
    return outs if _finish(status, "a product of weights that share x", (tokens, in_features)) else None
