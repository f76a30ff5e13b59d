"""Random and hostile arguments to the ops and to the C functions of the CPU library, with every access watched.

    python scripts/fuzz_ops.py --seconds 180 --seed 0     # make fuzz-ops
    python scripts/fuzz_ops.py --seed 0 --only 4711        # one case again, with its whole report
    python scripts/fuzz_ops.py --installed --cases 300     # refusals and numbers alone: seconds, no compiler

The library is built with AddressSanitizer and UndefinedBehaviorSanitizer (g++) and takes the place of the installed one
in a process of its own, which is started anew behind a case that ends it. A case is a valid call of a random shape in
which up to three arguments are made hostile: other types, sizes, strides, devices, memory that is too short or
misaligned, row orders that leave the weight, numbers at the ends of their range. Whatever comes, a call either raises
RuntimeError, ValueError or TypeError, or returns what the PyTorch reference makes of the same values. Everything else
is listed with the case's number, and the exit status is 1.

Not tried: C functions with memory shorter than their sizes say, which they cannot see; CUDA (`make memcheck`).
"""

import argparse
import ctypes
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = dict.fromkeys(["codec", "dispatch", "lloyd", "pool", "product", "rows_generic", "rows_neon"], [])
SOURCES["rows_avx2"] = ["-mavx2", "-mfma", "-mf16c"]
SOURCES["rows_avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
SOURCES["rows_avx512"] += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
REFUSALS = (RuntimeError, ValueError, TypeError)
EXTREMES = [-(2**63), -(2**62), -(2**31), -1, 0, 1, 3, 7, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1]
# csrc/lowra.h
OK, BAD_SHAPE, BAD_TYPE, NULL_POINTER, MISALIGNED, BAD_ROW_ORDER = 0, 1, 2, 3, 7, 8


def build(folder: pathlib.Path) -> pathlib.Path:
    """The CPU library under both sanitizers."""
    flags = ["-O1", "-g", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    objects = []
    for name, wide in SOURCES.items():
        objects.append(str(folder / f"{name}.o"))
        source = ROOT / "csrc" / "cpu" / f"{name}.cpp"
        subprocess.run(["g++", *flags, *wide, "-c", str(source), "-o", objects[-1]], check=True)
    library = folder / "libwatched.so"
    subprocess.run(["g++", *flags, "-shared", "-o", str(library), *objects, "-lpthread"], check=True)
    return library


def watched_environment() -> dict[str, str]:
    # the runtime of C++ too: PyTorch throws before the library that the sanitizer watches brings it
    names = ("libasan.so", "libstdc++.so.6")
    found = [
        subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True, check=True) for n in names
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(one.stdout.strip() for one in found),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "2",
    }


class Cases:
    """The cases of one seed, each a function of its number alone."""

    def __init__(self, seed: int):
        import torch

        sys.path.insert(0, str(ROOT / "tests" / "kernels"))
        import cases

        import bitsandbytes  # noqa: F401 - registers the ops
        from bitsandbytes.backends.lowra import layout, lloyd, native, reference, table_gradients

        self.seed, self.torch, self.native, self.packed_case = seed, torch, native, cases.packed_case
        self.reference, self.lloyd, self.table_gradients = reference, lloyd, table_gradients
        self.ops, self.matrix = torch.ops.bitsandbytes, layout.PackedMatrix
        types = (torch.float32, torch.float16, torch.bfloat16)
        self.floats = types
        self.types = [*types, torch.float64, torch.int32, torch.int64, torch.uint8, torch.int8, torch.bool]
        self.types += [torch.complex64, torch.float8_e4m3fn]

    def run(self, number: int) -> str | None:
        """What is wrong with a case; None if nothing."""
        self.random = random.Random(self.seed * 1_000_003 + number)
        self.torch.manual_seed(number)
        # the sanitizers cannot tell a stale cache from a fresh one, so both are tried
        if self.random.random() < 0.3:
            sys.modules["bitsandbytes.backends.lowra.checks"]._checked.clear()
        return self.of_c() if self.random.random() < 0.3 else self.of_op()

    # Ops.

    def of_op(self) -> str | None:
        case = self.valid_case()
        name = self.random.choice(
            ["dequantize", "dequantize_part", "linear", "quantize", "table_gradients", "encode_scales", "lloyd_max"]
        )
        arguments = self.arguments_of(name, case)
        count = min(len(arguments), self.random.choice([0, 1, 1, 1, 2, 3]))
        for place in self.random.sample(range(len(arguments)), count):
            arguments[place] = self.hostile(arguments[place])
        try:
            found = getattr(self.ops, f"lowra_{name}")(*arguments)
        except REFUSALS as error:
            return None if str(error) else f"{name}: {type(error).__name__} without a word"
        except Exception as error:
            return f"{name} {self.described(arguments)}: {type(error).__name__}: {error}"
        return self.compared(name, arguments, found)

    def valid_case(self):
        pick = self.random.choice
        rows = [pick([0, 0, 1, 2, 3, 5, 9]) for _ in range(3)]
        rows[pick([0, 1, 2])] += 1
        columns = pick([1, 7, 8, 31, 64, 65, 100, 200, 257, 513, 1000])
        return self.packed_case(
            *rows,
            columns,
            pick([8, 16, 24, 64, 64, 128, 256]),
            scales=pick([self.torch.float32, self.torch.float16, self.torch.uint8]),
            dtype=pick(self.floats),
            seed=self.random.randrange(1000),
        )

    def arguments_of(self, name: str, case) -> list:
        torch, pick, packed = self.torch, self.random.choice, case.packed
        sizes = packed.rows_4bit, packed.rows_2bit, packed.group_size
        if name == "dequantize":
            return [*packed, pick(self.floats)]
        if name == "dequantize_part":
            first = pick([0, 0, 256]) if packed.in_features > 256 else 0
            return [*packed, 0, packed.rows, first, packed.in_features - first, pick(self.floats)]
        if name == "linear":
            dtype = pick(self.floats)
            x = torch.randn(*pick([(), (1,), (3,), (2, 2), (0,), (70,)]), packed.in_features).to(dtype)
            return [x, *packed.tensors, pick([None, torch.randn(packed.rows).to(dtype)]), *sizes]
        if name == "quantize":
            return [case.weight, case.row_order, case.thresholds, *sizes]
        if name == "table_gradients":
            return [torch.randn(case.weight.shape).to(pick(self.floats)), *packed.tensors, *sizes, pick([True, False])]
        if name == "encode_scales":
            return [case.weight.float().abs()]
        tables = [torch.linspace(-1, 1, count) * pick([0.6, 0.9, 1.0]) for count in (16, 4, 2)]
        levels, cuts = torch.cat(tables), torch.cat([(table[:-1] + table[1:]) / 2 for table in tables])
        return [case.weight, levels, cuts, None, packed.group_size, pick([0, 1, 5]), pick([True, False])]

    def hostile(self, value):
        torch, pick = self.torch, self.random.choice
        if isinstance(value, torch.Tensor):
            return self.hostile_tensor(value)
        if value is None:
            return pick([None, torch.ones(1), torch.ones(5), torch.ones(64)])
        if isinstance(value, bool):
            return not value
        if isinstance(value, torch.dtype):
            return pick([*self.types, None, 7])
        return pick([*EXTREMES, value + 1, value - 1, -value, 2 * value, None, 2.5])

    def hostile_tensor(self, tensor):
        torch, pick = self.torch, self.random.choice
        kinds = {
            "none": lambda: None,
            "type": lambda: tensor.to(pick(self.types)),
            "spread": lambda: torch.stack([tensor, tensor], dim=-1)[..., 0],
            "turned": lambda: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor.flip(0),
            "expanded": lambda: tensor[:1].expand(tensor.shape),
            "one number": lambda: tensor.reshape(-1)[:1].reshape([]).expand(tensor.shape),
            "overlapping": lambda: torch.as_strided(tensor, tensor.shape, [0] * tensor.dim()),
            "huge": lambda: tensor.reshape(-1)[:1].expand(2**40),
            "shorter": lambda: tensor[:-1],
            "longer": lambda: torch.cat([tensor, tensor[:1]]),
            "flat": lambda: tensor.reshape(-1),
            "folded": lambda: tensor[None],
            "number": lambda: tensor.reshape(-1)[0],
            "empty": lambda: tensor[:0],
            "misaligned": lambda: self.misaligned(tensor, pick([1, 2, 3, 4, 8])),
            "short storage": lambda: self.short_storage(tensor.clone(), pick([0, 1, 3])),
            "short and spread": lambda: self.short_storage(
                torch.stack([tensor, tensor], dim=-1)[..., 0], pick([0, 1, tensor.numel(), 2 * tensor.numel() - 2])
            ),
            "noise": lambda: self.noise(tensor),
            "meta": lambda: tensor.to("meta"),
            "sparse": lambda: tensor.to_sparse(),
            "wants a gradient": lambda: tensor.detach().clone().requires_grad_(),
            "inference": lambda: self.inference(tensor),
        }
        if tensor.dtype == torch.int32:
            kinds |= {f"order {i}": lambda: self.bad_order(tensor) for i in range(20)}
        if not tensor.numel():
            return None
        try:
            return kinds[pick(list(kinds))]()
        except (*REFUSALS, IndexError):
            return None  # torch itself cannot make it of this one

    def misaligned(self, tensor, offset: int):
        data = bytearray(tensor.numel() * tensor.element_size() + offset)
        moved = self.torch.frombuffer(data, dtype=tensor.dtype, offset=offset).view(tensor.shape)
        return moved.copy_(tensor)

    def short_storage(self, tensor, left: int):
        tensor.untyped_storage().resize_(left * tensor.element_size())
        return tensor

    def noise(self, tensor):
        data = bytearray(self.random.randbytes(tensor.numel() * tensor.element_size()))
        return self.torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape).clone()

    def inference(self, tensor):
        with self.torch.inference_mode():
            return tensor.clone()

    def bad_order(self, order):
        pick, bad = self.random.choice, order.clone()
        place = self.random.randrange(len(bad))
        bad[place] = pick([-1, len(bad), 2**31 - 1, -(2**31), int(bad[place - 1]), len(bad) + 5])
        return pick([bad, order[self.torch.randperm(len(order))]])

    def compared(self, name: str, arguments: list, found) -> str | None:
        """What a call returned against the reference of the same values, laid out anew."""
        torch = self.torch
        found = found if isinstance(found, tuple) else (found,)
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        if all(tensor.is_meta for tensor in tensors):
            return None  # nothing was computed
        if any(tensor.is_meta or tensor.layout != torch.strided for tensor in tensors):
            return f"{name} {self.described(arguments)}: returned something"
        plain = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        expected = getattr(self, f"{name}_of")(*plain)
        for one, other in zip(found, expected, strict=True):
            if one.shape != other.shape or one.dtype != other.dtype:
                return f"{name} {self.described(arguments)}: {one.dtype} {list(one.shape)} for {list(other.shape)}"
        judge = getattr(self, f"{name}_agrees", None)
        if judge is not None:
            agrees = judge(plain, found, expected)
        else:
            agrees = all(self.same(one, other) for one, other in zip(found, expected, strict=True))
        return None if agrees else f"{name} {self.described(arguments)}: other numbers than the reference"

    def same(self, one, other) -> bool:
        return bool(((one == other) | (one.isnan() & other.isnan())).all())

    def dequantize_of(self, *arguments):
        *packed, dtype = arguments
        return (self.reference.dequantize(self.matrix(*packed), dtype),)

    def dequantize_part_of(self, *arguments):
        *packed, first, rows, column, columns, dtype = arguments
        whole = self.reference.dequantize(self.matrix(*packed), dtype)
        return (whole[first : first + rows, column : column + columns],)

    def quantize_of(self, *arguments):
        return self.reference.quantize(*arguments)

    def table_gradients_of(self, gradient, *arguments):
        *packed, rows_4bit, rows_2bit, group_size, with_scales = arguments
        packed = self.matrix(*packed, rows_4bit, rows_2bit, gradient.shape[1], group_size)
        return self.table_gradients.table_gradients(gradient, packed, with_scales)

    def encode_scales_of(self, absmax):
        return self.reference.encode_scales(absmax)

    def encode_scales_agrees(self, plain, found, expected) -> bool:
        """Steps and all bytes but those of numbers that are no magnitudes: what no byte stands for, each machine casts
        in its own way."""
        (absmax,), (codes, steps) = plain, found
        step = expected[1].repeat_interleave(256)[: absmax.numel()].view(absmax.shape)
        ratio = (absmax / step).where(step > 0, self.torch.zeros_like(absmax))  # a step that is NaN: a byte of 0
        return self.same(steps, expected[1]) and self.same(codes[ratio >= 0], expected[0][ratio >= 0])

    def linear_of(self, x, *arguments):
        *packed, bias, rows_4bit, rows_2bit, group_size = arguments
        packed = self.matrix(*packed, rows_4bit, rows_2bit, x.shape[-1], group_size)
        weight = self.reference.dequantize(packed, self.torch.float32).double()
        out = self.torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
        self.magnitude = x.double().abs() @ weight.abs().t() + (0 if bias is None else bias.double().abs())
        self.exact = out
        return (out.to(x.dtype),)

    def linear_agrees(self, plain, found, expected) -> bool:
        """Within what float32 sums in any order may be off, weights rounded to the type or not, and a rounding of the
        result, two beside a bias."""
        out, info = found[0], self.torch.finfo(plain[0].dtype)
        room = self.magnitude * ((plain[0].shape[-1] + 2) * 2**-23 + info.eps / 2 * (info.bits < 32))
        room += 2 * info.eps * self.exact.abs() + info.tiny * plain[0].shape[-1]
        off = (out.double() - self.exact).abs()
        lost = self.exact.isnan()  # a factor that was none, or infinite beside a 0
        large = ~(self.magnitude < info.max / 2)  # a sum in another order may end beyond the type
        return bool((lost & ~out.isfinite() | ~lost & (large | (off <= room))).all())

    def lloyd_max_of(self, weight, levels, cuts, _, *options):
        return self.lloyd.lloyd_max(weight, levels, cuts, *options)

    def lloyd_max_agrees(self, plain, found, expected) -> bool:
        """Errors are those of the codebooks beside them, and no larger than the reference's; sums of two orders may
        stop at another step. Asked where the search is defined: finite weights, a start with each level in its cell."""
        torch, (weight, levels, cuts, _, group_size, *_) = self.torch, plain
        starts = [(levels[self.lloyd.LEVELS[p]], cuts[self.lloyd.THRESHOLDS[p]]) for p in (4, 2, 1)]
        in_cells = all(((table[:-1] <= cut) & (cut <= table[1:])).all() for table, cut in starts)
        if not (weight.isfinite().all() and levels.isfinite().all() and in_cells):
            return True
        groups = -(-weight.shape[1] // group_size)
        padded = torch.nn.functional.pad(weight.double(), (0, groups * group_size - weight.shape[1]))
        absmax = padded.view(-1, groups, group_size).abs().amax(2).repeat_interleave(group_size, 1)
        absmax = absmax[:, : weight.shape[1]]
        normal = (weight.float() / absmax.float()).where(absmax > 0, torch.zeros(weight.shape))
        for place, precision in enumerate((4, 2, 1)):
            own = found[0][:, self.lloyd.LEVELS[precision]].double()
            code = torch.searchsorted(found[1][:, self.lloyd.THRESHOLDS[precision]].contiguous(), normal)
            spread = own.abs().amax(1).clamp(min=1).square() * absmax.square().sum(1)
            if not (spread < 1e37).all():
                continue  # beyond float32
            true = (weight.double() - absmax * own.gather(1, code)).square().sum(1)
            room = 1e-6 * spread + 1e-37
            error, other = found[2][:, place].double(), expected[2][:, place].double()
            if not ((error - true).abs() <= room).all() or not (error <= 1.001 * other + room).all():
                return False
        return True

    def described(self, arguments: list) -> str:
        def one(value):
            if isinstance(value, self.torch.Tensor):
                return (
                    f"{str(value.dtype)[6:]}{list(value.shape)}/{value.stride() if not value.is_sparse else 'sparse'}"
                )
            return str(value)

        return f"({', '.join(map(one, arguments))})"

    # C functions.

    def of_c(self) -> str | None:
        function = self.random.choice([self.c_dequantize, self.c_product, self.c_quantize, self.c_lloyd_max])
        return function(self.valid_case())

    def sizes_or_worse(self, struct, names: list[str]) -> int:
        """Makes sizes hostile, sometimes; the status that must follow. Valid sizes beyond the memory are not tried."""
        if self.random.random() < 0.6:
            return OK
        for name in self.random.sample(names, self.random.choice([1, 1, 2, 3])):
            setattr(struct, name, self.random.choice([n for n in EXTREMES if -(2**63) <= n < 2**63]))
        rows = sum(getattr(struct, n) for n in names if n.startswith("rows"))
        columns, group = struct.in_features, struct.group_size
        fits = all(0 <= getattr(struct, n) < 2**31 for n in names if n.startswith("rows")) and rows < 2**31
        fits = fits and 0 < columns and columns * max(rows, 1) < 2**55 and group in range(8, 257, 8)
        if fits:  # as they were
            return -1
        return BAD_SHAPE

    def pointer_or_worse(self, pointer: int, size: int) -> tuple[int | None, int]:
        chance = self.random.random()
        if chance < 0.04:
            return None, NULL_POINTER
        return (pointer + self.random.randrange(1, size), MISALIGNED) if chance < 0.08 and size > 1 else (pointer, OK)

    def pointers_or_worse(self, *pointers_and_sizes: tuple[int, int]) -> tuple[list[ctypes.c_void_p], set[int]]:
        made = [self.pointer_or_worse(*one) for one in pointers_and_sizes]
        return [ctypes.c_void_p(pointer) for pointer, _ in made], {status for _, status in made} - {OK}

    def order_or_worse(self, order) -> tuple[object, set[int]]:
        if self.random.random() < 0.85:
            return order, set()
        bad = self.bad_order(order)
        return bad, set() if sorted(bad.tolist()) == list(range(len(bad))) else {BAD_ROW_ORDER}

    def judged(self, name: str, status: int, wanted: set[int], same) -> str | None:
        if not wanted:
            return (
                None if status == OK and same() else f"C {name}: status {status}, or other numbers than the reference"
            )
        return None if status in wanted else f"C {name}: status {status}, not one of {wanted}"

    def type_or_worse(self, kind: int) -> tuple[int, set[int]]:
        if self.random.random() < 0.9:
            return kind, set()
        return self.random.choice([-1, 3, 4, 2**31 - 1, -(2**31)]), {BAD_TYPE}

    def c_dequantize(self, case) -> str | None:
        torch, native = self.torch, self.native
        dtype = self.random.choice(self.floats)
        order, wanted = self.order_or_worse(case.row_order)
        packed = case.packed._replace(row_order=order)
        struct = native._Packed.from_buffer_copy(native.packed_of(packed))
        shape = self.sizes_or_worse(struct.shape, ["rows4", "rows2", "rows1", "in_features", "group_size"])
        if shape == -1:
            return None
        wanted |= {shape} - {OK}
        out = torch.empty(packed.rows, packed.in_features, dtype=dtype)
        for name, size in (("codes", 1), ("row_order", 4), ("levels", 2), ("scales", packed.scales.element_size())):
            pointer, status = self.pointer_or_worse(getattr(struct, name), size)
            setattr(struct, name, pointer)
            wanted |= {status} - {OK}
        (address,), more = self.pointers_or_worse((out.data_ptr(), out.element_size()))
        kind, worse = self.type_or_worse(native._TYPES[dtype])
        wanted |= more | worse
        threads = self.random.choice([1, 2, 16, 0, -1, 2**31 - 1])
        part = native._Part(0, packed.rows, 0, packed.in_features)
        if self.random.random() < 0.1:
            name, value = self.random.choice(
                [(n, v) for n, _ in part._fields_ for v in (-1, -(2**63), 2**62, 2**63 - 1)]
            )
            setattr(part, name, value)
            wanted.add(BAD_SHAPE)
        status = native._cpu.lowra_cpu_dequantize(ctypes.byref(struct), ctypes.byref(part), address, kind, threads)
        return self.judged(
            "dequantize", status, wanted, lambda: torch.equal(out, self.reference.dequantize(packed, dtype))
        )

    def c_product(self, case) -> str | None:
        torch, native = self.torch, self.native
        dtype, tokens = self.random.choice(self.floats), self.random.choice([0, 1, 2, 3, 7, 16])
        order, wanted = self.order_or_worse(case.row_order)
        packed = case.packed._replace(row_order=order)
        struct = native._Packed.from_buffer_copy(native.packed_of(packed))
        shape = self.sizes_or_worse(struct.shape, ["rows4", "rows2", "rows1", "in_features", "group_size"])
        if shape == -1 or tokens == 0 and wanted:
            return None  # nothing to compute: what else is wrong is nobody's business
        wanted |= {shape} - {OK}
        x, out = torch.randn(tokens, packed.in_features).to(dtype), torch.empty(tokens, packed.rows, dtype=dtype)
        bias = self.random.choice([None, torch.randn(packed.rows).to(dtype)])
        count = self.random.choice([-1, 17, 2**62, -(2**63)]) if self.random.random() < 0.1 else tokens
        wanted |= {BAD_SHAPE} if count != tokens else set()
        size = x.element_size()
        given = (x.data_ptr(), size), (out.data_ptr(), size), (0 if bias is None else bias.data_ptr(), size)
        (of_x, of_out, of_bias), more = self.pointers_or_worse(*given) if tokens else ([None] * 3, set())
        more -= {NULL_POINTER} if of_x and of_out and not of_bias else set()
        kind, worse = self.type_or_worse(native._TYPES[dtype])
        wanted |= more | worse
        threads = self.random.choice([1, 2, 16, 0, -1, 2**31 - 1])
        status = native._cpu.lowra_cpu_product(ctypes.byref(struct), of_x, count, of_bias, of_out, kind, threads)
        used = bias if of_bias else None

        def same():
            sizes = packed.rows_4bit, packed.rows_2bit, packed.group_size
            plain = [x, *packed.tensors, used, *sizes]
            return self.linear_agrees(plain, (out,), self.linear_of(*plain))

        return self.judged("product", status, wanted, same)

    def c_quantize(self, case) -> str | None:
        torch, native = self.torch, self.native
        order, wanted = self.order_or_worse(case.row_order)
        arguments = case.weight, order, case.thresholds, case.rows_4bit, case.rows_2bit, case.group_size
        struct = native.shape_of(
            len(case.weight), case.rows_4bit, case.rows_2bit, case.weight.shape[1], case.group_size
        )
        shape = self.sizes_or_worse(struct, ["rows4", "rows2", "rows1", "in_features", "group_size"])
        if shape == -1:
            return None
        codes, absmax = torch.empty_like(case.codes), torch.empty(case.scales.shape)
        kind, worse = self.type_or_worse(native._TYPES[case.weight.dtype])
        pointers, more = self.pointers_or_worse(
            (case.weight.data_ptr(), case.weight.element_size()),
            (order.data_ptr(), 4),
            (case.thresholds.data_ptr(), 4),
            (codes.data_ptr(), 1),
            (absmax.data_ptr(), 4),
        )
        wanted |= more | worse | ({shape} - {OK})
        status = native._cpu.lowra_cpu_quantize(ctypes.byref(struct), pointers[0], kind, *pointers[1:], 2)

        def same():
            expected = self.reference.quantize(*arguments)
            return torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])

        return self.judged("quantize", status, wanted, same)

    def c_lloyd_max(self, case) -> str | None:
        torch, native = self.torch, self.native
        levels, cuts = torch.linspace(-1, 1, 22), torch.linspace(-1, 1, 19)
        struct = native._Lloyd(levels.data_ptr(), cuts.data_ptr(), *case.weight.shape, case.group_size, 3, 1)
        shape = self.sizes_or_worse(struct, ["rows", "in_features", "group_size"])
        if shape == -1:
            return None
        wanted = {shape} - {OK}
        if self.random.random() < 0.1:
            struct.iterations = self.random.choice([-1, -(2**31)])
            wanted.add(BAD_SHAPE)
        kind, worse = self.type_or_worse(native._TYPES[case.weight.dtype])
        found = [torch.full((len(case.weight), width), torch.nan) for width in (22, 19, 3)]
        pointers, more = self.pointers_or_worse(
            (case.weight.data_ptr(), case.weight.element_size()), *((tensor.data_ptr(), 4) for tensor in found)
        )
        wanted |= more | worse
        status = native._cpu.lowra_cpu_lloyd_max(ctypes.byref(struct), pointers[0], kind, *pointers[1:], 2)
        return self.judged("lloyd_max", status, wanted, lambda: all(not t.isnan().any() for t in found))


