"""What a command will need of memory: said at its start, and refused where the machine does not have it."""

import dataclasses
import os
import pathlib
import re
from typing import Any

import torch

from ..inspection.requirements import PYTHON_BYTES, Run, finetuning, quantising
from ..inspection.shapes import ModelShape, UnknownMemory, read_shape
from ..training import hqq
from ..training.default_tables import chosen_tables
from ..training.methods import check_method, quantization_config
from ..training.recipe import Recipe

# Of the memory that a card is sold with, a driver leaves so much (a 24 GB RTX 4090: 23.6 GiB).
_LEFT_BY_DRIVER = 0.97


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU, there or only named.

    Attributes:
        name: for messages.
        size: bytes that programs can have.
        large_workspace: see `Run`.
    """

    name: str
    size: float
    large_workspace: bool = False


def named_card(size: str) -> Card:
    """The card of a size such as "8GB", or "8192 MiB" as nvidia-smi writes it.

    Raises:
        ValueError: no size.
    """
    found = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)\s*([MG])(?:i?B)?", size.strip(), flags=re.IGNORECASE)
    gigabytes = 0.0 if not found else float(found[1]) / (1 if found[2] in "gG" else 1024)
    if not 0 < gigabytes < 10_000:
        raise ValueError(f"--gpu takes a size with its unit, such as 8GB or 8192MiB; got {size!r}.")
    return Card(f"a card of {gigabytes:.4g} GB", gigabytes * 2**30 * _LEFT_BY_DRIVER)


def card_of(device: int = 0) -> Card | None:
    """The GPU that is there, or None."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    return Card(f"{properties.name} ({gib(properties.total_memory)})", properties.total_memory, properties.major >= 9)


def host_bytes() -> float:
    """Memory of this machine, or of the control group that this process may use."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        sizes.append(int(text))
    return float(min(sizes))


def shape_if_known(model: str, trust_remote_code: bool, show: bool = True) -> ModelShape | None:
    """The shape of a model; None, with a line that says so, where its memory is not known beforehand.

    None without a word where the model cannot be used: the command reads it next, and says why.
    """
    try:
        return read_shape(model, trust_remote_code)
    except UnknownMemory as reason:
        if show:
            print(f"memory: not known beforehand: {reason}")
    except (OSError, ValueError):
        pass
    return None


def announce_quantising(shape: ModelShape, device: torch.device, check: bool, show: bool = True, **asked: Any) -> None:
    """Says what quantising needs.

    Args:
        shape: of the model.
        device: where the arithmetic runs.
        check: refuse what does not fit.
        show: print it.
        asked: see `quantising`.

    Raises:
        ValueError: it does not fit the GPU, or the host's memory.
    """
    on_gpu = device.type == "cuda"
    needed = quantising(shape, on_gpu, **asked)
    if show:
        places = f"{gib(needed.device)} on the GPU and " if on_gpu else ""
        beside = ", beside the dense model for the calibration" if asked.get("calibrating") and on_gpu else ""
        print(f"memory: quantising holds about {places}{gib(needed.host)} of the host{beside}", flush=True)
    card = card_of(device.index or 0) if on_gpu else None
    what, less = "Quantising this model", None
    if asked.get("end_to_end"):
        what, less = "Training all blocks of this model together", "Leave out --end-to-end"
    if check and card is not None:
        _refuse(what, needed.device, card.name, card.size, less or "Give --device cpu")
    if check:
        _refuse(what, needed.host, "this machine", host_bytes(), less or "Take a machine with more memory")


def announce_finetuning(recipe: Recipe, check: bool, show: bool = True) -> None:
    """Says what a run of a recipe needs, from config.json alone.

    Args:
        recipe: as it was read; a dense model is quantised first.
        check: refuse what does not fit.
        show: print it; of several processes one does.

    Raises:
        ValueError: it does not fit the GPU, or on a CPU the machine's memory; or the recipe's method cannot be used.
    """
    shape = shape_if_known(recipe.model, recipe.trust_remote_code, show)
    if shape is None:
        return
    card = card_of(int(os.environ.get("LOCAL_RANK", 0)))
    run = run_of(recipe, shape, card)
    needed = finetuning(shape, run)
    size = needed.allocated + PYTHON_BYTES if card is None else needed.on_card
    if show:
        print(
            f"memory: fine-tuning needs about {gib(size)} {'of the host' if card is None else 'on the GPU'} for "
            f"{run.batch} x {run.length} tokens at rank {run.rank}, most at the {needed.moment}",
            flush=True,
        )
        if needed.host and card is not None:
            print(f"memory: between forward and backward {gib(needed.host)} of it wait on the host", flush=True)
    if check:
        name, there = ("this machine", host_bytes()) if card is None else (card.name, card.size)
        less = "Give a smaller batch_size (and more accumulation), shorter sequences, a smaller rank or fewer bits"
        if card is not None and (longer := fitting_option(shape, run, there)) is not None:
            less = f"Give {option_words(longer, run)}, with which it fits"
        _refuse("This fine-tuning", size, name, there, less)
        if card is not None:
            less = "Leave out offload_activations=true, or give shorter sequences"
            _refuse("Offloading activations", needed.host + PYTHON_BYTES, "this machine", host_bytes(), less)
    if shape.packed is None and run.bits < 16 and recipe.method != "hqq":
        device = torch.device("cpu" if card is None else "cuda")
        asked: dict[str, Any] = {"embeddings": run.embeddings, "head": run.head, "rank": run.rank}
        announce_quantising(shape, device, check, show, **asked)


def fitting_option(shape: ModelShape, run: Run, size: float) -> Run | None:
    """The run with other options that let it fit; None where none do or none are needed."""
    if finetuning(shape, run).on_card <= size:
        return None
    return next((each for each in longer_options(shape, run) if finetuning(shape, each).on_card <= size), None)


def longer_options(shape: ModelShape, run: Run) -> list[Run]:
    """The run with other options that need less of the card, the one that costs least first: without tables that are
    trained because nothing was said of them, and with more of the options for long contexts.
    """
    more = [dataclasses.replace(run, tables="frozen")] if run.tables == "shared" else []
    if run.checkpointing:
        pairs = [(run.offload, True), (True, run.tiled_mlp), (True, True)]
        more += [dataclasses.replace(run, offload=offload, tiled_mlp=tiled and shape.tiles) for offload, tiled in pairs]
    return [each for place, each in enumerate(more) if each != run and each not in more[:place]]


def option_words(run: Run, asked: Run | None = None) -> str:
    """The recipe's fields for the options of a run, and for its tables where those are not what was asked for."""
    frozen = asked is not None and run.tables != asked.tables
    words = ["tables=frozen"] * frozen + ["offload_activations=true"] * run.offload + ["tiled_mlp=true"] * run.tiled_mlp
    return " ".join(words)


