"""What lies between the products of a decoding step on the processor, and a dense head, against the references."""

import ctypes
import dataclasses

import pytest
import torch

from bitsandbytes.backends.lowra import decoding, native, native_cpu, native_decoding
from bitsandbytes.backends.lowra.decoding import Attention, Cache, Norm

pytestmark = pytest.mark.skipif(not native.cpu_available(), reason="the CPU library was not built")
TYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=native_cpu.instructions() if native.cpu_available() else [])
def instructions(request):
    native_cpu.choose_instructions(request.param)
    yield
    native_cpu.choose_instructions(None)


@pytest.fixture
def reference(monkeypatch):
    """Calls a function of decoding.py without the library."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(native_decoding, "_covers", lambda x: False)
            return function(*arguments)

    return call


def random(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected):
    """Within a rounding of the type, of the values' size: sums come in another order."""
    unit = max(torch.finfo(found.dtype).eps, 2e-6)
    assert found.isfinite().all()
    assert (found.double() - expected.double()).abs().max() <= unit * expected.double().abs().max()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens, features", [(1, 2048), (3, 64), (2, 7), (1, 1001)])
@pytest.mark.parametrize("one_plus", [False, True])
def test_add_norm(instructions, reference, tokens, features, one_plus, dtype):
    delta, weight = random(tokens, features, dtype=dtype, seed=1), random(features, dtype=dtype, seed=2)
    norm = Norm(weight, 1e-5, one_plus)
    for given, of_delta in ((None, None), (delta, None), (delta, Norm(weight.flip(0), 1e-5, one_plus))):
        stream, expected_stream = (random(tokens, features, dtype=dtype) for _ in range(2))
        found = decoding.add_norm(stream, given, norm, of_delta)
        expected = reference(decoding.add_norm, expected_stream, given, norm, of_delta)
        close(found, expected)
        close(stream, expected_stream)
        if of_delta is None:
            assert torch.equal(stream, expected_stream)  # one addition, one rounding


SHAPES = [
    # heads, key-value heads, dim, rotated columns, slots, slot, first slot of each sequence
    (32, 4, 64, 64, 256, 200, [0]),
    (5, 5, 64, 64, 100, 99, [0, 99]),
    (6, 2, 80, 40, 130, 70, [64, 3]),
    (4, 1, 7, 6, 9, 0, [0]),
    (2, 2, 256, 256, 64, 63, [1]),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"softcap": 3.0}, {"norms": True}])
def test_attention(instructions, reference, shape, options, dtype):
    heads, kv_heads, dim, rotary, slots, slot, first = shape
    batch, options = len(first), dict(options)
    if options.pop("norms", False):
        norms = [Norm(random(dim, dtype=dtype, seed=seed), 1e-6, heads % 2 == 0) for seed in (7, 8)]
        options |= {"query_norm": norms[0], "key_norm": norms[1]}
    angles = torch.rand(slots, rotary, generator=torch.Generator().manual_seed(9)) * 6
    attention = Attention(heads, kv_heads, dim, dim**-0.5, angles.cos().to(dtype), angles.sin().to(dtype), **options)
    keys, values = (random(batch, kv_heads, slots, dim, dtype=dtype, seed=seed) for seed in (5, 6))
    places = torch.tensor([slot], dtype=torch.int32), torch.tensor(first, dtype=torch.int32)
    cache = Cache(keys, values, *places, *decoding.workspace_of(attention, batch, slots, torch.device("cpu")))
    other = dataclasses.replace(cache, keys=keys.clone(), values=values.clone())
    query = random(batch, heads * dim, dtype=dtype, seed=1)
    key, value = (random(batch, kv_heads * dim, dtype=dtype, seed=seed) for seed in (2, 3))
    found = decoding.attend(query, key, value, cache, attention)
    expected = reference(decoding.attend, query, key, value, other, attention)
    # PyTorch's kernel and the capped scores of the reference are rounded to the type on the way
    assert (found.double() - expected.double()).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max() + 2e-6
    assert torch.equal(cache.values, other.values)
    if "query_norm" in options:
        close(cache.keys, other.keys)
    else:
        assert torch.equal(cache.keys, other.keys)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens, rows, in_features", [(1, 130, 1000), (4, 3, 7), (2, 1, 2048)])
def test_dense_product(instructions, tokens, rows, in_features, dtype):
    x, weight = random(tokens, in_features, dtype=dtype), random(rows, in_features, dtype=dtype, seed=1)
    found = native_cpu.dense_product(x, weight)
    close(found, (x.double() @ weight.double().T).to(dtype))


def test_the_c_interface_refuses_what_it_cannot_read():
    x, out = torch.ones(4, 64), torch.empty(4, 64)
    at, to = x.data_ptr(), out.data_ptr()
    dense, bad_shape, bad_type, null, misaligned = native._cpu.lowra_cpu_dense_product, 1, 2, 3, 7
    assert dense(at, 4, 64, at, 1, to, 0, 1) == dense(None, 0, 64, None, 1, None, 0, 1) == 0
    for rows, columns, tokens in ((-1, 64, 1), (4, 0, 1), (4, 64, 17), (4, 64, -1), (2**31 - 1, 2**60, 1)):
        assert dense(at, rows, columns, at, tokens, to, 0, 1) == bad_shape
    assert dense(at, 4, 64, at, 1, to, 3, 1) == bad_type
    assert dense(None, 4, 64, at, 1, to, 0, 1) == null and dense(at + 1, 4, 64, at, 1, to, 0, 1) == misaligned

    def norm(**changed):
        given = dict(residual=at, weight=at, out=to, tokens=4, features=64, epsilon=1e-5) | changed
        return native.call_cpu("lowra_cpu_add_norm", ctypes.byref(native_decoding._Norm(**given)), 0)

    assert norm() == norm(tokens=0, residual=None) == 0
    assert norm(features=0) == norm(tokens=-1) == norm(tokens=2**62) == bad_shape
    assert norm(weight=None) == norm(delta_weight=at) == null and norm(delta=at + 2) == misaligned
    slot, first, late = (torch.tensor([place], dtype=torch.int32) for place in (3, 0, 4))
    sums = torch.empty(64)

    def attention(**changed):
        names = ("query", "key", "value", "keys", "values", "cosine", "sine")
        given = dict.fromkeys(names, at) | {"keys": to, "values": to, "out": sums.data_ptr()}
        given |= {"slot": slot.data_ptr(), "first": first.data_ptr(), "batch": 1, "heads": 2, "kv_heads": 1, "dim": 16}
        given |= {"rotary_dim": 16, "slots": 4, "scaling": 1.0} | changed
        return native.call_cpu("lowra_cpu_attention", ctypes.byref(native_decoding._Attention(**given)), 0, 1)

    assert attention() == attention(batch=0, query=None) == 0
    for wrong in ({"heads": 3, "kv_heads": 2}, {"dim": 513}, {"rotary_dim": 17}, {"slots": 3}, {"window": -1}):
        assert attention(**wrong) == bad_shape
    assert attention(first=late.data_ptr()) == bad_shape
    assert attention(key=None) == attention(slot=None) == null and attention(query=at + 2) == misaligned
    assert native._cpu.lowra_cpu_attention(None, 0, 1) == native._cpu.lowra_cpu_add_norm(None, 0) == null
    assert ctypes.sizeof(native_decoding._Attention) == 160


def test_gains_name_the_ranks_that_are_a_tokens_own():
    factors = torch.zeros(28, 3)
    factors[0:4, 0], factors[10, 0] = 0.5, 2.0
    factors[8:16, 1] = 1.0
    factors[24:28, 2] = 1.0
    gains = decoding.Gains.of(factors, [16, 0, 12])
    assert gains.own == (8, 0, 4)
    assert gains.fours.tolist() == [[0, 2, -1], [2, 3, -1], [-1, -1, 6]]
    assert torch.equal(gains.factors, factors)
    beside = torch.tensor([8, 9, 11])  # ranks without a gain in a four that has one
    assert gains.factors[beside, 0].signbit().all()
    assert not gains.factors[:, 1:].signbit().any()
    assert not gains.factors[4:8].signbit().any()
