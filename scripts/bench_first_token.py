"""The first token of fast generation: what of its time the host takes, and for what.

    python scripts/bench_first_token.py --device cpu --shape narrow --prompt 20      # on one thread
    python scripts/bench_first_token.py --cases 0:1:1 16:1:1 16:4:8 --prompt 100     # a 7B on a GPU

A row is the median of calls of `generate` for one token by a session that is there already, in milliseconds, and of
each part of it as the host sees it: on a GPU `prompt` is the time until its last kernel was launched, and `waits` what
is left until the token is there. Parts that `session` or `generate` contains are not in those. `kept` says whether the
session served every call; a decoder that is read in full says so in `reads`.
"""

import argparse
import contextlib
import json
import statistics
import time

import torch
from bench_generation import generate, with_adapters, without_adapters
from peft import PeftModel
from peft.tuners.lora import LoraModel
from random_models import SHAPES, make_model

from lowra.generation import fast
from lowra.generation.decoder import Decoder
from lowra.generation.session import Session

# By their names in a row: where they are looked up when they are called.
PARTS = {
    "names": (fast, "adapter_names"),
    "reads": (Decoder, "__init__"),
    "current": (Decoder, "read_again"),
    "refresh": (Decoder, "refresh"),
    "session": (fast, "_session"),
    "prompt": (Decoder, "prompt"),
    "run": (Session, "run"),
}
# Outer parts first: what is taken off them is still whole.
INSIDE = {"session": ["names", "current", "refresh"], "current": ["reads"], "run": ["prompt"]}
_FIRST = 5  # calls that are not timed: the session is made, and with --turns takes up to four adapters
_WHOLE = ("session", "run", "hooks")


@contextlib.contextmanager
def timed_parts(spent: dict[str, float]):
    """Within, seconds of each part are added to what was spent on it."""
    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in PARTS.items()}
    hooks = LoraModel._enable_peft_forward_hooks

    def watched(name, function):
        def call(*arguments, **keywords):
            started = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

        return call

    @contextlib.contextmanager
    def watched_hooks(*arguments, **keywords):
        started, context = time.perf_counter(), hooks(*arguments, **keywords)
        with context:
            entered = time.perf_counter()
            yield
            left = time.perf_counter()
        spent["hooks"] = spent.get("hooks", 0.0) + entered - started + time.perf_counter() - left

    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, watched(name, originals[name]))
    LoraModel._enable_peft_forward_hooks = watched_hooks
    try:
        yield
    finally:
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, originals[name])
        LoraModel._enable_peft_forward_hooks = hooks


def first_token(
    model: torch.nn.Module, ids: torch.Tensor, repeats: int, new: int = 1, other_adapters: bool = False
) -> dict:
    """A row: see above. other_adapters: sequences go through others at each call."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    turns = [number if other_adapters else 0 for number in range(_FIRST + repeats)]
    for turn in turns[:_FIRST]:
        generate(model, ids, new, fast=True, turn=turn)
    session, rows = fast.session_of(bare), []
    for turn in turns[_FIRST:]:
        spent: dict[str, float] = {}
        with timed_parts(spent):
            started = time.perf_counter()
            generate(model, ids, new, fast=True, turn=turn)
            if ids.is_cuda:
                torch.cuda.synchronize()
            spent["first"] = time.perf_counter() - started
        rows.append(spent)
    median = {name: 1e3 * statistics.median(row.get(name, 0.0) for row in rows) for name in (*PARTS, "hooks", "first")}
    median["generate"] = median["first"] - sum(median[name] for name in _WHOLE)
    for outer, inner in INSIDE.items():
        median[outer] -= sum(median[name] for name in inner)
    median["waits"] = median.pop("run")
    return {"kept": fast.session_of(bare) is session} | {name: round(value, 2) for name, value in median.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--bits", type=float, default=1.5)
    parser.add_argument("--cases", nargs="*", default=["0:1:1", "16:1:1", "16:4:8"], help="rank:adapters:sequences")
    parser.add_argument("--prompt", type=int, default=100, help="tokens")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--turns", action="store_true", help="sequences go through other adapters at each call")
    parser.add_argument("--new", type=int, default=1, help="tokens; with 2 a new session also captures a step")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    model = make_model(args.shape, args.bits, device=args.device)
    for case in args.cases:
        rank, adapters, batch = map(int, case.split(":"))
        model = with_adapters(model, rank, adapters) if rank else without_adapters(model)
        ids = torch.randint(5, model.config.vocab_size, (batch, args.prompt), device=args.device)
        row = {"rank": rank, "adapters": adapters, "batch": batch}
        row |= first_token(model, ids, args.repeats, args.new, args.turns)
        print(json.dumps(row), flush=True)
        fast.release(model)


if __name__ == "__main__":
    main()