def work(options: argparse.Namespace) -> None:
    """In the watched process: cases from `options.first` on, each announced before it runs."""
    cases = Cases(options.seed)
    if options.library:
        cases.native._cpu = cases.native._load(pathlib.Path(options.library), "cpu")
    if not cases.native.cpu_available():
        sys.exit("The CPU library could not be loaded.")
    number, end = options.first, time.monotonic() + options.seconds
    while time.monotonic() < end and number - options.first < options.cases:
        print(f"case {number}", flush=True)
        wrong = cases.run(number)
        if wrong:
            print(f"wrong {number} {wrong}", flush=True)
        if options.only is not None:
            return
        number += 1


def watch(options: argparse.Namespace, library: pathlib.Path) -> int:
    """Starts the worker, again behind every case that ends it; the number of cases that went wrong."""
    options.first = options.first if options.only is None else options.only
    first, end, bad = options.first, time.monotonic() + options.seconds, []
    while time.monotonic() < end and first - options.first < options.cases:
        command = [sys.executable, __file__, "--library", str(library), "--seed", str(options.seed)]
        command += ["--first", str(first), "--seconds", str(max(1, int(end - time.monotonic())))]
        command += ["--cases", str(options.cases - first + options.first)]
        if options.only is not None:
            command += ["--only", str(options.only)]
        done = subprocess.run(command, env=watched_environment(), capture_output=True, text=True, cwd=ROOT)
        lines = done.stdout.splitlines()
        bad += [line.removeprefix("wrong ") for line in lines if line.startswith("wrong ")]
        announced = [int(line.split()[1]) for line in lines if line.startswith("case ")]
        if not announced:
            sys.exit(f"The watched process did not start:\n{done.stderr[-4000:]}")
        first = announced[-1] + 1
        if done.returncode != 0:
            report = [
                line
                for line in done.stderr.splitlines()
                if "ERROR" in line or "runtime error" in line or " in lowra" in line
            ]
            bad.append(f"{announced[-1]} ended the process ({done.returncode}): {' | '.join(report[:3])}")
            if options.only is not None:
                print(done.stderr)
        if options.only is not None:
            break
    for line in bad:
        print(line)
    print(f"{first} cases of seed {options.seed}, {len(bad)} of them wrong")
    return len(bad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--first", type=int, default=0, help="the case to begin with")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="how many at most")
    parser.add_argument("--installed", action="store_true", help="try the installed library, which nothing watches")
    parser.add_argument("--library", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.installed:
        # what the sanitizer's allocator refuses; a copy of an expanded tensor could fill the machine otherwise
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    if options.library or options.installed:
        return work(options)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(1 if watch(options, build(pathlib.Path(folder))) else 0)


if __name__ == "__main__":
    main()
