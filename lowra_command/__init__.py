"""The command `lowra`: what can be typed, and help on it, without an import that takes seconds.

One module per subcommand, each with `add_parser(subparsers)`; what a command does stands in `lowra.commands`, in the
module of the same name, and is imported when it runs. A package of its own beside `lowra`, because `import lowra`
registers the format with Transformers and PEFT and imports both.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import sys
import warnings

from safetensors import SafetensorError

from . import (
    adapter,
    chat,
    compare,
    demo,
    env,
    evaluate,
    export,
    finetune,
    generate,
    inspect,
    merge,
    plan,
    quantize,
    recipes,
    verify,
)
from .parser import CommandParser

_COMMANDS = (
    plan,
    quantize,
    recipes,
    finetune,
    evaluate,
    generate,
    chat,
    inspect,
    verify,
    compare,
    merge,
    export,
    adapter,
    demo,
    env,
)

# Memory of a GPU in segments that grow, instead of blocks of fixed sizes with gaps between them: of a card that a
# fine-tuning nearly fills the gaps took 0.5 to 1.3 GB (docs/lab/cards.md). Under its old name and the one from 2.9 on.
ALLOCATOR = dict.fromkeys(("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "expandable_segments:True")

_DESCRIPTION = """LoRA fine-tuning of large language models on base weights of 1 to 2 bits.

The usual way, from a checkpoint that is too large for your GPU to an adapter trained on it:

  lowra quantize MODEL --bits 2 --rank 16 --output small
  lowra finetune 8gb-chat model=small train_file=chat.jsonl output=runs/mine
  lowra evaluate small --adapter runs/mine/adapter --data text.txt
  lowra generate small --adapter runs/mine/adapter --prompt "Once upon a time"
  lowra merge runs/mine/adapter --output merged
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand.

    Returns:
        The exit status: 0; 1 where a command that answers a question answers no; 2 where the input cannot be used (one
        message, no traceback); 130 where it was interrupted.
    """
    parser = build_parser()
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    if sys.platform == "linux" and not ALLOCATOR.keys() & os.environ.keys():
        os.environ.update(ALLOCATOR)  # PyTorch reads it when it first takes memory
    try:
        result = args.run(args)
    except (ValueError, OSError, SafetensorError) as error:  # the last where the Trainer or PEFT cannot write
        print(f"lowra: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nlowra: interrupted{args.interrupted}", file=sys.stderr)  # below a progress bar
        return 130
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    return 0 if args.is_yes(result) else 1


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="lowra", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"lowra {importlib.metadata.version('lowra')}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        _add_json(subparser)
    parser.set_defaults(is_yes=lambda result: True, interrupted="")
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in nested:
        for subparser in action.choices.values():
            _add_json(subparser)
    if not nested:
        parser.add_argument("--json", action="store_true", help="print one machine-readable object as the last line")
