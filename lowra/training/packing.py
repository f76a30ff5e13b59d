"""Several conversations in one row, so that a batch has hardly any padding.

Each begins anew at position 0, and Transformers derives from the positions that none may look at another. No attention
mask goes with them. That a model honours it is tried out before training, since models with code of their own need not.
"""

import bisect
from collections.abc import Callable

import torch
from torch import nn

from .conversations import IGNORED

_LEAKED = 0.25  # of what one row without positions changes; rounding in bfloat16 stays below a tenth of that


def pack(examples: list[dict], length: int) -> list[dict]:
    """Rows of at most `length` tokens, by best fit, the longest examples first; nothing is cut.

    Args:
        examples: `input_ids` and `labels`, none longer than `length`.

    Returns:
        rows with `position_ids` beside them; the first label of each example is ignored.
    """
    rows: list[list[dict]] = []
    room: list[tuple[int, int]] = []  # tokens left and number of each row, ascending
    for example in sorted(examples, key=lambda example: -len(example["input_ids"])):
        size = len(example["input_ids"])
        at = bisect.bisect_left(room, (size, -1))
        if at == len(room):
            rows.append([example])
            bisect.insort(room, (length - size, len(rows) - 1))
        else:
            left, number = room.pop(at)
            rows[number].append(example)
            bisect.insort(room, (left - size, number))
    return [_joined(row) for row in rows]


def _joined(examples: list[dict]) -> dict:
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        row["input_ids"] += example["input_ids"]
        row["labels"] += [IGNORED, *example["labels"][1:]]
        row["position_ids"] += range(len(example["input_ids"]))
    return row


def collate_packed(rows: list[dict], pad: int) -> dict[str, torch.Tensor]:
    """A batch [B, T] of packed rows. What fills the shorter ones stands at position 0 and looks at nothing else."""
    length = max(len(row["input_ids"]) for row in rows)
    filling = {"input_ids": pad, "labels": IGNORED, "position_ids": 0}
    return {
        key: torch.tensor([row[key] + [fill] * (length - len(row[key])) for row in rows])
        for key, fill in filling.items()
    }


@torch.no_grad()
def check_packing(model: nn.Module, vocabulary: int, forward: Callable[..., torch.Tensor]) -> None:
    """
    Args:
        model: on its device.
        vocabulary: number of tokens it knows.
        forward: from `input_ids` and perhaps `position_ids` [1, T] to logits [1, T, V].

    Raises:
        ValueError: conversations in one row look at each other.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, 16), generator=generator).to(device)
    positions = torch.arange(8, device=device).repeat(2)[None]
    training = model.training
    model.eval()
    try:
        alone = forward(input_ids=ids[:, 8:]).float()
        packed = forward(input_ids=ids, position_ids=positions)[:, 8:].float()
        mixed = forward(input_ids=ids)[:, 8:].float()
    finally:
        model.train(training)
    if (packed - alone).norm() > _LEAKED * (mixed - alone).norm():
        raise ValueError(
            "packing=true cannot be used with this model: conversations in one row look at each other. Leave packing "
            "out, or take an attention implementation that follows position ids."
        )
