"""How the codes of one LoRA layer lie in flat tensors, and what they decode to.

Four forms hold every method: split codes (LoraQuant, BIN, RTN, GPTQ), PB-LLM, BiLLM and JD-Diagonal. Each form names
its fields, their types and lengths as a function of the layer's shape alone, so a file needs no offsets: it stores,
for each field, the concatenation over all layers, and bytes that are not codes, scales or zero points do not exist.
Within a field a layer is padded to whole bytes, under one byte a layer.

Forms decode to component rows, b [c, m] and a [c, n] float32, where B = b^T and A = a; c components are stored of
rank r, and a reader appends r - c components of zeros.
"""

import dataclasses
from typing import NamedTuple, Protocol

import torch

from .codes import RtnCodes, SignCodes, from_groups, group_count, into_groups, pack_bits, packed_bytes, unpack_bits

Rows = tuple[torch.Tensor, torch.Tensor]  # component rows of b [c, m] and a [c, n]
Fields = dict[str, torch.Tensor]
Sizes = dict[str, tuple[torch.dtype, list[int]]]  # of each field: its type, and the lengths of its parts


class LayerLayout(NamedTuple):
    """Shape of one packed layer."""

    name: str  # PEFT's name of the layer
    embedding: bool  # whether PEFT keeps the factors as embedding parameters
    m: int  # outputs
    n: int  # inputs
    rank: int  # r of the trained adapter
    stored: int  # c, components stored
    important: int  # h, of which this many are at k bits

    @property
    def parameters(self) -> int:
        """Numbers of the trained layer, r (m + n)."""
        return self.rank * (self.m + self.n)


class LayerCodes(Protocol):
    """Codes of one layer in one form, before packing."""

    def rows(self) -> Rows: ...

    def pack(self, bits: int) -> Fields: ...

    @staticmethod
    def sizes(layer: LayerLayout, bits: int) -> Sizes:
        """Type of every field, and the lengths of its parts in one layer."""

    @classmethod
    def unpack(cls, fields: Fields, layer: LayerLayout, bits: int) -> "LayerCodes":
        """Undoes `pack`."""


