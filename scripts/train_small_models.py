"""Trains a small BART from nothing, to have an encoder-decoder where BART-large cannot be downloaded.

    python scripts/train_small_models.py --train encyclopaedia/train.txt --validation encyclopaedia/validation.txt \\
        --output runs/small-bart --minutes 4

Two objectives in equal parts: text infilling (spans of about three tokens, a third of the text, each replaced by one
<mask>; BART) and the first sentence of a passage from the rest of it (gap sentences; PEGASUS), the nearest thing to a
news summary in running text. The tokenizer is trained on the same text. 1.5 MB of text and some minutes make a model
that writes its domain's words in order and summarises nothing well: it shows that the path works, no more.
"""

import argparse
import itertools
import json
import math
import pathlib
import random
import re
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # BART's, in BART's order
MASKED_SHARE, SPAN = 0.3, 3.0
POSITIONS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=pathlib.Path, required=True, help="UTF-8 text")
    parser.add_argument("--validation", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the model")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256, help="hidden size (default 256)")
    parser.add_argument("--layers", type=int, default=3, help="of the encoder and of the decoder (default 3)")
    parser.add_argument("--passage", type=int, default=256, help="tokens of a training passage (default 256)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop earlier, with the schedule cut to fit")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for path in (args.train, args.validation):
        if not path.is_file() or not path.read_text(encoding="utf-8").strip():
            parser.error(f"{path} is no file with text")
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    texts = [path.read_text(encoding="utf-8") for path in (args.train, args.validation)]
    tokenizer = train_tokenizer(texts[0].splitlines(), args.vocabulary)
    train, validation = (passages(text, tokenizer, args.passage) for text in texts)
    model = make_model(tokenizer, args.width, args.layers)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size / 1e6:.1f} million parameters, {len(train)} passages of at most {args.passage} tokens", flush=True)
    losses = fit(model, tokenizer, train, validation, args)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "training.json").write_text(json.dumps({**losses, "parameters": size, "seed": args.seed}, indent=2))
    print(json.dumps(losses))


def train_tokenizer(lines: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with BART's special tokens around each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **names)


def passages(text: str, tokenizer, length: int) -> list[list[list[int]]]:
    """Passages of at least two sentences and at most `length` tokens, each a list of tokenised sentences."""
    found, current, size = [], [], 0
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", text):
        tokens = tokenizer(" " + sentence.strip(), add_special_tokens=False, verbose=False)["input_ids"][: length // 2]
        if len(tokens) < 5:
            continue
        if size + len(tokens) > length and len(current) > 1:
            found.append(current)
            current, size = [], 0
        current.append(tokens)
        size += len(tokens)
    return found + ([current] if len(current) > 1 else [])


def make_model(tokenizer, width: int, layers: int) -> BartForConditionalGeneration:
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(tokenizer),
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=width // 32,
            decoder_attention_heads=width // 32,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            max_position_embeddings=POSITIONS,
            dropout=0.1,
        )
    )
    # as bart-large generates
    model.generation_config.update(num_beams=4, no_repeat_ngram_size=3, early_stopping=True, forced_bos_token_id=0)
    return model


def example(sentences: list[list[int]], mask: int, gap: bool) -> tuple[list[int], list[int]]:
    """Source and target token ids, with BART's <s> and </s> around both."""
    if gap:
        source, target = list(itertools.chain(*sentences[1:])), sentences[0]
    else:
        target = list(itertools.chain(*sentences))
        source, position = [], 0
        while position < len(target):
            if random.random() < MASKED_SHARE / SPAN:
                source.append(mask)
                position += max(1, round(random.expovariate(1 / SPAN)))
            else:
                source.append(target[position])
                position += 1
    return [0, *source, 2], [0, *target, 2]


def batch(chosen: list, tokenizer, gap: bool, device) -> dict[str, torch.Tensor]:
    pairs = [example(sentences, tokenizer.mask_token_id, gap) for sentences in chosen]
    sources, targets = zip(*pairs, strict=True)
    inputs = padded(sources, tokenizer.pad_token_id)
    tensors = {"input_ids": inputs, "attention_mask": inputs != tokenizer.pad_token_id, "labels": padded(targets, -100)}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def padded(sequences, value: int) -> torch.Tensor:
    longest = max(map(len, sequences))
    return torch.tensor([sequence + [value] * (longest - len(sequence)) for sequence in sequences])


def fit(model, tokenizer, train: list, validation: list, args) -> dict:
    """Trains in place; returns losses per token on validation passages, before and after."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    started, report = time.perf_counter(), {"before": evaluate(model, tokenizer, validation, args, device)}
    for step in range(args.steps):
        # progress is steps or time, whichever runs out first
        progress = max(step / args.steps, (time.perf_counter() - started) / (60 * args.minutes))
        if progress >= 1:
            break
        rate = args.learning_rate * min(1, (step + 1) / 100) * max(0.02, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs = batch(random.choices(train, k=args.batch_size), tokenizer, step % 2 == 0, device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    report.update(after=evaluate(model, tokenizer, validation, args, device), steps=step + 1)
    return {**report, "seconds": round(time.perf_counter() - started, 1), "device": device.type}


@torch.no_grad()
def evaluate(model, tokenizer, validation: list, args, device) -> dict[str, float]:
    """Mean loss per target token of both objectives on the first 256 validation passages."""
    model.eval()
    state = random.getstate()
    random.seed(0)  # the same masks each time
    losses = {}
    for name, gap in (("infilling", False), ("gap sentence", True)):
        total = tokens = 0
        for start in range(0, min(256, len(validation)), args.batch_size):
            inputs = batch(validation[start : start + args.batch_size], tokenizer, gap, device)
            count = int((inputs["labels"] != -100).sum())
            total += model(**inputs).loss.item() * count
            tokens += count
        losses[name] = round(total / tokens, 4)
    random.setstate(state)
    model.train()
    return losses


if __name__ == "__main__":
    main()
