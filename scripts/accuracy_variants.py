"""One variant of `accuracy_grid.py`: its switches, and every matrix quantised by them with the start of its adapter."""

import dataclasses
import pathlib
import re

import accuracy_blocks
import accuracy_efficientqat
import torch
from safetensors.torch import load_file, save_file

from lowra.checkpoints.dense import DenseCheckpoint, empty_model, safetensors_files
from lowra.config import LowRAConfig
from lowra.quantization import block_training
from lowra.quantization.block_stream import BlockStream
from lowra.quantization.calibration import SEQUENCE
from lowra.quantization.joint_training import BATCH
from lowra.quantization.loftq import LowRank, initialize
from lowra.quantization.pack import quantize_matrix
from lowra.quantization.planning import Planner, costs_before
from lowra.quantization.trained_weight import TrainedWeight
from lowra.training import hqq
from lowra.weights.packed import PackedWeight

RATES = dict(block_training.RATES)


@dataclasses.dataclass
class Variant:
    """One row of the table: switches of `LowRAConfig` and `AdapterRecipe`, and experiments that are not in the library.

    Attributes:
        model: folder of another model than the first argument.
        text: folder of another text than the second.
        aware: precisions from the errors that the low-rank fit leaves at each precision, in place of the learner's.
        train: what is trained beside the adapter: "lora" (nothing), "levels", "both": levels and scales, or "shared":
            changes that many of them share; of "efficientqat" "steps", or "steps alone" without the adapter.
        table_rate: learning rate of levels and scales over that of the adapter.
        method: of the low-rank start, or "hqq" or "efficientqat" for these baselines at whole `bits`.
        reconstruct: passes of the training of each block towards the dense one.
        reconstruct_blocks: sequences of text for it.
        rates: of that training, in place of `block_training.RATES`.
        calibrate_on: text of the statistics: "given" (for training) or "own" (written by the model).
        reconstruct_on: text of the blocks' training: "given", "own", or "both", the given one first.
        blocks: what `accuracy_blocks.train` takes, in place of the library's training of blocks.
        one_bit: what an error at one bit costs with sensitivities of "fisher"; 0: as the library has it.
        emphasis: factor on the assigner's errors in each block, in place of 1.
        end_to_end: of a training of all blocks together: text ("on" and "blocks", as of `reconstruct_on`), "steps",
            what else `JointTraining` takes, and "seconds", by which steps are fewer.
        tuning_seed: added to `seed` in fine-tuning alone, so that many share one packed model.
        only: regular expression for the names of the matrices that are quantised; the others keep 16 bits.
    """

    model: str = ""
    text: str = ""
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
    tuning_seed: int = 0
    train_steps: int = 120
    reconstruct: int = 0
    reconstruct_blocks: int = 24
    rates: dict = dataclasses.field(default_factory=dict)
    calibrate_on: str = "given"
    reconstruct_on: str = "given"
    blocks: dict = dataclasses.field(default_factory=dict)
    one_bit: float = 0.0
    emphasis: tuple = ()
    end_to_end: dict = dataclasses.field(default_factory=dict)
    only: str = ""

    def __post_init__(self):
        sequences = self.reconstruct * self.reconstruct_blocks
        sequences += self.end_to_end.get("steps", 0) * self.end_to_end.get("batch", BATCH)
        self.one_bit = self.one_bit or costs_before(sequences * SEQUENCE)[-1]


DEFAULTS = dataclasses.asdict(Variant())


class Experiment(Planner):
    """The planner with other errors than the learner's.

    Attributes:
        emphasis: factor for each block, or nothing.
    """

    emphasis: tuple = ()

    def _sensitivity(self, name: str):
        factor = self.emphasis[int(re.search(r"\.(\d+)\.", name)[1])] if self.emphasis else 1.0
        return super()._sensitivity(name) * factor

    def see_correction(self, name, fit) -> None:
        """Replaces a matrix's errors [N, 3] by those that `fit(book, row_bits)` leaves in its channels, [N]."""
        book = self._codebooks[name]
        for place, bits in enumerate((4, 2, 1)):
            book.errors[:, place] = fit(book, torch.full((len(book.errors),), bits, dtype=torch.uint8))


