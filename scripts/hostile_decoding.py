"""Calls of the C functions of a decoding step on the processor with hostile arguments, for `fuzz_ops.py`."""

import ctypes

from hostile_calls import BAD_SHAPE, OK, Cases
from hostile_ops import EXTREMES

UNSUPPORTED = 5  # csrc/lowra.h
_HOSTILE = [number for number in EXTREMES if -(2**31) <= number < 2**31]


class DecodingCases(Cases):
    """The cases of one seed: those of `Cases`, and of what else a token of a model goes through."""

    def __init__(self, seed: int):
        super().__init__(seed)
        from bitsandbytes.backends.lowra import decoding, native_decoding

        self.decoding, self.structs = decoding, native_decoding

    def of_a_kind(self) -> str | None:
        if self.random.random() < 0.8:
            return super().of_a_kind()
        return self.random.choice([self.c_group, self.c_dense_product, self.c_add_norm, self.c_attention])()

    def by_reference(self, call):
        """What a function of `decoding` gives without the library."""
        library, self.native._cpu = self.native._cpu, None
        try:
            return call()
        finally:
            self.native._cpu = library

    def near(self, found, expected, dtype) -> bool:
        room = 8 * self.torch.finfo(dtype).eps * float(expected.abs().max()) + 1e-5
        return bool(((found.double() - expected.double()).abs() <= room).all())

    def fields_or_worse(self, struct, sizes: dict[str, list[int]]) -> set[int]:
        """Makes one size hostile, sometimes: one of those that are none."""
        if self.random.random() < 0.7:
            return set()
        name = self.random.choice(list(sizes))
        setattr(struct, name, self.random.choice(sizes[name]))
        return {BAD_SHAPE}

    def addresses_or_worse(self, struct, sizes: dict[str, int]) -> set[int]:
        wanted = set()
        for name, size in sizes.items():
            pointer, status = self.pointer_or_worse(getattr(struct, name), size)
            setattr(struct, name, pointer)
            wanted |= {status} - {OK}
        return wanted

    def c_group(self) -> str | None:
        torch, native, case = self.torch, self.native, self.valid_case()
        count, tokens = self.random.choice([1, 2, 3]), self.random.choice([0, 1, 2, 4])
        dtype, order, wanted = self.random.choice(self.floats), *self.order_or_worse(case.row_order)
        packed = case.packed._replace(row_order=order)
        structs = (self.libraries.Packed * count)(*[native.packed_of(packed)] * count)
        worse = structs[self.random.randrange(count)]
        shape = self.sizes_or_worse(worse.shape, ["rows4", "rows2", "rows1", "in_features", "group_size"])
        if shape == -1 or tokens == 0 and wanted:
            return None  # see `c_product`
        wanted |= {shape} - {OK}
        x = torch.randn(tokens, packed.in_features).to(dtype)
        outs = [torch.empty(tokens, packed.rows, dtype=dtype) for _ in range(count)]
        addresses = ctypes.c_void_p * count
        to, biases = addresses(*(out.data_ptr() for out in outs)), addresses(*[None] * count)
        (of_x,), more = self.pointers_or_worse((x.data_ptr(), x.element_size())) if tokens else ([None], set())
        kind, other = self.type_or_worse(native.TYPES[dtype])
        wanted |= more | other
        given = self.random.choice([0, 4, -1, 2**31 - 1]) if self.random.random() < 0.1 else count
        wanted |= {BAD_SHAPE} if given != count else set()
        status = native._cpu.lowra_cpu_product_group(structs, given, of_x, tokens, biases, to, kind, 2)
        if status == UNSUPPORTED:  # a group size or a processor without such kernels, which are looked at after sizes
            return None if BAD_SHAPE not in wanted else f"C product_group: unsupported, not one of {wanted}"
        expected = self.reference.linear_in_integers(x, packed) if tokens and not wanted else None
        return self.judged("product_group", status, wanted, lambda: all(self._are(out, expected) for out in outs))

    def _are(self, out, expected) -> bool:
        """Near what integers give: one quotient may be rounded the other way, which is 1 in 127 of a part's largest."""
        return expected is None or bool(
            (out.double() - expected).abs().max() <= 0.02 * expected.abs().max() + 0.02 or not expected.numel()
        )

    def c_dense_product(self) -> str | None:
        torch, pick = self.torch, self.random.choice
        dtype, rows, columns, tokens = pick(self.floats), pick([0, 1, 3, 130]), pick([1, 7, 64, 1000]), pick([0, 1, 3])
        x, weight = torch.randn(tokens, columns).to(dtype), torch.randn(rows, columns).to(dtype)
        out, size = torch.empty(tokens, rows, dtype=dtype), x.element_size()
        kind, wanted = self.type_or_worse(self.native.TYPES[dtype])
        pointers, more = self.pointers_or_worse((weight.data_ptr(), size), (x.data_ptr(), size), (out.data_ptr(), size))
        wanted |= more if rows and tokens else set()
        sizes = [rows, columns, tokens]
        if self.random.random() < 0.2:
            place = self.random.randrange(3)
            sizes[place] = pick([[-1, -(2**63)], [0, -1, 2**62], [-1, 17, 2**62]][place])
            wanted.add(BAD_SHAPE)
        status = self.native._cpu.lowra_cpu_dense_product(
            pointers[0], *sizes[:2], pointers[1], sizes[2], pointers[2], kind, 2
        )
        expected = (x.double() @ weight.double().T).to(dtype)
        return self.judged("dense_product", status, wanted, lambda: not out.numel() or self.near(out, expected, dtype))

    def c_add_norm(self) -> str | None:
        torch, pick, decoding = self.torch, self.random.choice, self.decoding
        dtype, tokens, features = pick(self.floats), pick([1, 2, 5]), pick([1, 7, 64, 200])
        residual, delta = torch.randn(tokens, features).to(dtype), torch.randn(tokens, features).to(dtype)
        weight, out = torch.randn(features).to(dtype), torch.empty(tokens, features, dtype=dtype)
        norm, of_delta = decoding.Norm(weight, 1e-5, pick([True, False])), pick([True, False])
        same = residual.clone()
        struct = self.structs._Norm(
            residual.data_ptr(), delta.data_ptr(), weight.data_ptr() if of_delta else None, weight.data_ptr(),
            out.data_ptr(), tokens, features, norm.epsilon, norm.one_plus,
        )  # fmt: skip
        size = residual.element_size()
        wanted = self.addresses_or_worse(struct, dict.fromkeys(("residual", "weight", "out"), size))
        wanted |= self.fields_or_worse(struct, {"tokens": [-1, -(2**63), 2**62], "features": [0, -1, -(2**63)]})
        kind, other = self.type_or_worse(self.native.TYPES[dtype])
        wanted |= other
        status = self.native._cpu.lowra_cpu_add_norm(ctypes.byref(struct), kind)
        expected = self.by_reference(lambda: decoding.add_norm(same, delta, norm, norm if of_delta else None))
        return self.judged("add_norm", status, wanted, lambda: self.near(out, expected, dtype))

    def c_attention(self) -> str | None:
        torch, pick, decoding = self.torch, self.random.choice, self.decoding
        dtype, batch, kv_heads, slots = pick(self.floats), pick([1, 2, 3]), pick([1, 2]), pick([1, 5, 40])
        heads, dim = kv_heads * pick([1, 2, 3]), pick([2, 16, 34])

        def some(*shape):
            return torch.randn(*shape).to(dtype)

        attention = decoding.Attention(
            heads, kv_heads, dim, dim**-0.5, some(slots, dim), some(slots, dim), window=pick([0, 1, 3]),
            softcap=pick([0.0, 5.0]),
        )  # fmt: skip
        query, key, value = some(batch, heads * dim), some(batch, kv_heads * dim), some(batch, kv_heads * dim)
        keys, values = some(batch, kv_heads, slots, dim), some(batch, kv_heads, slots, dim)
        slot = torch.tensor([self.random.randrange(slots)], dtype=torch.int32)
        first = torch.tensor([self.random.randint(0, int(slot)) for _ in range(batch)], dtype=torch.int32)
        none = torch.empty(0)
        cache = decoding.Cache(keys.clone(), values.clone(), slot, first, none, none)
        out, size = torch.empty_like(query), query.element_size()
        struct = self.structs._Attention(
            query.data_ptr(), key.data_ptr(), value.data_ptr(), keys.data_ptr(), values.data_ptr(),
            attention.cosine.data_ptr(), attention.sine.data_ptr(), None, None, slot.data_ptr(), first.data_ptr(),
            None, None, out.data_ptr(), batch, heads, kv_heads, dim, dim, slots, attention.window, False,
            attention.scaling, attention.softcap, 0.0,
        )  # fmt: skip
        names = ("query", "key", "value", "keys", "values", "cosine", "sine", "out")
        wanted = self.addresses_or_worse(struct, dict.fromkeys(names, size) | {"slot": 4, "first": 4})
        negative = [number for number in _HOSTILE if number < 0]
        fields = dict.fromkeys(("heads", "kv_heads", "dim", "slots"), [0, *negative])
        wanted |= self.fields_or_worse(struct, fields | {"batch": negative, "window": negative, "rotary_dim": [1, -2]})
        if not wanted and self.random.random() < 0.1:
            wrong, what = pick([(slot, slots), (slot, -1), (first, int(slot) + 1), (first, -1)])
            wrong[-1] = what
            wanted.add(BAD_SHAPE)
        kind, other = self.type_or_worse(self.native.TYPES[dtype])
        wanted |= other
        status = self.native._cpu.lowra_cpu_attention(ctypes.byref(struct), kind, 2)
        if wanted:
            return self.judged("attention", status, wanted, lambda: True)
        expected = self.by_reference(lambda: decoding.attend(query, key, value, cache, attention))
        return self.judged("attention", status, wanted, lambda: self.near(out, expected, dtype))
