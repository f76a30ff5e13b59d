"""`lowra generate`: text from a packed model and its adapter."""

import argparse
import math

from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TextStreamer

from ..checkpoints.dense import read_config
from ..checkpoints.hub import resolve_folder
from ..corpus import check_characters, check_token_ids
from ..generation.loading import check_adapter_folder, load_model, load_tokenizer_for
from ..generation.text import Continuation, continue_text
from .ranges import MOST_SEEDS, check_range, refuse_idle


def run(args: argparse.Namespace) -> dict:
    """Prints the prompt with its continuation, token by token, and how fast that went."""
    check_sampling(args)
    check_adapter_folder(args.adapter)
    folder = resolve_folder(args.model)
    config = read_config(folder, args.trust_remote_code)
    tokenizer = load_tokenizer_for(folder, args.adapter, args.trust_remote_code)
    _check_prompt(args, config, tokenizer)
    model = load_model(str(folder), args.adapter, args.device, args.force, args.trust_remote_code)
    printer = TextStreamer(tokenizer, skip_special_tokens=True)
    said = continue_text(
        model, tokenizer, args.prompt, args.tokens, args.temperature, args.seed or 0, printer, exact=args.exact
    )
    print(f"({speed(said)})")
    return {
        "text": said.text,
        "tokens": said.tokens,
        "seconds": round(said.seconds, 3),
        "first_token_seconds": round(said.first_seconds, 3),
        "tokens_per_second": round(said.tokens_per_second, 1),
    }


def speed(said: Continuation) -> str:
    """Such as "64 tokens, the first after 0.03 s, then 512 a second"."""
    rest = f", then {said.tokens_per_second:.3g} a second" if said.tokens > 1 else ""
    return f"{said.tokens} tokens, the first after {said.first_seconds:.2g} s{rest}"


def check_sampling(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: numbers of these options that say nothing.
    """
    check_range(args, "tokens", 1)
    check_range(args, "temperature", 0, 100)  # beyond, every token is as likely as any
    check_range(args, "seed", 0, MOST_SEEDS)
    refuse_idle(args, [(args.temperature == 0, "seed", "without --temperature: nothing is drawn")])


def room(config: PreTrainedConfig, tokens: int) -> float:
    """How many tokens a model has positions for after these; infinite where they are not counted."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return math.inf if limit is None else limit - tokens


def _check_prompt(args: argparse.Namespace, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        ValueError: no text, or more than the model has positions for.
    """
    check_characters(args.prompt, "The prompt has {!r}")
    if config.is_encoder_decoder:
        raise ValueError(f"{args.model} is an encoder-decoder, which continues no prompt: give a language model.")
    ids = tokenizer(args.prompt, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("The prompt has no tokens: give some text to continue.")
    check_token_ids(set(ids), config, tokenizer, "the prompt")
    left = room(config, len(ids))
    if args.tokens > left:
        raise ValueError(
            f"The prompt has {len(ids)} tokens and --tokens adds {args.tokens}, but the model has {left + len(ids)} "
            "positions: shorten the prompt or add fewer."
        )
