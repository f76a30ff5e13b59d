"""The plan of a model: what the learner found for every matrix, and the precision the assigner gives each channel."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from ..checkpoints.dense import DenseCheckpoint, check_finite
from ..checkpoints.guarded import read_tensors
from ..checkpoints.targets import Target
from ..config import MOST_GROUP, LowRAConfig
from ..weights.codebook import PRECISIONS, Codebook
from ..weights.fingerprint import fingerprint_of, weight_digest
from ..weights.packed import channel_bits
from .assigner import Assignment, Problem, assign
from .calibration import Calibration
from .job import with_bar
from .joint_training import BATCH
from .learner import learn_codebook
from .work import LEARNED, WorkFolder

# What a unit of squared error at 4, 2 and 1 bits costs where sensitivities are of "fisher". They take errors for small;
# those of one bit cost more than that, and where there is a choice too many channels would have it. Codes that are
# trained on much text make up for it (docs/lab/accuracy.md).
FISHER_COSTS = (1.0, 1.0, 3.0)
TRAINED_COSTS = (1.0, 1.0, 1.0)
# Tokens that blocks and all blocks together are trained on, all passes together. On 0.2 million of all blocks together
# it costs, on 0.4 million of blocks nothing was seen either way, on 1 million it pays.
MUCH_TRAINING = 1_000_000


def costs_before(tokens: int) -> tuple[float, ...]:
    """tokens: that the codes will be trained on."""
    return TRAINED_COSTS if tokens >= MUCH_TRAINING else FISHER_COSTS


def fisher_costs(config: LowRAConfig, calibration: Calibration | None) -> tuple[float, ...]:
    kept = [] if calibration is None else [calibration.sequences, calibration.further]
    texts = [text for text in kept if text is not None]
    if not texts:
        return costs_before(0)
    return costs_before(config.reconstruct * texts[0].numel() + config.end_to_end * BATCH * texts[-1].shape[1])


@dataclasses.dataclass
class Plan:
    """Codebook and precision of every matrix, by the name of its weight.

    Attributes:
        codebooks: tables of each matrix, on the CPU.
        row_bits: uint8 [N] of each matrix.
        energy: sum of squares of each matrix.
        assignment: the assigner's report over all channels.
        error: sum of squared differences over the sum of squares, over all matrices.
        fingerprint: of the base's weights.
    """

    codebooks: dict[str, Codebook]
    row_bits: dict[str, torch.Tensor]
    energy: dict[str, float]
    assignment: Assignment
    error: float
    fingerprint: str

    def loss(self, name: str) -> float:
        """Sum of squared differences of one matrix when it is packed by its tables as it is."""
        return float(self.codebooks[name].error_at(self.row_bits[name]).sum())


class Planner:
    """Collects one matrix at a time, then assigns precisions over all of them.

    Attributes:
        costs: of a unit of squared error at 4, 2 and 1 bits, where sensitivities are of "fisher".
    """

    def __init__(self, config: LowRAConfig, store: WorkFolder | None = None, calibration: Calibration | None = None):
        """
        Args:
            config: recipe and budget.
            store: keeps finished matrices, so that a killed run resumes; None keeps nothing.
            calibration: for sensitivity "fisher".

        Raises:
            ValueError: "fisher" without a calibration.
        """
        if config.sensitivity == "fisher" and calibration is None:
            raise ValueError(
                "sensitivity=fisher needs a calibration: run `lowra quantize MODEL --calibrate FILE`, or pass "
                "calibration= to quantize_checkpoint."
            )
        self.config = config
        self.calibration = calibration
        self.store = store
        self.costs = fisher_costs(config, calibration)
        self._targets: dict[str, Target] = {}
        self._codebooks: dict[str, Codebook] = {}
        self._energy: dict[str, float] = {}
        self._samples: dict[str, str] = {}

    def add(self, name: str, target: Target, weight: torch.Tensor) -> None:
        """Learns the tables of one matrix [N, K], on the device it is on.

        Raises:
            ValueError: NaN or Inf in the weight, named.
        """
        check_finite(name, weight)
        codebook = learn_codebook(weight, self.config)
        energy = float(weight.float().square().sum(dtype=torch.float64))
        record = {
            "levels": codebook.levels.cpu(),
            "thresholds": codebook.thresholds.cpu(),
            "errors": codebook.errors.cpu(),
            "energy": torch.tensor([energy], dtype=torch.float64),
            "sample": torch.frombuffer(bytearray.fromhex(weight_digest(name, weight)), dtype=torch.uint8),
        }
        if self.store is not None:
            self.store.save(LEARNED, name, record)
        self._keep(name, target, record)

    def has_stored(self, name: str) -> bool:
        """Whether an earlier run has learned a matrix."""
        return self.store is not None and self.store.has(LEARNED, name)

    def resume(self, name: str, target: Target) -> None:
        """Takes a matrix from the store."""
        if self.store is None:
            raise ValueError("This planner keeps nothing, so there is nothing to resume.")
        self._keep(name, target, read_tensors(self.store.path(LEARNED, name), "what was learned of a matrix")[0])

    def _keep(self, name: str, target: Target, record: dict[str, torch.Tensor]) -> None:
        self._targets[name] = target
        self._codebooks[name] = Codebook(record["levels"], record["thresholds"], record["errors"])
        self._energy[name] = float(record["energy"])
        self._samples[name] = bytes(record["sample"].tolist()).hex()

    def assign(self) -> Plan:
        """Spends the budget over all channels collected.

        Raises:
            ValueError: the budget cannot be met.
        """
        assignment = assign(self._problem(), self.config.assigner)
        counts = [self._targets[name].out_features for name in self._codebooks]
        parts = torch.from_numpy(assignment.row_bits).split(counts)
        row_bits = {name: part.clone() for name, part in zip(self._codebooks, parts, strict=True)}
        plan = Plan(self._codebooks, row_bits, self._energy, assignment, 0.0, fingerprint_of(self._samples))
        plan.error = sum(map(plan.loss, row_bits)) / max(sum(self._energy.values()), np.finfo(float).tiny)
        return plan

    def _problem(self) -> Problem:
        check_budget(self.config, self._targets)
        errors, each_size, costs = [], [], []
        for name, book in self._codebooks.items():
            target = self._targets[name]
            errors.append(book.errors.double().numpy() * self._sensitivity(name))
            each_size.append(np.full(target.out_features, target.in_features, dtype=np.int64))
            costs.append(np.tile(_channel_costs(target, self.config), (target.out_features, 1)))
        sizes = np.concatenate(each_size)
        budget = _budget(self.config, int(sizes.sum()))
        return Problem(np.concatenate(errors), np.concatenate(costs), sizes, budget, self.config.menu)

    def _sensitivity(self, name: str) -> np.ndarray | float:
        """What a unit of squared error costs in this matrix, or in each of its channels at each precision [N, 3]."""
        if self.config.sensitivity == "fisher" and self.calibration is not None:
            return self.calibration.channel_weights(name).double().numpy()[:, None] * np.array(self.costs)
        if self.config.sensitivity == "layer":
            # relative to the matrix: plain squared error starves whole layers of small norm
            return self._share(name) / max(self._energy[name], 1e-300)
        return 1.0

    def _share(self, name: str) -> float:
        """Weight of a matrix's relative error: that of head and embeddings by size, or as one of many they starve."""
        target = self._targets[name]
        blocks = [] if target.in_block else [other for other in self._targets.values() if other.in_block]
        if not blocks:
            return 1.0
        return target.size * len(blocks) / sum(block.size for block in blocks)


