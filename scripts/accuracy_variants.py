"""One variant of `accuracy_grid.py`: its switches, and every matrix quantised by them with the start of its adapter."""

import dataclasses
import pathlib

import torch

from lowra.checkpoints.dense import DenseCheckpoint, empty_model, safetensors_files
from lowra.config import LowRAConfig
from lowra.quantization import block_training
from lowra.quantization.block_stream import BlockStream
from lowra.quantization.loftq import LowRank, initialize
from lowra.quantization.pack import quantize_matrix
from lowra.quantization.planning import Planner
from lowra.training import hqq

RATES = dict(block_training.RATES)


@dataclasses.dataclass
class Variant:
    """One row of the table: switches of `LowRAConfig` and `AdapterRecipe`, and experiments that are not in the library.

    Attributes:
        model: folder of another model than the first argument.
        aware: precisions from the errors that the low-rank fit leaves at each precision, in place of the learner's.
        train: what is trained beside the adapter: "lora" (nothing), "levels", or "both": levels and scales.
        table_rate: learning rate of levels and scales over that of the adapter.
        method: of the low-rank start, or "hqq" for that baseline at whole `bits`.
        reconstruct: passes of the training of each block towards the dense one.
        reconstruct_blocks: sequences of training text for it.
        rates: of that training, in place of `block_training.RATES`.
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
    reconstruct: int = 0
    reconstruct_blocks: int = 24
    rates: dict = dataclasses.field(default_factory=dict)


DEFAULTS = dataclasses.asdict(Variant())


class Experiment(Planner):
    """The planner with other errors than the learner's."""

    def see_correction(self, name, fit) -> None:
        """Replaces a matrix's errors [N, 3] by those that `fit(book, row_bits)` leaves in its channels, [N]."""
        book = self._codebooks[name]
        for place, bits in enumerate((4, 2, 1)):
            book.errors[:, place] = fit(book, torch.full((len(book.errors),), bits, dtype=torch.uint8))


def quantise(session, v: Variant):
    """(packed weight, A, B) of every matrix, on the CPU, and true bits per parameter; dense weights for HQQ.

    session: an `accuracy_grid.Session`, of which weights, targets and calibration are read.

    On the CPU because many processes that wait for one GPU at every small step make each other slow.
    """
    if v.method == "hqq":
        dense = {name: hqq.hqq(weight, int(v.bits)) for name, weight in session.weights.items()}
        return {name: (weight, *plain_start(weight, v.rank)) for name, weight in dense.items()}, hqq.true_bits(
            int(v.bits)
        )
    config = LowRAConfig(
        bits=v.bits, budget=v.budget, sensitivity=v.sensitivity, refine=v.refine, menu=v.menu, group_size=v.group_size,
        scales=v.scales, codebook=v.codebook, assigner=v.assigner,
    )  # fmt: skip
    planner = Experiment(config, None, session.calibration)

    def fit(name, book, row_bits):
        weight = session.weights[name]
        moment = session.calibration.moment(name) if v.method == "cloq" or v.feedback else None

        def pack(matrix):
            return quantize_matrix(matrix, book, row_bits, config)

        packed, factors = initialize(
            weight, pack, v.rank, v.rank, v.method, v.steps, v.seed, moment=moment, feedback=v.feedback
        )
        return packed, factors.lora_A, factors.lora_B

    for name, target in session.targets.items():
        planner.add(name, target, session.weights[name])
        if v.aware:

            def left_over(book, row_bits, name=name):
                packed, a, b = fit(name, book, row_bits)
                left = session.weights[name] - packed.dequantize() - b @ a
                seen = left @ session.calibration.moment(name) if v.method == "cloq" else left
                return (seen * left).sum(dim=1)

            planner.see_correction(name, left_over)
    plan = planner.assign()
    fitted = {name: fit(name, plan.codebooks[name], plan.row_bits[name]) for name in session.targets}
    if v.reconstruct:
        fitted = reconstructed(session, v, fitted)
    stored = sum(packed.stored_bits for packed, _, _ in fitted.values())
    return fitted, stored / sum(weight.numel() for weight in session.weights.values())


def reconstructed(session, v: Variant, fitted):
    """`fitted` after its blocks were trained on the session's device."""

    def start(name):
        packed, a, b = fitted[name]
        there = {key: tensor.to(session.device) for key, tensor in packed.tensors().items()}
        return dataclasses.replace(packed, **there), LowRank(a.to(session.device), b.to(session.device))

    block_training.RATES.update(RATES | v.rates)
    folder = pathlib.Path(session.folder)
    source = DenseCheckpoint(safetensors_files(folder), empty_model(folder))
    sequences = session.train[: v.reconstruct_blocks]
    stream = BlockStream(source, session.targets, sequences, block_training.BATCH, session.device)
    trained = {}
    for block in block_training.train_blocks(stream, start, 1.0, v.reconstruct, v.seed):
        for name, weight in block.weights.items():
            packed, factors = weight.packed(), weight.factors()
            there = {key: tensor.cpu() for key, tensor in packed.tensors().items()}
            trained[name] = dataclasses.replace(packed, **there), factors.lora_A.cpu(), factors.lora_B.cpu()
    return trained


def plain_start(weight, rank):
    a = (torch.rand(rank, weight.shape[1]) * 2 - 1) * weight.shape[1] ** -0.5
    return a, torch.zeros(weight.shape[0], rank)
