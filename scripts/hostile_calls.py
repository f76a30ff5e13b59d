"""Calls of the CPU library's C functions with hostile sizes, types and pointers, for `fuzz_ops.py`."""

import ctypes

from hostile_ops import EXTREMES, OpCases

# csrc/lowra.h
OK, BAD_SHAPE, BAD_TYPE, NULL_POINTER, MISALIGNED, BAD_ROW_ORDER = 0, 1, 2, 3, 7, 8


class Cases(OpCases):
    """The cases of one seed: calls of ops, and of the C functions below them."""

    def of_a_kind(self) -> str | None:
        return self.of_c() if self.random.random() < 0.3 else self.of_op()

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
        struct = self.libraries.Packed.from_buffer_copy(native.packed_of(packed))
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
        kind, worse = self.type_or_worse(native.TYPES[dtype])
        wanted |= more | worse
        threads = self.random.choice([1, 2, 16, 0, -1, 2**31 - 1])
        part = self.libraries.Part(0, packed.rows, 0, packed.in_features)
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
        struct = self.libraries.Packed.from_buffer_copy(native.packed_of(packed))
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
        kind, worse = self.type_or_worse(native.TYPES[dtype])
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
        kind, worse = self.type_or_worse(native.TYPES[case.weight.dtype])
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
        struct = self.libraries.Lloyd(levels.data_ptr(), cuts.data_ptr(), *case.weight.shape, case.group_size, 3, 1)
        shape = self.sizes_or_worse(struct, ["rows", "in_features", "group_size"])
        if shape == -1:
            return None
        wanted = {shape} - {OK}
        if self.random.random() < 0.1:
            struct.iterations = self.random.choice([-1, -(2**31)])
            wanted.add(BAD_SHAPE)
        kind, worse = self.type_or_worse(native.TYPES[case.weight.dtype])
        found = [torch.full((len(case.weight), width), torch.nan) for width in (22, 19, 3)]
        pointers, more = self.pointers_or_worse(
            (case.weight.data_ptr(), case.weight.element_size()), *((tensor.data_ptr(), 4) for tensor in found)
        )
        wanted |= more | worse
        status = native._cpu.lowra_cpu_lloyd_max(ctypes.byref(struct), pointers[0], kind, *pointers[1:], 2)
        return self.judged("lloyd_max", status, wanted, lambda: all(not t.isnan().any() for t in found))
