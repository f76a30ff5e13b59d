"""lowra_linear, forward and backward, against float64 products of the reference's weights: kernels and fallback."""

from dataclasses import replace

import pytest
import torch
from cases import packed_case

from bitsandbytes.backends.lowra import dense_parts, native, reference
from bitsandbytes.backends.lowra.dense_parts import product_by_columns, product_by_rows
from bitsandbytes.backends.lowra.ops import gradient_of_input

OPS = torch.ops.bitsandbytes
SHAPES = [
    (0, 0, 16, 512, 64),
    (16, 0, 0, 128, 64),
    (0, 16, 0, 256, 64),
    (3, 5, 7, 224, 64),
    (20, 40, 300, 1056, 32),
    (17, 130, 33, 3008, 128),
    (9, 3, 150, 5504, 64),
    (70, 1, 300, 2080, 256),
    (2, 2, 2, 96, 24),
    (3, 3, 3, 1004, 64),
    (100, 300, 900, 576, 64),  # more tiles of 16 rows than blocks
]


def largest_weights(case):
    """Every weight of a row at the size of its largest level: what the sums of 1-bit rows are made of."""
    levels = case.levels.clone()
    for segment in case.packed.segments():
        rows = levels[segment.levels_of(segment.first, segment.end)].view(-1, 2**segment.bits)
        rows[:] = rows.abs().amax(dim=1, keepdim=True)
    return reference.dequantize(replace(case, levels=levels).packed, torch.float32)


def sums_in_fused_kernels(device, dtype):
    """Whether a product of up to 64 tokens is one kernel, not cuBLAS's: of bfloat16 from Ampere on."""
    if device == "cpu":
        return True
    code, _ = native.cuda_code(torch.device(device, 0))
    return dtype == torch.float16 or (dtype == torch.bfloat16 and code >= 80)


def close(out, x, case, bias, fused):
    """The exact product, rounded once to the type of x, of the weights as `dequantize` rounds them to that type (these
    a dense product sums) or of the unrounded ones (these the kernels for few tokens sum); float32 sums in any order.
    cuBLAS may also round parts of a sum."""
    unit, errors = torch.finfo(out.dtype).eps, []
    size = x.double().abs() @ largest_weights(case).double().T
    for dtype in {out.dtype, torch.float32}:
        exact = x.double() @ reference.dequantize(case.packed, dtype).double().T
        if bias is not None:
            exact = exact + bias.double()
        if fused:
            bound = unit * exact.abs() + 1e-6 * size + torch.finfo(out.dtype).smallest_normal
            errors.append(((out.double() - exact).abs() / bound).max())
        else:
            errors.append((out.double() - exact).norm() / (2 * unit * exact.norm() + 1e-6 * size.norm()))
    assert min(errors) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 16, 17, 33, 64, 65, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_equals_the_exact_product(device, shape, tokens, dtype):
    *mix, in_features, group_size = shape
    scales = [torch.float32, torch.float16, torch.uint8][(tokens + in_features) % 3]
    case = packed_case(*mix, in_features, group_size, scales=scales, seed=tokens)
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, in_features, generator=random).to(dtype)
    bias = torch.randn(sum(mix), generator=random).to(dtype) if tokens % 2 else None
    moved = None if bias is None else bias.to(device)
    out = OPS.lowra_linear(*case.to(device).linear_arguments(x.to(device), moved))
    assert out.dtype == dtype and out.shape == (tokens, sum(mix))
    covered = tokens <= 64 and in_features % 32 == 0 and group_size >= 32
    fused = device == "cpu" or (covered and sums_in_fused_kernels(device, dtype))
    close(out.cpu(), x, case, bias, fused)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_reaches_every_output(device, value):
    case = packed_case(20, 20, 20, 512).to(device)
    x = torch.ones(2, 512, device=device, dtype=torch.bfloat16)
    x[0, 100] = value
    out = OPS.lowra_linear(*case.linear_arguments(x))
    assert not out[0].isfinite().any() and out[1].isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e20, 1e38])