def run_of(recipe: Recipe, shape: ModelShape, card: Card | None) -> Run:
    """What a recipe asks for, in the terms of the model of memory.

    Raises:
        ValueError: a method or options that cannot be used.
    """
    if recipe.tiled_mlp and not shape.tiles:
        raise ValueError(
            f"tiled_mlp=true: {recipe.model} has no MLP that is known to work token by token; leave it out."
        )
    in_blocks = recipe.task in ("language_modeling", "chat")
    run = Run(
        rank=recipe.rank,
        batch=recipe.batch_size,
        length=recipe.block_size if in_blocks else recipe.source_length + recipe.target_length,
        bits=recipe.bits,
        checkpointing=recipe.gradient_checkpointing,
        offload=recipe.offload_activations,
        tiled_mlp=recipe.tiled_mlp,
        packing=recipe.packing and recipe.task == "chat",
        accumulation=recipe.accumulation,
        optimizer=recipe.optimizer,
        tables=chosen_tables(recipe, shape.packed),
        eval_batch=recipe.eval_batch_size,
        large_workspace=card is not None and card.large_workspace,
        bf16=recipe.bf16 or recipe.fp16,
    )
    if shape.packed is not None:
        return packed_run(run, shape)
    check_method(recipe)
    config = quantization_config(recipe)
    if recipe.method == "lora16":
        return dataclasses.replace(run, bits=16.0)
    if config is None:
        return dataclasses.replace(run, true_bits=hqq.true_bits(int(recipe.bits)))
    return dataclasses.replace(
        run,
        true_bits=config.bits if config.budget == "true" else None,
        embeddings=config.quantize_embeddings,
        head=config.quantize_head,
        group_size=config.group_size,
    )


def packed_run(run: Run, shape: ModelShape) -> Run:
    """With what a packed model has in place of what is asked."""
    packed = shape.packed
    if packed is None:
        return run
    return dataclasses.replace(
        run,
        bits=packed.nominal_bits or packed.bits,
        true_bits=packed.true_bits,
        embeddings=packed.quantize_embeddings,
        head=packed.quantize_head,
        group_size=packed.group_size,
        rank=int((packed.initial_adapter or {}).get("rank", run.rank)),
    )


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def _refuse(what: str, needed: float, where: str, there: float, remedy: str) -> None:
    if needed > there:
        raise ValueError(
            f"{what} needs about {gib(needed)}, and {where} has {gib(there)}. {remedy} (`lowra plan` shows what fits), "
            "or --no-memory-check to try it all the same."
        )
