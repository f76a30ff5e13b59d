"""What lies between the products of a decoding step, and products in one launch: kernels against the references."""

import dataclasses

import pytest
import torch
from cases import packed_case

from bitsandbytes.backends.lowra import decoding, native, native_decoding, ops
from bitsandbytes.backends.lowra.decoding import Attention, Cache, Norm

pytestmark = pytest.mark.cuda
TYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    assert native.cuda_available()


def on_gpu(value):
    """A dataclass of tensors with these on the GPU; the others as they are."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{f.name: on_gpu(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def has_place(in_features, tokens):
    """Whether x, made ready twice, finds place in the shared memory of a block: code for Turing keeps to 64 KB."""
    code, _ = native.cuda_code(torch.device("cuda", 0))
    return code >= 80 or in_features * tokens <= 8192


def random(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected):
    """Within two roundings of the type, of the values' size: sums come in another order, and rounding follows them."""
    found, expected = found.cpu().float(), expected.float()
    unit = torch.finfo(torch.bfloat16).eps
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= 2 * unit * expected.abs().max()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("tokens, features", [(1, 4096), (3, 64), (33, 5120), (2, 8192), (1, 8), (5, 1000)])
@pytest.mark.parametrize("parts", ["residual", "delta", "delta normalised"])
def test_add_norm(tokens, features, parts, one_plus, dtype):
    residual = random(tokens, features, dtype=dtype)
    delta = None if parts == "residual" else random(tokens, features, dtype=dtype, seed=1)
    norm = Norm(random(features, dtype=dtype, seed=2), 1e-5, one_plus)
    of_delta = Norm(random(features, dtype=dtype, seed=3), 1e-5, one_plus) if parts == "delta normalised" else None
    stream = residual.cuda()
    found = decoding.add_norm(stream, on_gpu(delta), on_gpu(norm), on_gpu(of_delta))
    expected = decoding.add_norm(residual, delta, norm, of_delta)
    close(stream, residual)
    close(found, expected)
    if parts != "delta normalised":
        assert torch.equal(stream.cpu(), residual)  # one addition, one rounding


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 11008), (7, 24), (32, 8200), (2, 3, 16)])
def test_gate(shape, activation, dtype):
    opened, up = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    close(decoding.gate(opened.cuda(), up.cuda(), activation), decoding.gate(opened, up, activation))


def a_cache(attention, batch, slots, slot, first, dtype):
    keys = random(batch, attention.kv_heads, slots, attention.dim, dtype=dtype, seed=5)
    values = random(batch, attention.kv_heads, slots, attention.dim, dtype=dtype, seed=6)
    workspace = decoding.workspace_of(attention, batch, slots, torch.device("cpu"))
    return Cache(
        keys, values, torch.tensor([slot], dtype=torch.int32), torch.tensor(first, dtype=torch.int32), *workspace
    )


def an_attention(heads, kv_heads, dim, positions, dtype, rotary=None, **options):
    angles = torch.rand(positions, (rotary or dim) // 2, generator=torch.Generator().manual_seed(9)) * 6
    angles = torch.cat((angles, angles), dim=1)
    return Attention(heads, kv_heads, dim, dim**-0.5, angles.cos().to(dtype), angles.sin().to(dtype), **options)


SHAPES = [
    # heads, key-value heads, dim, slots, slot, first slot of each sequence
    (32, 32, 128, 256, 0, [0]),
    (32, 32, 128, 256, 63, [0]),
    (32, 32, 128, 256, 64, [0]),
    (32, 8, 128, 2304, 2175, [0]),
    (28, 4, 128, 320, 300, [0, 17, 300]),
    (8, 1, 256, 200, 130, [0, 128]),
    (5, 5, 64, 100, 99, [0]),
    (6, 2, 80, 130, 70, [64, 3]),
    (12, 4, 96, 70, 65, [65, 0]),
    (4, 4, 8, 64, 10, [2]),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"softcap": 3.0}, {"norms": False}, {"norms": True}])
def test_attention(shape, options, dtype):
    heads, kv_heads, dim, slots, slot, first = shape
    options = dict(options)
    if "norms" in options:
        one_plus = options.pop("norms")
        norms = [Norm(random(dim, dtype=dtype, seed=seed), 1e-6, one_plus) for seed in (7, 8)]
        options |= {"query_norm": norms[0], "key_norm": norms[1]}
    attention = an_attention(heads, kv_heads, dim, slots, dtype, **options)
    cache = a_cache(attention, len(first), slots, slot, first, dtype)
    moved = on_gpu(cache)
    query = random(len(first), heads * dim, dtype=dtype, seed=1)
    key, value = (random(len(first), kv_heads * dim, dtype=dtype, seed=seed) for seed in (2, 3))
    for _ in range(2):  # the counters are back at zero after the first
        found = decoding.attend(query.cuda(), key.cuda(), value.cuda(), moved, on_gpu(attention))
    expected = decoding.attend(query, key, value, cache, attention)
    close(found, expected)
    close(moved.keys, cache.keys)
    assert torch.equal(moved.values.cpu(), cache.values)
    assert not moved.finished.any()


