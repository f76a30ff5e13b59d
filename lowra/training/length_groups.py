"""Rows of about one length together, in an order that follows from the seed and the epoch alone."""

from collections.abc import Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthGroups(LengthGroupedSampler):
    """Transformers' sampler takes its order from PyTorch's global generator, which a resumed run has in another state
    where it draws that of a later epoch: some rows would come twice in it, and others not at all.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        """
        Args:
            batch_size: rows of a step, of which the longest stand together.
            lengths: of all rows.
            seed: the order of epoch e is that of seed + e, as in PyTorch's own samplers.
        """
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self._seed + self._epoch)
        return super().__iter__()
