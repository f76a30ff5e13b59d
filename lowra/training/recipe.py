"""The recipe of a fine-tuning run: flat YAML and `key=value` overrides, all checked before anything runs."""

import dataclasses
import functools
import json
import pathlib
import typing
from typing import Literal

import pydantic
import yaml

from ..checkpoints.guarded import read_text
from ..checkpoints.places import expanded
from ..config import check_keys
from ..quantization.initial_adapter import LEAST_ALPHA
from .kinds import (
    Alpha,
    Count,
    Few,
    Limit,
    Number,
    Passes,
    Place,
    Processes,
    Rank,
    Rate,
    RateOr0,
    Seed,
    Share,
    Tables,
    Truth,
    WholeShare,
    checked,
)
from .problems import Problems


@dataclasses.dataclass
class Recipe:
    """What is trained on what, and how. The defaults are the paper's WikiText-2 recipe (Table 10).

    Attributes:
        model: local folder or hub name of a dense checkpoint, or a folder that `lowra quantize` wrote.
        task: "language_modeling" (blocks of running text), "instruction" (source and target, loss on the target),
            "chat" (conversations in the model's chat template, loss on the assistant's turns) or "summarization"
            (encoder-decoder, ROUGE on generated summaries).
        output: folder for adapter, curve and metrics.
        method: preset of `lowra.training.methods`: lora16, qlora, loftq, pissa, assigner_only, lowra, hqq.
        bits: nominal bits per quantised parameter; unused by lora16.
        rank, alpha, dropout: of LoRA; alpha None means alpha = rank, the paper's choice. A packed model that brings its
            initial adapter keeps that one's.
        target_modules: names of layers, or their last parts, that get the adapter; None means all packed ones.
        rslora, dora: LoRA scaled by alpha / sqrt(rank), and LoRA of direction and magnitude. These three are for
            adapters that start anew, not for those fitted to what quantisation lost.
        init_steps: LoftQ's alternating steps.
        tables: of a packed base: "frozen", or what is trained with the adapter and saved beside it: "shared" (what all
            levels of a channel and all scales of a group of inputs have in common, at next to no cost), "levels" or
            "levels_and_scales". "auto" is "shared" on a base that was calibrated, without dora, and "frozen" otherwise
            (`lowra.training.default_tables`), in a grid "frozen", so that all of its runs train alike.
        tables_learning_rate: their peak rate, whatever the adapter's is; without weight decay.
        quantization: options of `LowRAConfig` set on top of the method's, such as `sensitivity: none`.
        dataset, dataset_config: hub name and configuration; train_file and validation_file take their place.
        train_file, validation_file: local text, one paragraph a line, or JSON lines with the columns below; for chat,
            JSON lines with `messages`, `prompt` and `completion`, or `conversations`.
        train_split, validation_split: splits of the hub data set; validation_split None carves it out of train.
        carve_validation: rows taken from train with data_seed where there is no validation data.
        text_column, source_column, target_column: fields of a row; for instruction data source_column may be None.
        max_train_samples, max_eval_samples: first rows (or blocks) used; None uses all.
        block_size: tokens of a block of running text; of a conversation, and of a row where they are packed.
        chat_template: file with a Jinja template that takes the place of the tokenizer's.
        packing: several conversations in one row of at most block_size tokens, without padding between them.
        source_length, target_length: tokens; longer ones are cut.
        num_beams: of generated summaries; None leaves it to the model.
        max_steps, epochs: optimiser steps; where they are None, passes over the training data.
        batch_size, accumulation: sequences per device and forward pass; passes per optimiser step.
        eval_batch_size: sequences per evaluation pass.
        learning_rate, scheduler, warmup_ratio, weight_decay, beta2, max_grad_norm: of AdamW and its schedule.
        optimizer: a name of Transformers' optimisers.
        group_by_length: batches of similar lengths.
        gradient_checkpointing: recompute activations in backward.
        layer_graphs: run the layers as CUDA graphs (`lowra.capture_layers`); None does where one process trains on a
            GPU, with gradient checkpointing.
        offload_activations: the inputs of checkpointed layers wait in the host's memory, for long contexts on a GPU
            (`lowra.offload_activations`).
        tiled_mlp: MLPs and norms work on 4,096 tokens at a time, for long contexts (`lowra.tile_mlps`). Neither goes
            with layer_graphs.
        liger: norms, rotary embedding and gated activations by Liger's kernels, on a GPU.
        bf16: base and autocast in bfloat16; else float32. Adapter factors are float32 in both. On a GPU without
            bfloat16 (before Ampere) fp16 takes its place.
        fp16: in place of bf16, float16 with loss scaling; on GPUs alone.
        seed, data_seed: of training and of the carved validation rows.
        eval_steps: optimiser steps between evaluations; None does not evaluate on the way.
        save_steps: optimiser steps between checkpoints, from which a run that crashed resumes; None writes none.
        eval_epochs: evaluate after each epoch.
        logging_steps: optimiser steps between points of the loss curve.
        workers: processes that load data, no more than there are cores.
        report_to: trackers of Transformers, such as "wandb,tensorboard", or "none".
        resume: go on from the newest whole checkpoint in `output`.
        trust_remote_code: run the Python code that the model brings, where its architecture is its own.
        given: names of the fields that were set by overrides, such as "quantization.menu". Where such a field has no
            effect it is refused, and one of a recipe's file is not (`lowra.training.settled`). No key of the file.
    """

    model: Place
    task: Literal["language_modeling", "instruction", "chat", "summarization"] = "language_modeling"
    output: Place = "runs/finetune"
    method: str = "lowra"
    bits: Number = 2.0
    rank: Rank = 64
    alpha: Alpha | None = None
    dropout: Share = 0.0
    target_modules: list[str] | None = None
    rslora: Truth = False
    dora: Truth = False
    init_steps: Few = 5
    tables: Tables = "auto"
    tables_learning_rate: Rate = 4e-3
    quantization: dict = dataclasses.field(default_factory=dict)
    dataset: str | None = None
    dataset_config: str | None = None
    train_file: Place | None = None
    validation_file: Place | None = None
    train_split: str = "train"
    validation_split: str | None = "validation"
    carve_validation: Count = 1024
    text_column: str = "text"
    source_column: str | None = None
    target_column: str | None = None
    max_train_samples: Limit | None = None
    max_eval_samples: Limit | None = None
    block_size: Count = 1024
    chat_template: Place | None = None
    packing: Truth = False
    source_length: Count = 512
    target_length: Count = 128
    num_beams: Few | None = None
    max_steps: Limit | None = None
    epochs: Passes = 1.0
    batch_size: Count = 16
    accumulation: Count = 4
    eval_batch_size: Count = 4
    learning_rate: Rate = 3e-4
    scheduler: str = "cosine"
    warmup_ratio: WholeShare = 0.03
    weight_decay: RateOr0 = 0.1
    beta2: Share = 0.999
    max_grad_norm: RateOr0 = 0.3
    optimizer: str = "adamw_torch"
    group_by_length: Truth = False
    gradient_checkpointing: Truth = True
    layer_graphs: Truth | None = None
    offload_activations: Truth = False
    tiled_mlp: Truth = False
    liger: Truth = False
    bf16: Truth = True
    fp16: Truth = False
    seed: Seed = 0
    data_seed: Seed = 42
    eval_steps: Limit | None = None
    eval_epochs: Truth = False
    save_steps: Limit | None = 25
    logging_steps: Count = 1
    workers: Processes = 0
    report_to: str = "none"
    resume: Truth = False
    trust_remote_code: Truth = False
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self) -> None:
        problems = Problems("The recipe")
        for name, checker in _checkers().items():
            with problems.noted():
                setattr(self, name, checked(name, getattr(self, name), checker))
        problems.report()
        checks = (self._check_types, self._check_data, self._check_layers, self._check_quantization)
        for check in checks:
            with problems.noted():
                check()
        problems.report()

    def _check_types(self) -> None:
        if self.alpha is not None and self.alpha < LEAST_ALPHA:
            raise ValueError(f"alpha must be at least {LEAST_ALPHA:g}, or left out; got {self.alpha:g}.")
        if self.fp16 and self.bf16:
            if {"bf16", "fp16"} <= self.given:
                raise ValueError("bf16=true and fp16=true are two types for one computation: give one of them.")
            self.bf16 = "bf16" in self.given  # what the command line says counts before the file
            self.fp16 = not self.bf16

    def _check_data(self) -> None:
        if not self.train_file and not self.dataset:
            raise ValueError("The recipe names no data: give train_file=FILE, or dataset=NAME of the hub.")
        if self.task == "summarization" and not (self.source_column and self.target_column):
            raise ValueError("summarization needs source_column and target_column, such as document and summary.")

    def _check_layers(self) -> None:
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(
                "target_modules names no layer: leave it out for all, or name some, such as [q_proj, v_proj]."
            )
        if self.task in ("language_modeling", "chat") and self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, or there is nothing to predict; got {self.block_size}.")

    def _check_quantization(self) -> None:
        try:
            json.dumps(self.quantization)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"quantization holds what config.json cannot hold: {error}.") from None

    @classmethod
    def from_dict(cls, content: dict, given: typing.Iterable[str] = ()) -> "Recipe":
        """From the keys of a YAML file, and the names of those that were set by overrides.

        Raises:
            ValueError: an unknown key (with the nearest known one), a value of the wrong kind or out of range.
        """
        problems, known = Problems("The recipe"), [name for name in _checkers() if name != "given"]
        for key in content:
            with problems.noted():
                check_keys([key], known, "The recipe")
        with problems.noted():
            if not content.get("model"):
                raise ValueError("The recipe names no model: give model=PATH.")
        if problems.found:  # and what else is wrong
            with problems.noted():
                cls(**{"model": "none", **{key: content[key] for key in known if content.get(key) is not None}})
        problems.report()
        return cls(**content, given=frozenset(given))

    def changed(self, overrides: typing.Sequence[str]) -> "Recipe":
        """A copy with `key=value` overrides applied."""
        content, given = override(self.to_dict(), overrides)
        return Recipe.from_dict(content, self.given | given)

    def to_dict(self) -> dict:
        """The keys of a YAML file."""
        content = dataclasses.asdict(self)
        del content["given"]
        return content


