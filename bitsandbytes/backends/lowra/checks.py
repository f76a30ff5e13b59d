"""What the ops ask of their arguments before a kernel sees them; a RuntimeError with one sentence otherwise.

Kernels take addresses and sizes on trust, so what they are given must be there: of the right types and sizes,
contiguous, on one device, and a row order that names every row once. The checks of a packed weight take longer than a
launch, so arguments that look the same as some before pass at once.
"""

import weakref
from typing import Any

import torch

from . import layout
from .layout import PackedMatrix

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NAMES = PackedMatrix._fields[:5]


def check_given(**tensors: torch.Tensor | None) -> None:
    """None passes for a tensor in a schema."""
    for name, tensor in tensors.items():
        torch._check(tensor is not None, lambda name=name: f"{name} must be a tensor, got None")


def check_type(name: str, dtype: torch.dtype) -> None:
    """A type that the kernels multiply in."""
    torch._check(dtype in FLOATS, lambda: f"{name} must be float32, float16 or bfloat16, got {dtype}")


def check_sizes(rows: int, rows_4bit: int, rows_2bit: int, in_features: int, group_size: int) -> None:
    torch._check(
        rows_4bit >= 0 and rows_2bit >= 0 and rows_4bit + rows_2bit <= rows,
        lambda: f"{rows_4bit} 4-bit and {rows_2bit} 2-bit rows do not fit into {rows} rows",
    )
    torch._check(in_features > 0, lambda: f"a weight must have columns, got in_features={in_features}")
    torch._check(
        group_size % 8 == 0 and 8 <= group_size <= 256,
        lambda: f"group_size must be a multiple of 8 from 8 to 256, got {group_size}",
    )


def check_together(**tensors: torch.Tensor | None) -> None:
    """All on the device of the first, and none of them sparse."""
    (first, leader), *others = tensors.items()
    if leader is None:
        raise RuntimeError(f"{first} must be a tensor, got None")
    torch._check(leader.layout == torch.strided, lambda: f"{first} must be a dense tensor, got {leader.layout}")
    for name, tensor in others:
        torch._check(
            tensor is None or (tensor.device == leader.device and tensor.layout == torch.strided),
            lambda name=name, tensor=tensor: (
                f"{name} must be a dense tensor on {leader.device} like {first}, got {_described(tensor)}"
            ),
        )


def _described(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.layout} on {tensor.device}"


def check_memory(*tensors: torch.Tensor | None) -> None:
    """Storages that were resized under their tensors are refused: PyTorch's own copies read past them too.

    Not asked for packed weights on a GPU, where the host has no time: those that FSDP empties between uses have no
    address, which the library refuses.
    """
    for tensor in tensors:
        if tensor is not None and not tensor.is_meta and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = (tensor.storage_offset() + last + 1) * tensor.element_size()
            if end > tensor.untyped_storage().nbytes():
                raise RuntimeError(f"The storage of a tensor {list(tensor.shape)} is shorter than the tensor.")


def check_packed(packed: PackedMatrix) -> None:
    """The tensors of a packed weight fit one another; what `row_order` holds is not looked at."""
    codes, row_order, scales, steps, levels = packed.tensors
    check_given(codes=codes, row_order=row_order, scales=scales, levels=levels)
    rows, in_features = packed.rows, packed.in_features
    torch._check(
        row_order.dtype == torch.int32 and row_order.shape == (rows,),
        lambda: f"row_order must be int32 [rows], got {row_order.dtype} {tuple(row_order.shape)}",
    )
    check_sizes(rows, *packed.sizes)
    size = layout.codes_size(rows, packed.rows_4bit, packed.rows_2bit, in_features)
    torch._check(
        codes.dtype == torch.uint8 and codes.shape == (size,),
        lambda: (
            f"codes must be {size} bytes (uint8) for in_features={in_features}, got {codes.dtype} {tuple(codes.shape)}"
        ),
    )
    groups = layout.group_count(in_features, packed.group_size)
    torch._check(
        scales.shape == (rows, groups), lambda: f"scales must be [{rows}, {groups}], got {tuple(scales.shape)}"
    )
    if scales.dtype == torch.uint8:
        blocks = layout.scale_step_count(rows, in_features, packed.group_size)
        torch._check(
            steps is not None and steps.dtype == torch.float32 and steps.shape == (blocks,),
            lambda: f"8-bit scales need scale_steps float32 [{blocks}]",
        )
    else:
        torch._check(
            scales.dtype in (torch.float32, torch.float16) and steps is None,
            lambda: f"scales must be float32, float16 or (with scale_steps) uint8, got {scales.dtype}",
        )
    entries = layout.levels_size(rows, packed.rows_4bit, packed.rows_2bit)
    torch._check(
        levels.dtype == torch.float16 and levels.shape == (entries,),
        lambda: f"levels must be {entries} float16 values, got {levels.dtype} {tuple(levels.shape)}",
    )
    tensors = dict(zip(_NAMES, packed.tensors, strict=True))
    check_together(**tensors)
    for name, tensor in tensors.items():
        torch._check(
            tensor is None or tensor.is_contiguous(),
            lambda name=name: f"{name} must lie in one piece of memory: pass {name}.contiguous()",
        )


