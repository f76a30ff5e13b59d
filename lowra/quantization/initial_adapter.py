"""The adapter that is written beside a packed checkpoint, as PEFT reads it."""

import dataclasses
import math
import pathlib

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    PreTrainedModel,
)

from ..checkpoints.atomic import save_json, save_tensors
from ..checkpoints.guarded import read_tensors
from ..checkpoints.records import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    digest_of_adapter,
    record_of_base,
    record_of_files,
    save_record,
)
from ..checkpoints.targets import Target
from ..config import LowRAConfig
from .loftq import METHODS, STEPS

ADAPTER_FOLDER = "initial_adapter"


MOST_RANK = 2**16  # more than any layer is wide
LEAST_ALPHA, MOST_ALPHA = 1e-6, 1e6  # beyond, one of the factors leaves what the types hold
MOST_ROUNDS = 1000  # of whatever converges in a few: more would be a slip of the keyboard, and hours


@dataclasses.dataclass
class AdapterRecipe:
    """The adapter to write beside the checkpoint.

    Attributes:
        rank: r.
        alpha: LoRA's alpha; None means alpha = r, the paper's choice.
        method: "loftq", "cloq" (needs a calibration with second moments), "pissa" or "lora".
        steps: alternating steps of LoftQ and CLoQ.
        dropout: recorded for training.
    """

    rank: int
    alpha: float | None = None
    method: str = "loftq"
    steps: int = STEPS
    dropout: float = 0.0

    def __post_init__(self) -> None:
        is_given = self.alpha is not None
        self.alpha = float(self.rank if self.alpha is None else self.alpha)
        if self.method not in METHODS:
            raise ValueError(f"The initialisation must be one of {', '.join(METHODS)}; got {self.method!r}.")
        for name, number in (("rank", self.rank), ("number of steps", self.steps)):
            if number < 1:
                raise ValueError(f"A {name} is at least 1; got {number}.")
        if self.steps > MOST_ROUNDS:
            raise ValueError(f"A number of steps is at most {MOST_ROUNDS}, of which a few do; got {self.steps}.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite; got {self.alpha:g}.")
        if is_given and not LEAST_ALPHA <= self.alpha <= MOST_ALPHA:
            raise ValueError(f"alpha must be from {LEAST_ALPHA:g} to {MOST_ALPHA:g}; got {self.alpha:g}.")

    @property
    def scaling(self) -> float:
        """alpha / r, by which the product of the factors counts."""
        return (self.alpha or self.rank) / self.rank

    def started(self) -> dict:
        """What the packed checkpoint records of it: what its packed weights depend on."""
        return {name: getattr(self, name) for name in ("rank", "alpha", "method", "steps")}


def check_rank(rank: int, targets: dict[str, Target]) -> None:
    """
    Raises:
        ValueError: no layer takes an adapter, or one is too small for the rank.
    """
    adapted = [target for target in targets.values() if target.adapted]
    if not adapted:
        raise ValueError("Experts, embeddings and head take no adapter, and nothing else is packed: give no rank.")
    smallest = min(adapted, key=lambda target: min(target.out_features, target.in_features))
    limit = min(smallest.out_features, smallest.in_features)
    if rank > limit:
        raise ValueError(
            f"A rank of {rank} does not fit {smallest.name} [{smallest.out_features}, {smallest.in_features}]: give at "
            f"most {limit}, or leave that layer dense (modules_to_not_convert, --keep-dense)."
        )


def task_type(model: PreTrainedModel) -> str | None:
    """PEFT's name for what a model is for, by which its Auto classes choose; None for other than language models."""
    own = getattr(type(model), "_auto_class", None)  # of a class that came with its checkpoint
    for name, mapping, door in (
        ("SEQ_2_SEQ_LM", MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, "AutoModelForSeq2SeqLM"),
        ("CAUSAL_LM", MODEL_FOR_CAUSAL_LM_MAPPING, "AutoModelForCausalLM"),
    ):
        if own == door or mapping.get(type(model.config), None) is type(model):
            return name
    return None


def write_adapter(
    factors: list[pathlib.Path],
    folder: pathlib.Path,
    base: pathlib.Path,
    model: PreTrainedModel,
    targets: dict[str, Target],
    recipe: AdapterRecipe,
    config: LowRAConfig,
) -> None:
    """Writes a PEFT adapter.

    Args:
        factors: safetensors files with lora_A and lora_B of the layers.
        folder: to create.
        base: where the packed checkpoint will lie.
        model: of the base.
        targets: what is packed; those that are adapted have factors.
        recipe: of the adapter.
        config: of the packed checkpoint.
    """
    tensors = {}
    for path in factors:
        tensors.update(read_tensors(path, "factors of the initial adapter")[0])
    save_tensors(tensors, folder / ADAPTER_WEIGHTS)
    save_json(
        {
            "peft_type": "LORA",
            "task_type": task_type(model),
            "base_model_name_or_path": str(base.resolve()),  # found from whatever folder that is loaded
            "r": recipe.rank,
            "lora_alpha": recipe.alpha,
            "lora_dropout": recipe.dropout,
            "target_modules": sorted(target.name for target in targets.values() if target.adapted),
            "bias": "none",
            "init_lora_weights": True,
            "inference_mode": False,
        },
        folder / ADAPTER_CONFIG,
    )
    start = {"init": recipe.method, "start": digest_of_adapter(folder / ADAPTER_WEIGHTS)}
    save_record({**record_of_base(config), **start, **record_of_files(folder)}, folder)
