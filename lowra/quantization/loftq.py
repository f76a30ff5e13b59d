"""Low-rank initialisation against the quantisation error (P4): LoftQ, CLoQ, PiSSA, and plain LoRA for comparison."""

import dataclasses
import math
from collections.abc import Callable

import torch

from ..weights.packed import PackedWeight
from .feedback import with_feedback
from .lowrank import truncated_svd

METHODS = ("loftq", "cloq", "pissa", "lora")
STEPS = 5


@dataclasses.dataclass
class LowRank:
    """Adapter factors, scaled so that base + scaling * lora_B @ lora_A is the wanted sum.

    Attributes:
        lora_A: float32 [r, K].
        lora_B: float32 [N, r].
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor


def initialize(
    weight: torch.Tensor,
    quantize: Callable[[torch.Tensor], PackedWeight],
    rank: int,
    alpha: float,
    method: str = "loftq",
    steps: int = STEPS,
    seed: int = 0,
    *,
    moment: torch.Tensor | None = None,
    feedback: int = 0,
) -> tuple[PackedWeight, LowRank]:
    """Quantises a weight and fits adapter factors to what is left.

    loftq: alternate Q = quantise(W - B A) and B A = best rank-r fit of W - dequantise(Q), `steps` times from B A = 0;
    the last Q goes with the last fit (LowRA, section 4.1, following LoftQ). cloq: the same with the fit that is best in
    the outputs, least mean || (W - Q - B A) x ||^2 over the inputs x (CLoQ, Deng et al. 2025). pissa: the best rank-r
    part of W first, the residual quantised (appendix D). lora: Q = quantise(W), A Kaiming-uniform, B zero, as QLoRA
    starts.

    Args:
        weight: float32 [N, K].
        quantize: packs a matrix of this shape.
        rank: r, at most min(N, K).
        alpha: LoRA's alpha; the factors are divided by the scaling alpha / r.
        moment: [K, K], positive definite, mean x x^T of the inputs; for cloq and feedback.
        feedback: rounds after the last step that choose codes and levels for the outputs (`feedback.recode`), each with
            a new low-rank fit.

    Raises:
        ValueError: unknown method, a rank that does not fit, or no moment where one is needed.
    """
    if method not in METHODS:
        raise ValueError(f"The initialisation must be one of {', '.join(METHODS)}; got {method!r}.")
    if not 0 < rank <= min(weight.shape):
        raise ValueError(f"A rank of {rank} does not fit a weight {list(weight.shape)}: give 1 to {min(weight.shape)}.")
    if moment is None and (method == "cloq" or feedback):
        raise ValueError("cloq and feedback need the second moment of the inputs.")
    scaling = alpha / rank
    if method == "lora":
        bound = math.sqrt(6 / ((1 + 5) * weight.shape[1]))  # Kaiming with a = sqrt(5), as PEFT initialises A
        generator = torch.Generator().manual_seed(seed)
        lora_a = (torch.rand(rank, weight.shape[1], generator=generator) * 2 - 1) * bound
        lora_b = torch.zeros(weight.shape[0], rank)
        packed = with_feedback(weight, quantize(weight), moment, feedback)
        return packed, LowRank(lora_a.to(weight.device), lora_b.to(weight.device))
    if method == "pissa":
        left, right = truncated_svd(weight, rank, seed)
        rest = weight - left @ right
        return with_feedback(rest, quantize(rest), moment, feedback), _scaled(left, right, scaling)
    root = None
    if method == "cloq" and moment is not None:
        root = torch.linalg.cholesky(moment.to(weight.device).double()).float()
    packed = quantize(weight)
    for step in range(steps + feedback):
        if step >= steps:
            packed = with_feedback(weight - left @ right, packed, moment, 1)
        elif step:
            packed = quantize(weight - left @ right)
        residual = weight - packed.dequantize()
        left, right = truncated_svd(residual if root is None else residual @ root, rank, seed)
        if root is not None:
            right = torch.linalg.solve_triangular(root.T, right.T, upper=True).T
    if root is not None:
        left, right = _balanced(left, right)
    return packed, _scaled(left, right, scaling)


def _balanced(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the same product with the square root of its singular values on both sides."""
    basis, rest = torch.linalg.qr(left)
    inner, values, outer = torch.linalg.svd(rest @ right, full_matrices=False)
    return basis @ inner * values.sqrt(), values.sqrt()[:, None] * outer


def _scaled(left: torch.Tensor, right: torch.Tensor, scaling: float) -> LowRank:
    root = math.sqrt(scaling)
    return LowRank(right / root, left / root)
