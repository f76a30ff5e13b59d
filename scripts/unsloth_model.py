"""The peer of `bench_training.py`'s way "unsloth": NF4 with their LoRA and their patched layers, on random weights.

Their loader reads folders, so a dense checkpoint of the shape is written first (13.5 GB for a 7B, in --scratch), with a
tokenizer of as many words. Needs unsloth, unsloth_zoo, TRL and `datasets` or a stand-in for it, of which no step needs
anything. They patch Transformers for the rest of the process.
"""

import pathlib
import shutil
from typing import Any

import torch
from random_models import SHAPES, make_model

_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LENGTH = 4096


def make_unsloth_model(shape: str, rank: int, dtype: torch.dtype, scratch: pathlib.Path) -> Any:
    """A model with its adapters, as their notebooks make it, with plain gradient checkpointing of theirs."""
    from unsloth import FastLanguageModel

    folder = scratch / f"unsloth-{shape}"
    _write(folder, shape, dtype)
    try:
        model, _ = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=_LENGTH, dtype=dtype, load_in_4bit=True, local_files_only=True,
            use_gradient_checkpointing=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    return FastLanguageModel.get_peft_model(
        model, r=rank, lora_alpha=rank, target_modules=_LINEAR, lora_dropout=0, bias="none",
        use_gradient_checkpointing=True,
    )  # fmt: skip


def _write(folder: pathlib.Path, shape: str, dtype: torch.dtype) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make_model(shape, "bf16", _LENGTH, dtype=dtype).save_pretrained(folder)
    words = {f"t{number}": number for number in range(SHAPES[shape][-1])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "t0", "unk_token": "t1", "bos_token": "t2", "eos_token": "t3"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
