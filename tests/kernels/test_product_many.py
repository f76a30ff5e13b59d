"""The fused product of more than 64 tokens against float64 products of the reference's weights; Hopper alone has it."""

import functools

import pytest
import torch
from cases import packed_case

from bitsandbytes.backends.lowra import native, reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and native.cuda_available() and native.cuda_code(torch.device("cuda", 0))[1]),
        reason="no Hopper GPU here, or no code for it in the library",
    ),
]
# rows of 4, 2 and 1 bits, in_features, group size: no rows of a precision, runs that end within a warp, more tiles than
# the chip holds at once, a last tile that is nearly empty, one step; where tiles are few, pairs of blocks share the
# columns, evenly or not
SHAPES = [
    (0, 0, 64, 128, 64),
    (64, 0, 0, 64, 64),
    (0, 64, 0, 192, 64),
    (3, 5, 8, 256, 64),
    (20, 40, 300, 1088, 64),
    (17, 131, 36, 3008, 128),
    (70, 2, 300, 2048, 256),
    (400, 100, 1000, 4096, 64),
    (5, 5, 1990, 640, 64),
    (200, 1400, 2400, 256, 64),
    (1, 2000, 183, 384, 64),
]


@functools.cache
def packed(shape, scales):
    *mix, in_features, group_size = shape
    return packed_case(*mix, in_features, group_size, scales=scales)


@functools.cache
def reference_weight(shape, scales, dtype):
    return reference.dequantize(packed(shape, scales).packed, dtype).cuda()


def product(case, x, bias=None):
    return native.cuda_product(x, case.packed, bias)


def assert_within_one_rounding(out, x, weight, bias):
    """weight: rounded to the type of x, as the kernel multiplies it; float32 sums in any order."""
    exact = x.double() @ weight.double().T
    if bias is not None:
        exact = exact + bias.double()
    size = x.double().abs() @ weight.double().abs().T
    bound = torch.finfo(x.dtype).eps * exact.abs() + 1e-6 * size + torch.finfo(x.dtype).smallest_normal
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [65, 128, 129, 200, 512, 700])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_exact_product(shape, tokens, dtype):
    *mix, in_features, _ = shape
    scales = [torch.float32, torch.float16, torch.uint8][in_features % 3]
    case, weight = packed(shape, scales), reference_weight(shape, scales, dtype)
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, in_features, generator=random).to(dtype).cuda()
    bias = torch.randn(sum(mix), generator=random).to(dtype).cuda() if tokens % 2 else None
    assert_within_one_rounding(product(case.to("cuda"), x, bias), x, weight, bias)


def test_launches_that_overlap():
    """In a graph each kernel is put on the chip while the one before it drains; outputs differ if they disturb it.
    All kernels of a product take part."""
    case = packed_case(100, 500, 1400, 1024, scales=torch.uint8).to("cuda")
    tokens_in_turn = (70, 300, 64, 1, 600, 20, 200, 8, 9) * 5
    inputs = [torch.randn(tokens, 1024, device="cuda").bfloat16() for tokens in tokens_in_turn]
    alone = []
    for x in inputs:
        alone.append(product(case, x))
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        together = [product(case, x) for x in inputs]
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("rows, in_features, group_size", [(64, 96, 64), (64, 128, 32), (63, 128, 64)])
def test_shapes_that_it_does_not_cover_are_left_to_others(rows, in_features, group_size):
    case = packed_case(0, 0, rows, in_features, group_size).to("cuda")
    assert product(case, torch.randn(100, in_features, device="cuda").bfloat16()) is None
