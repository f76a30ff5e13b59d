"""Integer codes of adapter factors: round-to-nearest and sign codes in groups, and their packing into bytes.

Everything here sees a factor as component rows [components, length]: the rows of A' and the columns of B' (that is, B'
transposed), so that a group is `GROUP` consecutive numbers of one component (LoraQuant, Section 3.2 and Appendix B).

A scale is rounded to float16 *before* codes are chosen with it. The numbers that refinement and evaluation see are
therefore the very numbers that a reader of the packed file computes, bit for bit.
"""

import dataclasses

import numpy as np
import torch

GROUP = 128  # numbers that share a scale; the papers' choice for all methods
_LARGEST_SCALE = torch.finfo(torch.float16).max


def group_count(length: int) -> int:
    """Groups in a row of `length` numbers; the last one may be shorter."""
    return -(-length // GROUP)


def into_groups(rows: torch.Tensor) -> torch.Tensor:
    """Views rows [..., length] as [..., groups, GROUP], zeros filling the last group."""
    missing = group_count(rows.shape[-1]) * GROUP - rows.shape[-1]
    if missing:
        rows = torch.nn.functional.pad(rows, (0, missing))
    return rows.unflatten(-1, (-1, GROUP))


def from_groups(groups: torch.Tensor, length: int) -> torch.Tensor:
    """Undoes `into_groups`: [..., groups, GROUP] to [..., length]."""
    return groups.flatten(-2)[..., :length]


def group_sizes(length: int, device: torch.device) -> torch.Tensor:
    """How many real numbers each group of a row holds, float32 [groups]."""
    sizes = torch.full((group_count(length),), float(GROUP), device=device)
    sizes[-1] = length - GROUP * (len(sizes) - 1)
    return sizes


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """Rounds a scale to float16.

    Raises:
        ValueError: a scale is beyond the range of float16.
    """
    if scale.numel() and scale.max() > _LARGEST_SCALE:
        raise ValueError(
            f"A group of an adapter factor needs the scale {scale.max().item():.3g}, and packed scales are float16 "
            f"(largest {_LARGEST_SCALE:.0f}). Such an adapter has diverged in training; train it again."
        )
    return scale.to(torch.float16)


@dataclasses.dataclass
class RtnCodes:
    """Round-to-nearest codes of component rows: w^ = scale (code - zero).

    codes: uint8 [components, length]; scales: float16 [components, groups]; zeros: uint8 [components, groups].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """Float32 rows [components, length]."""
        length = self.codes.shape[-1]
        grouped = into_groups(self.codes).to(torch.float32)
        levels = grouped - self.zeros.to(torch.float32).unsqueeze(-1)
        return from_groups(levels * self.scales.to(torch.float32).unsqueeze(-1), length)


@dataclasses.dataclass
class SignCodes:
    """Sign codes of component rows: w^ = scale where the bit is set, -scale elsewhere.

    positive: bool [components, length]; scales: float16 [components, groups].
    """

    positive: torch.Tensor
    scales: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """Float32 rows [components, length]."""
        length = self.positive.shape[-1]
        signs = into_groups(self.positive.to(torch.float32).mul_(2).sub_(1))
        return from_groups(signs * self.scales.to(torch.float32).unsqueeze(-1), length)


@dataclasses.dataclass(frozen=True)
class RoundToNearest:
    """Round-to-nearest at `bits` bits (Equations 6 and 7)."""

    bits: int

    # The own value of a number reaches its code only through rounding, and a rate of 1 there lets numbers wander across
    # cell borders; measured over 1 / 0.3 / 0.1 / 0, the refined error at 2 bits is 0.317 / 0.265 / 0.252 / 0.249.
    PASS = 0.1

    def grid(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (float32 holding a float16 number) and zero point of groups [..., GROUP], each [..., 1].

        The range is stretched to hold 0, so that the zero point is itself a code and fits the k bits that AvgBits
        counts for it. It changes only groups of one sign, which trained adapters do not have at 128 numbers.
        """
        top = 2**self.bits - 1
        low = groups.amin(-1, keepdim=True).clamp_(max=0)
        high = groups.amax(-1, keepdim=True).clamp_(min=0)
        scale = round_scale((high - low) / top).to(torch.float32)
        # A group whose scale rounds to zero decodes to zeros whatever its codes are; 1 only avoids 0 / 0.
        zero = torch.round(-low / torch.where(scale > 0, scale, 1.0)).clamp_(0, top)
        return scale, zero

    def codes_on(self, groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes, still float32, of groups [..., GROUP] on a grid of `grid`."""
        steps = torch.round(groups / torch.where(scale > 0, scale, 1.0))
        return steps.add_(zero).clamp_(0, 2**self.bits - 1)

    def quantize(self, rows: torch.Tensor) -> RtnCodes:
        """Codes of float32 rows [components, length]."""
        groups = into_groups(rows)
        scale, zero = self.grid(groups)
        codes = from_groups(self.codes_on(groups, scale, zero).to(torch.uint8), rows.shape[-1])
        return RtnCodes(codes, scale.squeeze(-1).to(torch.float16), zero.squeeze(-1).to(torch.uint8))

    def simulate(self, rows: torch.Tensor) -> torch.Tensor:
        """`quantize(rows).dequantize()` without the integers in between; the same numbers."""
        groups = into_groups(rows)
        scale, zero = self.grid(groups)
        return from_groups(self.codes_on(groups, scale, zero).sub_(zero).mul_(scale), rows.shape[-1])

    def straight_through(self, rows: torch.Tensor, simulated: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient at rows with rounding taken as the identity: w^ = s round(w / s) moves with w and with s.

        d w^ / d s is then (w^ - w) / s, and s = (max - min) / (2^k - 1) hands the sum of it over the group to its
        largest and its smallest number. This is the path that draws in a range that outliers have stretched.
        """
        groups, difference = into_groups(rows), into_groups(simulated - rows)
        gradients = into_groups(gradient)
        low, lowest = groups.min(-1, keepdim=True)
        high, highest = groups.max(-1, keepdim=True)
        span = high - low
        pull = (gradients * difference).sum(-1, keepdim=True) / torch.where(span > 0, span, 1.0)
        result = gradients * self.PASS
        result.scatter_add_(-1, highest, pull).scatter_add_(-1, lowest, -pull)
        return from_groups(result, rows.shape[-1])


@dataclasses.dataclass(frozen=True)
class Sign:
    """Sign binarisation with the mean |w| of each group as scale (Equation 8); zero counts as positive."""

    def scale(self, rows: torch.Tensor) -> torch.Tensor:
        """Float16 [components, groups] of rows [components, length]."""
        return round_scale(into_groups(rows.abs()).sum(-1) / group_sizes(rows.shape[-1], rows.device))

    def quantize(self, rows: torch.Tensor) -> SignCodes:
        """Codes of float32 rows [components, length]."""
        return SignCodes(rows >= 0, self.scale(rows))

    def simulate(self, rows: torch.Tensor) -> torch.Tensor:
        """`quantize(rows).dequantize()` without the bits in between; the same numbers."""
        scale = self.scale(rows).to(torch.float32).unsqueeze(-1)
        return from_groups(torch.where(into_groups(rows) >= 0, scale, -scale), rows.shape[-1])

    def straight_through(self, rows: torch.Tensor, simulated: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient at rows with sign taken as the identity."""
        return gradient


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes (any shape, values below 2**bits) into uint8 [packed_bytes], the first code in the lowest bits."""
    flat = codes.reshape(-1).to(torch.uint8).cpu().numpy()
    planes = np.unpackbits(flat[:, None], axis=1, bitorder="little")[:, :bits]
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack_bits(packed: torch.Tensor, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Undoes `pack_bits`: uint8 codes of the given shape."""
    count = int(np.prod(shape))
    stream = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little")
    planes = np.zeros((count, 8), dtype=np.uint8)
    planes[:, :bits] = stream.reshape(count, bits)
    return torch.from_numpy(np.packbits(planes, axis=1, bitorder="little").reshape(shape))
