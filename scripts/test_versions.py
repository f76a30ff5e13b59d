"""Runs the behaviour tests with other versions of the libraries below, and writes the table of docs/versions.md.

    python scripts/test_versions.py                 every combination: hours on two cores
    python scripts/test_versions.py oldest pinned   some of them
    python scripts/test_versions.py --list

A combination has a virtual environment of its own under build/versions, which begins as a copy of the running one (hard
links, so it costs next to nothing) and into which pip puts the other versions. torch stays as it is: another build is a
download of gigabytes. Results are kept in docs/versions.json; combinations that are not run keep theirs.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "build" / "versions"
RESULTS = ROOT / "docs" / "versions.json"
TABLE = ROOT / "docs" / "versions.md"
LIBRARIES = ("transformers", "peft", "accelerate", "bitsandbytes", "torch")

# what is asked for beside the running versions, and who pins it
COMBINATIONS = {
    "oldest": (
        {"transformers": "5.6.0", "peft": "0.18.1", "accelerate": "1.10.0", "bitsandbytes": "0.50.0"},
        "all lower bounds at once",
    ),
    "LLaMA-Factory": ({"transformers": "5.6.0", "peft": "0.18.1"}, "the newest that it allows"),
    "axolotl": ({"transformers": "5.16.1", "peft": "0.19.1"}, "its pins"),
    "unsloth": ({"transformers": "5.17.0", "peft": "0.20.0"}, "the newest Transformers that it allows"),
    "pinned": ({}, "constraints.txt: what CI runs"),
    "newest": ({"transformers": "5.24.0", "peft": "0.21.2"}, "the newest releases"),
}

TESTS = {
    "all": (
        "tests/integration",
        "tests/adapters/test_adapter_library.py",
        "tests/test_commands.py",
        "tests/training/test_finetune.py",
    ),
    "core": tuple(
        f"tests/integration/test_{name}.py"
        for name in ("patches", "peft", "peft_limits", "adapter_keys", "loading", "embeddings", "experts", "parameters")
    ),
}


def python_of(name: str, versions: dict[str, str]) -> pathlib.Path:
    """The interpreter of a combination's environment, which is made anew."""
    running = pathlib.Path(sys.prefix)
    if not versions:
        return running / "bin" / "python"
    folder = ENVIRONMENTS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-al", str(running), str(folder)], check=True)
    python = folder / "bin" / "python"
    kept = {library: version for library, version in installed(python).items() if library in ("torch", "bitsandbytes")}
    wanted = [f"{library}=={version}" for library, version in {**kept, **versions}.items()]
    subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], check=True)
    return python


def installed(python: pathlib.Path) -> dict[str, str]:
    """Versions of the libraries, as their distributions say."""
    code = f"import importlib.metadata as m; print(*(m.version(n).partition('+')[0] for n in {LIBRARIES!r}))"
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(zip(LIBRARIES, found.split(), strict=True))


def run(name: str, tests: str) -> dict:
    versions, _ = COMBINATIONS[name]
    python = python_of(name, versions)
    log = ENVIRONMENTS / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow and not cuda",
        "-p",
        "no:cacheprovider",
        *TESTS[tests],
    ]
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        subprocess.run(command, cwd=ROOT, env=surroundings, stdout=file, stderr=subprocess.STDOUT)
    text = log.read_text()
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", text[-400:])}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, flags=re.MULTILINE)
    return {
        "versions": installed(python),
        "tests": tests,
        "date": datetime.date.today().isoformat(),
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "skipped": counts.get("skipped", 0),
        "failures": failed,
    }


def write_table(results: dict[str, dict]) -> None:
    """Puts the table of the results between the two marks of docs/versions.md."""
    heads = ["combination", *LIBRARIES, "tests", "passed", "failed", "skipped", "run on", "what it is"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, (_, why) in COMBINATIONS.items():
        if name in results:
            result = results[name]
            cells = [name, *(result["versions"][library] for library in LIBRARIES)]
            cells += [str(result[kind]) for kind in ("tests", "passed", "failed", "skipped", "date")]
            lines.append(f"| {' | '.join([*cells, why])} |")
    start, end = "<!-- results -->\n", "<!-- end -->"
    text = TABLE.read_text()
    before, _, rest = text.partition(start)
    TABLE.write_text(before + start + "\n".join([*lines, end]) + rest.partition(end)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("combinations", nargs="*", metavar="NAME", help="all if none is named")
    parser.add_argument("--list", action="store_true", help="name the combinations and stop")
    parser.add_argument("--tests", choices=TESTS, default="all", help="core: without commands, training, generation …")
    arguments = parser.parse_args()
    if unknown := set(arguments.combinations) - set(COMBINATIONS):
        parser.error(f"no such combination: {', '.join(sorted(unknown))}; there are {', '.join(COMBINATIONS)}")
    if arguments.list:
        for name, (versions, why) in COMBINATIONS.items():
            print(f"{name}: {' '.join(f'{k}=={v}' for k, v in versions.items()) or 'as installed'} ({why})")
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in arguments.combinations or COMBINATIONS:
        results[name] = run(name, arguments.tests)
        print(f"{name}: {results[name]}")
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        write_table(results)
    if any(results[name]["failed"] or not results[name]["passed"] for name in arguments.combinations or COMBINATIONS):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
