"""Compares the machine code of every CUDA kernel in the working tree with that of a commit.

    python scripts/kernels/sass_diff.py [--arch 90] [--against HEAD] [--show product_wgmma]

Addresses become labels and encodings fall away, so that an instruction more moves nothing else. Exit status 1 where a
kernel differs, came or went. For a change that is to leave the kernels alone: comments, formatting, the host's side.
"""

import argparse
import difflib
import re
import subprocess

from cuda_builds import ROOT, build, find_tool, head_sources, kernel_names, without_hashes

_INSTRUCTION = re.compile(r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<text>.*?)\s*;")
_TARGET = re.compile(r"\b(BRA|BSSY|CALL\S*|BRX|JMP|BREAK|WARPSYNC\S*)\b(.*?)(0x[0-9a-f]+)(?=[ ;]|$)")


def disassemble(library) -> dict[str, list[str]]:
    """Instructions of every kernel by its mangled name."""
    remedy = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or put the bin of a CUDA toolkit on PATH"
    tool = find_tool("cuobjdump", remedy)
    text = subprocess.run([tool, "-sass", str(library)], text=True, check=True, capture_output=True).stdout
    kernels = {}
    for part in without_hashes(text).split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found = [(int(m["address"], 16), m["text"]) for m in map(_INSTRUCTION.match, body.splitlines()) if m]
        kernels[name.strip()] = _with_labels(found)
    return kernels


def _with_labels(instructions: list[tuple[int, str]]) -> list[str]:
    """The instructions without addresses; where one jumps to, a label that counts from the kernel's start."""
    targets = {int(match[3], 16) for _, text in instructions if (match := _TARGET.search(text))}
    labels = {address: f"label {number}" for number, address in enumerate(sorted(targets))}
    lines = []
    for address, text in instructions:
        if address in labels:
            lines.append(f"{labels[address]}:")
        lines.append(_TARGET.sub(lambda match: f"{match[1]}{match[2]}{labels[int(match[3], 16)]}", text))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90", help="compute capability without the dot")
    parser.add_argument("--against", default="HEAD", help="a commit")
    parser.add_argument("--show", help="print the changes of kernels with this in their name")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", f"{options.against}^{{commit}}"], cwd=ROOT, text=True, capture_output=True
    )
    if commit.returncode:
        raise SystemExit(f"git knows no commit {options.against!r}.")
    commit = commit.stdout.strip()
    before = disassemble(build(head_sources(commit), f"{commit}-{options.arch}", options.arch)[0])
    after = disassemble(build(ROOT, f"tree-{options.arch}", options.arch)[0])
    names = kernel_names(sorted({*before, *after}))
    changed = 0
    for mangled, name in names.items():
        old, new = before.get(mangled, []), after.get(mangled, [])
        if old == new:
            continue
        changed += 1
        lines = list(difflib.unified_diff(old, new, f"{commit} {name}", name, lineterm=""))[2:]
        added = sum(line.startswith("+") for line in lines)
        removed = sum(line.startswith("-") for line in lines)
        kind = "new" if not old else "gone" if not new else "changed"
        print(f"{kind}: {name}: {len(old)} instructions, now {len(new)} (+{added} -{removed})")
        if options.show and options.show in name:
            print("\n".join(lines))
    print(f"{len(names)} kernels for sm_{options.arch}, {changed} differ from {commit}.")
    raise SystemExit(1 if changed else 0)


if __name__ == "__main__":
    main()
