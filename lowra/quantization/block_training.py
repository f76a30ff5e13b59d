"""Blocks trained to put out what the dense ones do: codes, levels, scales and the adapter of a block together.

A weight that is packed by itself knows neither of the errors before it nor of those beside it. Here each block in turn
is given what the packed blocks before it put out, and is trained towards what the dense block puts out in the dense
model: ApiQ (Liao et al. 2024) trains the adapter like this, EfficientQAT (Chen et al. 2024) codes and tables. No more
than one block is dense at a time. Bits and format stay as they are.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..device import has_bfloat16
from ..weights.packed import PackedWeight
from .block_stream import Block, BlockStream
from .loftq import LowRank
from .trained_weight import TrainedWeight

# Sequences of a step; blocks see all sequences in each pass.
BATCH = 4
# Learning rates of Adam at the start, over the root mean square of what they change (levels and scales: absolute). What
# the codes are rounded from learns slowly: at 0.03 outputs get as near, and fine-tuning ends worse (docs/lab/log.md).
RATES = {"dense": 0.01, "level_change": 1e-3, "scale_change": 1e-3, "lora_A": 0.01, "lora_B": 0.01}
_WARMUP = 0.05

# The packed weight of a name and the adapter's factors on it, or None, where the training starts.
Start = Callable[[str], tuple[PackedWeight, LowRank | None]]


@dataclasses.dataclass
class TrainedBlock:
    """A block that has been trained.

    Attributes:
        block: with its dense weights.
        weights: its packed weights by name.
        before, after: error of its output (`output_error`).
    """

    block: Block
    weights: dict[str, TrainedWeight]
    before: float
    after: float


def train_blocks(
    stream: BlockStream,
    start: Start,
    scaling: float,
    passes: int,
    seed: int = 0,
    finished: Callable[[Block], dict[str, torch.Tensor] | None] = lambda block: None,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[TrainedBlock]:
    """Trains block after block.

    Args:
        stream: the blocks of the dense model.
        start: see `Start`.
        scaling: by which the product of factors counts.
        passes: over all sequences, for each block.
        seed: of their order.
        finished: the weights [N, K], product included, of a block that an earlier run has trained, or None.
        on_step: called after each step of the training.
    """
    dense = packed = stream.inputs()
    for name in stream.names:
        with stream.block(name) as block:
            wanted = run_block(block, {}, dense)
            now = finished(block)
            if now is None:
                weights = _at_start(block, start, scaling)
                before, after = train_block(block, weights, packed, wanted, passes, seed, on_step)
                if not after < before:  # as on a text of a few sequences
                    weights, after = _at_start(block, start, scaling), before
                yield TrainedBlock(block, weights, before, after)
                now = current(weights)
            packed = run_block(block, now, packed)
            dense = wanted


def _at_start(block: Block, start: Start, scaling: float) -> dict[str, TrainedWeight]:
    return {name: TrainedWeight(block.weight(name), *start(name), scaling) for name in block.targets}


def train_block(
    block: Block,
    weights: dict[str, TrainedWeight],
    inputs: torch.Tensor,
    wanted: torch.Tensor,
    passes: int,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Trains the packed weights of one block, in place.

    Args:
        block: the block.
        weights: the packed weights of the block by name.
        inputs: [count, T, H], what the packed blocks before put out.
        wanted: [count, T, H], what the dense block puts out in the dense model.
        passes: over all sequences.
        seed: of the order of the sequences.
        on_step: called after each step.

    Returns:
        mean squared error of the output over the variance of what is wanted, before and after.
    """
    before = output_error(block, current(weights), inputs, wanted)
    steps = steps_of(len(inputs), passes)
    optimiser = torch.optim.Adam(list(_groups(weights)), betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_factor(step, steps))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        for members in torch.randperm(len(inputs), generator=generator).split(BATCH):
            members = members.to(inputs.device)
            with computing(inputs.device):
                out = block(inputs[members].float(), {name: weight() for name, weight in weights.items()})
            _distance(out, wanted[members]).mean().backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            on_step()
    return before, output_error(block, current(weights), inputs, wanted)


def steps_of(sequences: int, passes: int) -> int:
    """Steps of the training of one block."""
    return passes * math.ceil(sequences / BATCH)


def current(weights: dict[str, TrainedWeight]) -> dict[str, torch.Tensor]:
    """The weights as they are now, without a way back for gradients."""
    with torch.no_grad():
        return {name: weight() for name, weight in weights.items()}


@torch.no_grad()
def run_block(block: Block, weights: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """What a block puts out for all inputs [count, T, H], in their dtype."""
    out = torch.empty_like(inputs)
    for first in range(0, len(inputs), BATCH):
        with computing(inputs.device):
            out[first : first + BATCH] = block(inputs[first : first + BATCH].float(), weights)
    return out


def output_error(block: Block, weights: dict[str, torch.Tensor], inputs: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean over the tokens of the squared error of the output over what is wanted squared."""
    parts = zip(run_block(block, weights, inputs).split(BATCH), wanted.split(BATCH), strict=True)
    return sum(float(_distance(out, goal).sum()) for out, goal in parts) / wanted[..., 0].numel()


def _distance(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """[B, T]: squared error of each token over its own size: the norms of the blocks behind divide by that."""
    wanted = wanted.float()
    return (out.float() - wanted).square().sum(dim=-1) / wanted.square().sum(dim=-1)


def _groups(weights: dict[str, TrainedWeight]) -> Iterator[dict]:
    for weight in weights.values():
        for name, parameter in weight.named_parameters():
            rate = RATES[name]
            if name in ("lora_A", "lora_B"):
                if not weight.trains_product:
                    continue
            if name not in ("level_change", "scale_change"):
                rate *= float(parameter.detach().square().mean().sqrt())
            yield {"params": [parameter], "lr": rate}


def rate_factor(step: int, steps: int) -> float:
    """Of the learning rates at a step: warm-up, then half a cosine."""
    return min(1.0, (step + 1) / max(1.0, _WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


@contextlib.contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """On a GPU bfloat16 products, where it has them, and attention whose backward sums in one order, so that every run
    learns the same.
    """
    if device.type == "cpu":
        yield
        return
    with torch.autocast(device.type, torch.bfloat16, has_bfloat16(device)), sdpa_kernel(SDPBackend.MATH):
        yield
