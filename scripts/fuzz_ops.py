"""Random and hostile arguments to the ops and to the C functions of the CPU library, with every access watched.

    python scripts/fuzz_ops.py --seconds 180 --seed 0     # make fuzz-ops
    python scripts/fuzz_ops.py --seed 0 --only 4711        # one case again, with its whole report
    python scripts/fuzz_ops.py --installed --cases 300     # refusals and numbers alone: seconds, no compiler

The library is built with AddressSanitizer and UndefinedBehaviorSanitizer (g++) and takes the place of the installed one
in a process of its own, which is started anew behind a case that ends it. A case is a valid call of a random shape in
which up to three arguments are made hostile: other types, sizes, strides, devices, memory that is too short or
misaligned, row orders that leave the weight, numbers at the ends of their range. Whatever comes, a call either raises
RuntimeError, ValueError or TypeError, or returns what the PyTorch reference makes of the same values. Everything else
is listed with the case's number, and the exit status is 1.

Not tried: C functions with memory shorter than their sizes say, which they cannot see; CUDA (`make memcheck`).
"""

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from hostile_decoding import DecodingCases

ROOT = pathlib.Path(__file__).parents[1]
WATCHED = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"


def build(folder: pathlib.Path) -> pathlib.Path:
    """The CPU library under both sanitizers, of the files that CMake knows and with their options."""
    cmake, target = str(pathlib.Path(sys.executable).with_name("cmake")), "bitsandbytes_lowra_cpu"
    settings = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_COMPILER=g++", f"-DCMAKE_CXX_FLAGS={WATCHED}"]
    for command in (
        ["-S", str(ROOT), "-B", str(folder), *settings],
        ["--build", str(folder), "--parallel", "2", "--target", target],
    ):
        subprocess.run(
            [cmake, *command], check=True, env={**os.environ, "LOWRA_CPU_ONLY": "1"}, stdout=subprocess.DEVNULL
        )
    return folder / f"lib{target}.so"


def watched_environment() -> dict[str, str]:
    # the runtime of C++ too: PyTorch throws before the library that the sanitizer watches brings it
    names = ("libasan.so", "libstdc++.so.6")
    found = [
        subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True, check=True) for n in names
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(one.stdout.strip() for one in found),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "2",
    }


def work(options: argparse.Namespace) -> None:
    """In the watched process: cases from `options.first` on, each announced before it runs."""
    cases = DecodingCases(options.seed)
    if options.library:
        cases.native._cpu = cases.libraries.load(pathlib.Path(options.library), "cpu")
    if not cases.native.cpu_available():
        sys.exit("The CPU library could not be loaded.")
    number, end = options.first, time.monotonic() + options.seconds
    while time.monotonic() < end and number - options.first < options.cases:
        print(f"case {number}", flush=True)
        wrong = cases.run(number)
        if wrong:
            print(f"wrong {number} {wrong}", flush=True)
        if options.only is not None:
            return
        number += 1


def watch(options: argparse.Namespace, library: pathlib.Path) -> int:
    """Starts the worker, again behind every case that ends it; the number of cases that went wrong."""
    options.first = options.first if options.only is None else options.only
    first, end, bad = options.first, time.monotonic() + options.seconds, []
    while time.monotonic() < end and first - options.first < options.cases:
        command = [sys.executable, __file__, "--library", str(library), "--seed", str(options.seed)]
        command += ["--first", str(first), "--seconds", str(max(1, int(end - time.monotonic())))]
        command += ["--cases", str(options.cases - first + options.first)]
        if options.only is not None:
            command += ["--only", str(options.only)]
        done = subprocess.run(command, env=watched_environment(), capture_output=True, text=True, cwd=ROOT)
        lines = done.stdout.splitlines()
        bad += [line.removeprefix("wrong ") for line in lines if line.startswith("wrong ")]
        announced = [int(line.split()[1]) for line in lines if line.startswith("case ")]
        if not announced:
            sys.exit(f"The watched process did not start:\n{done.stderr[-4000:]}")
        first = announced[-1] + 1
        if done.returncode != 0:
            report = [
                line
                for line in done.stderr.splitlines()
                if "ERROR" in line or "runtime error" in line or " in lowra" in line
            ]
            bad.append(f"{announced[-1]} ended the process ({done.returncode}): {' | '.join(report[:3])}")
            if options.only is not None:
                print(done.stderr)
        if options.only is not None:
            break
    for line in bad:
        print(line)
    print(f"{first} cases of seed {options.seed}, {len(bad)} of them wrong")
    return len(bad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--first", type=int, default=0, help="the case to begin with")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="how many at most")
    parser.add_argument("--installed", action="store_true", help="try the installed library, which nothing watches")
    parser.add_argument("--library", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.installed:
        # what the sanitizer's allocator refuses; a copy of an expanded tensor could fill the machine otherwise
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    if options.library or options.installed:
        return work(options)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(1 if watch(options, build(pathlib.Path(folder))) else 0)


if __name__ == "__main__":
    main()
