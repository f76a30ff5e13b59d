"""lowra_shared_tables and lowra_shared_gradients: PyTorch's own gradients, and sums in double precision."""

import math

import pytest
import torch
from cases import packed_case

from bitsandbytes.backends.lowra import reference
from bitsandbytes.backends.lowra.shared_tables import changes_of, changes_size, shared_tables, shared_tables_of

OPS = torch.ops.bitsandbytes
# rows of 4, 2 and 1 bits, K, group size, tokens
SHAPES = [
    (3, 5, 9, 256, 64, 5),
    (1, 0, 0, 200, 64, 1),
    (0, 1, 0, 8, 8, 3),
    (0, 0, 1, 7, 64, 9),
    (2, 3, 0, 1001, 24, 17),
    (0, 40, 70, 4096, 128, 40),
    (5, 0, 6, 2080, 256, 1030),
    (1, 1, 1, 11008, 64, 12),
]
SCALES = [torch.float32, torch.float16, torch.uint8]


def random_changes(case, seed, with_gains=True):
    size = changes_size(*case.scales.shape, with_gains)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.1


def given_of(case, tokens, dtype, seed):
    """x, gradient, gradient of x and output, of no product in particular: the op adds them up whatever they are."""
    rows, columns = case.weight.shape
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, size, generator=made).to(dtype) for size in (columns, rows, columns, rows)]


