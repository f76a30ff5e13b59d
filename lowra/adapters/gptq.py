"""GPTQ on adapter factors (LoraQuant, Table 1): round-to-nearest codes with the error of each column handed on.

The factors are quantised as the two linear layers that they are. A [r, n] sees the inputs x of the layer, with
Hessian H = sum x x^T; B [m, r] sees A x, with Hessian A H A^T of the *quantised* A. Groups are those of RTN, 128
along rows of A and columns of B, so both methods store the same bits: a group of A is 128 columns that GPTQ passes
one after the other on a grid fixed when it enters the group, and a group of B lies inside one column.
"""

import pathlib
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from ..checkpoints.places import expanded
from ..corpus import read_text
from .codes import GROUP, RoundToNearest, RtnCodes, Sign
from .formats import SplitCodes
from .loraquant import check_bits, layout
from .source import LoraAdapter
from .storage import PackedAdapter, pack

DAMPING = 0.01  # share of the mean diagonal that is added to a Hessian, GPTQ's own
CALIBRATION_TOKENS = 256  # tokens a block
CALIBRATION_BLOCKS = 64  # blocks at most


def calibration_blocks(path: str | pathlib.Path, tokenizer: Callable) -> torch.Tensor:
    """Tokens of a file of text, or of JSON lines with a field `text`, as [blocks, 256], 64 at most, the rest dropped.

    Raises:
        FileNotFoundError: no such file. ValueError: not text, or shorter than one block.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"Calibration file {path} does not exist; expected a UTF-8 text file.")
    tokens = torch.tensor(tokenizer("".join(read_text(path)))["input_ids"], dtype=torch.long)
    blocks = min(CALIBRATION_BLOCKS, len(tokens) // CALIBRATION_TOKENS)
    if blocks == 0:
        raise ValueError(
            f"Calibration file {path} has {len(tokens)} tokens; expected at least {CALIBRATION_TOKENS}. Give more text."
        )
    return tokens[: blocks * CALIBRATION_TOKENS].view(blocks, CALIBRATION_TOKENS)


@torch.no_grad()
def input_hessians(
    model: nn.Module, blocks: torch.Tensor, names: list[str], progress: bool = False
) -> dict[str, torch.Tensor]:
    """Sum of x x^T over all tokens for the inputs of named LoRA layers, float32 [n, n] by PEFT's name.

    Args:
        model: a PeftModel with the adapter to be quantised active, so that inputs are those it was trained on.
        blocks: token ids [blocks, tokens].
        names: layers of the adapter, as PEFT names them in its files.
    """
    wanted = set(names)
    sums: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).to(torch.float32)
            sums[name] = sums[name].addmm_(x.mT, x) if name in sums else x.mT @ x

        return hook

    hooks = [module.register_forward_pre_hook(record(name)) for name, module in model.named_modules() if name in wanted]
    device = next(model.parameters()).device
    try:
        model.eval()
        for ids in tqdm(blocks.split(4), desc="calibrate", disable=not progress):
            model(input_ids=ids.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    missing = wanted - sums.keys()
    if missing:
        raise ValueError(
            f"Layer {sorted(missing)[0]} of the adapter saw no input in calibration; expected every layer of the "
            "adapter in the base model. The adapter belongs to another base."
        )
    return {name: total.cpu() for name, total in sums.items()}


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of a damped Hessian [n, n], float32; row i hands on the error of i."""
    n = len(hessian)
    hessian = hessian.to(torch.float64).clone()
    mean = hessian.diagonal().mean()
    # An input that is always zero has nothing to hand on; any positive number there keeps the matrix regular.
    hessian.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).to(torch.float32).view(n, n)


def gptq_rows(rows: torch.Tensor, hessian: torch.Tensor, bits: int) -> RtnCodes:
    """Codes of A [r, n] under the Hessian [n, n] of its inputs, groups of 128 along n."""
    near, work, length = RoundToNearest(bits), rows.clone(), rows.shape[1]
    factor = inverse_factor(hessian)
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    scales, zeros = [], []
    for first in range(0, length, GROUP):
        last = min(first + GROUP, length)
        scale, zero = near.grid(work[:, first:last])
        scales.append(scale)
        zeros.append(zero)
        errors = torch.empty(len(rows), last - first)
        for column in range(first, last):
            value = work[:, column : column + 1]
            code = near.codes_on(value, scale, zero)
            codes[:, column] = code.squeeze(1).to(torch.uint8)
            error = (value - scale * (code - zero)) / factor[column, column]
            work[:, column:last] -= error * factor[column, column:last]
            errors[:, column - first] = error.squeeze(1)
        work[:, last:] -= errors @ factor[first:last, last:]
    return RtnCodes(codes, torch.cat(scales, 1).to(torch.float16), torch.cat(zeros, 1).to(torch.uint8))


def gptq_columns(columns: torch.Tensor, hessian: torch.Tensor, bits: int) -> RtnCodes:
    """Codes of B [m, r], given as rows [r, m], under the Hessian [r, r] of its inputs, groups of 128 along m."""
    near, work = RoundToNearest(bits), columns.clone()
    factor = inverse_factor(hessian)
    parts = []
    for index in range(len(work)):
        part = near.quantize(work[index : index + 1])
        parts.append(part)
        error = (work[index] - part.dequantize()[0]) / factor[index, index]
        work[index + 1 :] -= factor[index, index + 1 :, None] * error
    return RtnCodes(*(torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros")))


def quantize_gptq(
    adapter: LoraAdapter, hessians: dict[str, torch.Tensor], bits: int, progress: bool = False
) -> PackedAdapter:
    """GPTQ on the factors as trained.

    Args:
        hessians: from `input_hessians`, for every layer of the adapter.
    """
    check_bits(bits)
    coded = []
    for layer in tqdm(adapter.layers, desc="gptq", disable=not progress):
        hessian = hessians[layer.name]
        codes_a = gptq_rows(layer.a, hessian, bits)
        quantized_a = codes_a.dequantize()
        codes_b = gptq_columns(layer.b.mT, quantized_a @ hessian @ quantized_a.mT, bits)
        none = Sign().quantize(layer.b.mT[:0]), Sign().quantize(layer.a[:0])
        coded.append((layout(layer, len(layer.a), len(layer.a)), SplitCodes(codes_b, codes_a, *none)))
    return pack(adapter, f"gptq {bits}", "split", bits, coded)
