"""`lowra quantize`: a dense checkpoint to packed weights, with the initial adapter beside them."""

import argparse
from collections.abc import Callable

from ..checkpoints.places import expanded, new_folder
from ..config import LowRAConfig
from ..device import choose_device
from ..quantization.calibration import CALIBRATION_FILE, RECONSTRUCT_TOKENS, TOKENS, Calibration, calibrate
from ..quantization.group_size import GROUP_SIZES
from ..quantization.initial_adapter import ADAPTER_FOLDER, AdapterRecipe
from ..quantization.loftq import STEPS
from ..quantization.pipeline import quantize_checkpoint
from ..quantization.work import WorkFolder
from .memory import announce_quantising, shape_if_known
from .ranges import check_range, refuse_idle

OWN = "self"  # in place of the name of a text, for one that the model writes; a file of this name is ./self


def run(args: argparse.Namespace) -> dict:
    """Quantises and prints what came out."""
    if args.group_size == "best" and args.budget != "true":
        raise ValueError("--group-size best needs --budget true: nominal bits do not count what scales cost.")
    is_stored = (args.calibrate or "").endswith(".safetensors")
    _refuse_options_without_effect(args, is_stored)
    args.output = expanded(args.output)
    if args.calibrate and (statistics := expanded(args.calibrate) / CALIBRATION_FILE).is_file():
        raise ValueError(f"--calibrate takes a file, and {args.calibrate} is a packed folder: give {statistics}.")
    stored = Calibration.load(args.calibrate) if is_stored else None
    has_moments = _wants_moments(args) if stored is None else stored.has_moments
    learned = args.codebook == "learned"  # what refines and feeds back fits levels
    config = LowRAConfig(
        bits=args.bits,
        menu=_menu(args.menu),
        budget=args.budget,
        group_size=64 if args.group_size == "best" else args.group_size,
        scales=args.scales,
        codebook=args.codebook,
        iterations=20 if args.iterations is None else args.iterations,
        block_weight=args.block_weight or "absmax_squared",
        thresholds=args.thresholds or "channel",
        assigner=args.assigner,
        sensitivity=args.sensitivity or ("fisher" if args.calibrate else "layer"),
        refine=(2 if args.calibrate and learned else 0) if args.refine is None else args.refine,
        feedback=int(has_moments and learned) if args.feedback is None else args.feedback,
        reconstruct=args.reconstruct,
        end_to_end=args.end_to_end,
        modules_to_not_convert=args.keep_dense,
        quantize_head=args.head,
        quantize_embeddings=args.embeddings,
    )
    adapter = None
    if args.rank is not None:
        method = args.init or ("cloq" if has_moments else "loftq")
        adapter = AdapterRecipe(args.rank, args.alpha, method, STEPS if args.loftq_steps is None else args.loftq_steps)
    check_range(args, "reconstruct_tokens", 1)
    reconstruct_tokens = (args.reconstruct_tokens or RECONSTRUCT_TOKENS) if args.reconstruct else 0
    calibration: Calibration | Callable[[], Calibration] | None = stored
    if args.calibrate and stored is None:

        def collected() -> Calibration:
            return calibrate(
                args.model,
                None if args.calibrate == OWN else args.calibrate,
                TOKENS if args.calibration_tokens is None else args.calibration_tokens,
                args.device,
                has_moments,
                reconstruct_tokens=reconstruct_tokens,
                end_to_end=args.end_to_end,
                modules_to_not_convert=args.keep_dense,
                head=args.head,
                embeddings=args.embeddings,
                trust_remote_code=args.trust_remote_code,
                keep_text=WorkFolder(new_folder(expanded(args.output))).text,
            )

        calibration = collected
    shape = shape_if_known(args.model, args.trust_remote_code)
    if shape is not None and shape.packed is None:
        announce_quantising(
            shape,
            choose_device(args.device),
            not args.no_memory_check,
            embeddings=args.embeddings,
            head=args.head,
            rank=args.rank or 0,
            calibrating=callable(calibration),
            moments=callable(calibration) and has_moments,
            reconstruct_tokens=reconstruct_tokens,
            end_to_end=bool(args.end_to_end),
        )
    report = quantize_checkpoint(
        args.model,
        args.output,
        config,
        adapter,
        args.device,
        calibration=calibration,
        trust_remote_code=args.trust_remote_code,
        group_sizes=GROUP_SIZES if args.group_size == "best" else (),
    )
    parameters, assigner = report["quantised_parameters"], report["assigner"]
    print(f"{args.output}: {parameters:,} weights at {report['nominal_bits']:.4f} nominal bits")
    print(
        f"  everything stored: {report['true_bits']:.4f} bits per weight, {report['packed_bytes'] / 2**20:.1f} MiB "
        f"(bf16: {parameters * 2 / 2**20:.1f} MiB)"
    )
    print(
        f"  assigner: {assigner['solver']}, {assigner['channels']:,} channels, "
        f"{assigner['gap']:.1e} above the relaxed bound"
    )
    if report["end_to_end"] is not None:
        before, after = report["end_to_end"]["divergence"]
        kept = "" if report["end_to_end"]["kept"] else ", not kept"
        print(f"  end to end: KL divergence from the dense model {before:.4f} -> {after:.4f}{kept}")
    *stages, (_, whole) = report["seconds"].items()
    since = " since it went on from a killed run" if report["resumed"] else ""
    print(f"  {whole:.1f} seconds{since}: {', '.join(f'{stage} {value:.1f}' for stage, value in stages)}")
    if adapter is not None:
        print(f"  adapter to train: {args.output / ADAPTER_FOLDER}")
    return {"output": str(args.output), **report}


def _refuse_options_without_effect(args: argparse.Namespace, stored: bool) -> None:
    """
    Args:
        args: as they came.
        stored: whether --calibrate names statistics of an earlier run.

    Raises:
        ValueError: an option that others make meaningless.
    """
    fixed, by_layers = args.codebook == "normal_float", args.assigner == "layer_order"
    no_steps = args.init in ("pissa", "lora")
    by_fisher = args.sensitivity in (None, "fisher") and not by_layers
    reads_calibration = _wants_moments(args) or args.reconstruct or args.end_to_end or by_fisher
    refuse_idle(
        args,
        [
            (args.rank is None, "alpha init loftq_steps", "without --rank"),
            (no_steps, "loftq_steps", f"with --init {args.init}, which takes no steps"),
            (not args.calibrate, "calibration_tokens reconstruct_tokens", "without --calibrate"),
            (not args.reconstruct, "reconstruct_tokens", "without --reconstruct"),
            (
                stored,
                "calibration_tokens reconstruct_tokens",
                "beside stored statistics, whose tokens were read when they were made",
            ),
            (
                not reads_calibration,
                "calibrate",
                "where sensitivity, feedback, --reconstruct, --end-to-end and --init do not read it",
            ),
            (fixed, "iterations block_weight thresholds", "with --codebook normal_float, which learns nothing"),
            (args.iterations == 0, "block_weight thresholds", "with --iterations 0, which learns nothing"),
            (by_layers, "sensitivity", "with --assigner layer_order, which asks for no errors"),
        ],
    )


def _wants_moments(args: argparse.Namespace) -> bool:
    """Whether a pass over text has to collect second moments, for feedback or for the adapter's start."""
    cloq = args.rank is not None and args.init in (None, "cloq")
    feedback = args.codebook == "learned" if args.feedback is None else args.feedback != 0
    return args.calibrate is not None and (cloq or feedback)


def _menu(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--menu takes precisions separated by commas, such as 1,2,4; got {text!r}.") from None
