"""A short fine-tuning of a variant of `accuracy_grid.py`: plain LoRA on all linear layers, tables where they learn too.

AdamW, cosine schedule, warmup 0.03, gradients clipped at 0.3.
"""

import math

import torch
from accuracy_efficientqat import SteppedLinear, UniformWeight
from torch import nn

from lowra.nn.linear import LowRALinear
from lowra.nn.trained_tables import bake_tables, train_tables
from lowra.weights.packed import PackedWeight


class Adapted(nn.Module):
    """x (W + B A)^T with W frozen: packed, or dense for the 16-bit runs and HQQ."""

    def __init__(self, base, a, b):
        super().__init__()
        self.base = base
        self.lora_a, self.lora_b = nn.Parameter(a.float().clone()), nn.Parameter(b.float().clone())

    def forward(self, x):
        low = nn.functional.linear(nn.functional.linear(x, self.lora_a), self.lora_b)
        return self.base(x) + low


def base_layer(weight: PackedWeight | UniformWeight | torch.Tensor) -> nn.Module:
    if isinstance(weight, PackedWeight):
        return LowRALinear.from_packed(weight)
    if isinstance(weight, UniformWeight):
        return SteppedLinear(weight)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")  # draws no random numbers
    layer.weight = nn.Parameter(weight.bfloat16())
    return layer


def fine_tune(session, v):
    tables = optimise(session, v)
    if not tables:
        return {"tuned": session.perplexity()}
    unbaked = session.perplexity()
    if not v.train.startswith("steps"):
        bake_tables(session.model)
    return {"tuned": session.perplexity(), "tuned_unpacked": unbaked}


def optimise(session, v, batch=8, warmup=0.03):
    """Trains adapters, and tables where the variant says so; returns the parameters of these."""
    model, blocks, steps = session.model, session.train, v.train_steps
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if v.train.startswith("steps"):
        tables = [p for name, p in model.named_parameters() if name.endswith("step_change")]
        for parameter in tables:
            parameter.requires_grad_(True)
    else:
        tables = train_tables(model, scales=v.train == "both", shared=v.train == "shared") if v.train != "lora" else {}
        tables = list(tables.values())
    adapters = [p for name, p in model.named_parameters() if name.endswith(("lora_a", "lora_b"))]
    if v.train == "steps alone":
        adapters = []
    for parameter in adapters:
        parameter.requires_grad_(True)
    groups = [{"params": adapters, "lr": v.lr}, {"params": tables, "lr": v.lr * v.table_rate, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.1)
    warm = max(1, round(warmup * steps))

    def factor(step):
        if step < warm:
            return step / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    generator = torch.Generator().manual_seed(v.seed + v.tuning_seed)
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(8)])
    while len(order) < batch * steps:
        order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
    model.train()
    for step in range(steps):
        ids = blocks[order[step * batch : (step + 1) * batch]].to(session.device)
        with torch.autocast(session.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters + tables, 0.3)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
    return tables
