"""Arguments that a kernel must never see: each is refused in one sentence or made right first, whatever memory holds.

`scripts/fuzz_ops.py` tries many more of the same kinds, against a library that watches every access.
"""

import ctypes
import pathlib
import subprocess
import sys

import pytest
import torch
from cases import packed_case

from bitsandbytes.backends.lowra import checks, layout, libraries, native, reference

OPS = torch.ops.bitsandbytes
TENSORS = ("codes", "row_order", "scales", "scale_steps", "levels")


def case_on(device):
    return packed_case(3, 5, 8, 1400, scales=torch.uint8).to(device)  # two scale steps


def calls(packed, weight, thresholds):
    """Every op that takes a packed weight or a row order, as calls by name."""
    x = torch.ones(2, weight.shape[1], device=weight.device)
    linear = (*packed.tensors, None, packed.rows_4bit, packed.rows_2bit, packed.group_size)
    gradient = (*packed.tensors, packed.rows_4bit, packed.rows_2bit, packed.group_size)
    counts = packed.rows_4bit, packed.rows_2bit, packed.group_size
    return {
        "dequantize": lambda: OPS.lowra_dequantize(*packed, torch.float32),
        "dequantize_part": lambda: OPS.lowra_dequantize_part(*packed, 0, 4, 0, 100, torch.float32),
        "linear": lambda: OPS.lowra_linear(x, *linear),
        "linear in bfloat16": lambda: OPS.lowra_linear(x.bfloat16(), *linear),
        "table_gradients": lambda: OPS.lowra_table_gradients(weight, *gradient, True),
        "quantize": lambda: OPS.lowra_quantize(weight, packed.row_order, thresholds, *counts),
    }


def of_packed(case, **changes):
    return calls(case.packed._replace(**changes), case.weight, case.thresholds)


def spread(tensor):
    """The same values with a gap after each."""
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor
    return wide[..., 0]


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("how", ["spread", "expanded", "one number expanded"])
def test_packed_tensors_that_are_not_contiguous_are_refused(device, name, how):
    case = case_on(device)
    tensor = getattr(case, name)
    changed = {
        "spread": lambda: spread(tensor),
        "expanded": lambda: tensor[:1].expand(tensor.shape),
        "one number expanded": lambda: tensor.new_zeros(()).expand(tensor.shape),
    }[how]()
    assert changed.shape == tensor.shape and not changed.is_contiguous()
    for op, call in of_packed(case, **{name: changed}).items():
        if op != "quantize":
            with pytest.raises(RuntimeError, match=rf"{name} must lie in one piece of memory: pass {name}.contiguous"):
                call()


def test_other_tensors_that_are_not_contiguous_are_read_as_they_are(device):
    case = case_on(device)
    for change in (spread, lambda t: t[..., :1].expand(t.shape), lambda t: t.new_ones(()).expand(t.shape)):
        weight, thresholds = change(case.weight), change(case.thresholds)
        order = spread(case.row_order)
        plain = weight.contiguous().cpu(), order.cpu(), thresholds.contiguous().cpu()
        found = OPS.lowra_quantize(weight, order, thresholds, 3, 5, 64)
        expected = reference.quantize(*plain, 3, 5, 64)
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))
        x = change(torch.randn(4, 1400, device=device))
        bias = change(torch.randn(16, device=device))
        product = OPS.lowra_linear(*case.linear_arguments(x, bias))
        expected = OPS.lowra_linear(*case.linear_arguments(x.contiguous(), bias.contiguous()))
        # on a GPU float32 goes to cuBLAS, which sums 1,400 products in another order by how x lies in memory
        tolerance = 0 if device == "cpu" else 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(product, expected, rtol=0, atol=tolerance)
        gradient = change(case.weight)
        arguments = (*case.packed.tensors, 3, 5, 64, True)
        found = OPS.lowra_table_gradients(gradient, *arguments)
        expected = OPS.lowra_table_gradients(gradient.contiguous(), *arguments)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        absmax = change(case.weight).abs()
        found, expected = OPS.lowra_encode_scales(absmax), OPS.lowra_encode_scales(absmax.contiguous())
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        levels, cuts = (change(torch.linspace(-1, 1, n, device=device)) for n in (22, 19))
        found = OPS.lowra_lloyd_max(weight, levels, cuts, None, 64, 3, True)
        expected = OPS.lowra_lloyd_max(weight.contiguous(), levels.contiguous(), cuts.contiguous(), None, 64, 3, True)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", [*TENSORS, "weight", "thresholds", "x"])