def quantise(session, v: Variant):
    """(packed weight, A, B) of every matrix, on the CPU; dense weights for HQQ and where `v.only` leaves them.

    session: an `accuracy_grid.Session`, of which weights, targets and calibrations are read.

    On the CPU because many processes that wait for one GPU at every small step make each other slow.
    """
    if v.method == "hqq":
        dense = {name: hqq.hqq(weight, int(v.bits)) for name, weight in session.weights.items()}
        return {name: (weight, *plain_start(weight, v.rank)) for name, weight in dense.items()}
    if v.method == "efficientqat":  # its codes are made with the blocks
        return {name: (weight, *plain_start(weight, v.rank)) for name, weight in session.weights.items()}
    config = LowRAConfig(
        bits=v.bits, budget=v.budget, sensitivity=v.sensitivity, refine=v.refine, menu=v.menu, group_size=v.group_size,
        scales=v.scales, codebook=v.codebook, assigner=v.assigner,
    )  # fmt: skip
    calibration = session.calibration(v.calibrate_on)
    planner = Experiment(config, None, calibration)
    planner.emphasis = tuple(v.emphasis)
    planner.costs = (1.0, 1.0, v.one_bit)

    def fit(name, book, row_bits):
        weight = session.weights[name]
        moment = calibration.moment(name) if v.method == "cloq" or v.feedback else None

        def pack(matrix):
            return quantize_matrix(matrix, book, row_bits, config)

        packed, factors = initialize(
            weight, pack, v.rank, v.rank, v.method, v.steps, v.seed, moment=moment, feedback=v.feedback
        )
        return packed, factors.lora_A, factors.lora_B

    wanted = {name: target for name, target in session.targets.items() if re.search(v.only, name)}
    for name, target in wanted.items():
        planner.add(name, target, session.weights[name])
        if v.aware:

            def left_over(book, row_bits, name=name):
                packed, a, b = fit(name, book, row_bits)
                left = session.weights[name] - packed.dequantize() - b @ a
                seen = left @ calibration.moment(name) if v.method == "cloq" else left
                return (seen * left).sum(dim=1)

            planner.see_correction(name, left_over)
    plan = planner.assign()
    dense = {name: session.weights[name] for name in session.targets if name not in wanted}
    kept = {name: (weight, *plain_start(weight, v.rank)) for name, weight in dense.items()}
    return kept | {name: fit(name, plan.codebooks[name], plan.row_bits[name]) for name in wanted}


def true_bits(session, v: Variant, fitted) -> float:
    """Everything stored, per weight that is quantised."""
    if v.method == "hqq":
        return hqq.true_bits(int(v.bits))
    if v.method == "efficientqat":
        return accuracy_efficientqat.true_bits(int(v.bits))
    packed = {name: entry[0] for name, entry in fitted.items() if isinstance(entry[0], PackedWeight)}
    return sum(weight.stored_bits for weight in packed.values()) / sum(session.weights[n].numel() for n in packed)


def reconstructed(session, v: Variant, fitted):
    """What `fitted` packs after its blocks were trained on the session's device, by name: `TrainedWeight`, or what
    EfficientQAT makes of it; and what the training reports.
    """
    device = session.device

    def start(name):
        packed, a, b = fitted[name]
        there = {key: tensor.to(device) for key, tensor in packed.tensors().items()}
        return dataclasses.replace(packed, **there), LowRank(a.to(device), b.to(device))

    block_training.RATES.update(RATES | v.rates)
    folder = pathlib.Path(session.folder)
    source = DenseCheckpoint(safetensors_files(folder), empty_model(folder))
    targets = session.targets
    if v.only:
        targets = {name: target for name, target in targets.items() if isinstance(fitted[name][0], PackedWeight)}
    sequences = session.text(v.reconstruct_on, v.reconstruct_blocks)
    stream = BlockStream(source, targets, sequences, block_training.BATCH, device)
    if v.method == "efficientqat":
        return dict(accuracy_efficientqat.block_ap(stream, int(v.bits), v.reconstruct, v.seed, v.rates)), {}
    if v.blocks:
        weights, by_blocks = accuracy_blocks.train(
            session, stream, start, v.reconstruct, v.seed, session.held_out(), **v.blocks
        )
        return weights, {"kl_by_blocks": by_blocks}
    trained = {}
    trained_before = lambda block: None if block.targets else {}  # noqa: E731 - one that is left dense
    for block in block_training.train_blocks(stream, start, 1.0, v.reconstruct, v.seed, trained_before):
        trained.update(block.weights)
    return trained, {}


def save_fitted(fitted, path):
    """Packed or dense weights and factors by name, into a safetensors file."""
    tensors = {}
    for name, (stored, a, b) in fitted.items():
        parts = stored.tensors() if isinstance(stored, PackedWeight) else {"dense": stored}
        tensors |= {f"{name}:{part}": tensor.contiguous() for part, tensor in {**parts, "a": a, "b": b}.items()}
        if isinstance(stored, PackedWeight):
            tensors[f"{name}:shape"] = torch.tensor([stored.in_features, stored.group_size])
    save_file(tensors, path)


def load_fitted(path):
    parts = {}
    for key, tensor in load_file(path).items():
        name, _, part = key.rpartition(":")
        parts.setdefault(name, {})[part] = tensor
    fitted = {}
    for name, own in parts.items():
        a, b = own.pop("a"), own.pop("b")
        if "dense" in own:
            fitted[name] = own["dense"], a, b
        else:
            columns, group = own.pop("shape").tolist()
            fitted[name] = PackedWeight(**{"scale_steps": None, **own}, in_features=columns, group_size=group), a, b
    return fitted


def as_packed(fitted, trained):
    """`fitted` with what was trained in its place, on the CPU."""
    packed = {}
    for name, weight in trained.items():
        if not isinstance(weight, TrainedWeight):
            packed[name] = weight, *fitted[name][1:]
            continue
        stored, factors = weight.packed(), weight.factors()
        there = {key: tensor.cpu() for key, tensor in stored.tensors().items()}
        packed[name] = dataclasses.replace(stored, **there), factors.lora_A.cpu(), factors.lora_B.cpu()
    return fitted | packed


def plain_start(weight, rank):
    a = (torch.rand(rank, weight.shape[1]) * 2 - 1) * weight.shape[1] ** -0.5
    return a, torch.zeros(weight.shape[0], rank)
