"""All blocks of a packed model trained together towards the dense model's logits: for `accuracy_grid.py`."""

import math

import torch
from accuracy_recording import recorded
from transformers import AutoModelForCausalLM

from lowra.quantization import block_training


def train(session, trained, sequences, *, steps, batch=16, part=4, rate=0.3, codes=0.1, seed=0):
    """Trains the weights in place.

    Args:
        session: an `accuracy_grid.Session`.
        trained: `TrainedWeight` by name, as the blocks' training leaves them.
        sequences: token ids [count, T].
        steps, batch: of Adam, with sequences of each.
        part: sequences that are in memory at a time.
        rate: of tables and adapter over `block_training.RATES`.
        codes: the same of what the codes are rounded from; 0 leaves them.

    Returns:
        mean KL divergence of the tokens in the first and the last steps.
    """
    model = AutoModelForCausalLM.from_pretrained(session.folder, dtype=torch.float32).to(session.device)
    model.requires_grad_(False)
    model.config.use_cache = False
    groups = []
    for weight in trained.values():
        weight.dense.requires_grad_(codes > 0)
        for name, parameter in weight.named_parameters():
            if not parameter.requires_grad or (name in ("lora_A", "lora_B") and not weight.trains_product):
                continue
            own = (codes if name == "dense" else rate) * block_training.RATES[name]
            if name not in ("level_change", "scale_change"):
                own *= float(parameter.detach().square().mean().sqrt())
            groups.append({"params": [parameter], "lr": own})
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(steps * batch / len(sequences))
    order = torch.cat([torch.randperm(len(sequences), generator=generator) for _ in range(passes)])
    found = []
    with recorded(trained, session.device) as make:
        for step in range(steps):
            members = sequences[order[step * batch : (step + 1) * batch]]
            made = make()
            leaves = {name: weight.detach().requires_grad_() for name, weight in made.items()}
            total = torch.zeros((), device=session.device)
            for ids in members.to(session.device).split(part):
                with torch.autocast(session.device.type, torch.bfloat16):
                    with torch.no_grad():
                        wanted = model(input_ids=ids).logits
                    out = torch.func.functional_call(model, leaves, (), {"input_ids": ids}).logits
                loss = divergence(wanted, out) * len(ids) / len(members)
                loss.backward()
                total += loss.detach()
            torch.autograd.backward(list(made.values()), [leaf.grad for leaf in leaves.values()])
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            found.append(total)
    few = max(1, steps // 16)
    found = torch.stack(found)
    return float(found[:few].mean()), float(found[-few:].mean())


def divergence(wanted, out):
    """Mean KL divergence of logits [B, T, V]."""
    wanted, out = wanted.float().log_softmax(dim=-1), out.float().log_softmax(dim=-1)
    return (wanted.exp() * (wanted - out)).sum(dim=-1).mean()
