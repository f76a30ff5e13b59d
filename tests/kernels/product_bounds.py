"""How far a product of a packed weight on the processor may lie from one in float64 (docs/lab/kernels/cpu.md)."""

import torch

from bitsandbytes.backends.lowra import reference


def largest_weights(case):
    """Every weight of a row at the size of its largest level."""
    levels = case.levels.clone()
    for segment in case.packed.segments():
        rows = levels[segment.levels_of(segment.first, segment.end)].view(-1, 2**segment.bits)
        rows[:] = rows.abs().amax(dim=1, keepdim=True)
    return reference.dequantize(case.packed._replace(levels=levels), torch.float32)


def check(out, x, case, bias=None):
    """Sums in float32, rounded once: within half a unit of the result and K / 4 + 8 roundings of a sum whose terms have
    the size of the row's largest level."""
    weight = reference.dequantize(case.packed, torch.float32).double()
    exact, terms = x.double() @ weight.T, x.double().abs() @ largest_weights(case).double().T
    roundings = min(weight.shape[1], weight.shape[1] / 4 + 8)
    _check(out, exact, terms, bias, roundings)


def check_in_integers(out, x, case, bias=None):
    """As `check`, around the product with x and levels in integers."""
    terms = 2 * x.double().abs() @ largest_weights(case).double().T
    _check(out, reference.linear_in_integers(x, case.packed), terms, bias, x.shape[1] / 4 + 16)


def _check(out, expected, terms, bias, roundings):
    if bias is not None:
        expected, terms = expected + bias.double(), terms + bias.double().abs()
    bound = expected.abs() * torch.finfo(out.dtype).eps / 2 + terms * roundings * 2.0**-24
    assert ((out.double() - expected).abs() <= bound + torch.finfo(out.dtype).smallest_normal).all()