def _channel_costs(target: Target, config: LowRAConfig) -> np.ndarray:
    """Bits of one channel at each precision, as the budget counts them."""
    if config.budget == "nominal":
        return np.array([bits * target.in_features for bits in PRECISIONS], dtype=np.int64)
    shape = (target.out_features, target.in_features)
    return np.array([np.ceil(channel_bits(*shape, bits, config)) for bits in PRECISIONS], dtype=np.int64)


def check_budget(config: LowRAConfig, targets: dict[str, Target], group_sizes: Sequence[int] = ()) -> list[int]:
    """The group sizes with which the budget can be met, by shapes alone.

    Args:
        config: recipe and budget.
        targets: what is packed.
        group_sizes: to choose from; with none that of `config`.

    Raises:
        ValueError: the budget cannot be met; shapes tell, before anything is calibrated or learned.
    """
    sizes = group_sizes or (config.group_size,)
    weights = sum(target.size for target in targets.values())
    affordable = [size for size in sizes if _budget(config, weights) >= _least(config, targets, size)]
    if affordable:
        return affordable
    size, bits = max(sizes), min(config.menu)
    # rounded up, so that what is named suffices
    least, of_largest = (math.ceil(1e4 * _least(config, targets, each) / weights) / 1e4 for each in (size, MOST_GROUP))
    remedy = f", or use groups of {MOST_GROUP}, with which it is {of_largest:.4f}" if of_largest < least else ""
    raise ValueError(
        f"A budget of {config.bits:g} {config.budget} bits is below the smallest that can be built: with all channels "
        f"at {bits} bit{'s' * (bits > 1)}, in groups of {size} weights, the packed weights take {least:.4f}. Give at "
        f"least that{remedy}."
    )


def _least(config: LowRAConfig, targets: dict[str, Target], group_size: int) -> int:
    """Bits of all channels at the smallest precision of the menu."""
    config = dataclasses.replace(config, group_size=group_size)
    menu = [PRECISIONS.index(bits) for bits in config.menu]
    return sum(target.out_features * int(_channel_costs(target, config)[menu].min()) for target in targets.values())


def _budget(config: LowRAConfig, weights: int) -> int:
    """Bits that so many weights may take."""
    return int(config.bits * weights + 1e-6)


def learn(
    planner: Planner,
    source: DenseCheckpoint,
    targets: dict[str, Target],
    device: torch.device,
    progress: bool,
) -> None:
    """Feeds every target of a checkpoint to the planner, in the order of the checkpoint."""
    names = [name for name in source.names() if name in targets]
    finished = {name for name in names if planner.has_stored(name)}
    for name in with_bar(names, targets, finished, "learning", progress):
        target = targets[name]
        if name in finished:
            planner.resume(name, target)
        else:
            planner.add(name, target, target.as_matrix(source.load(name)[name]).to(device))
