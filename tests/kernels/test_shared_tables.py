"""lowra_shared_tables and lowra_shared_gradients: PyTorch's own gradients, and sums in double precision."""

import math

import pytest
import torch
from cases import packed_case

from bitsandbytes.backends.lowra import layout, reference
from bitsandbytes.backends.lowra.shared_tables import SharedChanges, shared_tables, shared_tables_of

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


def changes_of(case, seed, with_gain=True):
    rows, groups = case.scales.shape
    made = torch.Generator().manual_seed(seed)
    shift, gain, scale_gain = (torch.randn(count, generator=made) * 0.1 for count in (rows, rows, groups))
    return SharedChanges(shift, gain if with_gain else None, scale_gain)


def on(device, changes):
    return SharedChanges(*(change if change is None else change.to(device) for change in changes))


def given_of(case, tokens, dtype, seed):
    """x, gradient, gradient of x and output, of no product in particular: the op adds them up whatever they are."""
    rows, columns = case.weight.shape
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, size, generator=made).to(dtype) for size in (columns, rows, columns, rows)]


@pytest.mark.parametrize("number", range(len(SHAPES)))
@pytest.mark.parametrize("with_gain", [True, False])
def test_tables_equal_the_specification(device, number, with_gain):
    *counts, columns, group_size, _ = SHAPES[number]
    case = packed_case(*counts, columns, group_size, scales=SCALES[number % 3], seed=number)
    changes = changes_of(case, number, with_gain)
    levels, scales = shared_tables(case.packed, changes)
    found = shared_tables_of(case.to(device).packed, on(device, changes))
    assert found.levels.dtype == torch.float16 and found.scale_steps is None
    torch.testing.assert_close(found.levels.cpu(), levels.half(), rtol=1e-3, atol=1e-7)  # a step of float16
    torch.testing.assert_close(found.scales.cpu(), scales, rtol=1e-6, atol=0)
    none = shared_tables_of(
        case.to(device).packed, on(device, SharedChanges(*(None if c is None else c * 0 for c in changes)))
    )
    assert torch.equal(none.levels.cpu(), case.levels)
    assert torch.equal(none.scales.cpu(), reference.decode_scales(case.scales, case.scale_steps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_gradients_equal_sums_in_double_precision(device, number, dtype):
    *counts, columns, group_size, tokens = SHAPES[number]
    case = packed_case(*counts, columns, group_size, scales=torch.float32, seed=number)
    changes, given = changes_of(case, number), given_of(case, tokens, dtype, number)
    if dtype != torch.float32:
        given[3] = given[3].to(torch.float8_e5m2)
    groups = layout.group_count(columns, group_size)
    x, gradient, for_x, output = (tensor.double() for tensor in given)

    def by_group(values):
        padded = torch.nn.functional.pad(values, (0, groups * group_size - columns))
        return padded.view(*values.shape[:-1], groups, group_size).sum(dim=-1)

    order, scales = case.row_order.long(), case.scales.double()
    of_sums = (gradient.t() @ by_group(x))[order]
    size = ((gradient.abs().t() @ by_group(x.abs()))[order] * scales).sum(dim=1) * changes.level_gain.double().exp()
    exact = [
        ((of_sums * scales).sum(dim=1) * changes.level_gain.double().exp(), size),
        ((gradient * output).sum(dim=0)[order], (gradient * output).abs().sum(dim=0)[order]),
        (by_group((x * for_x).sum(dim=0)), by_group((x * for_x).abs().sum(dim=0))),
    ]
    tensors = [tensor.to(device) for tensor in (*given, case.scales, case.row_order, changes.level_gain)]
    found = OPS.lowra_shared_gradients(*tensors, group_size)
    # means and their products with the gradient are rounded to the type of x
    tolerances = 2 * torch.finfo(dtype).eps + 1e-5, 1e-5, 1e-5
    for actual, (wanted, bound), tolerance in zip(found, exact, tolerances, strict=True):
        assert actual.dtype == torch.float32 and actual.shape == wanted.shape
        assert ((actual.cpu() - wanted).abs() <= tolerance * bound + 1e-30).all()
    again = OPS.lowra_shared_gradients(*tensors[:3], None, *tensors[4:6], None, group_size)
    assert again[1].numel() == 0 and torch.equal(again[2], found[2])
    assert torch.equal(found[1], OPS.lowra_shared_gradients(*tensors, group_size)[1])  # in one order


def test_rows_apart_in_memory_no_tokens_and_numbers_beyond_float8(device):
    case = packed_case(2, 2, 3, 520, seed=1).to(device)
    scales, order = reference.decode_scales(case.scales, case.scale_steps), case.row_order
    large = torch.randn(9, 1040, device=device)
    x, gradient = large[:, 3:523], large[:, 5:12]
    gain = torch.zeros(7, device=device)
    found = OPS.lowra_shared_gradients(x, gradient, x, gradient, scales, order, gain, 64)
    copies = x.contiguous(), gradient.contiguous(), x.contiguous(), gradient.contiguous()
    expected = OPS.lowra_shared_gradients(*copies, scales, order, gain, 64)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    none = OPS.lowra_shared_gradients(x[:0], gradient[:0], x[:0], gradient[:0], scales, order, gain, 64)
    assert [each.abs().max().item() for each in none] == [0, 0, 0]
    ones = torch.ones(9, 7, device=device, dtype=torch.bfloat16)
    beyond = torch.full_like(ones, 1e6).to(torch.float8_e5m2)
    wide = x.bfloat16()
    found = OPS.lowra_shared_gradients(wide, ones, wide, -beyond.to(torch.bfloat16), scales, order, gain, 64)
    assert torch.isinf(found[1]).all()
    found = OPS.lowra_shared_gradients(wide, ones, wide, beyond, scales, order, gain, 64)
    assert found[1].tolist() == [9 * 57344] * 7


def test_gradients_are_those_of_the_tables(device):
    """Of a product with a weight of changed tables, as PyTorch differentiates it."""
    case = packed_case(3, 5, 9, 250, 64, scales=torch.uint8, seed=3)
    changes = [change.requires_grad_() for change in changes_of(case, 3)]
    x = torch.randn(12, 250, requires_grad=True)
    levels, scales = shared_tables(case.packed, SharedChanges(*changes))
    dense = reference.dequantize(case.packed._replace(levels=levels, scales=scales, scale_steps=None), torch.float32)
    out = x @ dense.t()
    gradient = torch.randn(out.shape)
    for_x, *wanted = torch.autograd.grad(out, [x, *changes], gradient)
    tensors = (x, gradient, for_x, out, scales, case.row_order, changes[1])
    found = OPS.lowra_shared_gradients(*(tensor.detach().to(device) for tensor in tensors), 64)
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())


def test_opcheck(device):
    case = packed_case(1, 2, 3, 136, seed=5, scales=torch.uint8).to(device)
    changes = on(device, changes_of(case.to("cpu"), 1))
    sizes = case.rows_4bit, case.rows_2bit, 136, case.group_size
    torch.library.opcheck(OPS.lowra_shared_tables.default, (*case.packed.tensors, *changes, *sizes))
    scales = reference.decode_scales(case.scales, case.scale_steps)
    given = [tensor.to(device) for tensor in given_of(case.to("cpu"), 4, torch.float32, 1)]
    arguments = (*given, scales, case.row_order, changes.level_gain, case.group_size)
    torch.library.opcheck(OPS.lowra_shared_gradients.default, arguments)


def test_what_does_not_fit_is_refused(device):
    case = packed_case(1, 2, 3, 136, seed=5).to(device)
    changes = on(device, changes_of(case.to("cpu"), 1))
    with pytest.raises(RuntimeError, match=r"scale_gain must be float32 \[3\]"):
        shared_tables_of(case.packed, changes._replace(scale_gain=changes.scale_gain[:2]))
    with pytest.raises(RuntimeError, match="level_shift must be float32"):
        shared_tables_of(case.packed, changes._replace(level_shift=changes.level_shift.half()))
    x, gradient, for_x, output = (tensor.to(device) for tensor in given_of(case.to("cpu"), 4, torch.float32, 1))
    rest = case.scales.float(), case.row_order, changes.level_gain, case.group_size
    with pytest.raises(RuntimeError, match="gradient_of_x must be"):
        OPS.lowra_shared_gradients(x, gradient, for_x[:, :5], output, *rest)
    with pytest.raises(RuntimeError, match="output and level_gain come together"):
        OPS.lowra_shared_gradients(x, gradient, for_x, None, *rest)
    with pytest.raises(RuntimeError, match="gradient must be"):
        OPS.lowra_shared_gradients(x, gradient.half(), for_x, output, *rest)
    assert math.isfinite(OPS.lowra_shared_gradients(x, gradient, for_x, output, *rest)[0].sum().item())
