"""EfficientQAT (Chen et al., 2024), a baseline of `accuracy_grid.py`, written from its paper.

Block-AP: uniform codes in groups of 64 with a step and a zero point for each group; in one block after another weights,
steps and zero points are trained through the rounding towards the dense block's output, by plain squared error, on what
the quantised blocks before put out. Stored: codes, steps in float16, zero points in as many bits as a code has. E2E-QP:
the steps alone are trained on the task, codes and zero points fixed.
"""

import dataclasses
import math

import torch
from torch import nn

from lowra.quantization import block_training

GROUP_SIZE = 64
# Of the paper for a LLaMA of 7 billion weights at 2 bits. Fewer steps over less text want more: `Variant.rates`.
RATES = {"weight": 2e-5, "quantiser": 1e-4}


def true_bits(bits: int) -> float:
    return bits + (16 + bits) / GROUP_SIZE


@dataclasses.dataclass
class UniformWeight:
    """Codes less their zero points, int8 [N, G, 64], and steps, float32 with float16's values [N, G, 1]."""

    codes: torch.Tensor
    steps: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        return (self.codes * self.steps).flatten(1)


class Trained(nn.Module):
    """A weight [N, K] during Block-AP."""

    def __init__(self, weight: torch.Tensor, bits: int):
        super().__init__()
        groups = weight.unflatten(1, (-1, GROUP_SIZE))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        self.top = 2**bits - 1
        self.weight = nn.Parameter(groups.clone())
        self.step = nn.Parameter(((high - low) / self.top).clamp(min=1e-4))
        self.zero = nn.Parameter((-low / self.step.detach()).round().clamp(0, self.top))

    def forward(self) -> torch.Tensor:
        step = self._step()
        return (self._codes(step) * step).flatten(1)

    def _step(self):
        return through(self.step, self.step.clamp(min=1e-4).half().float())

    def _codes(self, step):
        zero = through(self.zero, self.zero.round().clamp(0, self.top))
        scaled = self.weight / step
        return (through(scaled, scaled.round()) + zero).clamp(0, self.top) - zero

    @torch.no_grad()
    def packed(self) -> UniformWeight:
        step = self._step()
        return UniformWeight(self._codes(step).to(torch.int8).cpu(), step.cpu())


def through(value, stands_for):
    """The second, with the gradient of the first."""
    return value + (stands_for - value).detach()


class SteppedLinear(nn.Module):
    """A layer whose steps change by trained factors: what E2E-QP trains."""

    def __init__(self, weight: UniformWeight):
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("steps", weight.steps)
        self.step_change = nn.Parameter(torch.zeros_like(weight.steps), requires_grad=False)

    def forward(self, x):
        weight = (self.codes * (self.steps * (1 + self.step_change))).flatten(1)
        return nn.functional.linear(x, weight)


def block_ap(stream, bits, passes, seed, rates):
    """Yields the name and the `UniformWeight` of every matrix of the stream's blocks."""
    rates = RATES | rates
    dense = packed = stream.inputs()
    for name in stream.names:
        with stream.block(name) as block:
            wanted = block_training.run_block(block, {}, dense)
            weights = {name: Trained(block.weight(name), bits) for name in block.targets}
            train(block, weights, packed, wanted, passes, seed, rates=rates)
            packed = block_training.run_block(block, block_training.current(weights), packed)
            dense = wanted
            yield from ((name, weight.packed()) for name, weight in weights.items())


def train(block, weights, inputs, wanted, passes, seed, *, rates, batch=block_training.BATCH):
    own = [weight.weight for weight in weights.values()]
    others = [parameter for weight in weights.values() for parameter in (weight.step, weight.zero)]
    groups = [{"params": own, "lr": rates["weight"]}, {"params": others, "lr": rates["quantiser"]}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    steps = passes * math.ceil(len(inputs) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        for members in torch.randperm(len(inputs), generator=generator).split(batch):
            members = members.to(inputs.device)
            with block_training.computing(inputs.device):
                out = block(inputs[members].float(), {name: weight() for name, weight in weights.items()})
            nn.functional.mse_loss(out.float(), wanted[members].float()).backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
