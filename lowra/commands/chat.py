"""`lowra chat`: a conversation with a model that has a chat template."""

import argparse
import sys
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TextStreamer

from ..checkpoints.dense import read_config
from ..checkpoints.hub import resolve_folder
from ..corpus import check_characters, check_token_ids
from ..generation.loading import check_adapter_folder, load_model, load_tokenizer_for
from ..generation.text import continue_text
from .generate import check_sampling, room, speed


def run(args: argparse.Namespace) -> dict:
    """Answers one line after the other; returns the conversation."""
    check_sampling(args)
    check_adapter_folder(args.adapter)
    folder = resolve_folder(args.model)
    config = read_config(folder, args.trust_remote_code)
    tokenizer = load_tokenizer_for(folder, args.adapter, args.trust_remote_code)
    start = [{"role": "system", "content": args.system}] if args.system else []
    _check_template(tokenizer, args.model)
    _written([*start, {"role": "user", "content": "-"}], tokenizer, config)
    model = load_model(str(folder), args.adapter, args.device, args.force, args.trust_remote_code)
    printer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages = list(start)
    for line in _lines():
        if line == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        ids = _written(messages, tokenizer, config)
        left = room(config, ids.shape[1])
        if left < 1:
            raise ValueError(f"The conversation fills all positions of {args.model}: begin anew (/new) in time.")
        said = continue_text(
            model,
            tokenizer,
            ids,
            int(min(args.tokens, left)),
            args.temperature,
            args.seed or 0,
            printer,
            exact=args.exact,
        )
        messages.append({"role": "assistant", "content": said.reply})
        print(f"({speed(said)})", file=sys.stderr)
    return {"messages": messages}


def _check_template(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer of {model} has no chat template, so it does not say how a conversation is written: use "
            "`lowra generate`, or put the model's chat_template.jinja into the folder."
        )


def _written(messages: list[dict], tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> torch.Tensor:
    """A conversation up to where the model answers, ids [1, tokens].

    Raises:
        ValueError: the template, or the model, does not take it.
    """
    for message in messages:
        check_characters(message["content"], "The conversation has {!r}")
    try:
        written = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever the code of a template comes to
        raise ValueError(f"The chat template does not take this conversation: {error}.") from error
    ids = tokenizer(str(written), add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
    check_token_ids(set(ids.flatten().tolist()), config, tokenizer, "the conversation")
    return ids


def _lines() -> Iterator[str]:
    """What the user types, without empty lines, up to the end or /quit.

    Raises:
        ValueError: there is no standard input.
    """
    if sys.stdin is None:  # closed, as by a service that starts commands
        raise ValueError("Standard input is closed: type the conversation, or redirect it from a file or a pipe.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line