def check_operands(x: torch.Tensor, packed: PackedMatrix, bias: torch.Tensor | None) -> None:
    """x and bias fit each other and the weight, which is checked by itself."""
    check_type("x", x.dtype)
    check_together(x=x, codes=packed.codes, bias=bias)
    torch._check(
        bias is None or (bias.dtype == x.dtype and bias.shape == (packed.rows,)),
        lambda: (
            f"bias must be {x.dtype} [{packed.rows}] beside this x, got "
            + ("None" if bias is None else f"{bias.dtype} {tuple(bias.shape)}")
        ),
    )


@torch.compiler.disable
def refuse_width(x: torch.Tensor, packed: PackedMatrix) -> None:
    """Raises RuntimeError for an x whose last dimension is not the weight's, by the name that PyTorch has for it."""
    raise RuntimeError(
        f"mat1 and mat2 shapes cannot be multiplied: x is {list(x.shape)}, and the packed weight "
        f"[{packed.rows}, {packed.in_features}]"
    )


_checked: set[tuple] = set()


def check_packed_once(packed: PackedMatrix, dtype: torch.dtype) -> None:
    """`check_packed` for kernels, and `check_type` of what they are to multiply in."""
    tensors = [None if t is None else (t.shape, t.dtype, t.get_device(), t.is_contiguous()) for t in packed.tensors]
    key = (*tensors, *packed.sizes, dtype)
    if key not in _checked:
        check_type("dtype", dtype)
        check_packed(packed)
        _checked.add(key)


def check_operands_once(x: torch.Tensor, packed: PackedMatrix, bias: torch.Tensor | None) -> None:
    """`check_operands` for kernels."""
    of_bias = None if bias is None else (bias.shape, bias.dtype, bias.get_device())
    key = (x.dtype, x.get_device(), x.layout, of_bias, packed.codes.get_device(), packed.rows)
    if key not in _checked:
        check_operands(x, packed, bias)
        _checked.add(key)


def check_part(packed: PackedMatrix, part: tuple[int, int, int, int]) -> None:
    """(first row, rows, first column, columns) lie within the weight; kernels begin with a group, whatever its size."""
    first_row, rows, first_column, columns = part
    inside = 0 <= first_row and 0 <= rows and first_row + rows <= packed.rows
    inside = inside and 0 <= first_column and 0 <= columns and first_column + columns <= packed.in_features
    torch._check(
        inside and first_column % 256 == 0,
        lambda: (
            f"a part must lie within {[packed.rows, packed.in_features]} and its columns begin at a multiple of 256, "
            f"got {rows} rows from {first_row} on, {columns} columns from {first_column} on"
        ),
    )


def check_weight(weight: torch.Tensor) -> None:
    """A dense weight that is to be quantised."""
    check_given(weight=weight)
    torch._check(weight.dim() == 2, lambda: f"weight must be [out_features, in_features], got {tuple(weight.shape)}")
    check_type("weight", weight.dtype)


def check_quantize(
    weight: torch.Tensor,
    row_order: torch.Tensor,
    thresholds: torch.Tensor,
    rows_4bit: int,
    rows_2bit: int,
    group_size: int,
) -> None:
    check_weight(weight)
    check_given(row_order=row_order, thresholds=thresholds)
    rows, in_features = weight.shape
    torch._check(
        row_order.dtype == torch.int32 and row_order.shape == (rows,),
        lambda: f"row_order must be int32 [{rows}], got {row_order.dtype} {tuple(row_order.shape)}",
    )
    check_sizes(rows, rows_4bit, rows_2bit, in_features, group_size)
    expected = layout.thresholds_size(rows, rows_4bit, rows_2bit)
    torch._check(
        thresholds.dtype == torch.float32 and thresholds.shape == (expected,),
        lambda: f"thresholds must be {expected} float32 values, got {thresholds.dtype} {tuple(thresholds.shape)}",
    )
    check_together(weight=weight, row_order=row_order, thresholds=thresholds)


def check_lloyd_max(
    weight: torch.Tensor,
    initial_levels: torch.Tensor,
    initial_thresholds: torch.Tensor,
    group_size: int,
    iterations: int,
) -> None:
    check_weight(weight)
    check_given(initial_levels=initial_levels, initial_thresholds=initial_thresholds)
    check_sizes(weight.shape[0], 0, 0, weight.shape[1], group_size)
    torch._check(
        initial_levels.shape == (22,) and initial_thresholds.shape == (19,),
        lambda: (
            f"22 levels and 19 thresholds start the search, got {tuple(initial_levels.shape)} and "
            f"{tuple(initial_thresholds.shape)}"
        ),
    )
    check_type("initial_levels", initial_levels.dtype)
    check_type("initial_thresholds", initial_thresholds.dtype)
    torch._check(0 <= iterations < 2**31, lambda: f"iterations must be from 0 to 2^31 - 1, got {iterations}")
    check_together(weight=weight, initial_levels=initial_levels, initial_thresholds=initial_thresholds)


