"""The pieces of a packed checkpoint after their blocks were trained towards the dense ones (`block_training`).

A block is finished when all of its pieces are on disk; a killed run that is started again trains the others alone, from
what was packed before.
"""

import json
import logging
import pathlib
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoints.guarded import open_tensors, read_tensors
from ..weights.packed import PackedWeight
from .block_stream import Block, BlockStream
from .block_training import BATCH, steps_of, train_blocks
from .job import Job, text_of
from .loftq import LowRank
from .pieces import keep_packed
from .planning import Plan
from .work import ADAPTER, PIECES, TRAINED_ADAPTER, TRAINED_PIECES

logger = logging.getLogger(__name__)

# With 25,000 tokens fine-tuning ended worse than without, with 98,000 better (docs/lab/log.md).
FEW_TOKENS = 65_536


def open_stream(job: Job) -> BlockStream | None:
    """The blocks of the source over the text of the calibration, if they are to be trained.

    Raises:
        ValueError: there is no text, or the model is none whose blocks can be trained one by one.
    """
    if not job.config.reconstruct:
        return None
    sequences = text_of(job, "reconstruct")
    if sequences.numel() < FEW_TOKENS:
        logger.warning(
            "lowra: reconstruct has %d tokens of text, and blocks that are trained on so few learn the text instead of "
            "the model: give %d or more.",
            sequences.numel(),
            FEW_TOKENS,
        )
    return BlockStream(job.source, job.targets, sequences, BATCH, job.device)


def reconstruct(job: Job, plan: Plan, stream: BlockStream, pieces: list[pathlib.Path]) -> list[pathlib.Path]:
    """Trains every block that no earlier run has trained.

    Args:
        pieces: as they were packed, in the order of the source.

    Returns:
        the pieces with those of the blocks after training in their places.
    """
    inside = {name: block for name in job.targets for block in stream.names if name.startswith(f"{block}.")}
    done = {block for block in stream.names if _is_finished(job, [n for n in inside if inside[n] == block])}
    steps = steps_of(stream.count, job.config.reconstruct)
    bar = tqdm(
        total=steps * len(stream.names),
        initial=steps * len(done),
        desc="reconstructing",
        unit=" steps",
        disable=not job.progress,
    )
    with bar:
        for trained in train_blocks(
            stream,
            lambda name: load_packed(job, name, PIECES, ADAPTER),
            job.adapter.scaling if job.adapter else 1.0,
            job.config.reconstruct,
            finished=lambda block: _sums(job, block) if block.name in done else None,
            on_step=bar.update,
        ):
            errors = json.dumps([trained.before, trained.after])
            for name, weight in trained.weights.items():
                kinds = TRAINED_PIECES, TRAINED_ADAPTER
                dense = trained.block.weight(name)
                keep_packed(job, plan, name, dense, weight.packed(), weight.factors(), kinds, block_errors=errors)
    return [job.work.path(TRAINED_PIECES, piece.stem) if piece.stem in inside else piece for piece in pieces]


def _is_finished(job: Job, names: list[str]) -> bool:
    kinds = (TRAINED_PIECES, TRAINED_ADAPTER) if job.adapter else (TRAINED_PIECES,)
    return all(job.work.has(kind, name) for name in names for kind in kinds)


def load_packed(job: Job, name: str, piece: str, adapter: str | None) -> tuple[PackedWeight, LowRank | None]:
    """A packed weight and the factors on it, of pieces of these kinds; no factors of None."""
    target = job.targets[name]
    stored = read_tensors(job.work.path(piece, name), "a finished piece")[0]
    tensors: dict[str, Any] = {key.rpartition(".")[2]: tensor.to(job.device) for key, tensor in stored.items()}
    tensors.setdefault("scale_steps", None)
    packed = PackedWeight(**tensors, in_features=target.in_features, group_size=job.config.group_size)
    if job.adapter is None or adapter is None:
        return packed, None
    stored = read_tensors(job.work.path(adapter, name), "factors of the initial adapter")[0]
    by_side = {key.split(".")[-2]: tensor.to(job.device) for key, tensor in stored.items()}
    return packed, LowRank(**by_side)


def _sums(job: Job, block: Block) -> dict[str, torch.Tensor]:
    """Trained weights of a block with the product of the factors on them."""
    sums = {}
    for name in block.targets:
        packed, factors = load_packed(job, name, TRAINED_PIECES, TRAINED_ADAPTER)
        sums[name] = packed.dequantize()
        if factors is not None and job.adapter is not None:
            sums[name].addmm_(factors.lora_B, factors.lora_A, alpha=job.adapter.scaling)
    return sums


def block_errors(pieces: list[pathlib.Path]) -> list[list[float]]:
    """Error of each block's output before and after its training, in order."""
    found: dict[str, list[float]] = {}
    for piece in pieces:
        with open_tensors(piece, "a piece of the packed checkpoint") as content:
            errors = content.metadata().get("block_errors")
        if errors is not None:
            found.setdefault(errors, json.loads(errors))
    return list(found.values())
