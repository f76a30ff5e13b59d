"""One quantisation that is being run: what all of its stages need to know."""

import dataclasses
import pathlib
from collections.abc import Iterator

import torch
from tqdm import tqdm

from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.targets import Target
from ..config import LowRAConfig
from .calibration import Calibration
from .initial_adapter import AdapterRecipe
from .work import WorkFolder


@dataclasses.dataclass(frozen=True)
class Job:
    """What the stages share; nothing of it changes while they run.

    Attributes:
        source: the dense checkpoint.
        targets: its weights to pack, by name.
        config: recipe and budget.
        adapter: recipe of the initial adapter, or None.
        calibration: statistics of the layers, or None.
        model: name or path of the source, as it was given.
        folder: where the source lies.
        companions: files beside its weights that belong to it, relative to that.
        output: where the packed checkpoint will lie, as it was given.
        work: the folder where finished pieces lie until then.
        device: where the arithmetic runs.
        progress: show progress bars.
    """

    source: DenseCheckpoint
    targets: dict[str, Target]
    config: LowRAConfig
    adapter: AdapterRecipe | None
    calibration: Calibration | None
    model: str
    folder: pathlib.Path
    companions: list[pathlib.Path]
    output: pathlib.Path
    work: WorkFolder
    device: torch.device
    progress: bool


def text_of(job: Job, stage: str, further: bool = False) -> torch.Tensor:
    """Token ids [count, T] that the calibration keeps for those who train on them.

    Args:
        stage: which does, as `LowRAConfig` calls it.
        further: with those behind them, which the blocks do not see.

    Raises:
        ValueError: there is no text.
    """
    kept = [] if job.calibration is None else [job.calibration.sequences, job.calibration.further][: 1 + further]
    parts = [part for part in kept if part is not None and len(part)]
    if not parts:
        given = "and there is none" if job.calibration is None else "of which a file of statistics holds none"
        raise ValueError(
            f"{stage} trains on the text of a calibration, {given}: give the text (--calibrate FILE), or use {stage}=0."
        )
    return torch.cat(parts)


def with_bar(
    names: list[str], targets: dict[str, Target], finished: set[str], what: str, progress: bool
) -> Iterator[str]:
    """The names, under a progress bar of the weights to quantise; its estimate leaves out what an earlier run did."""
    sizes = {name: targets[name].size for name in names if name in targets}
    done = sum(sizes.get(name, 0) for name in finished)
    with tqdm(
        total=sum(sizes.values()), initial=done, desc=what, unit=" weights", unit_scale=True, disable=not progress
    ) as bar:
        for name in names:
            yield name
            if name not in finished:
                bar.update(sizes.get(name, 0))
