"""The CPU library in a program of its own, where the tools are: for ARM under an emulator, and with sanitizers.

Debian has them as g++-aarch64-linux-gnu and qemu-user; the compiler of macOS is clang, which comes with `ziglang` too.
"""

import importlib.util
import pathlib
import platform
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from cases import packed_case
from product_bounds import check, check_in_integers

from bitsandbytes.backends.lowra import native, reference

ROOT = pathlib.Path(__file__).parents[2]
# as in CMakeLists.txt
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
OWN_FLAGS = {
    "x86_64": {
        "rows_avx2.cpp": AVX2,
        "rows_avxvnni.cpp": [*AVX2, "-mavxvnni"],
        "rows_avx512.cpp": AVX512,
        "rows_avx512vnni.cpp": [*AVX512, "-mavx512vnni"],
    },
    "aarch64": {"rows_neondot.cpp": ["-march=armv8.2-a+dotprod"]},
}
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# ARMv8.0 as on a Pi 4, ARMv8.2, and all that the emulator knows
ARM_CHIPS = {"cortex-a72": ["neon", "generic"], "neoverse-n1": ["neondot", "neon", "generic"]}
ARM_CHIPS["max"] = ARM_CHIPS["neoverse-n1"]


def build(folder, compiler, machine, flags, program):
    """The library and one program of this folder, each file compiled by its own flags."""
    objects = []
    for source in [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "tests/kernels" / program]:
        own = OWN_FLAGS[machine].get(source.name, [])
        objects.append(folder / f"{source.stem}.o")
        call = [compiler, "-std=c++17", "-ffp-contract=off", f"-I{ROOT}/csrc", *flags, *own, "-c", source]
        subprocess.run([*call, "-o", objects[-1]], check=True, capture_output=True)
    subprocess.run([compiler, *flags, *objects, "-pthread", "-o", folder / "program"], check=True)
    return folder / "program"


def lines_of(*call):
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def for_arm():
    for tool in (ARM_COMPILER, ARM_EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


@pytest.mark.slow
@pytest.mark.usefixtures("for_arm")
def test_self_test_for_arm(tmp_path):
    program = build(tmp_path, ARM_COMPILER, "aarch64", ["-O2", "-static"], "cpu_selftest.cpp")
    for chip, names in ARM_CHIPS.items():
        assert [line.split(":")[0] for line in lines_of(ARM_EMULATOR, "-cpu", chip, program)] == names


# mix of rows, columns, group size, scales, type of x, tokens
ARM_CASES = [
    (16, 0, 0, 128, 64, torch.float32, torch.float32, 1),
    (0, 1, 0, 16, 64, torch.float16, torch.bfloat16, 2),
    (1, 0, 0, 7, 32, torch.uint8, torch.float16, 3),
    (3, 5, 7, 224, 64, torch.uint8, torch.bfloat16, 4),
    (4, 21, 35, 1056, 32, torch.uint8, torch.bfloat16, 1),
    (9, 20, 33, 1004, 128, torch.float16, torch.float16, 2),
    (7, 1, 30, 2080, 256, torch.uint8, torch.bfloat16, 3),
    (2, 2, 2, 96, 24, torch.float32, torch.float32, 4),
    (5, 6, 7, 1000, 8, torch.uint8, torch.bfloat16, 1),
    (2, 70, 85, 520, 64, torch.float32, torch.float32, 16),
    (0, 17, 65, 544, 32, torch.uint8, torch.float16, 4),
]


@pytest.mark.slow
@pytest.mark.usefixtures("for_arm")
def test_arm_against_the_reference(tmp_path):
    """Codes, absmax and dequantised weights to the last bit, products to their stated rounding."""
    program = build(tmp_path, ARM_COMPILER, "aarch64", ["-O2", "-static"], "cpu_replay.cpp")
    cases, files = [], (tmp_path / "cases", tmp_path / "results")
    with files[0].open("wb") as file:
        for seed, (*shape, scales, dtype, tokens) in enumerate(ARM_CASES):
            case = packed_case(*shape, scales=scales, seed=seed)
            rows, in_features = case.weight.shape
            random = torch.Generator().manual_seed(seed)
            x, bias = (torch.randn(*size, generator=random).to(dtype) for size in [(tokens, in_features), (rows,)])
            cases.append((case, x, bias))
            types = native.TYPES[scales], native.TYPES[dtype]
            file.write(struct.pack("10q", *shape, *types, tokens, case.codes.numel(), case.levels.numel()))
            steps = [] if case.scale_steps is None else [case.scale_steps]
            written = [case.row_order, case.thresholds, case.weight, case.codes, case.levels, case.scales, *steps]
            for tensor in [*written, x, bias]:
                file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    for chip, names in ARM_CHIPS.items():
        assert lines_of(ARM_EMULATOR, "-cpu", chip, program, *files) == names
        results = memoryview(bytearray(files[1].read_bytes()))

        def taken(like):
            nonlocal results
            own, results = results[: like.nbytes], results[like.nbytes :]
            return torch.frombuffer(own, dtype=like.dtype).view(like.shape)

        for name in names:
            for case, x, bias in cases:
                codes, absmax = reference.quantize(*case.quantize_arguments)
                assert torch.equal(taken(codes), codes) and torch.equal(taken(absmax), absmax)
                dense = reference.dequantize(case.packed, torch.float32)
                assert torch.equal(taken(dense), dense)
                out = x.new_empty(len(x), len(dense))
                check(taken(out), x, case, bias)
                in_integers = bool(taken(torch.empty(1, dtype=torch.int64)))
                assert in_integers == (name != "generic" and case.group_size >= 32 and len(x) <= 4)
                found = taken(out)
                if in_integers:
                    check_in_integers(found, x, case, bias)
        assert not results


@pytest.mark.slow
@pytest.mark.parametrize("target", ["aarch64-macos", "x86_64-macos", "aarch64-linux-gnu"])
def test_clang_takes_the_library(target, tmp_path):
    """Each file without a warning, macOS's own among the systems."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed")
    machine = target.split("-")[0]
    for source in (ROOT / "csrc/cpu").glob("*.cpp"):
        own = OWN_FLAGS[machine].get(source.name, [])
        if source.name == "rows_neondot.cpp":  # zig's name for it
            own = ["-mcpu=generic+dotprod"] if machine == "aarch64" else []
        call = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-std=c++17", "-O1", "-Wall", "-Wextra"]
        call += ["-Werror", "-ffp-contract=off", f"-I{ROOT}/csrc", *own]
        done = subprocess.run([*call, "-c", source, "-o", tmp_path / "file.o"], capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name}: {done.stderr}"


@pytest.mark.slow
def test_products_under_sanitizers(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = build(tmp_path, "g++", platform.machine(), flags, "cpu_selftest.cpp")
    assert lines_of(program)[-1].startswith("generic: 0 of")
