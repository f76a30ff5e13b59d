"""LoRA adapters in the products of a decoding step: the kernel against plain products in float32."""

import dataclasses

import pytest
import torch
from cases import packed_case

from bitsandbytes.backends.lowra import decoding, native, native_decoding, ops
from bitsandbytes.backends.lowra.decoding import Adapters, Gains, LowRank, Norm

pytestmark = pytest.mark.cuda
TYPES = [torch.bfloat16, torch.float16]
GROUPS = [
    ([(20, 40, 300), (3, 5, 7), (17, 130, 33)], [16, 0, 8]),
    ([(0, 0, 64), (0, 64, 0)], [4, 64]),
    ([(0, 0, 5)], [12]),
    ([(256, 1280, 2560), (256, 1280, 2560)], [16, 16]),
    ([(100, 300, 900), (1, 0, 0), (0, 0, 16)], [0, 128, 256]),
]


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    assert native.cuda_available()
    code, _ = native.cuda_code(torch.device("cuda", 0))
    if code < 80:
        pytest.skip("code for Turing keeps to 64 KB of shared memory, which few of these shapes fit in")


def random(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def group_of(mixes, ranks, in_features, dtype):
    """Weights, and their adapters with memory for the kernel."""
    cases = [packed_case(*mix, in_features, scales=torch.uint8, seed=i).to("cuda") for i, mix in enumerate(mixes)]
    biases = [random(sum(mix), dtype=dtype, seed=i) if i % 2 else None for i, mix in enumerate(mixes)]
    terms = []
    for i, (mix, rank) in enumerate(zip(mixes, ranks, strict=True)):
        a, b = random(rank, in_features, dtype=dtype, seed=i), random(sum(mix), rank, dtype=dtype, seed=i + 9)
        terms.append(LowRank(a / 8, b / 8, 0.5 + i) if rank else None)
    cells = torch.zeros(decoding.cells_of(in_features, sum(ranks)), dtype=torch.int64, device="cuda")
    launches = torch.zeros(1, dtype=torch.int32, device="cuda")
    weights = [(case.packed, bias) for case, bias in zip(cases, biases, strict=True)]
    return weights, Adapters(terms, cells, launches, 1)


def expected_of(x, weights, adapters):
    for (packed, bias), term in zip(weights, adapters.terms, strict=True):
        out = ops.linear(x, packed, bias).double()
        if term is not None:
            out += term.scaling * (x.double() @ term.a.double().T @ term.b.double().T)
        yield out


def assert_close(found, expected):
    """Two roundings of the type apart at most, of the values' size."""
    unit = torch.finfo(torch.bfloat16).eps
    assert found.isfinite().all()
    assert (found.double() - expected).abs().max() <= 2 * unit * expected.abs().max()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("mixes, ranks", GROUPS)
@pytest.mark.parametrize("in_features", [128, 1152, 4096])
def test_a_group_with_adapters(mixes, ranks, in_features, tokens, dtype):
    weights, adapters = group_of(mixes, ranks, in_features, dtype)
    for seed in range(4):  # the same memory each time
        adapters.launches.add_(1)
        x = random(tokens, in_features, dtype=dtype, seed=seed)
        outs = native_decoding.linear_group(x, weights, adapters)
        for found, expected in zip(outs, expected_of(x, weights, adapters), strict=True):
            assert_close(found, expected)
        adapters.launches.add_(1)
        again = native_decoding.linear_group(x, weights, adapters)
        assert all(torch.equal(one, other) for one, other in zip(outs, again, strict=True))


def scattered(ranks, tokens):
    """Gains with zeros here and there, in and between fours."""
    gains = random(ranks, tokens, dtype=torch.float32).abs()
    gains[5:9] = 0
    gains[20, : tokens - 1] = 0
    gains[12:16, -1] = 0
    return gains


def in_turns(ranks, tokens):
    """Sequences go through one of four adapters each, whose ranks lie side by side; every fifth through none."""
    token, rank = torch.arange(tokens), torch.arange(ranks)
    own = (rank[:, None] // (ranks // 8) % 4 == token % 4) & (token % 5 != 4)
    return own.float().cuda()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "gains_of, group, in_features",
    [
        (scattered, GROUPS[0], 1152),
        (in_turns, (GROUPS[3][0], [64, 64]), 4096),
        (in_turns, (GROUPS[4][0], [0, 32, 96]), 128),
    ],
)
def test_what_is_not_a_sequences_own_may_be_anything(gains_of, group, in_features, tokens, dtype):
    weights, adapters = group_of(*group, in_features, dtype)
    x, ranks = random(tokens, in_features, dtype=dtype), sum(group[1])
    gains = gains_of(ranks, tokens)
    adapters = dataclasses.replace(adapters, gains=Gains.of(gains, group[1]))
    adapters.launches.add_(1)
    outs = native_decoding.linear_group(x, weights, adapters)
    begin = 0
    for found, (packed, bias), term in zip(outs, weights, adapters.terms, strict=True):
        expected = ops.linear(x, packed, bias).double()
        if term is not None:
            end = begin + len(term.a)
            inner = x.double() @ term.a.double().T * gains[begin:end].double().T
            expected += term.scaling * inner @ term.b.double().T
            nobodys = (gains[begin:end] == 0).all(1)
            term.a[nobodys] = torch.inf
            begin = end
        assert_close(found, expected)
    adapters.launches.add_(1)
    again = native_decoding.linear_group(x, weights, adapters)
    assert all(torch.equal(one, other) for one, other in zip(outs, again, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("in_features", [128, 1152, 4096])
def test_after_a_norm(in_features, tokens, dtype):
    weights, adapters = group_of(*GROUPS[0], in_features, dtype)
    residual, delta = random(tokens, in_features, dtype=dtype), random(tokens, in_features, dtype=dtype, seed=1)
    norm = Norm(random(in_features, dtype=dtype, seed=2), 1e-5)
    adapters.launches.add_(1)
    outs, total = native_decoding.normed_linear_group(residual, delta, norm, weights, adapters)
    normal = decoding.add_norm(residual, delta, norm)
    assert torch.equal(total, residual)
    for found, expected in zip(outs, expected_of(normal, weights, adapters), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("in_features", [128, 2944, 11008])
def test_after_a_gate(in_features, tokens, dtype):
    weights, adapters = group_of([(20, 140, 300)], [16], in_features, dtype)
    opened, up = (random(tokens, in_features, dtype=dtype, seed=seed) for seed in (0, 1))
    adapters.launches.add_(1)
    found = native_decoding.gated_linear(opened, up, "silu", *weights[0], adapters)
    (expected,) = expected_of(decoding.gate(opened, up, "silu"), weights, adapters)
    assert_close(found, expected)


def test_streams_whose_blocks_share_the_chip():
    """Blocks wait for sums of others: kernels side by side must not wait for each other's place for ever."""
    dtype, ways = torch.bfloat16, []
    for seed in range(4):
        weights, adapters = group_of(*GROUPS[3], 4096, dtype)
        x = random(1, 4096, dtype=dtype, seed=seed)
        adapters.launches.add_(1)
        expected = native_decoding.linear_group(x, weights, adapters)
        ways.append((torch.cuda.Stream(), x, weights, adapters, expected))
    torch.cuda.synchronize()
    found = []
    for _ in range(200):
        for stream, x, weights, adapters, expected in ways:
            with torch.cuda.stream(stream):
                adapters.launches.add_(1)
                found.append((native_decoding.linear_group(x, weights, adapters), expected))
    torch.cuda.synchronize()
    for outs, expected in found:
        assert all(torch.equal(one, other) for one, other in zip(outs, expected, strict=True))


def test_what_the_kernel_does_not_cover_is_added_afterwards():
    weights, adapters = group_of([(20, 40, 300), (3, 5, 7)], [6, 3], 512, torch.bfloat16)
    x = random(2, 512, dtype=torch.bfloat16)
    assert native_decoding.linear_group(x, weights, adapters) is None  # ranks are no multiples of 4
    for found, expected in zip(
        decoding.linear_group(x, weights, adapters), expected_of(x, weights, adapters), strict=True
    ):
        assert_close(found, expected)


def test_factors_and_memory_of_another_size_are_refused():
    weights, adapters = group_of([(20, 40, 300)], [8], 512, torch.bfloat16)
    x = random(4, 512, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="Gains of 8 rows of adapters for 4 tokens, in float32, were expected"):
        of_three = Gains.of(torch.ones(8, 3, device="cuda"), [8])
        native_decoding.linear_group(x, weights, dataclasses.replace(adapters, gains=of_three))
    short = Adapters(adapters.terms, adapters.cells[:31], adapters.launches, 1)
    with pytest.raises(ValueError, match="need 32 cells; there are 31"):
        native_decoding.linear_group(x, weights, short)
    (term,) = adapters.terms
    turned = Adapters([LowRank(term.b, term.a, 1.0)], adapters.cells, adapters.launches, 1)
    with pytest.raises(ValueError, match=r"times \[rank, 512\] was expected"):
        native_decoding.linear_group(x, weights, turned)
