"""Trains a small LLaMA of chosen proportions from nothing with a larger model's next-token distribution as its teacher.

    python scripts/train_small_llama.py models/base-30m --text encyclopaedia/train.txt more.txt \\
        --validation encyclopaedia/validation.txt --output runs/wide-shallow --seconds 90

A few megabytes of text are too little to learn a language from, and enough to copy one: the loss is the cross entropy
to the teacher's distribution of the next token, on blocks at random places of the text. The student takes the teacher's
tokenizer. Its use here is a second set of trained weights: another width and depth, grouped-query attention.
"""

import argparse
import json
import math
import pathlib
import time

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path, nargs="+", required=True, help="UTF-8 text")
    parser.add_argument("--validation", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the model")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--key-value-heads", type=int, default=2)
    parser.add_argument("--inner", type=int, default=1728, help="width of the gated product")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a block")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop earlier, with the schedule cut to fit")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).to(device).eval()
    train = torch.cat([token_ids(path, tokenizer) for path in args.text])
    validation = token_ids(args.validation, tokenizer)
    student = make_student(teacher.config, args).to(device)
    losses = fit(student, teacher, train, validation, args, device)
    student.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    report = {**losses, "parameters": student.num_parameters(), "train_tokens": len(train), "seed": args.seed}
    (args.output / "training.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report))


def token_ids(path: pathlib.Path, tokenizer) -> torch.Tensor:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = ["".join(lines[i : i + 1000]) for i in range(0, len(lines), 1000)]
    return torch.cat([torch.tensor(tokenizer(part, verbose=False).input_ids) for part in parts])


def make_student(teacher, args) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=teacher.vocab_size,
            hidden_size=args.width,
            intermediate_size=args.inner,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.key_value_heads,
            max_position_embeddings=teacher.max_position_embeddings,
            bos_token_id=teacher.bos_token_id,
            eos_token_id=teacher.eos_token_id,
            pad_token_id=teacher.pad_token_id,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


def fit(student, teacher, train, validation, args, device) -> dict:
    """Trains in place; returns perplexities of both models on the beginning of the validation text."""
    parameters = [
        {"params": [p for p in student.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in student.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    train, offsets = train.to(device), torch.arange(args.length, device=device)
    started, step = time.perf_counter(), 0
    while True:
        progress = max(step / args.steps, (time.perf_counter() - started) / args.seconds)
        if progress >= 1:
            break
        rate = args.learning_rate * min(1, (step + 1) / 100) * max(0.02, 1 - progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - args.length, (args.batch_size, 1), device=device)
        ids = train[starts + offsets]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                wanted = teacher(input_ids=ids, use_cache=False).logits.float().softmax(-1)
            logits = student(input_ids=ids).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(0, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:  # also keeps the host from running ahead of the clock
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    report = {
        "teacher": perplexity(teacher, validation, args, device),
        "student": perplexity(student, validation, args, device),
    }
    return {**report, "steps": step, "tokens_seen": step * args.batch_size * args.length, "device": device.type}


@torch.no_grad()
def perplexity(model, tokens, args, device, blocks=32) -> float:
    model.eval()
    losses = []
    for block in tokens[: len(tokens) // args.length * args.length].view(-1, args.length)[:blocks].to(device):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            losses.append(model(input_ids=block[None], labels=block[None]).loss.item())
    return round(math.exp(sum(losses) / len(losses)), 3)


if __name__ == "__main__":
    main()
