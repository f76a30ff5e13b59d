"""`lowra quantize`: a dense checkpoint to packed weights, with the initial adapter beside them."""

import argparse
import functools
import pathlib
from collections.abc import Callable

from ..checkpoints.places import expanded
from ..config import LowRAConfig
from ..quantization.calibration import TOKENS, Calibration, calibrate
from ..quantization.initial_adapter import ADAPTER_FOLDER, AdapterRecipe
from ..quantization.loftq import STEPS
from ..quantization.pipeline import quantize_checkpoint
from .parser import add_trust


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="pack a checkpoint into 1 to 4 bits per weight and prepare an adapter",
        description="Packs the linear layers of a checkpoint into a bit budget. Every output channel gets 1, 2 or 4 "
        "bits and its own levels. With --rank, an adapter fitted to what was lost is written to OUTPUT/initial_adapter "
        "(train it with `lowra finetune`). A run that was killed goes on when started again with the same arguments.",
    )
    parser.add_argument("model", help="local folder or hub name of a checkpoint in safetensors, 16 or 32 bits")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to create")
    parser.add_argument("--bits", type=float, default=2.0, help="budget in bits per quantised weight, from 1 to 4")
    parser.add_argument("--rank", type=int, help="rank of the adapter; without it no adapter is written")
    parser.add_argument("--alpha", type=float, help="LoRA's alpha (default: the rank)")
    parser.add_argument(
        "--init", help="start of the adapter: loftq (default), cloq (default with --calibrate), pissa, lora"
    )
    parser.add_argument("--loftq-steps", type=int, help=f"alternating steps of LoftQ and CLoQ (default: {STEPS})")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add_trust(parser)
    calibration = parser.add_argument_group("calibration (one pass over some text; better below 2 bits)")
    calibration.add_argument(
        "--calibrate",
        metavar="FILE",
        help="UTF-8 text, or the calibration.safetensors of an earlier run",
    )
    calibration.add_argument(
        "--feedback",
        type=int,
        help="rounds that choose codes and levels for the layers' outputs (default: 1 where there are second moments, "
        "otherwise 0)",
    )
    calibration.add_argument(
        "--calibration-tokens", type=int, help=f"tokens of the text to use at most (default: {TOKENS})"
    )
    recipe = parser.add_argument_group("recipe (the defaults are good; `none` and `two_level` reproduce the paper)")
    recipe.add_argument(
        "--sensitivity", help="weight of an error: layer (default), fisher (default with --calibrate), none"
    )
    recipe.add_argument("--assigner", default="exact", help="exact, two_level (the paper's programs) or layer_order")
    recipe.add_argument("--scales", default="double_quant", help="group scales: double_quant, float16 or float32")
    recipe.add_argument("--budget", default="nominal", help="nominal counts codes alone, true all that is stored")
    recipe.add_argument("--menu", default="1,2,4", help="precisions a channel may get")
    recipe.add_argument("--group-size", type=int, default=64, help="weights that share a scale")
    recipe.add_argument("--codebook", default="learned", help="learned or normal_float (NF4 and NF2, as QLoRA)")
    recipe.add_argument("--iterations", type=int, default=20, help="limit of the Lloyd-Max iterations (the paper: 2)")
    recipe.add_argument("--block-weight", default="absmax_squared", help="absmax_squared or absmax (the paper's text)")
    recipe.add_argument("--thresholds", default="channel", help="one set per channel or per matrix")
    recipe.add_argument("--head", action="store_true", help="pack the output head too")
    recipe.add_argument("--embeddings", action="store_true", help="pack the embeddings too, and a head tied to them")
    recipe.add_argument(
        "--refine",
        type=int,
        help="rounds of least squares on scales and levels (default: 2 with --calibrate, otherwise 0)",
    )
    recipe.add_argument(
        "--keep-dense", nargs="*", metavar="NAME", help="modules whose name contains one of these stay dense"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict:
    """Quantises and prints what came out."""
    _refuse_options_without_effect(args)
    args.output = expanded(args.output)
    stored = Calibration.load(args.calibrate) if (args.calibrate or "").endswith(".safetensors") else None
    has_moments = _wants_moments(args) if stored is None else stored.has_moments
    config = LowRAConfig(
        bits=args.bits,
        menu=_menu(args.menu),
        budget=args.budget,
        group_size=args.group_size,
        scales=args.scales,
        codebook=args.codebook,
        iterations=args.iterations,
        block_weight=args.block_weight,
        thresholds=args.thresholds,
        assigner=args.assigner,
        sensitivity=args.sensitivity or ("fisher" if args.calibrate else "layer"),
        refine=(2 if args.calibrate else 0) if args.refine is None else args.refine,
        feedback=int(has_moments) if args.feedback is None else args.feedback,
        modules_to_not_convert=args.keep_dense,
        quantize_head=args.head,
        quantize_embeddings=args.embeddings,
    )
    adapter = None
    if args.rank is not None:
        method = args.init or ("cloq" if has_moments else "loftq")
        adapter = AdapterRecipe(args.rank, args.alpha, method, STEPS if args.loftq_steps is None else args.loftq_steps)
    calibration: Calibration | Callable[[], Calibration] | None = stored
    if args.calibrate and stored is None:
        calibration = functools.partial(
            calibrate,
            args.model,
            args.calibrate,
            TOKENS if args.calibration_tokens is None else args.calibration_tokens,
            args.device,
            has_moments,
            head=args.head,
            embeddings=args.embeddings,
            trust_remote_code=args.trust_remote_code,
        )
    report = quantize_checkpoint(
        args.model,
        args.output,
        config,
        adapter,
        args.device,
        calibration=calibration,
        trust_remote_code=args.trust_remote_code,
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
    print("  seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in report["seconds"].items()))
    if adapter is not None:
        print(f"  adapter to train: {args.output / ADAPTER_FOLDER}")
    return {"output": str(args.output), **report}


def _refuse_options_without_effect(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that needs another one."""
    needs = {
        "--alpha": (args.alpha, "--rank", args.rank),
        "--init": (args.init, "--rank", args.rank),
        "--loftq-steps": (args.loftq_steps, "--rank", args.rank),
        "--calibration-tokens": (args.calibration_tokens, "--calibrate", args.calibrate),
    }
    for option, (value, needed, given) in needs.items():
        if value is not None and given is None:
            raise ValueError(f"{option} has no effect without {needed}: give that too, or leave it out.")


def _wants_moments(args: argparse.Namespace) -> bool:
    """Whether a pass over text has to collect second moments, for feedback or for the adapter's start."""
    cloq = args.rank is not None and args.init in (None, "cloq")
    return args.calibrate is not None and (cloq or args.feedback != 0)


def _menu(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--menu takes precisions separated by commas, such as 1,2,4; got {text!r}.") from None
