"""`lowra adapter`: quantise trained LoRA adapters and read the labels of packed ones."""

import argparse

from .parser import Later, add_trust, place

METHODS = ("loraquant", "bin", "rtn", "gptq", "pbllm", "billm", "jd-diagonal")
SPLITS = ("svd", "norm", "random")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds `adapter` with its actions; each sets `run`, from the parsed arguments to a JSON-able dict."""
    adapter = subparsers.add_parser("adapter", help="quantise LoRA adapters below two bits, and inspect packed ones")
    actions = adapter.add_subparsers(dest="action", required=True)
    _add_quantize(actions)
    inspect = actions.add_parser("inspect", help="show the label of a packed adapter and whether it still holds")
    inspect.add_argument("adapter", type=place, help="folder written by `lowra adapter quantize`")
    inspect.set_defaults(run=Later("lowra.commands.adapter:run_inspect"))


def _add_quantize(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "quantize",
        help="quantise a trained PEFT LoRA adapter and pack it",
        description="Quantise a trained PEFT LoRA adapter by LoraQuant or one of its baselines, and write it packed.",
    )
    parser.add_argument("adapters", metavar="ADAPTER", type=place, nargs="+", help="PEFT folder (jd-diagonal: several)")
    parser.add_argument("--output", type=place, required=True, metavar="DIR", help="new folder for the packed adapter")
    # Checked by hand, so that an unknown method gets the same kind of message as any other bad input.
    parser.add_argument("--method", default="loraquant", help=f"one of {', '.join(METHODS)} (default loraquant)")
    parser.add_argument("--bits", type=int, help="bits of round-to-nearest codes (loraquant, rtn, gptq; default 2)")
    parser.add_argument("--base", type=place, help="base model; default: the one the adapter names, if it is a folder")
    parser.add_argument("--calibration", type=place, metavar="FILE", help="text or JSON lines for the Hessians of gptq")
    add_trust(parser)

    own = parser.add_argument_group("loraquant")
    own.add_argument("--ratio", type=float, help="share of variance in the part at --bits (default 0.9)")
    own.add_argument(
        "--static-h", type=int, metavar="H", help="components at --bits in each layer, in place of --ratio"
    )
    own.add_argument("--split", choices=SPLITS, help="how components are ranked (default svd; others need --static-h)")
    own.add_argument("--no-refine", action="store_true", help="skip straight-through refinement")
    own.add_argument("--no-binary", action="store_true", help="drop the 1-bit part")

    label = parser.add_argument_group("label")
    label.add_argument("--task", help="what the adapter is for")
    label.add_argument("--training-data", help="what it was trained on")
    label.add_argument("--evaluation", action="append", default=[], metavar="NAME=RESULT", help="a result; repeatable")
    label.add_argument("--licence", help="licence of the adapter")
    label.add_argument("--retire", metavar="YYYY-MM-DD", help="last day on which it may be loaded")
    parser.set_defaults(run=Later("lowra.commands.adapter:run_quantize"))
