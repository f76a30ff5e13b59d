"""Blocks trained on much text, and towards what the dense model makes of their output: for `accuracy_grid.py`.

The library trains a block towards the dense block's output, every direction of which counts alike. Here the dense
blocks behind it, or the gradients of the loss at its output, say which errors matter.
"""

import contextlib
import math

import torch
from transformers import AutoModelForCausalLM

from lowra.quantization import block_training
from lowra.quantization.block_training import current
from lowra.quantization.trained_stack import Adam, rates_of, stacked
from lowra.quantization.trained_weight import TrainedWeight


def train(session, stream, start, passes, seed, held_out, *, ahead=0, share=1.0, fisher=0, batch=block_training.BATCH):
    """Trains all blocks in turn.

    Args:
        session: an `accuracy_grid.Session`.
        stream: a `BlockStream`, of which all blocks are in memory at once.
        start: `block_training.Start`.
        passes, seed: as of `block_training.train_blocks`.
        held_out: token ids [count, T], on which nothing is trained.
        ahead: blocks behind the trained one that its output goes through before it is compared; -1: all, and norm and
            head, and what is compared are logits, by their KL divergence.
        share: of that comparison; the rest is the comparison at the block's own output.
        fisher: sequences over which gradients of the loss at the blocks' outputs are collected; errors there are
            then compared in their second moment, `share` of it and the rest plain.
        batch: sequences of a step.

    Returns:
        `TrainedWeight` by name, and the KL divergence on `held_out` of the model with the first 0, 1, 2... blocks
        packed.
    """
    model = AutoModelForCausalLM.from_pretrained(session.folder, dtype=torch.float32).to(session.device)
    model.requires_grad_(False)
    metrics = gradients(model, stream.sequences[:fisher]) if fisher else None
    trained, found = {}, [0.0]
    with contextlib.ExitStack() as stack:
        blocks = [stack.enter_context(stream.block(name)) for name in stream.names]
        packed = stream.inputs()
        states = {0: packed}  # what the dense blocks put out, as far as it is needed
        if ahead < 0:
            final = packed
            for block in blocks:
                final = run(block, {}, final, batch)
        for place, block in enumerate(blocks):
            weights = {name: TrainedWeight(block.weight(name), *start(name), 1.0) for name in block.targets}
            behind = blocks[place + 1 :] if ahead < 0 else blocks[place + 1 : place + 1 + ahead]
            while (known := max(states)) < place + 1 + (len(behind) if ahead > 0 else 0):
                states[known + 1] = run(blocks[known], {}, states[known], batch)
            states = {at: state for at, state in states.items() if at > place}
            goal = final if ahead < 0 else states[max(states)]

            def loss(
                hidden, members, made, *, block=block, place=place, behind=behind, near=states[place + 1], far=goal
            ):
                out = block(hidden, made)
                beside = distance(out, near[members])
                if metrics is not None:
                    return share * distance(out, near[members], metrics[place]) + (1 - share) * beside
                if ahead == 0:
                    return beside
                for other in behind:
                    out = other(out.float(), {})
                if ahead > 0:
                    return share * distance(out, far[members]) + (1 - share) * beside
                with torch.no_grad():
                    wanted = logits(model, far[members])
                return share * divergence(wanted, logits(model, out)) + (1 - share) * beside

            optimise(weights, packed, loss, passes, seed, batch)
            now = current(weights)
            packed = run(block, now, packed, batch)
            trained.update(weights)
            found.append(held_out_divergence(session, model, current(trained), held_out))
    return trained, found


def logits(model, hidden):
    return model.lm_head(model.model.norm(hidden.float()))


def distance(out, wanted, metric=None):
    """Mean over the tokens of the squared error over the size of what is wanted, squared; in a metric [H, H] of mean
    diagonal 1.
    """
    wanted = wanted.float()
    error = out.float() - wanted
    seen = error if metric is None else error @ metric
    return ((seen * error).sum(dim=-1) / wanted.square().sum(dim=-1)).mean()


@contextlib.contextmanager
def halved(device):
    """The products in bfloat16 on a GPU; other than the library's, attention may sum in any order."""
    with torch.autocast(device.type, torch.bfloat16, device.type != "cpu"):
        yield


@torch.no_grad()
def run(block, weights, inputs, batch):
    out = torch.empty_like(inputs)
    for first in range(0, len(inputs), batch):
        with halved(inputs.device):
            out[first : first + batch] = block(inputs[first : first + batch].float(), weights)
    return out


def gradients(model, sequences):
    """Second moment [H, H] of the loss's gradient at each block's output, relative to the size of the output; its
    mean diagonal is 1.
    """
    totals, handles = [0.0] * len(model.model.layers), []
    for place, layer in enumerate(model.model.layers):

        def watch(module, args, out, place=place):
            hidden = out[0] if isinstance(out, tuple) else out
            size = hidden.detach().float().norm(dim=-1, keepdim=True)

            def add(gradient):
                rows = (gradient.float() * size).flatten(0, 1)
                totals[place] = totals[place] + rows.T @ rows

            (hidden if hidden.requires_grad else hidden.requires_grad_(True)).register_hook(add)

        handles.append(layer.register_forward_hook(watch))
    for ids in sequences.to(model.device).split(4):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    return [total / total.diagonal().mean() for total in totals]


def optimise(weights, inputs, loss, passes, seed, batch):
    steps = math.ceil(passes * len(inputs) / batch)
    rates = {name: rates_of(weight, dict.fromkeys(block_training.RATES, 1.0)) for name, weight in weights.items()}
    stacks = stacked(weights, fixed_cells=False)  # as the library's blocks
    adams = [Adam(stack.parts(), stack.rates(rates)) for stack in stacks]
    generator = torch.Generator().manual_seed(seed)
    orders = torch.cat([torch.randperm(len(inputs), generator=generator) for _ in range(passes)])
    for step, members in enumerate(orders.to(inputs.device).split(batch)):
        made = [stack() for stack in stacks]
        leaves = {name: weight.detach().requires_grad_() for own in made for name, weight in own.items()}
        with halved(inputs.device):
            value = loss(inputs[members].float(), members, leaves)
        gradients = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        for own, adam in zip(made, adams, strict=True):
            adam.at(step, steps)
            adam.step(list(own.values()), [gradients[name] for name in own])
    for stack in stacks:
        stack.unstack()


def divergence(wanted, out):
    """Mean KL divergence of logits [B, T, V]."""
    wanted, out = wanted.float().log_softmax(dim=-1), out.float().log_softmax(dim=-1)
    return (wanted.exp() * (wanted - out)).sum(dim=-1).mean()


@torch.no_grad()
def held_out_divergence(session, model, weights, sequences):
    total = 0.0
    for ids in sequences.to(session.device).split(4):
        with halved(session.device):
            wanted = model(input_ids=ids, use_cache=False).logits
            out = torch.func.functional_call(model, weights, (), {"input_ids": ids, "use_cache": False}).logits
        total += float(divergence(wanted, out)) * len(ids)
    return total / len(sequences)