@pytest.mark.parametrize("left", [0, 1, 3])
def test_storages_that_were_cut_short_are_refused(name, left):
    def cut(tensor):
        copy = tensor.clone()
        copy.untyped_storage().resize_(left * copy.element_size())
        return copy

    case = case_on("cpu")
    if name in TENSORS and left < case.scale_steps.numel():
        for op, call in of_packed(case, **{name: cut(getattr(case, name))}).items():
            if op != "quantize" or name == "row_order":
                with pytest.raises(RuntimeError, match="is shorter than the tensor"):
                    call()
    if name == "x":
        with pytest.raises(RuntimeError, match="is shorter than the tensor"):
            OPS.lowra_linear(*case.linear_arguments(cut(torch.ones(2, 1400))))
    if name in ("weight", "thresholds"):
        setattr(case, name, cut(getattr(case, name)))
        with pytest.raises(RuntimeError, match="is shorter than the tensor"):
            OPS.lowra_quantize(*case.quantize_arguments)


@pytest.mark.parametrize("left", [0, 1, 30])
@pytest.mark.parametrize("name", ["weight", "levels", "cuts", "absmax", "gradient", "x", "thresholds"])
def test_short_storages_under_strided_tensors_are_refused(device, name, left):
    """What ops copy into one piece, they would copy from beyond the end."""

    def cut(tensor):
        spread = torch.stack([tensor, tensor], dim=-1)[..., 0]
        spread.untyped_storage().resize_(left * spread.element_size())
        return spread

    if device == "cuda" and name == "x":
        pytest.skip("a product on a GPU has no time to ask")
    case = case_on(device)
    tables = [torch.linspace(-1, 1, count, device=device) for count in (16, 4, 2)]
    named = {
        "weight": case.weight,
        "levels": torch.cat(tables),
        "cuts": torch.cat([(table[:-1] + table[1:]) / 2 for table in tables]),
        "absmax": case.weight.abs(),
        "gradient": torch.ones_like(case.weight),
        "x": torch.ones(3, 1400, device=device),
        "thresholds": case.thresholds,
    }
    given = {**named, name: cut(named[name])}
    made = {
        "encode_scales": lambda: OPS.lowra_encode_scales(given["absmax"]),
        "lloyd_max": lambda: OPS.lowra_lloyd_max(given["weight"], given["levels"], given["cuts"], None, 64, 2, True),
        "quantize": lambda: OPS.lowra_quantize(given["weight"], case.row_order, given["thresholds"], 3, 5, 64),
        "table_gradients": lambda: OPS.lowra_table_gradients(given["gradient"], *case.packed.tensors, 3, 5, 64, True),
        "linear": lambda: OPS.lowra_linear(*case.linear_arguments(given["x"])),
    }
    takes = {"absmax": ["encode_scales"], "gradient": ["table_gradients"], "x": ["linear"], "thresholds": ["quantize"]}
    for op in takes.get(name, ["lloyd_max", "quantize"] if name == "weight" else ["lloyd_max"]):
        with pytest.raises(RuntimeError, match="is shorter than the tensor"):
            made[op]()


@pytest.mark.skipif(not native.cpu_available(), reason="the CPU library was not built")
def test_a_slice_of_hostile_calls():
    """A seeded slice of `make fuzz-ops` without its sanitizers: refusals and numbers, in a process that may end."""
    script = pathlib.Path(__file__).parents[2] / "scripts" / "fuzz_ops.py"
    command = [sys.executable, str(script), "--installed", "--cases", "300", "--seconds", "120"]
    done = subprocess.run(command, capture_output=True, text=True)
    wrong = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0 and not wrong, (wrong, last, done.stderr[-2000:])


@pytest.mark.parametrize("place, value", [(0, 16), (3, -1), (5, 2**31 - 1), (15, -(2**31)), (7, None), (0, 1000)])
def test_row_orders_that_leave_the_weight_or_repeat_are_refused(device, place, value):
    case = case_on(device)
    order = case.row_order.clone()
    order[place] = order[place - 1].item() if value is None else value
    for call in of_packed(case, row_order=order).values():
        with pytest.raises(RuntimeError, match="row_order must name every row"):
            call()


