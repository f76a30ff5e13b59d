"""One variant of `accuracy_grid.py`: its switches, and every matrix quantised by them with the start of its adapter."""

import contextlib
import dataclasses
import math

import torch
from torch import nn

import bitsandbytes.backends.lowra.ops  # noqa: F401
from bitsandbytes.backends.lowra import layout
from bitsandbytes.backends.lowra.reference import decode_scales
from lowra import feedback
from lowra import quantize as lowra_quantize
from lowra.config import LowRAConfig
from lowra.loftq import initialize
from lowra.planning import Planner
from lowra.quantize import quantize_matrix
from lowra.refine import widen
from lowra.training import hqq


@dataclasses.dataclass
class Variant:
    """One row of the table: switches of `LowRAConfig` and `AdapterRecipe`, and experiments that are not in the library.

    Attributes:
        model: folder of another model than the first argument.
        aware: precisions from the errors that the low-rank fit leaves at each precision, in place of the learner's.
        train: what is trained beside the adapter: "lora" (nothing), "levels", "scales" or "both".
        table_rate: learning rate of levels and scales over that of the adapter.
        method: of the low-rank start, or "hqq" for that baseline at whole `bits`.
        scales: also "log4", four bits on a logarithmic grid between the extremes of 256 scales; simulated.
    """

    model: str = ""
    bits: float = 16.0
    budget: str = "nominal"
    sensitivity: str = "layer"
    refine: int = 0
    method: str = "loftq"
    steps: int = 5
    menu: tuple = (1, 2, 4)
    group_size: int = 64
    scales: str = "double_quant"
    codebook: str = "learned"
    assigner: str = "exact"
    aware: bool = False
    feedback: int = 0
    train: str = "lora"
    table_rate: float = 1.0
    rank: int = 8
    lr: float = 4e-3
    seed: int = 0
    train_steps: int = 120


DEFAULTS = dataclasses.asdict(Variant())


class Experiment(Planner):
    """The planner with other errors than the learner's."""

    def see_correction(self, name, fit) -> None:
        """Replaces a matrix's errors [N, 3] by those that `fit(book, row_bits)` leaves in its channels, [N]."""
        book = self._codebooks[name]
        for place, bits in enumerate((4, 2, 1)):
            book.errors[:, place] = fit(book, torch.full((len(book.errors),), bits, dtype=torch.uint8))


def quantise(session, v: Variant):
    """Dense weight, A, B and (codes, levels, scales) of every matrix, on the CPU; true bits per parameter.

    session: an `accuracy_grid.Session`, of which weights, targets and calibration are read.

    On the CPU because many processes that wait for one GPU at every small step make each other slow.
    """
    if v.method == "hqq":
        dense = {name: hqq.hqq(weight, int(v.bits)) for name, weight in session.weights.items()}
        return {name: (w, *plain_start(w, v.rank), None, 0) for name, w in dense.items()}, hqq.true_bits(int(v.bits))
    config = LowRAConfig(
        bits=v.bits, budget=v.budget, sensitivity=v.sensitivity, refine=v.refine, menu=v.menu, group_size=v.group_size,
        scales="float32" if v.scales == "log4" else v.scales, codebook=v.codebook, assigner=v.assigner,
    )  # fmt: skip
    planner = Experiment(config, None, session.calibration)

    def fit(name, book, row_bits):
        weight = session.weights[name]
        moment = session.calibration.moment(name) if v.method == "cloq" or v.feedback else None

        def pack(matrix):
            return quantize_matrix(matrix, book, row_bits, config)

        packed, factors = initialize(weight, pack, v.rank, v.rank, v.method, v.steps, v.seed, moment, v.feedback)
        a, b = factors.lora_A, factors.lora_B
        codes, levels, scales = tables_of(packed)
        dense = levels.gather(1, codes) * widen(scales, v.group_size, weight.shape[1])
        order = layout.row_order(row_bits).long()
        return dense, a, b, (codes.byte(), levels, scales, order), packed.stored_bits

    for name, target in session.targets.items():
        planner.add(name, target, session.weights[name])
        if v.aware:

            def left_over(book, row_bits, name=name):
                dense, a, b, _, _ = fit(name, book, row_bits)
                left = session.weights[name] - dense - b @ a
                seen = left @ session.calibration.moment(name) if v.method == "cloq" else left
                return (seen * left).sum(dim=1)

            planner.see_correction(name, left_over)
    plan = planner.assign()
    with stored_as(v.scales):
        fitted = {name: fit(name, plan.codebooks[name], plan.row_bits[name]) for name in session.targets}
    stored = sum(entry[-1] for entry in fitted.values())
    if v.scales == "log4":  # 4 bits and a share in two float32 for 256 scales, in the place of 32
        stored -= sum(entry[3][2].numel() for entry in fitted.values()) * (32 - 4 - 64 / 256)
    return fitted, stored / sum(weight.numel() for weight in session.weights.values())


@contextlib.contextmanager
def stored_as(scales: str):
    """ "log4" in the place of the library's storage of scales, for the time of quantising."""
    kept = lowra_quantize.store_scales
    if scales == "log4":
        lowra_quantize.store_scales = log_scales
    yield
    lowra_quantize.store_scales = kept


def tables_of(packed):
    """Codes [N, K], levels [N, 16] (the last one repeated) and scales [N, groups] in the order of the weight's rows."""
    order = layout.row_order(packed.row_bits).long()
    scales = torch.empty(packed.scales.shape)
    scales[order] = decode_scales(packed.scales, packed.scale_steps)
    levels = torch.empty(len(order), 16)
    levels[order] = feedback.padded_levels(packed)
    own = packed.row_bits.long()[:, None]
    levels = torch.where(levels.isfinite(), levels, levels.gather(1, 2**own - 1))
    wide = widen(scales, packed.group_size, packed.in_features)
    normal = torch.where(wide > 0, packed.dequantize() / wide, torch.zeros_like(wide))
    # a value a rounding above a repeated level would count as the last of them
    codes = torch.minimum(_nearest(normal, levels), 2**own - 1)
    return codes, levels, scales


def log_scales(absmax, storage="float32", block=256):
    """float32 [N, groups] rounded to 16 steps of equal ratio between the least and the greatest of each block."""
    flat = absmax.reshape(-1)
    padded = nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    used = padded > 0
    low = torch.where(used, padded, math.inf).amin(dim=1, keepdim=True).log()
    ratio = (padded.amax(dim=1, keepdim=True).log() - low).clamp(min=1e-6)
    code = ((padded.clamp(min=1e-30).log() - low) / ratio * 15).round().clamp(0, 15)
    rounded = torch.where(used, (low + code / 15 * ratio).exp(), 0)
    return rounded.view(-1)[: len(flat)].view(absmax.shape), None


def plain_start(weight, rank):
    a = (torch.rand(rank, weight.shape[1]) * 2 - 1) * weight.shape[1] ** -0.5
    return a, torch.zeros(weight.shape[0], rank)


def _nearest(normal, levels):
    return torch.searchsorted(((levels[:, 1:] + levels[:, :-1]) / 2).contiguous(), normal.contiguous())
