"""Conversations: rows of chat data to tokens, with loss on the assistant's turns alone.

Three forms of a row are known, as TRL and ShareGPT have them:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}, or messages in both places
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}

What the model reads is what its chat template writes. Which of it the assistant said, the template tells itself where
it has {% generation %} marks. Elsewhere it is what a turn adds to the conversation before it with the header of an
answer. That is well-defined only if every beginning of the conversation is written as it is within the whole. Templates
that rewrite earlier turns (Qwen 3 drops their thoughts) are refused: part of the labels would belong to other tokens.
"""

import dataclasses
import functools
import pathlib
import re
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from ..checkpoints.guarded import read_text
from ..corpus import check_characters, check_object, check_unrepeated

IGNORED = -100  # label that the losses of Transformers leave out

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
_ROLES |= {"system": "system", "tool": "tool"}
_REWRITTEN = (
    "{where}: the chat template writes turn {turn} otherwise when more follows, so it does not tell which tokens the "
    "assistant said. Mark them with {{% generation %}} in the template and give it as chat_template=FILE "
    "(trl.chat_template_utils.get_training_chat_template(tokenizer) has such templates for common models)."
)
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FORMS = "messages, prompt and completion, or conversations"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """
    Attributes:
        messages: each with `role` and `content`, and whatever else the template knows.
        tools: descriptions of the functions that the assistant may call, for the template, or None.
        where: file and line, for messages.
        first: of the messages that are learned from; what stands before is a prompt.
    """

    messages: list[dict]
    tools: list | None
    where: str
    first: int = 0


def read_row(row: Any, where: str) -> Conversation:
    """A row of chat data.

    Args:
        where: begins messages, such as "FILE, line 3".

    Raises:
        ValueError: none of the three forms, or no turn of the assistant in it.
    """
    check_object(row, where, '"messages": […]')
    forms = [name for name in ("messages", "conversations", "prompt") if name in row]
    if len(forms) != 1:
        found = f"both {' and '.join(forms)}" if forms else f"none of them; it has {', '.join(row) or 'nothing'}"
        raise ValueError(f"{where} must have {_FORMS}: it has {found}.")
    for column in row:
        check_unrepeated(row, column, where)
    first = 0
    if forms == ["conversations"]:
        messages = _messages(row["conversations"], f"{where}: conversations", ("from", "value"))
    elif forms == ["messages"]:
        messages = _messages(row["messages"], f"{where}: messages")
    else:
        if "completion" not in row:
            raise ValueError(f"{where} has a prompt and no completion; it has {', '.join(row)}.")
        prompt = _part(row["prompt"], "user", f"{where}: prompt")
        first = len(prompt)
        messages = prompt + _part(row["completion"], "assistant", f"{where}: completion")
    if not any(message["role"] == "assistant" for message in messages[first:]):
        raise ValueError(f"{where} has no turn of the assistant: there is nothing to learn from.")
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where} has tools that are no list.")
    return Conversation(messages, tools or None, where, first)


def _part(value: Any, role: str, where: str) -> list[dict]:
    return _messages([{"role": role, "content": value}] if isinstance(value, str) else value, where)


def _messages(value: Any, where: str, keys: tuple[str, str] = ("role", "content")) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list of turns, each with {keys[0]!r} and {keys[1]!r}.")
    messages = []
    for number, turn in enumerate(value, start=1):
        place = f"{where}, turn {number},"
        if not isinstance(turn, dict) or not isinstance(turn.get(keys[0]), str):
            raise ValueError(f"{place} must be an object with text in {keys[0]!r}.")
        content = turn.get(keys[1])
        if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
            raise ValueError(f"{place} has no text in {keys[1]!r}.")
        check_characters(content or "", f"{place} has {{!r}} in {keys[1]!r}")
        role = turn[keys[0]]
        if keys[0] == "from":
            if role not in _ROLES:
                raise ValueError(f"{place} is from {role!r:.80}; known are {', '.join(_ROLES)}.")
            messages.append({"role": _ROLES[role], "content": content})
        else:
            messages.append(turn)
    return messages


def use_template(tokenizer: PreTrainedTokenizerBase, file: str | None, model: str) -> None:
    """Sets the tokenizer's chat template where the recipe names a file.

    Raises:
        FileNotFoundError, ValueError: no such file, or no template at all.
    """
    if file is not None:
        if not pathlib.Path(file).is_file():
            raise FileNotFoundError(f"There is no chat template {file}.")
        tokenizer.chat_template = read_text(pathlib.Path(file), "a chat template")
    if not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer of {model} has no chat template, so it does not say how a conversation is written: give "
            "chat_template=FILE, a Jinja template."
        )
    if not tokenizer.is_fast:
        raise ValueError(f"The tokenizer of {model} does not say where tokens stand in the text: give a fast one.")


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, length: int) -> dict:
    """Tokens of a conversation and their labels; what is longer than `length` is cut off.

    Raises:
        ValueError: the template refuses the conversation, or does not tell what the assistant said.
    """
    write = functools.partial(_written, conversation, tokenizer)
    if marks_turns(tokenizer):
        # what is longer than the model's positions is cut below
        encoded: Any = write(
            tokenize=True, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        if conversation.first:
            text, prompt = write(), write(conversation.first, add_generation_prompt=True)
            if not text.startswith(prompt):
                raise ValueError(_REWRITTEN.format(where=conversation.where, turn=conversation.first))
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ends = [end for _, end in found["offset_mapping"]]
            mask = [said and end > len(prompt) for said, end in zip(mask, ends, strict=True)]
    else:
        text = write()
        spans = _spans(conversation, text, write)
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = found["input_ids"]
        mask = [any(a < end and start < b for a, b in spans) for start, end in found["offset_mapping"]]
    labels = [token if said else IGNORED for token, said in zip(ids, mask, strict=True)]
    return {"input_ids": ids[:length], "labels": labels[:length]}


def learns_to_stop(examples: list[dict], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a special token, with which generation could end, is among the labels of any example."""
    special = set(tokenizer.all_special_ids)
    return any(not special.isdisjoint(example["labels"]) for example in examples)


def marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has {% generation %} marks."""
    return bool(_MARKS.search(str(tokenizer.get_chat_template())))


def _written(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, turns: int | None = None, **options: Any
) -> Any:
    """The conversation, or its first turns, as the template writes it."""
    try:
        return tokenizer.apply_chat_template(
            conversation.messages[:turns], tools=conversation.tools, **{"tokenize": False, **options}
        )
    except TemplateSyntaxError as error:
        raise ValueError(f"Line {error.lineno} of the chat template is no Jinja: {error.message}.") from error
    except (TemplateError, TypeError, KeyError) as error:  # the last two of filters in the template
        reason = " ".join(str(error).split())
        raise ValueError(f"{conversation.where}: the chat template refuses this conversation: {reason}.") from error


def _spans(conversation: Conversation, text: str, write: Any) -> list[tuple[int, int]]:
    """Where in the text [start, end) the assistant's turns stand."""
    spans = []
    for number, message in enumerate(conversation.messages):
        if message["role"] != "assistant" or number < conversation.first:
            continue
        # a conversation may begin with the assistant, and templates need a turn
        before = write(number, add_generation_prompt=True) if number else ""
        after = write(number + 1)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(_REWRITTEN.format(where=conversation.where, turn=number + 1))
        spans.append((len(before), len(after)))
    return spans