@pytest.mark.parametrize("number", range(len(SHAPES)))
@pytest.mark.parametrize("with_gains", [True, False])
def test_tables_equal_the_specification(device, number, with_gains):
    *counts, columns, group_size, _ = SHAPES[number]
    case = packed_case(*counts, columns, group_size, scales=SCALES[number % 3], seed=number)
    changes = random_changes(case, number, with_gains)
    levels, scales = shared_tables(case.packed, changes, with_gains)
    found = shared_tables_of(case.to(device).packed, changes.to(device), with_gains)
    assert found.levels.dtype == torch.float16 and found.scale_steps is None
    torch.testing.assert_close(found.levels.cpu(), levels.half(), rtol=1e-3, atol=1e-7)  # a step of float16
    torch.testing.assert_close(found.scales.cpu(), scales, rtol=1e-6, atol=0)
    none = shared_tables_of(case.to(device).packed, 0 * changes.to(device), with_gains)
    assert torch.equal(none.levels.cpu(), case.levels)
    assert torch.equal(none.scales.cpu(), reference.decode_scales(case.scales, case.scale_steps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_gradients_equal_sums_in_double_precision(device, number, dtype):
    *counts, columns, group_size, tokens = SHAPES[number]
    case = packed_case(*counts, columns, group_size, scales=torch.float32, seed=number)
    changes, given = random_changes(case, number), given_of(case, tokens, dtype, number)
    rows, groups = case.scales.shape
    widened = changes_of(changes, rows, True).level_gain.double().exp()
    if dtype != torch.float32:
        given[3] = given[3].to(torch.float8_e5m2)
    x, gradient, for_x, output = (tensor.double() for tensor in given)

    def by_group(values):
        padded = torch.nn.functional.pad(values, (0, groups * group_size - columns))
        return padded.view(*values.shape[:-1], groups, group_size).sum(dim=-1)

    order, scales = case.row_order.long(), case.scales.double()
    of_sums = (gradient.t() @ by_group(x))[order]
    size = ((gradient.abs().t() @ by_group(x.abs()))[order] * scales).sum(dim=1) * widened
    exact = [
        ((of_sums * scales).sum(dim=1) * widened, size),
        ((gradient * output).sum(dim=0)[order], (gradient * output).abs().sum(dim=0)[order]),
        (by_group((x * for_x).sum(dim=0)), by_group((x * for_x).abs().sum(dim=0))),
    ]
    tensors = [tensor.to(device) for tensor in (*given, case.scales, case.row_order, changes)]
    whole = OPS.lowra_shared_gradients(*tensors, group_size)
    found = changes_of(whole, rows, True)
    # means and their products with the gradient are rounded to the type of x
    tolerances = 2 * torch.finfo(dtype).eps + 1e-5, 1e-5, 1e-5
    for actual, (wanted, bound), tolerance in zip(found, exact, tolerances, strict=True):
        assert actual.dtype == torch.float32 and actual.shape == wanted.shape
        assert ((actual.cpu() - wanted).abs() <= tolerance * bound + 1e-30).all()
    shifts = torch.cat([tensors[-1][:rows], tensors[-1][2 * rows :]])
    without = OPS.lowra_shared_gradients(*tensors[:3], None, *tensors[4:6], shifts, group_size)
    assert torch.equal(changes_of(without, rows, False).scale_gain, found.scale_gain)
    assert torch.equal(whole, OPS.lowra_shared_gradients(*tensors, group_size))  # always in one order


def test_rows_apart_in_memory_no_tokens_and_numbers_beyond_float8(device):
    case = packed_case(2, 2, 3, 520, seed=1).to(device)
    scales, order = reference.decode_scales(case.scales, case.scale_steps), case.row_order
    large = torch.randn(9, 1040, device=device)
    x, gradient = large[:, 3:523], large[:, 5:12]
    changes = torch.zeros(7 + 7 + 9, device=device)
    found = OPS.lowra_shared_gradients(x, gradient, x, gradient, scales, order, changes, 64)
    copies = x.contiguous(), gradient.contiguous(), x.contiguous(), gradient.contiguous()
    assert torch.equal(found, OPS.lowra_shared_gradients(*copies, scales, order, changes, 64))
    none = OPS.lowra_shared_gradients(x[:0], gradient[:0], x[:0], gradient[:0], scales, order, changes, 64)
    assert none.shape == changes.shape and not none.any()
    ones, wide = torch.ones(9, 7, device=device, dtype=torch.bfloat16), x.bfloat16()
    beyond = torch.full_like(ones, 1e6).to(torch.float8_e5m2)
    for output, expected in ((beyond, 9 * 57344), (beyond.to(torch.bfloat16), math.inf)):
        found = OPS.lowra_shared_gradients(wide, ones, wide, output, scales, order, changes, 64)
        assert changes_of(found, 7, True).level_gain.tolist() == [expected] * 7


def test_gradients_are_those_of_the_tables(device):
    """Of a product with a weight of changed tables, as PyTorch differentiates it."""
    case = packed_case(3, 5, 9, 250, 64, scales=torch.uint8, seed=3)
    changes = random_changes(case, 3).requires_grad_()
    x = torch.randn(12, 250, requires_grad=True)
    levels, scales = shared_tables(case.packed, changes, True)
    dense = reference.dequantize(case.packed._replace(levels=levels, scales=scales, scale_steps=None), torch.float32)
    out = x @ dense.t()
    gradient = torch.randn(out.shape)
    for_x, wanted = torch.autograd.grad(out, [x, changes], gradient)
    tensors = (x, gradient, for_x, out, scales, case.row_order, changes)
    found = OPS.lowra_shared_gradients(*(tensor.detach().to(device) for tensor in tensors), 64)
    torch.testing.assert_close(found.cpu(), wanted, rtol=2e-4, atol=2e-4 * wanted.abs().max().item())


def test_opcheck(device):
    case = packed_case(1, 2, 3, 136, seed=5, scales=torch.uint8)
    changes, given = random_changes(case, 1).to(device), given_of(case, 4, torch.float32, 1)
    case = case.to(device)
    sizes = case.rows_4bit, case.rows_2bit, 136, case.group_size
    torch.library.opcheck(OPS.lowra_shared_tables.default, (*case.packed.tensors, changes, True, *sizes))
    scales = reference.decode_scales(case.scales, case.scale_steps)
    arguments = (*(tensor.to(device) for tensor in given), scales, case.row_order, changes, case.group_size)
    torch.library.opcheck(OPS.lowra_shared_gradients.default, arguments)


def test_what_does_not_fit_is_refused(device):
    case = packed_case(1, 2, 3, 136, seed=5)
    changes, given = random_changes(case, 1).to(device), given_of(case, 4, torch.float32, 1)
    case, (x, gradient, for_x, output) = case.to(device), (tensor.to(device) for tensor in given)
    with pytest.raises(RuntimeError, match=r"changes must be float32 \[9\]"):
        shared_tables_of(case.packed, changes, False)
    with pytest.raises(RuntimeError, match="changes must be float32"):
        shared_tables_of(case.packed, changes.half(), True)
    rest = case.scales.float(), case.row_order, changes, case.group_size
    with pytest.raises(RuntimeError, match="gradient_of_x must be"):
        OPS.lowra_shared_gradients(x, gradient, for_x[:, :5], output, *rest)
    with pytest.raises(RuntimeError, match=r"changes must be float32 \[9\]"):
        OPS.lowra_shared_gradients(x, gradient, for_x, None, *rest)
    with pytest.raises(RuntimeError, match="gradient must be"):
        OPS.lowra_shared_gradients(x, gradient.half(), for_x, output, *rest)
