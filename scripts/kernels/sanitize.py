"""Runs the CUDA tests of the kernels under compute-sanitizer.

    python scripts/kernels/sanitize.py memcheck [-k "linear and not many"]
    python scripts/kernels/sanitize.py racecheck [-k many]

racecheck follows an mbarrier only for the threads that arrive themselves, so it runs on a build in which every lane
does (LOWRA_RACECHECK), made here for this machine's GPU. Only our kernels are checked: in cuBLAS's own racecheck
reports races. Further arguments are pytest's. One product of 512 tokens takes seconds, all of tests/kernels an hour:
give -k, or start several processes with different ones.
"""

import os
import subprocess
import sys

import torch
from cuda_builds import ROOT, build, find_tool

# The first measures PyTorch's peak of memory, which the tools raise; the second starts processes of its own.
_DESELECTED = "not never_dense_as_a_whole and not test_forced_product"


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in ("memcheck", "racecheck"):
        raise SystemExit(__doc__)
    tool, arguments = sys.argv[1], sys.argv[2:]
    sanitizer = find_tool("compute-sanitizer", "it comes with a CUDA toolkit; set CUDA_HOME to where one is")
    if not torch.cuda.is_available():
        raise SystemExit(f"{tool} runs the kernels: it needs an NVIDIA GPU, and PyTorch sees none here.")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if tool == "racecheck":
        arch = "{}{}".format(*torch.cuda.get_device_capability())
        library, _ = build(ROOT, f"racecheck-{arch}", arch, "-DLOWRA_RACECHECK=ON")
        environment["LOWRA_CUDA_LIBRARY"] = str(library)
    selection = _DESELECTED
    if "-k" in arguments:
        at = arguments.index("-k")
        selection = f"({arguments[at + 1]}) and {_DESELECTED}"
        del arguments[at : at + 2]
    command = [sanitizer, "--tool", tool, "--kernel-regex", "kns=lowra", "--error-exitcode", "1"]
    command += [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-k", selection, "tests/kernels", *arguments]
    raise SystemExit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
