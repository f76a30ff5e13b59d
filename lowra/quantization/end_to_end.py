"""The pieces of a packed checkpoint after all blocks were trained together towards the dense model (`joint_training`).

A killed run that is started again goes on from the last state that was kept, every few minutes, and ends in the same
weights. What the training did not bring nearer to the dense model, on text that was held out, stays as it was.
"""

import json
import logging
import pathlib
import time
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoints.guarded import one_line, open_tensors, read_tensors
from .job import Job, text_of
from .joint_training import BATCH, HELD_OUT, JointTraining
from .pieces import keep_packed, keep_tensors
from .planning import Plan
from .reconstruction import load_packed
from .token_tables import token_tables
from .trained_weight import TrainedWeight
from .work import ADAPTER, END_TO_END, JOINT_ADAPTER, JOINT_PIECES, PIECES, TRAINED_ADAPTER, TRAINED_PIECES

logger = logging.getLogger(__name__)

# Seconds between the states that are kept, each three times as large as the weights in float32.
KEEP_AFTER = 300.0
# Of a text that is short.
_SHARE_HELD_OUT = 1 / 8
_STATE = "state"


def check_text(job: Job) -> None:
    """
    Raises:
        ValueError: there is no text for the training, or less than it takes.
    """
    if job.config.end_to_end:
        _sequences(job)


def train_end_to_end(job: Job, plan: Plan, pieces: list[pathlib.Path]) -> tuple[list[pathlib.Path], dict[str, Any]]:
    """Trains all blocks together, from what was packed before.

    Args:
        pieces: in the order of the source.

    Returns:
        the pieces with those after training in their places, if that was for the better; and what it did: steps,
        tokens, names of the embeddings and the head that were trained too, KL divergence on text that was held out
        before and after, and whether it was kept.
    """
    model: Any = type(job.source.model).from_pretrained(job.folder, dtype=torch.float32)
    model.to(job.device)
    model.config.use_cache = False
    inside = [name for name, target in job.targets.items() if target.in_block]
    kinds = (TRAINED_PIECES, TRAINED_ADAPTER) if job.config.reconstruct else (PIECES, ADAPTER)
    scaling = job.adapter.scaling if job.adapter else 1.0
    dense = {name: job.targets[name].as_matrix(model.get_parameter(name)).detach() for name in inside}
    weights = {name: TrainedWeight(dense[name], *load_packed(job, name, *kinds), scaling) for name in inside}
    fixed = {name: load_packed(job, name, PIECES, None)[0].dequantize() for name in job.targets if name not in weights}
    text, held_out = _sequences(job)
    training = JointTraining(
        model,
        job.targets,
        weights,
        text,
        job.config.end_to_end,
        fixed=fixed,
        token_tables=_types_of_token_tables(job, model, pieces),
    )
    before = _restored(job, training)
    if before is None:
        before = training.divergence(held_out)
    _run(job, training, before)
    after = training.divergence(held_out)
    training.finish()
    did = {
        "steps": training.steps,
        "tokens": training.steps * BATCH * text.shape[1],
        "token_tables": list(training.token_tables.now),
        "divergence": [before, after],
        "kept": after < before,
    }
    if not did["kept"]:
        logger.warning(
            "lowra: the training of all blocks together was not for the better: KL divergence from the dense model on "
            "text that was held out %.4g before, %.4g after. What the blocks learned each by itself is kept: give more "
            "text, or end_to_end=0.",
            before,
            after,
        )
        return pieces, did
    for name, weight in weights.items():
        with open_tensors(job.work.path(kinds[0], name), "a finished piece") as content:
            errors = {key: value for key, value in (content.metadata() or {}).items() if key == "block_errors"}
        keep_packed(
            job, plan, name, dense[name], weight.packed(), weight.factors(), (JOINT_PIECES, JOINT_ADAPTER), **errors
        )
    tables = training.token_tables.stored()
    for name, table in tables.items():
        keep_tensors(job, JOINT_PIECES, name, {name: table.cpu()})
    trained = weights.keys() | tables.keys()
    return [job.work.path(JOINT_PIECES, piece.stem) if piece.stem in trained else piece for piece in pieces], did


def _types_of_token_tables(job: Job, model: Any, pieces: list[pathlib.Path]) -> dict[str, torch.dtype]:
    """Embeddings and head that are not packed, by name, and the type that each is stored in."""
    found = {}
    for name in {piece.stem for piece in pieces}.intersection(token_tables(model)).difference(job.targets):
        with open_tensors(job.work.path(PIECES, name), "a finished piece") as content:
            found[name] = content.get_tensor(name).dtype  # of a file that is mapped: no table is read
    return dict(sorted(found.items()))


def _sequences(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [count, T] to train on and to judge by: as far as there are some, those that no block has seen."""
    text = text_of(job, "end_to_end", further=True)
    held_out = max(1, min(HELD_OUT, int(len(text) * _SHARE_HELD_OUT)))
    if len(text) < 2:
        raise ValueError(
            "end_to_end trains on some sequences of the text and judges by others, and there is one: give more text, "
            "or use end_to_end=0."
        )
    text, judge = text[:-held_out], text[-held_out:]
    return text[-job.config.end_to_end * BATCH :], judge


def _run(job: Job, training: JointTraining, before: float) -> None:
    """Trains to the end, and keeps the state every few minutes and at the end."""
    bar = tqdm(total=training.steps, initial=training.done, desc="end to end", unit=" steps", disable=not job.progress)
    some = 1
    with bar:
        while training.done < training.steps:
            clock, begun = time.perf_counter(), training.done
            while training.done == begun or training.done < training.steps and time.perf_counter() - clock < KEEP_AFTER:
                losses = training.run(min(training.steps, training.done + some))
                bar.set_postfix(KL=f"{float(losses.mean()):.4f}", refresh=False)  # waits for the device
                bar.update(len(losses))
                some = max(1, int((training.done - begun) / (time.perf_counter() - clock)))  # those of a second
            job.work.save(
                END_TO_END,
                _STATE,
                {name: tensor.cpu() for name, tensor in training.state().items()},
                {"done": json.dumps([training.done, before])},
            )


def _restored(job: Job, training: JointTraining) -> float | None:
    """Goes on from the state of an earlier run, if there is one.

    Returns:
        the divergence before the training, as that run found it; None where there is none that can be gone on from.
    """
    if not job.work.has(END_TO_END, _STATE):
        return None
    path = job.work.path(END_TO_END, _STATE)
    try:
        state, metadata = read_tensors(path, "how far an earlier run had come")
        done, before = json.loads(metadata["done"])
        before = float(before)
        training.restore(state, int(done))
    except (KeyError, TypeError, ValueError) as error:  # as any piece that is damaged: it is made again
        logger.warning("lowra: the training of all blocks together begins anew (%s: %s).", path, one_line(error))
        return None
    return before
