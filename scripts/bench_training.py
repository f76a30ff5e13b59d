"""Fine-tuning steps of a LLaMA-shaped model: time, how long the GPU works of it, and memory, lowra beside QLoRA.

    python scripts/bench_training.py --shape 7b --bits 2 --peers NF4 --out docs/lab/training.json

Weights are random, packed ones of a fixed mix of precisions; times do not depend on their values. All bases get the
same adapters (float32, on all linear layers of the blocks), gradient checkpointing, AdamW and autocast, in one process,
one after the other. Ways: "eager" is what Transformers and PEFT do as they come, "compiled" compiles every decoder
layer (torch.compile), "graphs" is `lowra.capture_layers`, "unsloth" a model of theirs; these are steps of a plain loop.
"trainer" is the public door: the recipe's Trainer, as `lowra finetune` makes it. "+liger" adds Liger's kernels for
norms, rotary embedding and SwiGLU. Milliseconds are medians of steps between two synchronisations; the GPU's are the
union of its kernels' times in one step.
"""

import argparse
import gc
import itertools
import json
import pathlib
import signal
import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_clock import PREPARING, busy, memory, reset_peak, timed
from peft import LoraConfig, get_peft_model
from random_models import MIXES, SHAPES, make_model
from torch.profiler import ProfilerActivity, profile

import lowra
from bitsandbytes.backends.lowra import native
from lowra.nn.trained_tables import train_tables
from lowra.training.table_checkpoints import TRAINED_TABLES

_RECOMPILES = 256  # a layer may have each of its NF4 weights' statistics among its guards


class NotReady(BaseException):
    """Not in the time it had. Below Exception, which the compiler takes for its own."""


def adapted(args: argparse.Namespace, base: str | float, way: str) -> torch.nn.Module:
    """A model with its adapters, ready for steps."""
    kernels = way.split("+")
    if kernels[0] == "unsloth":
        from unsloth_model import make_unsloth_model

        return make_unsloth_model(args.shape, args.rank, args.dtype, args.scratch)
    model = make_model(args.shape, base, device=args.device, dtype=args.dtype)
    if "liger" in kernels:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False)
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    if args.tables and isinstance(base, float):
        train_tables(model, **TRAINED_TABLES[args.tables])
    if kernels[0] == "graphs":
        lowra.capture_layers(model)
    elif kernels[0] == "compiled":
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _RECOMPILES
        for layer in model.get_base_model().model.layers:
            layer.compile(dynamic=False)
    return model


class Loop:
    """Steps of a model as a plain loop takes them: autocast, AdamW, and scaled losses in float16."""

    def __init__(self, model: torch.nn.Module, args: argparse.Namespace):
        self._model = model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        self._optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        self._autocast = torch.autocast(args.device, args.dtype)
        self._scaler: Any = torch.amp.GradScaler(args.device, enabled=args.dtype == torch.float16)
        self.loss = torch.zeros(())

    def step(self, tokens: torch.Tensor) -> None:
        with self._autocast:
            loss = self._model(input_ids=tokens, labels=tokens, use_cache=False).loss
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()


def prepared(step: Callable[[], None], limit: float) -> float:
    """Seconds of the first steps.

    Raises:
        NotReady: they take more than so many seconds.
    """

    def stop(*_: Any) -> None:
        raise NotReady

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return sum(timed(step) for _ in range(PREPARING)) / 1e3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_loop(args: argparse.Namespace, base: str | float, way: str, batch: int, length: int, loop: Loop) -> dict:
    """What is found of one shape of batches."""
    tokens = torch.randint(0, SHAPES[args.shape][-1], (batch, length), device=args.device)
    try:
        preparing = prepared(lambda: loop.step(tokens), args.ready)
    except NotReady:
        return {"not_ready_in_s": args.ready}
    reset_peak()
    milliseconds = statistics.median(timed(lambda: loop.step(tokens)) for _ in range(args.steps))
    with profile(activities=[ProfilerActivity.CUDA] if args.device == "cuda" else None) as profiler:
        timed(lambda: loop.step(tokens))
    gpu, kernels = busy(profiler)
    found = {"ms": milliseconds, "gpu_ms": gpu, "kernels": kernels, "preparing_s": preparing, "loss": loop.loss.item()}
    return found | memory()


def measure(args: argparse.Namespace, base: str | float, way: str) -> list[dict]:
    """The rows of one base in one way."""
    rows = []
    loop = None if way.startswith("trainer") else Loop(adapted(args, base, way), args)
    for batch, length in args.shapes:
        row = {"shape": args.shape, "base": base, "way": way, "rank": args.rank, "batch": batch, "length": length}
        if args.dtype != torch.bfloat16:
            row["dtype"] = args.half
        if loop is None:
            from trainer_steps import through_trainer

            row |= through_trainer(args, base, "liger" in way, batch, length)
        else:
            row |= in_loop(args, base, way, batch, length, loop)
        rows.append({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--bits", type=float, nargs="*", default=[2.0], choices=MIXES)
    parser.add_argument("--peers", nargs="*", default=["NF4"], help="NF4, bf16")
    parser.add_argument("--ways", nargs="*", default=["eager", "graphs", "graphs+liger"], help="of packed bases")
    parser.add_argument("--peer-ways", nargs="*", default=["eager", "compiled"], help="of the peers")
    parser.add_argument("--shapes", nargs="*", default=["1x512", "2x1024"], help="batch x length")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tables", nargs="?", const="shared", choices=TRAINED_TABLES, help="packed bases train theirs")
    parser.add_argument("--optimizer", default="adamw_torch", help="of the Trainer; a plain loop has the fused one")
    parser.add_argument("--steps", type=int, default=7, help="timed ones")
    parser.add_argument("--half", choices=("bfloat16", "float16"), default="bfloat16", help="float16: scaled losses")
    parser.add_argument("--cap", type=float, help="GiB that PyTorch may take of the GPU, as on a smaller card")
    parser.add_argument("--ready", type=float, default=200, help="seconds that the first steps of a shape may take")
    parser.add_argument("--device", default="cuda", help="cpu: nothing is measured but that it runs")
    parser.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path("/tmp"), help="for unsloth's checkpoint")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.half)
    if args.cap:
        torch.cuda.set_per_process_memory_fraction(args.cap * 2**30 / torch.cuda.mem_get_info()[1])
    args.shapes = [tuple(int(number) for number in shape.split("x")) for shape in args.shapes]
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    code = native.cuda_code(torch.device("cuda", 0))[0] if args.device == "cuda" else 0
    print(name, torch.__version__, f"kernels of {code}", f"at most {args.cap} GiB" if args.cap else "")
    if "unsloth" in args.peer_ways:
        import unsloth  # noqa: F401 - before what it patches is used
    rows = []
    pairs = [*itertools.product(args.bits, args.ways), *itertools.product(args.peers, args.peer_ways)]
    # Liger replaces classes of Transformers for the rest of the process, unsloth too
    for base, way in sorted(pairs, key=lambda pair: ("liger" in pair[1], "unsloth" in pair[1])):
        rows += measure(args, base, way)
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()
    if args.out:
        args.out.write_text(json.dumps({"device": name, "code": code, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
