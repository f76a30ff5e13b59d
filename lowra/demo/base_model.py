"""Trains the demo's base: a LLaMA of about 4 million parameters, seconds to minutes on two CPU cores."""

import math
import pathlib

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 256
_BATCH = 12
_STEPS = 320
_PEAK_LR = 4e-3


def train_base(text: pathlib.Path, folder: pathlib.Path, seed: int = 0) -> None:
    """Trains tokenizer and model on a text and saves both as an ordinary bfloat16 checkpoint."""
    tokenizer = _train_tokenizer(text)
    tokens = torch.tensor(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_then_cosine)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(_STEPS), desc="training the demo's base", unit="step")
    for _ in bar:
        starts = torch.randint(len(tokens) - CONTEXT, (_BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.2f}")
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _warmup_then_cosine(step: int) -> float:
    warmup = 0.05 * _STEPS
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * (1 + math.cos(math.pi * (step - warmup) / (_STEPS - warmup))) / 2


def _train_tokenizer(text: pathlib.Path) -> PreTrainedTokenizerFast:
    trainer = ByteLevelBPETokenizer()
    trainer.train([str(text)], vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, bos_token="<|end|>", eos_token="<|end|>")