def test_a_row_order_that_is_written_to_is_looked_at_again(device):
    case = case_on(device)
    order = case.row_order.clone()
    every = of_packed(case, row_order=order)
    for call in every.values():
        call()
    order[4] = 99
    for call in every.values():
        with pytest.raises(RuntimeError, match="row_order must name every row"):
            call()
    order.copy_(case.row_order)
    for call in every.values():
        call()


@pytest.mark.parametrize("tokens", [1, 20, 100])
def test_rows_in_no_order_at_all(device, tokens):
    """Packing leaves the rows of a precision in the order of W; a product must not depend on it."""
    case = packed_case(64, 128, 320, 512)
    case.row_order = torch.randperm(512, generator=torch.Generator().manual_seed(0)).int()
    weight = reference.dequantize(case.packed, torch.float32)
    moved = case.to(device)
    assert torch.equal(OPS.lowra_dequantize(*moved.packed, torch.float32).cpu(), weight)
    x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = OPS.lowra_linear(*moved.linear_arguments(x.to(device))).cpu().float()
    expected = x.float() @ weight.T
    assert (out - expected).norm() <= 1e-2 * expected.norm()


WRONG = [None, torch.complex64, torch.int64, torch.float64, torch.bool, torch.int16]


@pytest.mark.parametrize("kind", WRONG, ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_packed_tensors_of_other_types_are_refused(device, name, kind):
    case = case_on(device)
    changed = None if kind is None else getattr(case, name).to(kind)
    for op, call in of_packed(case, **{name: changed}).items():
        if op != "quantize" or name == "row_order":
            with pytest.raises(RuntimeError):
                call()


@pytest.mark.parametrize("kind", WRONG, ids=str)
def test_operands_of_other_types_are_refused(device, kind):
    case = case_on(device)
    x, bias, absmax = torch.ones(2, 1400, device=device), torch.ones(16, device=device), case.weight.abs()
    levels, cuts = torch.linspace(-1, 1, 22, device=device), torch.linspace(-1, 1, 19, device=device)

    def other(tensor):
        return None if kind is None else tensor.to(kind)

    packed = (*case.packed.tensors, 3, 5, 64)
    refused = [
        lambda: OPS.lowra_linear(*case.linear_arguments(other(x))),
        lambda: OPS.lowra_dequantize(*case.packed, kind),
        lambda: OPS.lowra_dequantize_part(*case.packed, 0, 4, 0, 8, kind),
        lambda: OPS.lowra_quantize(other(case.weight), case.row_order, case.thresholds, 3, 5, 64),
        lambda: OPS.lowra_quantize(case.weight, case.row_order, other(case.thresholds), 3, 5, 64),
        lambda: OPS.lowra_encode_scales(other(absmax)),
        lambda: OPS.lowra_table_gradients(other(case.weight), *packed, True),
        lambda: OPS.lowra_lloyd_max(other(case.weight), levels, cuts, None, 64, 2, True),
        lambda: OPS.lowra_lloyd_max(case.weight, other(levels), cuts, None, 64, 2, True),
        lambda: OPS.lowra_lloyd_max(case.weight, levels, other(cuts), None, 64, 2, True),
    ]
    if kind is not None:
        refused.append(lambda: OPS.lowra_linear(*case.linear_arguments(x, other(bias))))
        refused.append(lambda: OPS.lowra_linear(*case.linear_arguments(x.half(), bias)))
    for call in refused:
        with pytest.raises(RuntimeError):
            call()


def test_column_weights_are_refused(device):
    weight = torch.randn(3, 64, device=device)
    levels, cuts = torch.linspace(-1, 1, 22, device=device), torch.linspace(-1, 1, 19, device=device)
    with pytest.raises(RuntimeError, match="column_weights are not supported"):
        OPS.lowra_lloyd_max(weight, levels, cuts, torch.ones(64, device=device), 64, 2, True)


@pytest.mark.parametrize("name", [*TENSORS, "x", "bias"])
@pytest.mark.parametrize("where", ["meta", "sparse", "other"])
def test_tensors_elsewhere_are_refused(device, name, where):
    case = case_on(device)
    arguments = {**dict(zip(TENSORS, case.packed.tensors, strict=True)), "x": torch.ones(2, 1400, device=device)}
    arguments["bias"] = torch.ones(16, device=device)
    if where == "other" and device == "cpu":
        pytest.skip("there is only the CPU")
    to = {"meta": lambda t: t.to("meta"), "other": lambda t: t.cpu(), "sparse": lambda t: t.to_sparse()}[where]
    arguments[name] = to(arguments[name])
    x, bias = arguments.pop("x"), arguments.pop("bias")
    with pytest.raises(RuntimeError):
        OPS.lowra_linear(x, *arguments.values(), bias, 3, 5, 64)
    if name in TENSORS:
        for op, call in of_packed(case, **arguments).items():
            if op != "quantize" or name == "row_order":
                with pytest.raises(RuntimeError):
                    call()


@pytest.mark.parametrize("change", [{"x": torch.ones(())}, {"x": torch.ones(3, 0)}, {"x": torch.ones(3, 100)}])
def test_x_of_other_sizes_is_refused(device, change):
    with pytest.raises(RuntimeError):
        OPS.lowra_linear(*case_on(device).linear_arguments(change["x"].to(device)))


@pytest.mark.parametrize("shape", [(1,), (17,), (16, 1), (1, 16), ()])
def test_a_bias_of_another_size_is_refused(device, shape):
    case = case_on(device)
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = torch.ones(2, 1400, device=device, dtype=dtype), torch.ones(shape, device=device, dtype=dtype)
        with pytest.raises(RuntimeError, match="bias must be"):
            OPS.lowra_linear(*case.linear_arguments(x, bias))


@pytest.mark.parametrize(
    "changes",
    [
        *({"rows_4bit": n} for n in (-1, 17, 2**31, 2**62, -(2**63))),
        *({"rows_2bit": n} for n in (-1, 17, 2**63 - 1)),
        {"rows_4bit": 2**62, "rows_2bit": 2**62},
        {"rows_4bit": 19, "rows_2bit": -11},
        *({"group_size": n} for n in (0, -64, 12, 512, 2**40)),
        *({"in_features": n} for n in (0, -1400, 700, 2**62, 2**63 - 1)),
    ],
    ids=str,
)
def test_sizes_that_fit_nothing_are_refused(device, changes):
    case = case_on(device)
    for op, call in of_packed(case, **changes).items():
        if op.startswith("dequantize") or "in_features" not in changes:
            with pytest.raises(RuntimeError):
                call()


@pytest.mark.parametrize("part", [(2**63 - 1, 2**63 - 1, 0, 8), (0, 4, 2**62, 2**62), (-4, 8, 0, 8), (0, 4, 0, -8)])
def test_parts_whose_ends_cannot_be_counted_are_refused(device, part):
    with pytest.raises(RuntimeError, match="must lie within"):
        OPS.lowra_dequantize_part(*case_on(device).packed, *part, torch.float32)


@pytest.mark.parametrize("iterations", [-1, 2**31, 2**62])
def test_iterations_that_cannot_be_counted_are_refused(device, iterations):
    levels, cuts = torch.linspace(-1, 1, 22, device=device), torch.linspace(-1, 1, 19, device=device)
    with pytest.raises(RuntimeError, match="iterations must be"):
        OPS.lowra_lloyd_max(torch.ones(2, 64, device=device), levels, cuts, None, 64, iterations, True)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)])
