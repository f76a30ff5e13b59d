"""Training steps on several GPUs: losses beside those of one process, and the memory that each GPU needs.

    python scripts/bench_sharding.py                                   # two GPUs, about three minutes
    python scripts/bench_sharding.py --processes 4 --runs 65b:2:fsdp2 --out sharding.json

A run is SHAPE:BITS:WAY; ways are "one" process, "ddp" (torchrun, a copy on each GPU), "fsdp2" (`accelerate launch` with
configs/accelerate/fsdp2.yaml, a share on each GPU) and "offload" (the same, shares in the host's memory). Each is a
Transformers Trainer with LoRA on all linear layers, gradient checkpointing and bfloat16, on the same rows of random
tokens. Weights are random packed ones that each process makes by itself, the same everywhere: a layer on the GPU, which
for sharding moves to the host at once, as a checkpoint would be loaded. Nothing is written or downloaded. Peaks are
those of PyTorch's allocator from the first layer on.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch

RUNS = "7b:2:one,7b:2:ddp,7b:2:fsdp2,65b:2:fsdp2,7b:2:offload"
_GIB = 2**30
_HERE = pathlib.Path(__file__).resolve()
_FSDP2 = _HERE.parents[1] / "configs" / "accelerate" / "fsdp2.yaml"


def train(args: argparse.Namespace) -> dict:
    """The run of one process.

    Returns:
        rank, losses of the steps, median seconds of a step, bytes: of all frozen tensors and of those that lie here,
        peak of the GPU and of the host.
    """
    from peft import LoraConfig, get_peft_model
    from random_models import make_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        times: list[float] = []

        def on_step_end(self, *_args, **_kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    rank, processes = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    shape, bits, way = args.worker.split(":")
    started = time.perf_counter()
    arguments = TrainingArguments(  # before the model: it tells Accelerate of bfloat16
        tempfile.mkdtemp(), max_steps=args.steps, per_device_train_batch_size=args.rows // processes, seed=0,
        learning_rate=1e-3, lr_scheduler_type="constant", bf16=True, gradient_checkpointing=True, logging_steps=1,
        gradient_checkpointing_kwargs={"use_reentrant": False}, use_cpu=not torch.cuda.is_available(),
        save_strategy="no", report_to=[], disable_tqdm=True, label_names=["labels"], dataloader_pin_memory=False,
        ddp_find_unused_parameters=False, ddp_broadcast_buffers=False, remove_unused_columns=False,
    )  # fmt: skip
    model = make_model(shape, float(bits), device=device, kept="cpu" if way in ("fsdp2", "offload") else device)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    made = time.perf_counter()
    vocabulary = model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (args.rows, args.tokens), generator=torch.Generator().manual_seed(0))
    clock = Clock()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens] * args.steps,
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
        callbacks=[clock],
    )
    trainer.train()
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    here = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in frozen)
    steps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return {
        "rank": rank,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "step_seconds": statistics.median(steps),
        "making_seconds": made - started,
        "frozen_bytes": whole,
        "frozen_bytes_here": here,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def command_of(way: str, processes: int) -> list[str]:
    """What starts the processes of a run."""
    if way == "one":
        return [sys.executable]
    if way == "ddp":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(_FSDP2)]
    offload = ["--fsdp_offload_params", "true"] if way == "offload" else []
    return [*launch, "--num_processes", str(processes), *offload]


def start(run: str, args: argparse.Namespace) -> list[dict]:
    """A run in processes of its own; what each of them found, or nothing where one failed."""
    way = run.rpartition(":")[2]
    environment = dict(os.environ)
    if way == "one":
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--rows", str(args.rows), "--tokens", str(args.tokens), "--steps", str(args.steps)]
        command = [*command_of(way, args.processes), str(_HERE), "--worker", run, "--results", folder, *sizes]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"{run} failed:\n{done.stderr[-9000:]}", flush=True)
            return []
        return [json.loads(file.read_text()) for file in sorted(pathlib.Path(folder).glob("*.json"))]


def report(run: str, found: list[dict], reference: list[float] | None, seconds: float) -> dict:
    """Prints a line for a run.

    Args:
        reference: losses of one process, where there are any.

    Returns:
        what was found, for a file.
    """
    first = found[0]
    result = {"run": run, "seconds": seconds, "processes": found}
    parts = [f"{run:16} losses {first['losses'][0]:.4f} to {first['losses'][-1]:.4f}"]
    if reference:
        pairs = zip(first["losses"], reference, strict=True)
        result["largest_difference"] = max(abs(a - b) / b for a, b in pairs)
        parts.append(f"{result['largest_difference']:.1e} from one process")
    parts.append(f"{first['step_seconds']:.2f} s a step")
    parts.append(f"base {first['frozen_bytes'] / _GIB:.2f} GiB")
    parts.append("here " + " ".join(f"{one['frozen_bytes_here'] / _GIB:.2f}" for one in found))
    if first["peak_bytes"] is not None:
        parts.append("peak " + " ".join(f"{one['peak_bytes'] / _GIB:.2f}" for one in found))
    print(", ".join(parts) + f" ({seconds:.0f} s in all)", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default=RUNS, help="SHAPE:BITS:WAY,…")
    parser.add_argument("--processes", type=int, default=2, help="GPUs")
    parser.add_argument("--rows", type=int, default=4, help="of a step, over all processes")
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for everything that was found")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        found = train(args)
        (args.results / f"{found['rank']}.json").write_text(json.dumps(found))
        return
    if args.rows % args.processes:
        parser.error(f"--rows {args.rows} cannot be divided by {args.processes} processes")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{args.processes} x {device}, torch {torch.__version__}", flush=True)
    results, alone = [], {}
    for run in args.runs.split(","):
        started = time.perf_counter()
        found = start(run, args)
        if found:
            model, _, way = run.rpartition(":")
            results.append(report(run, found, alone.get(model), time.perf_counter() - started))
            if way == "one":
                alone[model] = found[0]["losses"]
            if args.out:
                args.out.write_text(json.dumps({"device": device, "torch": torch.__version__, "runs": results}))


if __name__ == "__main__":
    main()
