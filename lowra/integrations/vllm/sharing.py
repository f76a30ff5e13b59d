"""What a layer of an engine has of packed weights: all of their rows or those of its rank, merged where that is free.

Tensors in, packed weights out; nothing here knows vLLM.
"""

import dataclasses
from collections.abc import Mapping

import torch

from bitsandbytes.backends.lowra.checks import check_packed

from ...nn.row_layout import RowLayout
from ...weights.cutting import join, take_columns, take_rows
from ...weights.packed import TENSOR_DTYPES, TENSOR_NAMES, PackedWeight


@dataclasses.dataclass(frozen=True)
class Share:
    """What a rank has of a layer whose outputs may be several weights of the checkpoint, one below the other.

    Attributes:
        name: of the layer, for messages.
        in_features: columns of the whole weights.
        wholes: rows of each output in the checkpoint.
        rows: of each output, those of this rank.
        columns: those of this rank.
    """

    name: str
    in_features: int
    wholes: tuple[int, ...]
    rows: tuple[range, ...]
    columns: range


def rows_of_rank(name: str, whole: int, rows: int, rank: int, ranks: int) -> range:
    """Which rows of an output a rank has: one of as many pieces as there are ranks, or fewer that several ranks share.

    Raises:
        ValueError: the output cannot be cut like that.
    """
    pieces, rest = divmod(whole, rows)
    if rest or not pieces or ranks % pieces:
        raise ValueError(
            f"{name} has {whole} rows in the packed checkpoint, of which {ranks} ranks cannot have {rows} each: serve "
            "with another tensor-parallel size."
        )
    first = rank * pieces // ranks * rows
    return range(first, first + rows)


def packed_weight(name: str, tensors: Mapping[str, torch.Tensor], in_features: int, group_size: int) -> PackedWeight:
    """The packed weight that loaded tensors, by leaf, make up.

    Raises:
        ValueError: they are no packed weight of so many columns.
    """
    if "weight" in tensors and tensors["weight"].dtype not in TENSOR_DTYPES["weight"]:
        raise ValueError(
            f"{name} is dense in the checkpoint, {tensors['weight'].dtype}, and a packed weight was expected."
        )
    needed = {"weight", "row_bits", "scales", "levels"}
    if "scales" in tensors and tensors["scales"].dtype == torch.uint8:
        needed.add("scale_steps")
    if absent := sorted(needed - tensors.keys()):
        raise ValueError(f"The packed checkpoint lacks {', '.join(absent)} of {name}.")
    given = {leaf: tensors[leaf].contiguous() if leaf in tensors else None for leaf in TENSOR_NAMES}
    given["levels"] = tensors["levels"].to(torch.float16)  # float32 where PEFT's k-bit preparation was saved
    weight = PackedWeight(**given, in_features=in_features, group_size=group_size)  # type: ignore[arg-type]
    try:
        RowLayout(weight.row_bits)
        check_packed(weight.matrix())
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"The tensors of {name} are no packed weight of {in_features} columns ({error}).") from error
    return weight


def take_share(parts: Mapping[tuple[int, ...], PackedWeight], share: Share) -> list[PackedWeight]:
    """What this rank has, in the order of the outputs: one weight, its rows sorted again.

    Several stay apart where they have 8-bit scales and are whole: merged they would have float32 ones, for which there
    is more to pay than a product for each.

    Args:
        parts: by the outputs they hold, counted from 0: (0,), (1,) and (2,), or (0, 1, 2) for what the checkpoint has
            merged already.
        share: what of them.

    Raises:
        ValueError: a part is missing or has other sizes than the layer, or cannot be cut where it has to be.
    """
    held = [output for outputs in sorted(parts) for output in outputs]
    if held != list(range(len(share.wholes))):
        raise ValueError(f"{share.name} has {len(share.wholes)} outputs, and the checkpoint brought {held} of them.")
    taken = []
    for outputs, weight in sorted(parts.items()):
        wholes = [share.wholes[output] for output in outputs]
        found = weight.row_bits.numel()
        if found != sum(wholes):
            raise ValueError(f"{share.name} needs {sum(wholes)} rows, and the checkpoint has {found}.")
        starts = [sum(wholes[:place]) for place in range(len(wholes))]
        rows = [
            torch.arange(start + share.rows[output].start, start + share.rows[output].stop)
            for start, output in zip(starts, outputs, strict=True)
        ]
        try:
            piece = take_columns(weight, share.columns.start, len(share.columns))
        except ValueError as error:
            raise ValueError(f"{share.name}: {error} Serve with another tensor-parallel size.") from error
        taken.append(take_rows(piece, torch.cat(rows)))
    return taken if any(weight.scale_steps is not None for weight in taken) else [join(taken)]
