"""`lowra plan`: which bits, rank and length fit a card, and what the memory is spent on."""

import argparse
import dataclasses
import difflib
from typing import Any

from transformers.training_args import OptimizerNames

from ..checkpoints.configs import CONFIG_FILE
from ..checkpoints.places import expanded
from ..inspection.requirements import CONTEXT_BYTES, Requirement, Run, finetuning, quantising
from ..inspection.shapes import ModelShape, read_shape
from ..integrations.graph_memory import ROOM_BETWEEN
from ..quantization.initial_adapter import MOST_RANK
from ..training.default_tables import pays_to_train
from ..training.kinds import Tables
from .memory import Card, card_of, fitting_option, gib, longer_options, named_card, option_words, packed_run
from .ranges import check_range

_BITS = (4.0, 3.0, 2.0, 1.5, 1.25)
_USUAL_CARDS = (8, 12, 16, 24, 48, 80)
_RANK, _LENGTH = 16, 1024
_STEP, _LONGEST = 256, 2**20
_MOST_SEQUENCES = 2**16
_SEQUENCES = 16  # of an optimiser step
_EVALUATED = 1  # sequences of an evaluation pass, in the plan as in the command that it proposes


def run(args: argparse.Namespace) -> dict:
    """Prints what fits and why.

    Raises:
        FileNotFoundError, ValueError: a model whose config cannot be used or whose memory is not known, or numbers that
            make no sense.
    """
    check_range(args, "bits", 1, 4)
    for name, most in (("rank", MOST_RANK), ("length", _LONGEST), ("batch", _MOST_SEQUENCES)):
        check_range(args, name, 1)
        check_range(args, name, 2 if name == "length" else 1, most)
    if args.optimizer not in list(OptimizerNames):
        nearest = difflib.get_close_matches(args.optimizer, [name.value for name in OptimizerNames], n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ", such as adamw_torch."
        raise ValueError(f"--optimizer must be a name of Transformers' optimisers; got {args.optimizer!r}{hint}")
    if (path := expanded(args.model)).is_file() and path.name == CONFIG_FILE:
        args.model = str(path.parent)
    card = card_of() if args.gpu is None else named_card(args.gpu)
    shape = read_shape(args.model, args.trust_remote_code)
    asked = _asked(args, shape, card)
    _show_question(args.model, shape, asked)
    options = [asked] if shape.packed is not None else _options(asked, shape, args)
    result: dict = {"model": args.model, "parameters": shape.parameters}
    fitting = options
    if card is None:
        result["cards"] = _show_cards(shape, options)
        fitting = [option for option in options if option.bits == 2.0] or options
    else:
        result |= {"card": card.name, "card_bytes": card.size, "longest": _show_lengths(shape, options, card)}
        fitting = [option for option in options if finetuning(shape, option).on_card <= card.size]
    chosen = fitting[0] if fitting else options[-1]
    needed = finetuning(shape, chosen)
    _show_parts(chosen, needed)
    result["chosen"] = dataclasses.asdict(chosen)
    result["needed"] = dataclasses.asdict(needed) | {"allocated": needed.allocated, "on_card": needed.on_card}
    result["fits"] = bool(fitting)
    if card is not None:
        result["longer"] = _show_longer(shape, chosen, card)
    if card is not None and not fitting:
        print(f"\nThis does not fit {card.name}: {_say_less(shape, chosen, card)}.")
        return result
    if shape.packed is None:
        packing = quantising(shape, True, chosen.embeddings, chosen.head, chosen.rank)
        result["quantising"] = dataclasses.asdict(packing)
        print(f"\nquantising holds {gib(packing.device)} on the GPU and {gib(packing.host)} of the host's memory")
    result["commands"] = _commands(args.model, shape, chosen)
    print("\nto run:" if card is None else f"\nfits {card.name}; to run:")
    for command in result["commands"]:
        print(f"  {command}")
    return result


def longest(shape: ModelShape, option: Run, size: float) -> int:
    """The longest sequence that fits and that the model has positions for, in steps of 256; 0 where none does."""
    limit = shape.positions or _LONGEST
    low, high = 0, -(-limit // _STEP)
    while low < high:
        middle = (low + high + 1) // 2
        length = min(limit, middle * _STEP)
        if finetuning(shape, dataclasses.replace(option, length=length)).on_card <= size:
            low = middle
        else:
            high = middle - 1
    return min(limit, low * _STEP)


def _asked(args: argparse.Namespace, shape: ModelShape, card: Card | None) -> Run:
    """
    Raises:
        ValueError: more tokens than the model has positions, or bits for a model that has its own.
    """
    if args.length is not None and shape.positions is not None and args.length > shape.positions:
        raise ValueError(f"--length is {args.length}, but {args.model} has {shape.positions} positions.")
    if args.bits is not None and shape.packed is not None:
        raise ValueError(f"{args.model} is packed already: --bits has no effect on it. Leave it out.")
    if args.offload_activations and args.no_checkpointing:
        raise ValueError(
            "--offload-activations is for what gradient checkpointing keeps: leave out --no-checkpointing."
        )
    if args.tiled_mlp and not shape.tiles:
        raise ValueError(f"--tiled-mlp: {args.model} has no MLP that is known to work token by token; leave it out.")
    own = (shape.packed.initial_adapter or {}) if shape.packed is not None else {}
    if args.rank is not None and own.get("rank") not in (None, args.rank):
        raise ValueError(
            f"{args.model} begins with an adapter of rank {own['rank']}: --rank has no effect on it. Leave it out."
        )
    run = Run(
        rank=args.rank or _RANK,
        batch=args.batch,
        length=args.length or min(_LENGTH, shape.positions or _LENGTH),
        bits=args.bits or 2.0,
        checkpointing=not args.no_checkpointing,
        offload=args.offload_activations,
        tiled_mlp=args.tiled_mlp,
        accumulation=max(1, _SEQUENCES // args.batch),
        optimizer=args.optimizer,
        tables=args.tables or _usual_tables(shape, args.bits or 2.0),
        eval_batch=_EVALUATED,
        large_workspace=card is not None and card.large_workspace,
    )
    return packed_run(run, shape) if args.rank is None else dataclasses.replace(packed_run(run, shape), rank=args.rank)


def _options(asked: Run, shape: ModelShape, args: argparse.Namespace) -> list[Run]:
    """The ways to pack, best first: the most bits, and embeddings left dense where they can be."""
    return [
        dataclasses.replace(
            asked,
            bits=each,
            embeddings=packed,
            head=packed and shape.head > 0,
            tables=args.tables or _usual_tables(shape, each),
        )
        for each in (_BITS if args.bits is None else (args.bits,))
        for packed in (False, True)
    ]


def _show_question(model: str, shape: ModelShape, asked: Run) -> None:
    count = shape.parameters
    size = f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"
    widths = f"{shape.layers} blocks of width {shape.hidden:,}, vocabulary {shape.vocabulary:,}"
    print(f"{model}: {size} parameters, {widths}")
    checkpointing = "with gradient checkpointing" if asked.checkpointing else "without gradient checkpointing"
    options = f", {option_words(asked)}" if option_words(asked) else ""
    print(f"fine-tuning at rank {asked.rank}, batch {asked.batch}, {checkpointing}, {asked.optimizer}{options}")


def _show_lengths(shape: ModelShape, options: list[Run], card: Card) -> list[dict]:
    print(f"\nlongest sequence that fits {card.name}, and what {options[0].length:,} tokens need:")
    print(f"  {'bits':>5}  {'embeddings':<10} {'tokens':>9} {'needed':>12}")
    rows = []
    for option in options:
        tokens, needed = longest(shape, option, card.size), finetuning(shape, option).on_card
        rows.append({"bits": option.bits, "embeddings": option.embeddings, "tokens": tokens, "needed": needed})
        print(f"  {option.bits:>5.3g}  {_tables(option):<10} {_tokens(tokens):>9} {gib(needed):>12}")
    return rows


def _show_cards(shape: ModelShape, options: list[Run]) -> list[dict]:
    print("\nno GPU here and no --gpu: longest sequence in tokens by card")
    print(f"  {'bits':>5}  {'embeddings':<10}" + "".join(f"{size:>8} GB" for size in _USUAL_CARDS))
    rows = []
    for option in options:
        tokens = {size: longest(shape, option, named_card(f"{size}GB").size) for size in _USUAL_CARDS}
        rows.append({"bits": option.bits, "embeddings": option.embeddings, "tokens": tokens})
        cells = "".join(f"{_tokens(count):>11}" for count in tokens.values())
        print(f"  {option.bits:>5.3g}  {_tables(option):<10}{cells}")
    return rows


def _show_parts(option: Run, needed: Requirement) -> None:
    tokens = f"{option.batch} x {option.length:,} tokens"
    print(f"\n{option.bits:.3g} bits, {tokens}, embeddings {_tables(option)}; the peak is the {needed.moment}:")
    between = needed.allocated * ROOM_BETWEEN
    rest = {"room between blocks": between, "context of the driver": CONTEXT_BYTES, "a card must have": needed.on_card}
    for part, size in (needed.parts | rest).items():
        print(f"  {part:<30} {gib(size):>12}")
    if needed.host:
        print(f"  {'of the host, pinned':<30} {gib(needed.host):>12}")


def _show_longer(shape: ModelShape, option: Run, card: Card) -> list[dict]:
    """What other options would let fit."""
    rows: list[dict[str, Any]] = []
    for longer in longer_options(shape, option):
        tokens = longest(shape, longer, card.size)
        host = finetuning(shape, dataclasses.replace(longer, length=tokens)).host
        if tokens > longest(shape, option, card.size):
            rows.append({"options": option_words(longer, option), "tokens": tokens, "host": host})
    if rows:
        print(f"\nlonger sequences at {option.bits:.3g} bits, by fields of the recipe:")
    for row in rows:
        beside = f", and {gib(row['host'])} of the host" if row["host"] else ""
        print(f"  {row['options']:<40} {_tokens(row['tokens']):>9} tokens{beside}")
    return rows


def _say_less(shape: ModelShape, option: Run, card: Card) -> str:
    if (longer := fitting_option(shape, option, card.size)) is not None:
        return f"with {option_words(longer, option)} it would ({gib(finetuning(shape, longer).on_card)})"
    own = shape.packed is not None and shape.packed.initial_adapter is not None
    rank = option.rank if own else min(8, option.rank)
    least = dataclasses.replace(option, length=min(512, option.length), batch=1, rank=rank)
    needed = finetuning(shape, least).on_card
    settings = f"{least.bits:.3g} bits, rank {least.rank} and 1 x {least.length} tokens"
    if needed <= card.size:
        return f"{settings} would ({gib(needed)})"
    less = "pack it with fewer bits or a smaller rank, or take a smaller model"
    return f"even {settings} need {gib(needed)}; {less if shape.packed is not None else 'take a smaller model'}"


def _commands(model: str, shape: ModelShape, option: Run) -> list[str]:
    fields = (
        f"block_size={option.length} batch_size={option.batch} accumulation={option.accumulation} "
        f"eval_batch_size={option.eval_batch}"
    )
    if not option.checkpointing:
        fields += " gradient_checkpointing=false"
    if option_words(option):
        fields += f" {option_words(option)}"
    if option.optimizer != Run.optimizer:
        fields += f" optimizer={option.optimizer}"
    if option.tables != _usual_tables(shape, option.bits):
        fields += f" tables={option.tables}"
    if shape.packed is not None:
        rank = "" if shape.packed.initial_adapter else f"rank={option.rank} "
        return [f"lowra finetune 8gb-chat train_file=FILE model={model} {rank}{fields}"]
    more = " --embeddings" * option.embeddings + " --head" * option.head
    more += " --calibrate TEXT" if _calibrates(option.bits) else ""
    return [
        f"lowra quantize {model} --bits {option.bits:g} --rank {option.rank}{more} --output packed",
        f"lowra finetune 8gb-chat train_file=FILE model=packed {fields}",
    ]


def _usual_tables(shape: ModelShape, bits: float) -> Tables:
    """What `lowra finetune` will do where nothing is said, of a packed model or one that the plan's commands pack."""
    pays = _calibrates(bits) if shape.packed is None else pays_to_train(shape.packed)
    return "shared" if pays else "frozen"


def _calibrates(bits: float) -> bool:
    """Whether the commands of the plan pack with a calibration."""
    return bits < 2


def _tokens(count: int) -> str:
    return f"{count:,}" if count else "-"


def _tables(option: Run) -> str:
    return "packed" if option.embeddings else "dense"
