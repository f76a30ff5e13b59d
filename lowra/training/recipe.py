"""The recipe of a fine-tuning run: flat YAML and `key=value` overrides, all checked before anything runs."""

import dataclasses
import pathlib
import types
import typing

import yaml

from ..config import check_keys

TASKS = ("language_modeling", "instruction", "summarization")
TABLES = ("frozen", "levels", "levels_and_scales")


@dataclasses.dataclass
class Recipe:
    """What is trained on what, and how. The defaults are the paper's WikiText-2 recipe (Table 10).

    Attributes:
        model: local folder or hub name of a dense checkpoint, or a folder that `lowra quantize` wrote.
        task: "language_modeling" (blocks of running text), "instruction" (source and target, loss on the target) or
            "summarization" (encoder-decoder, ROUGE on generated summaries).
        output: folder for adapter, curve and metrics.
        method: preset of `lowra.training.methods`: lora16, qlora, loftq, pissa, assigner_only, lowra, hqq.
        bits: nominal bits per quantised parameter; unused by lora16.
        rank, alpha, dropout: of LoRA; alpha None means alpha = rank, the paper's choice. A packed model that brings its
            initial adapter keeps that one's.
        init_steps: LoftQ's alternating steps.
        tables: of a packed base: "frozen", or what is trained with the adapter and saved beside it: "levels", or
            "levels_and_scales".
        tables_learning_rate: their peak rate, whatever the adapter's is; without weight decay.
        quantization: options of `LowRAConfig` set on top of the method's, such as `sensitivity: none`.
        dataset, dataset_config: hub name and configuration; train_file and validation_file take their place.
        train_file, validation_file: local text, one paragraph a line, or JSON lines with the columns below.
        train_split, validation_split: splits of the hub data set; validation_split None carves it out of train.
        carve_validation: rows taken from train with data_seed where there is no validation data.
        text_column, source_column, target_column: fields of a row; for instruction data source_column may be None.
        max_train_samples, max_eval_samples: first rows (or blocks) used; None uses all.
        block_size: tokens of a block of running text.
        source_length, target_length: tokens; longer ones are cut.
        num_beams: of generated summaries; None leaves it to the model.
        max_steps: optimiser steps; None trains for `epochs`.
        batch_size, accumulation: sequences per device and forward pass; passes per optimiser step.
        eval_batch_size: sequences per evaluation pass.
        learning_rate, scheduler, warmup_ratio, weight_decay, beta2, max_grad_norm: of AdamW and its schedule.
        optimizer: a name of Transformers' optimisers.
        group_by_length: batches of similar lengths.
        gradient_checkpointing: recompute activations in backward.
        bf16: base and autocast in bfloat16; else float32. Adapter factors are float32 in both.
        seed, data_seed: of training and of the carved validation rows.
        eval_steps, save_steps: optimiser steps between evaluations and checkpoints; None does neither.
        eval_epochs: evaluate after each epoch.
        logging_steps: optimiser steps between points of the loss curve.
        workers: processes that load data.
        report_to: trackers of Transformers, such as "wandb,tensorboard", or "none".
        resume: go on from the last checkpoint in `output`.
        trust_remote_code: run the Python code that the model brings, where its architecture is its own.
    """

    model: str
    task: str = "language_modeling"
    output: str = "runs/finetune"
    method: str = "lowra"
    bits: float = 2.0
    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    init_steps: int = 5
    tables: str = "frozen"
    tables_learning_rate: float = 4e-3
    quantization: dict = dataclasses.field(default_factory=dict)
    dataset: str | None = None
    dataset_config: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    train_split: str = "train"
    validation_split: str | None = "validation"
    carve_validation: int = 1024
    text_column: str = "text"
    source_column: str | None = None
    target_column: str | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    block_size: int = 1024
    source_length: int = 512
    target_length: int = 128
    num_beams: int | None = None
    max_steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 16
    accumulation: int = 4
    eval_batch_size: int = 4
    learning_rate: float = 3e-4
    scheduler: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.1
    beta2: float = 0.999
    max_grad_norm: float = 0.3
    optimizer: str = "adamw_torch"
    group_by_length: bool = False
    gradient_checkpointing: bool = True
    bf16: bool = True
    seed: int = 0
    data_seed: int = 42
    eval_steps: int | None = None
    eval_epochs: bool = False
    save_steps: int | None = None
    logging_steps: int = 1
    workers: int = 0
    report_to: str = "none"
    resume: bool = False
    trust_remote_code: bool = False

    def __post_init__(self):
        for name, kind in typing.get_type_hints(Recipe).items():
            setattr(self, name, _checked(name, getattr(self, name), kind))
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}; got {self.task!r}.")
        if self.tables not in TABLES:
            raise ValueError(f"tables must be one of {', '.join(TABLES)}; got {self.tables!r}.")
        if not self.model:
            raise ValueError("The recipe names no model: give model=PATH.")
        if not self.train_file and not self.dataset:
            raise ValueError("The recipe names no data: give train_file=FILE, or dataset=NAME of the hub.")
        if self.task == "summarization" and not (self.source_column and self.target_column):
            raise ValueError("summarization needs source_column and target_column, such as document and summary.")
        positive = ("rank", "init_steps", "block_size", "source_length", "target_length", "batch_size", "accumulation")
        for name in (*positive, "eval_batch_size", "learning_rate", "tables_learning_rate", "logging_steps", "epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in ("max_steps", "eval_steps", "save_steps", "num_beams", "max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or left out; got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}.")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must be in [0, 1]; got {self.warmup_ratio}.")

    @classmethod
    def from_dict(cls, content: dict) -> "Recipe":
        """From the keys of a YAML file.

        Raises:
            ValueError: an unknown key (with the nearest known one), a value of the wrong kind or out of range.
        """
        check_keys(content, [field.name for field in dataclasses.fields(cls)], "The recipe")
        if "model" not in content:
            raise ValueError("The recipe names no model: give model=PATH.")
        return cls(**content)

    def changed(self, overrides: list[str]) -> "Recipe":
        """A copy with `key=value` overrides applied."""
        return Recipe.from_dict(override(dataclasses.asdict(self), overrides))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def load_recipe(path: str | pathlib.Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file and `key=value` overrides; `quantization.key=value` reaches the options of LowRAConfig.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key or a value that cannot be used.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {path}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys; a recipe is a YAML file of `key: value` lines.")
    return Recipe.from_dict(override(content, overrides))


def override(content: dict, overrides: typing.Sequence[str]) -> dict:
    """A copy of a recipe's keys with `key=value` strings applied, the values read as YAML."""
    content = {**content, "quantization": dict(content.get("quantization") or {})}
    for entry in overrides:
        key, equals, text = entry.partition("=")
        if not equals or not key:
            raise ValueError(f"An override is key=value; got {entry!r}.")
        value = yaml.safe_load(text) if text else None
        outer, dot, inner = key.partition(".")
        if dot and outer == "quantization":
            content["quantization"][inner] = value
        else:
            content[key] = value
    return content


def _checked(name: str, value, kind):
    """The value as the field's kind; YAML reads 1e-4 as text and 2 as int."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{name} must be of type {kind.__name__}; got {value!r}.")