def load_recipe(path: str | pathlib.Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file and `key=value` overrides; `quantization.key=value` reaches the options of LowRAConfig.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key or a value that cannot be used.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {path}.")
    content = _parsed(read_text(path, "a recipe"), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys; a recipe is a YAML file of `key: value` lines.")
    return Recipe.from_dict(*override(content, overrides))


def override(content: dict, overrides: typing.Sequence[str]) -> tuple[dict, set[str]]:
    """A copy of a recipe's keys with `key=value` strings applied, the values read as YAML, and the names of those."""
    quantization = content.get("quantization") or {}
    if not isinstance(quantization, dict):
        raise ValueError(f"quantization must be of type dict; got {quantization!r}.")
    content, given = {**content, "quantization": dict(quantization)}, set()
    for entry in overrides:
        key, equals, text = entry.partition("=")
        if not equals or not key:
            raise ValueError(f"An override is key=value; got {entry!r}.")
        if key in given:
            raise ValueError(f"{key} is given twice; which of them is meant?")
        given.add(key)
        value = _parsed(text, f"The value of {entry!r:.100}") if text else None
        outer, dot, inner = key.partition(".")
        if dot and outer == "quantization":
            if not isinstance(content["quantization"], dict):
                raise ValueError(f"{key} is given beside quantization={content['quantization']!r}.")
            content["quantization"][inner] = value
        else:
            content[key] = value
    return content, given


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's own would take the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep=deep)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in mapping:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return mapping


def _parsed(text: str, place: str) -> typing.Any:
    """
    Raises:
        ValueError: not YAML, or YAML that makes objects of other types than JSON has.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date such as 2026-13-45
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{place} is not readable as YAML: {reason}") from error


@functools.cache
def _checkers() -> dict[str, pydantic.TypeAdapter]:
    """What checks each field."""
    config = pydantic.ConfigDict(coerce_numbers_to_str=True)
    kinds = typing.get_type_hints(Recipe, include_extras=True)
    return {name: pydantic.TypeAdapter(kind, config=config) for name, kind in kinds.items()}
