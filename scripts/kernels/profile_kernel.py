"""Profiles one CUDA kernel at one shape: by Nsight Compute where it is, else Nsight Systems, else PyTorch's profiler.

    python scripts/kernels/profile_kernel.py product_wgmma [--tokens 16 --rows 11008 --columns 4096 --bits 1.5]

Nsight Compute tells what limits the kernel; the other two only how long it takes. Its counters may need root.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys

from cuda_builds import FOLDER, ROOT

PRODUCTS = {"product_small": 1, "product_tensor": 16, "product_wgmma": 16, "product_many": 128}  # and their tokens
KERNELS = ["dequantize", "quantize", "encode_scales", "lloyd_max", "table_gradients", *PRODUCTS]
CALLS = 20


def work(options: argparse.Namespace) -> list:
    """Calls that run the kernel, each on memory of its own, so that the L2 cache is cold."""
    import torch

    sys.path.insert(0, str(ROOT / "scripts"))
    import bench_kernels

    ops, device = torch.ops.bitsandbytes, "cuda"
    packs = [bench_kernels.Packed(options.rows, options.columns, options.bits, seed) for seed in range(CALLS)]
    if options.kernel in PRODUCTS:
        x = torch.randn(options.tokens, options.columns, device=device, dtype=torch.bfloat16)
        return [lambda p=p: p.linear(x) for p in packs]
    if options.kernel == "lloyd_max":
        levels = torch.cat([torch.linspace(-1, 1, n) for n in (16, 4, 2)]).to(device)
        cuts = torch.cat([(t[1:] + t[:-1]) / 2 for t in (torch.linspace(-1, 1, n) for n in (16, 4, 2))]).to(device)
        group = bench_kernels.GROUP
        return [lambda p=p: ops.lowra_lloyd_max(p.weight, levels, cuts, None, group, 20, True) for p in packs]
    if options.kernel == "table_gradients":
        gradient = torch.randn(options.rows, options.columns, device=device, dtype=torch.bfloat16)
        return [lambda p=p: p.table_gradients(gradient) for p in packs]
    if options.kernel == "encode_scales":
        return [p.quantize_with_scales for p in packs]
    return [getattr(p, options.kernel) for p in packs]


def run(options: argparse.Namespace, with_torch_profiler: bool) -> None:
    """Runs every call once to warm up, once measured."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        raise SystemExit("A profile runs the kernel: it needs an NVIDIA GPU, and PyTorch sees none here.")
    calls = work(options)
    for call in calls:
        call()
    torch.cuda.synchronize()
    if not with_torch_profiler:
        for call in calls:
            call()
        torch.cuda.synchronize()
        return
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for call in calls:
            call()
        torch.cuda.synchronize()
    found = [event for event in trace.key_averages() if f"{options.kernel}_kernel" in event.key]
    if not found:
        raise SystemExit(f"No call ran {options.kernel}_kernel; another kernel serves this shape.")
    for event in found:
        print(f"{event.count} calls, {event.self_device_time_total / event.count:.2f} us each: {event.key}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--rows", type=int, default=11008, help="N")
    parser.add_argument("--columns", type=int, default=4096, help="K")
    parser.add_argument("--bits", type=float, default=1.5, choices=[1.5, 2.0, 2.5, 4.0])
    parser.add_argument("--tokens", type=int, help="of a product")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # under a profiler
    options = parser.parse_args()
    if options.kernel in PRODUCTS:
        options.tokens = options.tokens or PRODUCTS[options.kernel]
        os.environ["LOWRA_PRODUCT"] = options.kernel.removeprefix("product_")
    elif options.tokens:
        parser.error(f"--tokens: {options.kernel} is no product")
    if options.work:
        return run(options, with_torch_profiler=False)
    again = [sys.executable, __file__, *sys.argv[1:], "--work"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    report = str(pathlib.Path(FOLDER, options.kernel))
    if shutil.which("ncu"):
        chosen = ["--kernel-name", f"regex:{options.kernel}_kernel", "--launch-skip", str(CALLS), "--launch-count", "1"]
        command = ["ncu", "--set", "full", *chosen, "--export", report, "--force-overwrite", "--print-details", "all"]
    elif shutil.which("nsys"):
        command = ["nsys", "profile", "--stats=true", "--force-overwrite=true", "--output", report]
    else:
        print("Neither ncu nor nsys is on PATH: PyTorch's profiler tells the time, not what limits it.")
        return run(options, with_torch_profiler=True)
    raise SystemExit(subprocess.run(command + again).returncode)


if __name__ == "__main__":
    main()
