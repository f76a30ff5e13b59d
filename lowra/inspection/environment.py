"""What lowra finds where it runs: versions, GPUs, native libraries, kernels in use, and why others are not."""

import importlib
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
from typing import Any

import torch

from bitsandbytes.backends.lowra import layout, native, native_cpu
from bitsandbytes.backends.lowra import libraries as native_libraries

from ..integrations.model_patches import MODEL_PATCHES
from ..integrations.patches import TABLE
from ..integrations.patching import LibraryChanged

PACKAGES = ("lowra", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "trl")
SETTINGS = (
    "LOWRA_AUTOLOAD",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "LOWRA_CPU",
    "LOWRA_PRODUCT",
    "LOWRA_CUDA_LIBRARY",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
# What the kernels of an instruction set ask of a processor (csrc/cpu/dispatch.cpp), by the names of /proc/cpuinfo.
_ASKED = {
    "avx512vnni": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avxvnni": ("avx2", "f16c", "fma", "avx_vnni"),
    "avx2": ("avx2", "f16c", "fma"),
}


def describe() -> dict[str, Any]:
    """Everything, JSON-able."""
    return {
        "versions": versions(),
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "cuda": cuda(),
        "libraries": libraries(),
        "kernels": kernels(),
        "switched_off": switched_off(),
        "autoload": autoload(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def autoload() -> str:
    """Whether packed folders open without an `import lowra` here, in the words of the module that sees to it."""
    try:
        return importlib.import_module("lowra_autoload").state()
    except ImportError:
        return "not installed: renew the installation of lowra"


def versions() -> dict[str, str | None]:
    """Of the packages that take part; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cuda() -> dict[str, Any]:
    """PyTorch's CUDA line, the driver, and the GPUs."""
    cards = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = [properties.major, properties.minor]
        cards.append({"name": properties.name, "capability": capability, "bytes": properties.total_memory})
    return {"of_torch": torch.version.cuda, "driver": _driver(), "gpus": cards}


def libraries() -> dict[str, dict[str, Any]]:
    """The native library for the CPU and for CUDA: which files are there, and why one serves nothing."""
    folder = pathlib.Path(native.__file__).parent
    loaded = {"cpu": native.cpu_available(), "cuda": native.cuda_available()}
    return {
        kind: {
            "files": sorted(str(path) for path in folder.glob(f"libbitsandbytes_lowra_{kind}*.so")),
            "loaded": loaded[kind],
            "why_not": native_libraries.left_aside.get(kind),
        }
        for kind in loaded
    }


def kernels() -> dict[str, Any]:
    """The kernels in use: of the CPU, and of each GPU with what came of trying one."""
    found: dict[str, Any] = {"cpu": _cpu_kernels()}
    for index, card in enumerate(cuda()["gpus"]):
        device = torch.device("cuda", index)
        found[f"cuda:{index}"] = {
            "in_use": "PyTorch reference",
            "tried": _try(device),
            "not_in_use": {},
        }
        if native.cuda_available():
            found[f"cuda:{index}"] |= _cuda_kernels(*native.cuda_code(device), card["capability"])
    return found


def _cuda_kernels(code: int, hopper: bool, capability: list[int]) -> dict[str, Any]:
    """code, hopper: `native.cuda_code` of the GPU."""
    if not code:
        return {"in_use": "PyTorch reference", "not_in_use": {"native": "the library has no code for this GPU"}}
    reasons = {}
    if not hopper and capability[0] == 9:
        reasons["wgmma, many"] = "this build of the library has none of their code"
    elif not hopper:
        reasons["wgmma, many"] = "they need compute capability 9.0 (Hopper)"
    if code < native.AMPERE:
        reasons["tensor, for bfloat16"] = "tensor cores before Ampere multiply float16 alone: use float16"
    return {"in_use": f"native, code for compute capability {code // 10}.{code % 10}", "not_in_use": reasons}


def switched_off() -> list[str]:
    """Integrations whose guard found another library than it expects, in the guard's words."""
    failed = []
    for patch in (*TABLE, *MODEL_PATCHES):
        try:
            patch.check()
        except LibraryChanged as change:
            failed.append(str(change))
    return failed


def _cpu_kernels() -> dict[str, Any]:
    if not native.cpu_available():
        return {"in_use": "PyTorch reference", "tried": _try(torch.device("cpu")), "not_in_use": {}}
    here = native_cpu.instructions()
    flags = _processor_flags()
    reasons = {}
    for name, asked in _ASKED.items() if flags else ():
        lacking = [flag for flag in asked if flag not in flags]
        if name not in here and lacking:
            reasons[name] = f"the processor has no {', '.join(lacking)}"
    for name in here[1:]:
        reasons[name] = "LOWRA_CPU names another" if "LOWRA_CPU" in os.environ else f"{here[0]} is faster"
    return {"in_use": here[0], "tried": _try(torch.device("cpu")), "not_in_use": reasons}


def _try(device: torch.device) -> str:
    """Packs and decodes a small weight: "works", or what went wrong."""
    rows, columns, group = 8, 64, 64
    weight = torch.linspace(-1, 1, rows * columns, device=device).view(rows, columns)
    order = torch.arange(rows, dtype=torch.int32, device=device)
    levels = torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float16, device=device).repeat(rows)
    thresholds = torch.tensor([-0.5, 0.0, 0.5], device=device).repeat(rows)
    try:
        codes, absmax = torch.ops.bitsandbytes.lowra_quantize(weight, order, thresholds, 0, rows, group)
        matrix = layout.PackedMatrix(codes, order, absmax, None, levels, 0, rows, columns, group)
        decoded = torch.ops.bitsandbytes.lowra_dequantize(*matrix, torch.float32)
        worst = float((decoded - weight).abs().max() / absmax.max())
    except RuntimeError as error:
        return f"fails: {' '.join(str(error).split())}"
    return "works" if worst <= 0.25 + 1e-6 else f"gives wrong values (off by {worst:.3g} of a group's largest)"


def _processor_flags() -> set[str]:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, flags=re.MULTILINE)
    return set(found[1].split()) if found else set()


def _driver() -> str | None:
    """Version of the NVIDIA driver, or None where there is none."""
    try:
        text = pathlib.Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None