def check_absmax(absmax: torch.Tensor) -> None:
    check_given(absmax=absmax)
    torch._check(absmax.dtype == torch.float32, lambda: f"absmax must be float32, got {absmax.dtype}")
    check_together(absmax=absmax)


def check_gradient(gradient: torch.Tensor, codes: torch.Tensor, row_order: torch.Tensor) -> None:
    """The gradient of the dense weight that these belong to."""
    check_given(gradient=gradient, codes=codes, row_order=row_order)
    check_together(gradient=gradient, codes=codes)
    rows = row_order.numel()
    torch._check(
        gradient.dim() == 2 and gradient.shape[0] == rows and gradient.dtype in FLOATS,
        lambda: (
            f"gradient must be floating point (float32, float16 or bfloat16) [{rows}, K], got {gradient.dtype} "
            f"{tuple(gradient.shape)}"
        ),
    )


def check_watched(row_order: torch.Tensor) -> None:
    """Asks for compiled code, which cannot, whether a packed layer's tensors are those it was compiled for: the row
    order it was given may carry a function that says so.

    Raises:
        RuntimeError: they are not.
    """
    still = getattr(row_order, "lowra_still", None)
    if still is not None:
        still()


def ascends(row_order: torch.Tensor, rows_4bit: int, rows_2bit: int) -> bool:
    """Whether the rows of each precision stand in the order of W, as packing leaves them.

    To look means to wait for a GPU, so there what was found holds while the tensor lives and is not written to. A CUDA
    graph that is being captured cannot wait: what the calls before it have not seen is taken on trust.

    Raises:
        RuntimeError: `row_order` does not name every row once.
    """
    if row_order.get_device() < 0:
        return _look_at(row_order, rows_4bit, rows_2bit)
    found = _known_orders.what_was_found(row_order, rows_4bit, rows_2bit)
    if found is not None:
        return found
    if row_order.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    found = _look_at(row_order.cpu(), rows_4bit, rows_2bit)
    _known_orders.keep(row_order, rows_4bit, rows_2bit, found)
    return found


class KnownOrders:
    """What was found in row orders, while these live and are not written to."""

    def __init__(self) -> None:
        self._by_tensor: dict[int, tuple[weakref.ref, tuple, bool]] = {}  # by id
        self._by_memory: dict[int, int] = {}  # the id of a tensor there

    def what_was_found(self, row_order: torch.Tensor, rows_4bit: int, rows_2bit: int) -> bool | None:
        """None for a tensor that is not known, nor the same values of one that is: what hooks on saved tensors detach,
        as in a backward pass, is another tensor each time."""
        state = _state_of(row_order, rows_4bit, rows_2bit)
        tensor, seen, found = self._by_tensor.get(id(row_order), _UNKNOWN)
        if tensor() is row_order and seen == state:
            return found
        tensor, seen, found = self._by_tensor.get(self._by_memory.get(row_order.data_ptr(), -1), _UNKNOWN)
        known = tensor()
        same = (
            known is not None
            and seen == state == _state_of(known, rows_4bit, rows_2bit)
            and known.untyped_storage()._cdata == row_order.untyped_storage()._cdata
        )
        return found if same else None

    def keep(self, row_order: torch.Tensor, rows_4bit: int, rows_2bit: int, found: bool) -> None:
        key, place = id(row_order), row_order.data_ptr()

        def forget(_: Any) -> None:
            self._by_tensor.pop(key, None)
            if self._by_memory.get(place) == key:
                del self._by_memory[place]

        self._by_tensor[key] = weakref.ref(row_order, forget), _state_of(row_order, rows_4bit, rows_2bit), found
        self._by_memory[place] = key


_UNKNOWN: tuple = (lambda: None, None, None)
_known_orders = KnownOrders()


def _state_of(row_order: torch.Tensor, rows_4bit: int, rows_2bit: int) -> tuple:
    return _version_of(row_order), row_order.data_ptr(), row_order.shape, row_order.stride(), rows_4bit, rows_2bit


def _version_of(tensor: torch.Tensor) -> int | None:
    try:
        return tensor._version
    except RuntimeError:  # made under inference_mode, where nobody counts
        return None


def _look_at(row_order: torch.Tensor, rows_4bit: int, rows_2bit: int) -> bool:
    rows = row_order.numel()
    torch._check(
        torch.equal(row_order.sort().values, torch.arange(rows, dtype=torch.int32)),
        lambda: f"row_order must name every row from 0 to {rows - 1} once",
    )
    classes = row_order.split([rows_4bit, rows_2bit, rows - rows_4bit - rows_2bit])
    return all(bool((places.diff() > 0).all()) for places in classes)
