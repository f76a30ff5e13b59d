"""cpu_selftest.cpp with the CPU library in it, where the tools are: for ARM under an emulator, and with sanitizers.

Debian has them as g++-aarch64-linux-gnu and qemu-user.
"""

import pathlib
import platform
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# as in CMakeLists.txt
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
OWN_FLAGS = {
    "rows_avx2.cpp": AVX2,
    "rows_avxvnni.cpp": [*AVX2, "-mavxvnni"],
    "rows_avx512.cpp": AVX512,
    "rows_avx512vnni.cpp": [*AVX512, "-mavx512vnni"],
}


def build_and_run(folder, compiler, flags, runner=()):
    """The lines that the self-test prints, each file compiled by its own flags."""
    objects = []
    for source in [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "tests/kernels/cpu_selftest.cpp"]:
        own = OWN_FLAGS.get(source.name, []) if compiler == "g++" and platform.machine() == "x86_64" else []
        objects.append(folder / f"{source.stem}.o")
        call = [compiler, "-std=c++17", "-ffp-contract=off", f"-I{ROOT}/csrc", *flags, *own, "-c", source]
        subprocess.run([*call, "-o", objects[-1]], check=True, capture_output=True)
    subprocess.run([compiler, *flags, *objects, "-pthread", "-o", folder / "selftest"], check=True)
    done = subprocess.run([*runner, folder / "selftest"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_products_for_arm(tmp_path):
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    for tool in (compiler, emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    lines = build_and_run(tmp_path, compiler, ["-O2", "-static"], [emulator, "-cpu", "cortex-a72"])
    assert [line.split(":")[0] for line in lines] == ["neon", "generic"]


@pytest.mark.slow
def test_products_under_sanitizers(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    assert build_and_run(tmp_path, "g++", flags)[-1].startswith("generic: 0 of")
