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
        output: where the packed checkpoint will lie.
        work: where finished pieces lie until then.
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
    output: pathlib.Path
    work: pathlib.Path
    device: torch.device
    progress: bool

    @property
    def final(self) -> pathlib.Path:
        """Where the finished checkpoint is put together."""
        return self.work / "final"

    def piece(self, name: str) -> pathlib.Path:
        """The file of one conversion of the source, packed or kept dense."""
        return self.work / "pieces" / f"{name}.safetensors"

    def factors(self, name: str) -> pathlib.Path:
        """The file of the initial adapter's two factors on one weight."""
        return self.work / "adapter" / f"{name}.safetensors"


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
