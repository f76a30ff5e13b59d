"""Calls of the ops in which up to three arguments are made hostile, for `fuzz_ops.py`."""

import pathlib
import random
import sys

ROOT = pathlib.Path(__file__).parents[1]
REFUSALS = (RuntimeError, ValueError, TypeError)
EXTREMES = [-(2**63), -(2**62), -(2**31), -1, 0, 1, 3, 7, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1]


class OpCases:
    """The cases of one seed that call ops, each a function of its number alone."""

    def __init__(self, seed: int):
        import torch

        sys.path.insert(0, str(ROOT / "tests" / "kernels"))
        import cases

        import bitsandbytes  # noqa: F401 - registers the ops
        from bitsandbytes.backends.lowra import layout, libraries, lloyd, native, reference, table_gradients

        self.seed, self.torch, self.native, self.packed_case = seed, torch, native, cases.packed_case
        self.libraries = libraries
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
        return self.of_a_kind()

    def of_a_kind(self) -> str | None:
        return self.of_op()

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
        if all(tensor.is_meta for tensor in tensors) or not any(tensor.numel() for tensor in found):
            return None  # nothing was computed, and nothing looked at
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