def _concatenate(pieces: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([piece.reshape(-1) for piece in pieces])


def _cut(field: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    return list(field.split(sizes))


@dataclasses.dataclass
class SplitCodes:
    """h components in round-to-nearest codes of k bits, the others in sign codes (LoraQuant, Section 3.2).

    BIN is h = 0 and RTN is h = c, on the factors as trained.
    """

    b_important: RtnCodes
    a_important: RtnCodes
    b_other: SignCodes
    a_other: SignCodes

    def rows(self) -> Rows:
        return (
            torch.cat([self.b_important.dequantize(), self.b_other.dequantize()]),
            torch.cat([self.a_important.dequantize(), self.a_other.dequantize()]),
        )

    def pack(self, bits: int) -> Fields:
        important = (self.b_important, self.a_important)
        other = (self.b_other, self.a_other)
        return {
            "codes": _concatenate([pack_bits(part.codes, bits) for part in important]),
            "scales": _concatenate([part.scales for part in important]),
            "zeros": _concatenate([pack_bits(part.zeros, bits) for part in important]),
            "signs": _concatenate([pack_bits(part.positive, 1) for part in other]),
            "sign_scales": _concatenate([part.scales for part in other]),
        }

    @staticmethod
    def sizes(layer: LayerLayout, bits: int) -> Sizes:
        h, rest = layer.important, layer.stored - layer.important
        lengths = (layer.m, layer.n)
        groups = [group_count(length) for length in lengths]
        return {
            "codes": (torch.uint8, [packed_bytes(h * length, bits) for length in lengths]),
            "scales": (torch.float16, [h * count for count in groups]),
            "zeros": (torch.uint8, [packed_bytes(h * count, bits) for count in groups]),
            "signs": (torch.uint8, [packed_bytes(rest * length, 1) for length in lengths]),
            "sign_scales": (torch.float16, [rest * count for count in groups]),
        }

    @classmethod
    def unpack(cls, fields: Fields, layer: LayerLayout, bits: int) -> "SplitCodes":
        h, rest = layer.important, layer.stored - layer.important
        cut = {name: _cut(fields[name], sizes) for name, (_, sizes) in cls.sizes(layer, bits).items()}
        important: list[RtnCodes] = []
        other: list[SignCodes] = []
        for side, length in enumerate((layer.m, layer.n)):
            groups = group_count(length)
            important.append(
                RtnCodes(
                    unpack_bits(cut["codes"][side], bits, (h, length)),
                    cut["scales"][side].view(h, groups),
                    unpack_bits(cut["zeros"][side], bits, (h, groups)),
                )
            )
            other.append(
                SignCodes(
                    unpack_bits(cut["signs"][side], 1, (rest, length)).bool(),
                    cut["sign_scales"][side].view(rest, groups),
                )
            )
        return cls(important[0], important[1], other[0], other[1])


PBLLM_SALIENT = 0.1  # share of numbers kept at 8 bits
PBLLM_BITS = 8


def salient_count(length: int) -> int:
    """Numbers of a component row that PB-LLM keeps at 8 bits; fixed per row, so that a layout needs no counts."""
    return round(PBLLM_SALIENT * length)


@dataclasses.dataclass
class PbllmRows:
    """One factor in PB-LLM form.

    salient: bool [c, length], True at `salient_count` places of each row; codes: 8-bit RtnCodes of those numbers
    [c, salient], one scale and zero point a row; positive: bool [c, length - salient]; scales: float16 [c, groups].
    """

    salient: torch.Tensor
    codes: torch.Tensor
    code_scales: torch.Tensor
    code_zeros: torch.Tensor
    positive: torch.Tensor
    scales: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        rows = torch.zeros(self.salient.shape)
        rows[~self.salient] = self.positive.reshape(-1).to(torch.float32) * 2 - 1
        rows = from_groups(into_groups(rows) * self.scales.to(torch.float32).unsqueeze(-1), rows.shape[1])
        levels = self.codes.to(torch.float32) - self.code_zeros.to(torch.float32).unsqueeze(-1)
        rows[self.salient] = (levels * self.code_scales.to(torch.float32).unsqueeze(-1)).reshape(-1)
        return rows


@dataclasses.dataclass
class PbllmCodes:
    """PB-LLM: a tenth of the numbers at 8 bits, the others binarised, one bit a number that says which."""

    b: PbllmRows
    a: PbllmRows

    def rows(self) -> Rows:
        return self.b.dequantize(), self.a.dequantize()

    def pack(self, bits: int) -> Fields:
        sides = (self.b, self.a)
        return {
            "salient": _concatenate([pack_bits(side.salient, 1) for side in sides]),
            "codes": _concatenate([side.codes for side in sides]),
            "code_scales": _concatenate([side.code_scales for side in sides]),
            "code_zeros": _concatenate([side.code_zeros for side in sides]),
            "signs": _concatenate([pack_bits(side.positive, 1) for side in sides]),
            "sign_scales": _concatenate([side.scales for side in sides]),
        }

    @staticmethod
    def sizes(layer: LayerLayout, bits: int) -> Sizes:
        c, lengths = layer.stored, (layer.m, layer.n)
        return {
            "salient": (torch.uint8, [packed_bytes(c * length, 1) for length in lengths]),
            "codes": (torch.uint8, [c * salient_count(length) for length in lengths]),
            "code_scales": (torch.float16, [c, c]),
            "code_zeros": (torch.uint8, [c, c]),
            "signs": (torch.uint8, [packed_bytes(c * (length - salient_count(length)), 1) for length in lengths]),
            "sign_scales": (torch.float16, [c * group_count(length) for length in lengths]),
        }

    @classmethod
    def unpack(cls, fields: Fields, layer: LayerLayout, bits: int) -> "PbllmCodes":
        c = layer.stored
        cut = {name: _cut(fields[name], sizes) for name, (_, sizes) in cls.sizes(layer, bits).items()}
        sides = []
        for side, length in enumerate((layer.m, layer.n)):
            salient = salient_count(length)
            sides.append(
                PbllmRows(
                    unpack_bits(cut["salient"][side], 1, (c, length)).bool(),
                    cut["codes"][side].view(c, salient),
                    cut["code_scales"][side],
                    cut["code_zeros"][side],
                    unpack_bits(cut["signs"][side], 1, (c, length - salient)).bool(),
                    cut["sign_scales"][side].view(c, group_count(length)),
                )
            )
        return cls(*sides)


@dataclasses.dataclass
class BillmRows:
    """One factor in BiLLM form: two bits a number and two scales a group.

    residual: bool [c], components binarised twice; first, second: bool [c, length]; scales: float16 [c, groups, 2].
    A residual component is +-scale0 +-scale1, signs in first and second. In the others `first` is the sign and `second`
    says which of the two scales holds: 0 around the centre of the bell, 1 in its tails.
    """

    residual: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    scales: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        scale0, scale1 = (scale.unsqueeze(-1) for scale in self.scales.to(torch.float32).unbind(-1))
        first = into_groups(self.first.to(torch.float32) * 2 - 1)
        second = into_groups(self.second.to(torch.float32) * 2 - 1)
        twice = first * scale0 + second * scale1
        bell = first * torch.where(second > 0, scale1, scale0)
        return from_groups(torch.where(self.residual[:, None, None], twice, bell), self.first.shape[1])


@dataclasses.dataclass
class BillmCodes:
    """BiLLM: salient components binarised twice, the others in two groups by magnitude, each with its own scale."""

    b: BillmRows
    a: BillmRows

    def rows(self) -> Rows:
        return self.b.dequantize(), self.a.dequantize()

    def pack(self, bits: int) -> Fields:
        sides = (self.b, self.a)
        return {
            "residual": _concatenate([pack_bits(side.residual, 1) for side in sides]),
            "first": _concatenate([pack_bits(side.first, 1) for side in sides]),
            "second": _concatenate([pack_bits(side.second, 1) for side in sides]),
            "scales": _concatenate([side.scales for side in sides]),
        }

    @staticmethod
    def sizes(layer: LayerLayout, bits: int) -> Sizes:
        c, lengths = layer.stored, (layer.m, layer.n)
        planes = [packed_bytes(c * length, 1) for length in lengths]
        return {
            "residual": (torch.uint8, [packed_bytes(c, 1)] * 2),
            "first": (torch.uint8, planes),
            "second": (torch.uint8, planes),
            "scales": (torch.float16, [2 * c * group_count(length) for length in lengths]),
        }

    @classmethod
    def unpack(cls, fields: Fields, layer: LayerLayout, bits: int) -> "BillmCodes":
        c = layer.stored
        cut = {name: _cut(fields[name], sizes) for name, (_, sizes) in cls.sizes(layer, bits).items()}
        sides = []
        for side, length in enumerate((layer.m, layer.n)):
            sides.append(
                BillmRows(
                    unpack_bits(cut["residual"][side], 1, (c,)).bool(),
                    unpack_bits(cut["first"][side], 1, (c, length)).bool(),
                    unpack_bits(cut["second"][side], 1, (c, length)).bool(),
                    cut["scales"][side].view(c, group_count(length), 2),
                )
            )
        return cls(*sides)


@dataclasses.dataclass
class DiagonalCodes:
    """JD-Diagonal: this adapter's diagonal, float16 [c], between factors that several adapters share.

    shared_b: float16 [c, m]; shared_a: float16 [c, n]. Only the diagonal belongs to the adapter; the shared fields
    lie in a file of their own (see `shared_sizes`).
    """

    diagonal: torch.Tensor
    shared_b: torch.Tensor
    shared_a: torch.Tensor

    def rows(self) -> Rows:
        b = self.shared_b.to(torch.float32) * self.diagonal.to(torch.float32).unsqueeze(1)
        return b, self.shared_a.to(torch.float32)

    def pack(self, bits: int) -> Fields:
        return {"diagonal": self.diagonal}

    def pack_shared(self) -> Fields:
        return {"shared_b": self.shared_b.reshape(-1), "shared_a": self.shared_a.reshape(-1)}

    @staticmethod
    def sizes(layer: LayerLayout, bits: int) -> Sizes:
        return {"diagonal": (torch.float16, [layer.stored])}

    @staticmethod
    def shared_sizes(layer: LayerLayout) -> Sizes:
        return {
            "shared_b": (torch.float16, [layer.stored * layer.m]),
            "shared_a": (torch.float16, [layer.stored * layer.n]),
        }

    @classmethod
    def unpack(cls, fields: Fields, layer: LayerLayout, bits: int) -> "DiagonalCodes":
        c = layer.stored
        return cls(fields["diagonal"], fields["shared_b"].view(c, layer.m), fields["shared_a"].view(c, layer.n))


FORMS: dict[str, type[LayerCodes]] = {
    "split": SplitCodes,
    "pbllm": PbllmCodes,
    "billm": BillmCodes,
    "diagonal": DiagonalCodes,
}