def test_weights_of_nothing(device, shape):
    weight = torch.ones(shape, device=device)
    levels, cuts = torch.linspace(-1, 1, 22, device=device), torch.linspace(-1, 1, 19, device=device)
    order, thresholds = layout.row_order(torch.ones(shape[0], dtype=torch.uint8)), torch.zeros(shape[0])
    if shape[1]:
        found = OPS.lowra_lloyd_max(weight, levels, cuts, None, 64, 2, True)
        assert [tuple(tensor.shape) for tensor in found] == [(0, 22), (0, 19), (0, 3)]
        scales, steps = OPS.lowra_encode_scales(weight)
        assert scales.shape == shape and steps.shape == (0,)
    else:
        for call in (
            lambda: OPS.lowra_lloyd_max(weight, levels, cuts, None, 64, 2, True),
            lambda: OPS.lowra_quantize(weight, order.to(device), thresholds.to(device), 0, 0, 64),
        ):
            with pytest.raises(RuntimeError, match="must have columns"):
                call()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("name", ["codes", "levels"])
def test_memory_that_a_gpu_cannot_load_from_is_refused(name):
    case = case_on("cuda")
    tensor = getattr(case, name)
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")
    buffer[1:] = tensor
    for op, call in of_packed(case, **{name: buffer[1:]}).items():
        if op != "quantize":
            with pytest.raises(RuntimeError, match="pass its clone"):
                call()
    torch.cuda.synchronize()


