"""LOWRA_PRODUCT: the kernel that it names runs, or the product is refused; it is read once, hence a process each."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from bitsandbytes.backends.lowra import native

# Prints, for each number of tokens, which of our kernels ran, or "refused".
SCRIPT = """
import torch
from torch.profiler import ProfilerActivity, profile
from cases import packed_case
from bitsandbytes.backends.lowra import native
import bitsandbytes

dtype = torch.bfloat16 if native.cuda_code(torch.device("cuda", 0))[0] >= 80 else torch.float16
case = packed_case(20, 40, 68, 256, scales=torch.uint8)
weight = torch.ops.bitsandbytes.lowra_dequantize(*case.dequantize_arguments(dtype)).cuda().double()
case = case.to("cuda")
for tokens in (1, 8, 9, 64, 65, 200):
    x = torch.randn(tokens, 256, device="cuda").to(dtype)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        try:
            out = torch.ops.bitsandbytes.lowra_linear(*case.linear_arguments(x))
        except RuntimeError as error:
            assert "LOWRA_PRODUCT=" in str(error), error
            print("refused")
            continue
        torch.cuda.synchronize()
    exact = x.double() @ weight.T
    assert ((out.double() - exact).abs() <= 0.02 * (x.double().abs() @ weight.abs().T)).all()
    names = " ".join(event.key for event in trace.key_averages())
    print(next((k for k in ("small", "tensor", "wgmma", "many") if f"product_{k}_kernel" in names), "dense"))
"""
SMALL, UP_TO_64 = ["small"] * 2 + ["refused"] * 4, ["refused"] * 2


def run(kernel: str) -> list[str]:
    folder = pathlib.Path(__file__).parent
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "LOWRA_PRODUCT": kernel, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, text=True, capture_output=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize(
    "kernel, expected",
    [
        ("small", SMALL),
        ("tensor", ["tensor"] * 4 + UP_TO_64),
        ("dense", ["dense"] * 6),
        ("quick", ["refused"] * 6),
        ("Small", ["refused"] * 6),
    ],
)
def test_the_named_kernel_runs_or_the_product_is_refused(kernel, expected):
    assert run(kernel) == expected


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize(
    "kernel, expected", [("wgmma", ["wgmma"] * 4 + UP_TO_64), ("many", ["many"] * 6)], ids=["wgmma", "many"]
)
def test_kernels_of_hopper_are_refused_elsewhere(kernel, expected):
    _, hopper = native.cuda_code(torch.device("cuda", 0))
    assert run(kernel) == (expected if hopper else ["refused"] * 6)


@pytest.mark.parametrize("rows", [1, 128])
def test_the_refusal_says_what_the_kernels_cover(rows):
    with pytest.raises(
        RuntimeError, match=rf"weight \[{rows}, 64\] .* LOWRA_PRODUCT=.* names no kernel .* small takes"
    ):
        native.check(6, "product", native.shape_of(rows, 0, 0, 64, 64))