def test_attention_with_part_of_the_columns_rotated():
    attention = an_attention(8, 4, 64, 128, torch.bfloat16, rotary=32)
    cache = a_cache(attention, 2, 128, 90, [0, 30], torch.bfloat16)
    moved = on_gpu(cache)
    query, key, value = (random(2, n * 64, dtype=torch.bfloat16, seed=n) for n in (8, 4, 4))
    found = decoding.attend(query.cuda(), key.cuda(), value.cuda(), moved, on_gpu(attention))
    close(found, decoding.attend(query, key, value, cache, attention))
    close(moved.keys, cache.keys)


GROUPS = [
    [(20, 40, 300), (3, 5, 7), (17, 130, 33)],
    [(0, 0, 64), (0, 64, 0)],
    [(16, 0, 0), (0, 0, 16), (0, 16, 0)],
    [(0, 0, 5), (1, 0, 0), (100, 300, 900)],
    [(256, 1280, 2560), (256, 1280, 2560)],
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("in_features", [512, 1152, 4096])
def test_a_group_is_its_members(group, in_features, tokens, dtype):
    """One launch gives what as many launches give, a rounding apart: sums are shared out otherwise."""
    cases = [packed_case(*mix, in_features, scales=torch.uint8, seed=i).to("cuda") for i, mix in enumerate(group)]
    x = random(tokens, in_features, dtype=dtype).cuda()
    biases = [random(sum(mix), dtype=dtype, seed=i).cuda() if i % 2 else None for i, mix in enumerate(group)]
    weights = [(case.packed, bias) for case, bias in zip(cases, biases, strict=True)]
    outs = native_decoding.linear_group(x, weights)
    assert (outs is not None) == has_place(in_features, tokens)
    for out, (packed, bias) in zip(outs or decoding.linear_group(x, weights), weights, strict=True):
        close(out, ops.linear(x, packed, bias).cpu())


def test_what_a_group_does_not_cover_is_multiplied_one_by_one():
    cases = [packed_case(20, 20, 20, 512, scales=kind).to("cuda") for kind in (torch.uint8, torch.float16)]
    x = random(2, 512, dtype=torch.bfloat16).cuda()
    weights = [(case.packed, None) for case in cases]
    assert native_decoding.linear_group(x, weights) is None
    for out, (packed, bias) in zip(decoding.linear_group(x, weights), weights, strict=True):
        assert torch.equal(out, ops.linear(x, packed, bias))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("in_features", [128, 1152, 4096])
def test_norm_and_group_in_one_launch(in_features, tokens, one_plus, dtype):
    mixes = [(20, 40, 300), (3, 5, 7), (17, 130, 33)][: tokens % 3 + 1]
    cases = [packed_case(*mix, in_features, scales=torch.uint8, seed=i).to("cuda") for i, mix in enumerate(mixes)]
    weights = [(case.packed, None) for case in cases]
    residual = random(tokens, in_features, dtype=dtype).cuda()
    delta = random(tokens, in_features, dtype=dtype, seed=1).cuda() if tokens != 2 else None
    norm = Norm(random(in_features, dtype=dtype, seed=2).cuda(), 1e-5, one_plus)
    before = residual.clone()
    found = native_decoding.normed_linear_group(residual, delta, norm, weights)
    assert (found is not None) == has_place(in_features, tokens)
    assert torch.equal(residual, before)
    outs, total = found or decoding.normed_linear_group(before, delta, norm, weights)
    normal = decoding.add_norm(residual, delta, norm)
    assert torch.equal(total, residual)
    for out, (packed, bias) in zip(outs, weights, strict=True):
        close(out, ops.linear(normal, packed, bias).cpu())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("in_features", [128, 2944, 11008])
def test_gate_and_product_in_one_launch(in_features, tokens, activation, dtype):
    packed = packed_case(20, 140, 300, in_features, scales=torch.uint8).to("cuda").packed
    opened, up = (random(tokens, in_features, dtype=dtype, seed=seed).cuda() for seed in (0, 1))
    bias = random(460, dtype=dtype, seed=3).cuda()
    out = native_decoding.gated_linear(opened, up, activation, packed, bias)
    assert (out is not None) == has_place(in_features, tokens)
    if out is None:
        out = decoding.gated_linear(opened, up, activation, [(packed, bias)])
    close(out, ops.linear(decoding.gate(opened, up, activation), packed, bias).cpu())
