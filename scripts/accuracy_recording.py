"""The weights of `TrainedWeight`s made by one CUDA graph, and their way back by another: for `accuracy_grid.py`.

A weight and its way back are a hundred small kernels, and a GPU waits for each to be launched.
"""

import contextlib
import gc
import sys

import torch
from torch import nn

from lowra.nn.recording import collector_at_rest


class _Together(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weights = nn.ModuleList(weights)

    def forward(self):
        return tuple(weight() for weight in self.weights)


@contextlib.contextmanager
def recorded(weights, device):
    """Yields what makes all of the weights by name; each call overwrites what the last one made.

    Args:
        weights: `TrainedWeight` by name; they are as they were afterwards.
        device: of the weights.
    """
    together = _Together(weights.values())
    if device.type == "cuda":
        gc.collect()
        try:
            with collector_at_rest():
                known = [weight.detach().clone() for weight in together()]
                recording = torch.cuda.make_graphed_callables(together, (), allow_unused_input=True)
                if any((a - b).norm() > 1e-3 * a.norm() for a, b in zip(known, recording(), strict=True)):
                    raise RuntimeError("a replay makes other weights")
        except Exception as error:  # slower, and no less right
            print(f"not recorded: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            torch.cuda.synchronize()
            together.__dict__.pop("forward", None)
    yield lambda: dict(zip(weights, together(), strict=True))