def statuses_of(packed, out, threads=1):
    """What the CPU library answers to a dequantisation by this struct."""
    pointer = None if out is None else ctypes.c_void_p(out)
    part = libraries.Part(0, 16, 0, 200)
    return native._cpu.lowra_cpu_dequantize(packed and ctypes.byref(packed), part, pointer, 0, threads)


@pytest.mark.skipif(not native.cpu_available(), reason="the CPU library was not built")
def test_the_c_interface_refuses_sizes_and_pointers():
    case = packed_case(3, 5, 8, 200, scales=torch.uint8)
    out = torch.empty(16, 200)
    bad_shape, bad_type, null, misaligned, bad_order = 1, 2, 3, 7, 8

    def changed(**changes):
        struct = libraries.Packed.from_buffer_copy(native.packed_of(case.packed))
        for name, value in changes.items():
            setattr(struct if hasattr(struct, name) else struct.shape, name, value)
        return struct

    assert statuses_of(changed(), out.data_ptr()) == 0
    assert torch.equal(out, reference.dequantize(case.packed, torch.float32))
    for name in ("rows4", "rows2", "rows1", "in_features", "group_size"):
        for value in (-1, -(2**63), 2**63 - 1, 2**62):
            assert statuses_of(changed(**{name: value}), out.data_ptr()) == bad_shape
    # products that fit into 64 bits only by going round
    for rows, columns in ((2**31 - 1, 2**40), (2**20, 2**44), (1, 2**62), (2**31 - 1, 2**33)):
        assert statuses_of(changed(rows1=rows, in_features=columns), out.data_ptr()) == bad_shape
    assert statuses_of(changed(rows4=2**62, rows2=2**62, rows1=2**62), out.data_ptr()) == bad_shape
    assert statuses_of(changed(rows4=2**63 - 1, rows2=2**63 - 1, rows1=2), out.data_ptr()) == bad_shape
    for value in (-1, 2, 4, 2**31 - 1):
        assert statuses_of(changed(scale_type=value), out.data_ptr()) == bad_type
    for name in ("codes", "row_order", "scales", "scale_steps", "levels"):
        assert statuses_of(changed(**{name: None}), out.data_ptr()) == null
    assert statuses_of(changed(), None) == null and statuses_of(None, out.data_ptr()) == null
    for name in ("row_order", "scale_steps", "levels"):
        address = getattr(native.packed_of(case.packed), name)
        assert statuses_of(changed(**{name: address + 1}), out.data_ptr()) == misaligned
    assert statuses_of(changed(), out.data_ptr() + 2) == misaligned
    order = case.row_order.clone()
    order[3] = 16
    assert statuses_of(changed(row_order=order.data_ptr()), out.data_ptr()) == bad_order
    for threads in (-5, 0, 2**31 - 1):
        assert statuses_of(changed(), out.data_ptr(), threads) == 0


def test_a_library_of_another_version_is_left_aside(monkeypatch, tmp_path, caplog):
    (tmp_path / "libold.so").touch()

    class Old:
        def lowra_format_version(self):
            return layout.FORMAT_VERSION

    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: Old())
    monkeypatch.setattr(libraries, "left_aside", {})
    assert libraries.load(tmp_path / "libold.so", "cpu") is None and "built from another version" in caplog.text


def test_a_row_order_is_known_by_its_memory_while_nobody_writes_there():
    """A backward pass gets it detached where hooks handle saved tensors; to look again would make a GPU wait."""
    known, order = checks.KnownOrders(), torch.arange(8, dtype=torch.int32)
    known.keep(order, 2, 3, True)
    assert known.what_was_found(order, 2, 3) is True
    assert known.what_was_found(order.detach(), 2, 3) is True
    assert known.what_was_found(order.detach(), 3, 2) is None
    assert known.what_was_found(order[:7], 2, 3) is None
    assert known.what_was_found(order.clone(), 2, 3) is None
    alias = order.data  # has a counter of its own
    order.add_(1)
    assert known.what_was_found(order, 2, 3) is None
    assert known.what_was_found(order.detach(), 2, 3) is None
    assert known.what_was_found(alias, 2, 3) is None
    known.keep(order, 2, 3, False)
    detached = order.detach()
    assert known.what_was_found(detached, 2, 3) is False
    del order
    assert known.what_was_found(detached, 2, 3) is None