def test_tiny_and_huge_x(device, size):
    case = packed_case(20, 20, 20, 512, scales=torch.uint8)
    x = (torch.rand(2, 512, generator=torch.Generator().manual_seed(0)) * size).bfloat16()
    x[:, ::7] *= 2.0**-20  # far below the largest of their 64
    out = OPS.lowra_linear(*case.to(device).linear_arguments(x.to(device)))
    fits = (x.double() @ reference.dequantize(case.packed, torch.float32).double().T).abs() < 3e38
    assert torch.equal(out.cpu().isfinite(), fits)
    if fits.all():
        close(out.cpu(), x, case, None, True)


def test_leading_dimensions_and_unaligned_x(device):
    on_cpu = packed_case(8, 8, 16, 256)
    case = on_cpu.to(device)
    x = torch.randn(2, 3, 257, device=device).bfloat16()[..., 1:]
    out = OPS.lowra_linear(*case.linear_arguments(x))
    flat = OPS.lowra_linear(*case.linear_arguments(x.reshape(6, 256).clone()))
    assert out.shape == (2, 3, 32) and torch.equal(out.view(6, 32), flat)
    row = torch.randn(1, 257, device=device).bfloat16()[:, 1:]  # contiguous, yet not on a multiple of 16 bytes
    assert row.is_contiguous() and row.data_ptr() % 16 != 0
    for aligned, x_row in ((False, row), (True, row.clone())):  # a kernel where x is aligned, else cuBLAS
        out = OPS.lowra_linear(*case.linear_arguments(x_row))
        close(out.cpu(), x_row.cpu(), on_cpu, None, aligned or device == "cpu")
    assert OPS.lowra_linear(*case.linear_arguments(x[:0])).shape == (0, 3, 32)


@pytest.mark.parametrize("tokens", [4, 80])
def test_backward_multiplies_by_the_dequantised_weight(device, tokens):
    case = packed_case(5, 9, 18, 320)
    weight = reference.dequantize(case.packed, torch.float32)
    x = torch.randn(tokens, 320, generator=torch.Generator().manual_seed(0))
    bias, grad = torch.zeros(32), torch.randn(tokens, 32, generator=torch.Generator().manual_seed(1))
    on_x, on_bias = (tensor.to(device).requires_grad_() for tensor in (x, bias))
    OPS.lowra_linear(*case.to(device).linear_arguments(on_x, on_bias)).backward(grad.to(device))
    torch.testing.assert_close(on_x.grad.cpu(), grad @ weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(on_bias.grad.cpu(), grad.sum(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_once", [256, 512])
def test_products_with_a_part_of_the_weight_at_a_time(device, at_once):
    case = packed_case(100, 300, 600, 1056, scales=torch.uint8)
    weight = reference.dequantize(case.packed, torch.float32)
    random = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, 3, 1056, generator=random), torch.randn(2, 3, 1000, generator=random)
    bias = torch.randn(1000, generator=random)
    packed = case.to(device).packed
    close_to = {"rtol": 1e-4, "atol": 3e-4}
    out = product_by_columns(grad.to(device), packed, at_once)
    torch.testing.assert_close(out.cpu(), grad @ weight, **close_to)
    out = product_by_rows(x.to(device), packed, None, at_once)
    torch.testing.assert_close(out.cpu(), x @ weight.T, **close_to)
    out = product_by_rows(x.to(device), packed, bias.to(device), at_once)
    torch.testing.assert_close(out.cpu(), x @ weight.T + bias, **close_to)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_a_large_weight_is_never_dense_as_a_whole(monkeypatch):
    monkeypatch.setattr(dense_parts, "DENSE_BYTES", 8 << 20)
    case = packed_case(300, 700, 3096, 4096, scales=torch.uint8).to("cuda")
    packed = case.packed
    weight = OPS.lowra_dequantize(*packed, torch.bfloat16)
    x = torch.randn(1200, 4096, device="cuda", dtype=torch.bfloat16)
    expected = x @ weight.T, x @ weight
    outputs_bytes = 2 * x.numel()
    del weight
    for _ in range(2):  # the first time brings workspaces
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            outputs = OPS.lowra_linear(*case.linear_arguments(x)), gradient_of_input(x, packed)
        used = torch.cuda.max_memory_allocated() - before
        for out, exact in zip(outputs, expected, strict=True):
            torch.testing.assert_close(out, exact, rtol=2e-2, atol=4e-1)
        del outputs, out
    assert used < (9 << 20) + 2 * outputs_bytes  # the whole weight would be 32 MiB
