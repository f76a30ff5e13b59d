"""A module that works token by token, on some tokens at a time: what it makes in between is never held for all.

An MLP widens a token three to four times, and holds that width six times while it is differentiated: more than all else
of a block in a long context. Here nothing is kept but its input; in backward each tile of tokens is computed again and
differentiated at once (Arctic Long Sequence Training, arXiv 2506.13996, calls it a tiled MLP).

Under a checkpoint that recomputes the block around it this costs nothing twice. A checkpoint stops where the last
tensor that it needs has been saved, and here that is the input, saved before anything is computed; PyTorch's own
checkpoint in its place would run the MLP once more.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_Run = Callable[[torch.Tensor], torch.Tensor]


def tiled(run: _Run, x: torch.Tensor, size: int, trained: Sequence[torch.Tensor]) -> Any:
    """run(x), so many tokens at a time.

    Args:
        run: from x [..., T, K] to [..., T, N], where a token's numbers depend on those of no other token.
        x: [..., T, K].
        size: of a tile, in tokens of each sequence.
        trained: what `run` reads that gets gradients, beside x.
    """
    if not torch.is_grad_enabled() or not (x.requires_grad or trained):
        return _forward(run, x, size)
    # What it gives is nothing; its node is where the input is to be had in backward, and lives as long as that.
    saved: Any = _Saved.apply(x.new_empty(0).requires_grad_(), x)
    return _Tiled.apply(run, size, _Kept(saved), x, *trained)


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, differentiable: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return differentiable.view_as(differentiable)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> None:
        raise AssertionError("What this gives is not for use.")


class _Kept:
    """A tensor that autograd takes for no input of a function."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, size: int, saved: _Kept, x: torch.Tensor, *trained: Any) -> torch.Tensor:
        ctx.run, ctx.size, ctx.saved, ctx.trained = run, size, saved, trained
        ctx.autocast = _autocast_as_now(x.device.type)
        before = _random_state(x.device)
        out = _forward(run, x, size)
        is_random = any(not torch.equal(*pair) for pair in zip(before, _random_state(x.device), strict=True))
        ctx.random = before if is_random else None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved.tensor.grad_fn.saved_tensors
        needs_x, *needed = ctx.needs_input_grad[3:]
        wanted = [parameter for parameter, needs in zip(ctx.trained, needed, strict=True) if needs]
        sums: list[torch.Tensor | None] = [None] * len(wanted)
        of_x = torch.empty_like(x) if needs_x else None
        with _random_as(ctx.random, x.device):
            for place, tokens in _tiles(x, ctx.size):
                part = tokens.detach().requires_grad_(needs_x)
                with torch.enable_grad(), torch.autocast(x.device.type, **ctx.autocast):
                    out = ctx.run(part)
                of_out = gradient.narrow(-2, *place)
                found = torch.autograd.grad(out, [part] * needs_x + wanted, of_out, allow_unused=True)
                del out
                if of_x is not None:
                    of_x.narrow(-2, *place).copy_(torch.zeros_like(part) if found[0] is None else found[0])
                sums = [_sum(before, more) for before, more in zip(sums, found[needs_x:], strict=True)]
        by_parameter = iter(sums)
        return None, None, None, of_x, *(next(by_parameter) if needs else None for needs in needed)


def _forward(run: _Run, x: torch.Tensor, size: int) -> torch.Tensor:
    whole: torch.Tensor | None = None
    for place, tokens in _tiles(x, size):
        out = run(tokens)
        if whole is None:
            whole = out.new_empty(*x.shape[:-1], out.shape[-1])
        whole.narrow(-2, *place).copy_(out)
    assert whole is not None
    return whole


def _tiles(x: torch.Tensor, size: int) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
    """The first token and the length of each tile, and its tokens."""
    start = 0
    for tokens in x.split(size, dim=-2):
        yield (start, tokens.shape[-2]), tokens.contiguous()  # of several sequences they are not
        start += tokens.shape[-2]


def _sum(before: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    if before is None or more is None:
        return more if before is None else before
    return before.add_(more)


def _autocast_as_now(kind: str) -> dict[str, Any]:
    return {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}


def _random_state(device: torch.device) -> list[torch.Tensor]:
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


@contextlib.contextmanager
def _random_as(state: list[torch.Tensor] | None, device: torch.device) -> Iterator[None]:
    """Within, random numbers are drawn as from this state; None is as they come."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield
