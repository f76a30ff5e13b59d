"""`lowra plan`: which bits, rank and length fit a card, and what the memory is spent on."""

import argparse

from .parser import Later, add_trust


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="say which bits, rank and length of sequences fit a GPU, before anything is downloaded",
        description="Reads the config.json of a model (of a hub name it fetches nothing else) and says what "
        "fine-tuning it needs of memory and why, which bits and lengths fit the card, and the commands to run. What is "
        "not given is chosen: the most bits that fit. Exit status 1 where nothing fits the card.",
        epilog="example: lowra plan meta-llama/Llama-2-7b-hf --gpu 8GB --rank 16 --length 2048",
    )
    parser.add_argument("model", help="local folder or hub name, dense or packed")
    parser.add_argument(
        "--gpu", metavar="SIZE", help="memory of the card, such as 8GB or 8192MiB (default: the one that is there)"
    )
    parser.add_argument("--bits", type=float, help="nominal bits, from 1 to 4 (default: the most that fit)")
    parser.add_argument("--rank", type=int, help="of the adapter (default 16, or what a packed model brings)")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default 1024, or what the model has)")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a forward pass")
    parser.add_argument("--optimizer", default="adamw_torch", help="a name of Transformers', such as adamw_8bit")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations for backward")
    parser.add_argument(
        "--offload-activations", action="store_true", help="what is kept of each layer waits in the host's memory"
    )
    parser.add_argument("--tiled-mlp", action="store_true", help="MLPs and norms work on 4,096 tokens at a time")
    parser.add_argument(
        "--tables",
        choices=("frozen", "shared"),
        help="of the base, trained with the adapter or not (default: as finetune does, shared where it was calibrated)",
    )
    add_trust(parser)
    parser.set_defaults(run=Later("lowra.commands.plan:run"), is_yes=lambda result: result["fits"])
