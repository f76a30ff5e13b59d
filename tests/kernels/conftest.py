"""Devices of the kernel tests, and outputs full of NaN before a kernel writes them."""

import pytest
import torch

import bitsandbytes  # noqa: F401  (its entry point loads the lowra backend)
from bitsandbytes.backends.lowra import native


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU here")
        assert native.cuda_available(), "this torch sees a GPU, but lowra's CUDA library was not built or not found"
    return request.param


@pytest.fixture(autouse=True)
def poison():
    """Every torch.empty holds NaN or the largest integer, so that a place no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
