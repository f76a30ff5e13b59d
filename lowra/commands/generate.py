"""`lowra generate`: text from a packed model and its adapter."""

import argparse
import time

from ..corpus import load_tokenizer
from ..generation.loading import load_model
from ..generation.text import generate_text
from .parser import add_trust


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
        description="Continues a prompt with a packed (or dense) model and, if given, an adapter.",
    )
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--adapter", help="folder of an adapter, of PEFT or packed")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token every time")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--force", action="store_true", help="use a packed adapter in spite of its label")
    parser.add_argument("--device", help="cpu, cuda … (default: a GPU if there is one)")
    add_trust(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict:
    """Prints the prompt with its continuation."""
    if args.tokens < 1:
        raise ValueError(f"--tokens must be at least 1; got {args.tokens}.")
    model = load_model(args.model, args.adapter, args.device, args.force, args.trust_remote_code)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    start = time.perf_counter()
    text = generate_text(model, tokenizer, args.prompt, args.tokens, args.temperature, args.seed)
    print(text)
    return {"text": text, "seconds": round(time.perf_counter() - start, 3)}
