"""`lowra quantize`: a dense checkpoint to packed weights, with the initial adapter beside them."""

import argparse

from .parser import GOES_ON, Later, add_memory_check, add_trust, place


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="pack a checkpoint into 1 to 4 bits per weight and prepare an adapter",
        description="Packs the linear layers of a checkpoint into a bit budget. Every output channel gets 1, 2 or 4 "
        "bits and its own levels. With --rank, an adapter fitted to what was lost is written to OUTPUT/initial_adapter "
        "(train it with `lowra finetune`). A run that was killed goes on when started again with the same arguments.",
    )
    parser.add_argument("model", help="local folder or hub name of a checkpoint in safetensors, 16 or 32 bits")
    parser.add_argument("--output", required=True, type=place, help="folder to create")
    parser.add_argument("--bits", type=float, default=2.0, help="budget in bits per quantised weight, from 1 to 4")
    parser.add_argument("--rank", type=int, help="rank of the adapter; without it no adapter is written")
    parser.add_argument("--alpha", type=float, help="LoRA's alpha (default: the rank)")
    parser.add_argument(
        "--init", help="start of the adapter: loftq (default), cloq (default with --calibrate), pissa, lora"
    )
    parser.add_argument("--loftq-steps", type=int, help="alternating steps of LoftQ and CLoQ (default: 5)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add_trust(parser)
    add_memory_check(parser)
    calibration = parser.add_argument_group("calibration (one pass over some text; better below 2 bits)")
    calibration.add_argument(
        "--calibrate",
        metavar="FILE",
        help="UTF-8 text, self (the model writes it), or the calibration.safetensors of an earlier run",
    )
    calibration.add_argument(
        "--feedback",
        type=int,
        help="rounds that choose codes and levels for the layers' outputs (default: 1 where there are second moments, "
        "otherwise 0)",
    )
    calibration.add_argument(
        "--reconstruct",
        type=int,
        default=0,
        metavar="PASSES",
        help="passes over the text in which each block is trained to put out what the dense one does: codes, levels, "
        "scales and the adapter's start (default: 0, none)",
    )
    calibration.add_argument(
        "--calibration-tokens", type=int, help="tokens of the text to use at most (default: 25000)"
    )
    calibration.add_argument(
        "--reconstruct-tokens",
        type=int,
        metavar="TOKENS",
        help="tokens of the text for --reconstruct to use at most (default: 131072)",
    )
    calibration.add_argument(
        "--end-to-end",
        type=int,
        default=0,
        metavar="STEPS",
        help="steps of 16 sequences in which after that all blocks together are trained towards the dense model's "
        "logits, embeddings and head with them, on as much further text (default: 0, none)",
    )
    recipe = parser.add_argument_group("recipe (the defaults are good; `none` and `two_level` reproduce the paper)")
    recipe.add_argument(
        "--sensitivity", help="weight of an error: layer (default), fisher (default with --calibrate), none"
    )
    recipe.add_argument("--assigner", default="exact", help="exact, two_level (the paper's programs) or layer_order")
    recipe.add_argument("--scales", default="double_quant", help="group scales: double_quant, float16 or float32")
    recipe.add_argument("--budget", default="nominal", help="nominal counts codes alone, true all that is stored")
    recipe.add_argument("--menu", default="1,2,4", help="precisions a channel may get")
    recipe.add_argument(
        "--group-size",
        type=_group_size,
        default=64,
        metavar="WEIGHTS",
        help="weights that share a scale, or `best`: 64, 128 or 256, by the error at a true budget (default: 64, for "
        "which the kernels of generation are made)",
    )
    recipe.add_argument("--codebook", default="learned", help="learned or normal_float (NF4 and NF2, as QLoRA)")
    recipe.add_argument("--iterations", type=int, help="limit of the Lloyd-Max iterations (default: 20; the paper: 2)")
    recipe.add_argument("--block-weight", help="absmax_squared (default) or absmax (the paper's text)")
    recipe.add_argument("--thresholds", help="one set per channel (default) or per matrix")
    recipe.add_argument("--head", action="store_true", help="pack the output head too")
    recipe.add_argument("--embeddings", action="store_true", help="pack the embeddings too, and a head tied to them")
    recipe.add_argument(
        "--refine",
        type=int,
        help="rounds of least squares on scales and levels (default: 2 with --calibrate, otherwise 0)",
    )
    recipe.add_argument(
        "--keep-dense", nargs="+", metavar="NAME", help="modules whose name contains one of these stay dense"
    )
    parser.set_defaults(run=Later("lowra.commands.quantize:run"), interrupted=GOES_ON)


def _group_size(text: str) -> int | str:
    if text == "best":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number of weights, or best; got {text!r}") from None
