"""Prints registers, spills and static shared memory of every CUDA kernel, as ptxas counts them.

    python scripts/kernels/registers.py [--arch 90] [--kernel product_wgmma]

Dynamic shared memory is a launch's choice and not the compiler's: docs/lab/kernels/README.md gives it for each kernel.
"""

import argparse
import re

from cuda_builds import ROOT, build, kernel_names, without_hashes

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def usage(log: str) -> list[dict]:
    """One row for each kernel that a build with --resource-usage compiled, ordered by name."""
    found = [match.groupdict() for match in _ENTRY.finditer(log)]
    names = kernel_names([without_hashes(row["name"]) for row in found])
    for row in found:
        shared = re.search(r"(\d+) bytes smem", row["rest"])
        row["shared"] = int(shared[1]) if shared else 0
        row["kernel"] = names[without_hashes(row["name"])]
    return sorted(found, key=lambda row: row["kernel"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90", help="compute capability without the dot")
    parser.add_argument("--kernel", default="", help="only those with this in their name")
    options = parser.parse_args()
    _, log = build(ROOT, f"registers-{options.arch}", options.arch, "-DCMAKE_CUDA_FLAGS=--resource-usage", fresh=True)
    rows = [row for row in usage(log) if options.kernel in row["kernel"]]
    if not rows:
        raise SystemExit(f"No kernel has {options.kernel!r} in its name.")
    width = max(len(row["kernel"]) for row in rows)
    print(f"{'kernel':{width}} {'chip':7} registers  spilled (stored, loaded)  stack  static shared memory (bytes)")
    for row in rows:
        spilled = f"{row['stores']}, {row['loads']}"
        print(
            f"{row['kernel']:{width}} {row['arch']:7} {row['registers']:>9}  {spilled:>24}  {row['stack']:>5}  "
            f"{row['shared']:>28}"
        )


if __name__ == "__main__":
    main()
