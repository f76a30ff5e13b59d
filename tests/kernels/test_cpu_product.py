"""Products of packed weights on the processor, by every instruction set that it has, against float64 products."""

import ctypes
import multiprocessing
import os
import threading

import pytest
import torch
from cases import packed_case
from product_bounds import check, check_in_integers

from bitsandbytes.backends.lowra import decoding, dense_parts, libraries, native, native_cpu, reference

pytestmark = pytest.mark.skipif(not native.cpu_available(), reason="the CPU library was not built")
OPS = torch.ops.bitsandbytes
SHAPES = [
    (16, 0, 0, 128, 64),
    (0, 16, 0, 256, 64),
    (0, 0, 33, 512, 64),
    (0, 1, 0, 16, 64),
    (1, 0, 0, 7, 32),
    (3, 5, 7, 224, 64),
    (4, 21, 35, 1056, 32),
    (17, 40, 33, 1004, 128),
    (7, 1, 30, 2080, 256),
    (2, 2, 2, 96, 24),
    (5, 6, 7, 1000, 8),
    (2, 100, 130, 1004, 64),  # as many rows as are multiplied by tables, no number of lanes
    (0, 65, 80, 2080, 256),
    (0, 81, 64, 544, 32),
    (0, 90, 1100, 1536, 128),  # blocks of 64 rows
]
SCALES = [torch.float32, torch.float16, torch.uint8]


@pytest.fixture(params=["avx512vnni", "avx512", "avxvnni", "avx2", "neondot", "neon", "generic"])
def instructions(request):
    try:
        native_cpu.choose_instructions(request.param)
    except OSError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native_cpu.choose_instructions(None)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_of_tokens(instructions, shape):
    *mix, in_features, group_size = shape
    few = instructions == "generic" or sum(mix) > 60  # every number only where it is quick
    for tokens in (1, 2, 4, 5, 16, 17) if few else range(1, 18):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[tokens % 3]
        case = packed_case(*mix, in_features, group_size, scales=SCALES[tokens // 3 % 3], seed=tokens)
        random = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, in_features, generator=random).to(dtype)
        bias = torch.randn(sum(mix), generator=random).to(dtype) if tokens % 2 else None
        out = OPS.lowra_linear(*case.linear_arguments(x, bias))
        assert out.dtype == dtype and out.shape == (tokens, sum(mix))
        if tokens <= native_cpu.MOST_TOKENS:
            check(out, x, case, bias)
        else:
            torch.testing.assert_close(
                out.double(),
                # weights in 16 bits where the processor multiplies these
                x.double() @ reference.dequantize(case.packed, dense_parts.factor_type(x)).double().T
                + (0 if bias is None else bias.double()),
                rtol=1e-2 if dtype != torch.float32 else 1e-4,
                atol=2e-2 if dtype != torch.float32 else 1e-4,
            )


@pytest.mark.parametrize("shape", SHAPES)
def test_x_in_integers(instructions, shape):
    *mix, in_features, group_size = shape
    for tokens in range(1, 5):
        dtype = (torch.float16, torch.bfloat16)[tokens % 2]
        case = packed_case(*mix, in_features, group_size, scales=SCALES[tokens % 3], seed=tokens)
        random = torch.Generator().manual_seed(tokens)
        x = (torch.randn(tokens, in_features, generator=random) * 10.0 ** (tokens - 3)).to(dtype)
        x[0, : in_features // 2] = 0
        bias = torch.randn(sum(mix), generator=random).to(dtype) if tokens % 2 else None
        found = native_cpu.CpuGroup([(case.packed, bias)])(x)
        if instructions == "generic" or group_size not in (32, 64, 128, 256):  # there is no such kernel
            assert found is None
            continue
        (found,) = found
        check_in_integers(found, x, case, bias)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38, 1e-38])
def test_x_without_steps_is_multiplied_as_it_is(value):
    case = packed_case(20, 100, 100, 512)
    x = torch.zeros(2, 512, dtype=torch.bfloat16)
    x[0, 100] = value
    assert native_cpu.CpuGroup([(case.packed, None)])(x) is None


def test_a_group_is_its_members(instructions):
    """To the last bit: x is rounded alike for all."""
    mixes = [(20, 40, 300), (3, 0, 7), (0, 130, 33)]
    cases = [packed_case(*mix, 1004, scales=SCALES[i], seed=i) for i, mix in enumerate(mixes)]
    x = torch.randn(2, 1004, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = [(case.packed, None if i else torch.ones(360).bfloat16()) for i, case in enumerate(cases)]
    together = native_cpu.CpuGroup(weights)(x)
    if instructions == "generic":
        assert together is None
        return
    for out, weight in zip(together, weights, strict=True):
        assert torch.equal(out, native_cpu.CpuGroup([weight])(x)[0])
    assert native_cpu.CpuGroup([weights[0], (packed_case(1, 1, 1, 512).packed, None)])(x) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [8, 24, 64, 256])
def test_parts_are_those_of_the_reference(instructions, group_size, dtype):
    case = packed_case(7, 9, 11, 1004, group_size, scales=torch.uint8)
    whole = reference.dequantize(case.packed, dtype)
    assert torch.equal(OPS.lowra_dequantize(*case.packed, dtype), whole)
    for part in [(0, 27, 256, 748), (5, 3, 0, 256), (26, 1, 768, 1), (3, 0, 0, 4), (3, 4, 256, 0)]:
        rows, columns = slice(part[0], part[0] + part[1]), slice(part[2], part[2] + part[3])
        assert torch.equal(OPS.lowra_dequantize_part(*case.packed, *part, dtype), whole[rows, columns])


def test_the_same_sums_whatever_the_threads(instructions):
    case = packed_case(30, 200, 1300, 1024, scales=torch.uint8)
    threads = torch.get_num_threads()
    for tokens in (1, 16):
        x = torch.randn(tokens, 1024, generator=torch.Generator().manual_seed(0))
        try:
            torch.set_num_threads(1)
            expected = OPS.lowra_linear(*case.linear_arguments(x))
            torch.set_num_threads(3)
            assert torch.equal(OPS.lowra_linear(*case.linear_arguments(x)), expected)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_x_that_has_no_finite_sum_is_multiplied_all_the_same(instructions, value):
    case = packed_case(0, 100, 100, 512)
    x = torch.zeros(2, 512)
    x[0, 100] = value
    out = OPS.lowra_linear(*case.linear_arguments(x))
    expected = x[0, 100].double() * reference.dequantize(case.packed, torch.float32)[:, 100].double()
    finite = expected.abs() < 3.4e38
    assert torch.equal(out[0].isfinite(), finite) and torch.equal(out[1], torch.zeros(200))
    torch.testing.assert_close(out[0][finite].double(), expected[finite], rtol=1e-5, atol=0)


def test_callers_in_several_threads():
    case = packed_case(30, 200, 300, 1024)
    x = torch.randn(5, 1024, generator=torch.Generator().manual_seed(0))
    expected, wrong = OPS.lowra_linear(*case.linear_arguments(x)), []

    def call():
        torch.set_num_threads(2)
        for _ in range(50):
            if not torch.equal(OPS.lowra_linear(*case.linear_arguments(x)), expected):
                wrong.append(threading.get_ident())

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def _product_in_a_fork_of_itself(case, x, queue):
    """The library's threads after a fork; PyTorch's own do not survive one, and none is started here."""
    torch.set_num_threads(1)
    packed, call = native.packed_of(case.packed), native._cpu.lowra_cpu_product
    out = torch.empty(5, 530)
    arguments = (packed, x.data_ptr(), 5, None, out.data_ptr(), 0, 2)
    first = call(*arguments)
    child = os.fork()
    if child == 0:
        out.zero_()
        os._exit(call(*arguments) or int(not out.any()))
    queue.put((first, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))


def test_a_forked_child_has_threads_of_its_own():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    case = packed_case(30, 200, 300, 1024)
    process = context.Process(target=_product_in_a_fork_of_itself, args=(case, torch.ones(5, 1024), queue))
    process.start()
    assert queue.get(timeout=120) == (0, 0)
    process.join()


def test_the_c_interface_refuses_what_it_cannot_multiply():
    case = packed_case(3, 5, 8, 200, scales=torch.uint8)
    struct, x, out = native.packed_of(case.packed), torch.ones(17, 200), torch.empty(17, 16)
    call, bad_shape, bad_type, null, misaligned, bad_order = native._cpu.lowra_cpu_product, 1, 2, 3, 7, 8
    at_x, at_out = x.data_ptr(), out.data_ptr()
    assert call(struct, at_x, 16, None, at_out, 0, 1) == call(struct, None, 0, None, None, 0, 1) == 0
    for tokens in (-1, 17, 2**63 - 1):
        assert call(struct, at_x, tokens, None, at_out, 0, 1) == bad_shape
    assert call(struct, at_x, 1, None, at_out, 3, 1) == bad_type
    assert call(None, at_x, 1, None, at_out, 0, 1) == null
    assert call(struct, None, 1, None, at_out, 0, 1) == call(struct, at_x, 1, None, None, 0, 1) == null
    assert call(struct, at_x + 1, 1, None, at_out, 0, 1) == call(struct, at_x, 1, at_x + 2, at_out, 0, 1) == misaligned
    group, out_of, no_bias = native._cpu.lowra_cpu_product_group, (ctypes.c_void_p * 1)(at_out), (ctypes.c_void_p * 1)()
    assert (
        group(struct, 0, at_x, 1, no_bias, out_of, 2, 1)
        == group(struct, 4, at_x, 1, no_bias, out_of, 2, 1)
        == bad_shape
    )
    assert group(None, 1, at_x, 1, no_bias, out_of, 2, 1) == group(struct, 1, at_x, 1, None, out_of, 2, 1) == null
    assert group(struct, 1, at_x, 5, no_bias, out_of, 2, 1) == native.UNSUPPORTED
    order = case.row_order.clone()
    order[3] = 16
    struct = libraries.Packed.from_buffer_copy(struct)
    struct.row_order = order.data_ptr()
    assert call(struct, at_x, 1, None, at_out, 0, 1) == bad_order


def test_instructions_that_are_not_there_are_refused():
    with pytest.raises(OSError, match="LOWRA_CPU=mmx names no kernels"):
        native_cpu.choose_instructions("mmx")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_exact_group_is_multiplied_as_it_is(dtype):
    case = packed_case(20, 40, 100, 512)
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = native_cpu.product(x, case.packed, None)
    for weights in ([(case.packed, None)], decoding.Group([(case.packed, None)], exact=True)):
        assert torch.equal(decoding.linear_group(x, weights)[0], plain)
    rounded = native_cpu.CpuGroup([(case.packed, None)])(x) if dtype == torch.bfloat16 else None
    found = decoding.linear_group(x, decoding.Group([(case.packed, None)]))
    assert torch.equal(found[0], plain if rounded is None else rounded[0])
