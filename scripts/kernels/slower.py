"""What of a benchmark got slower than in an earlier one."""

import json
import pathlib

_KEY = ("what", "rows", "in_features", "bits", "tokens")


def slower(results: list[dict], earlier: list[dict], threshold: float) -> tuple[list[tuple[float, dict]], int]:
    """Compares the numbers of `bench_kernels.py` that two runs share.

    Args:
        threshold: per cent more time that a number may take.

    Returns:
        Earlier microseconds and today's row for what takes more, worst first, and how many numbers were compared.
        Peers (bf16, NF4) are compared too: where they differ, so does the machine.

    Raises:
        ValueError: the runs share no number.
    """
    before = {_key(row): row["us"] for row in earlier}
    shared = [(before[_key(row)], row) for row in results if _key(row) in before]
    if not shared:
        raise ValueError("The two runs have no number in common: give --shapes, --bits, --tokens and --parts alike.")
    worse = [(us, row) for us, row in shared if row["us"] > us * (1 + threshold / 100)]
    return sorted(worse, key=lambda pair: pair[0] / pair[1]["us"]), len(shared)


def report(results: list[dict], device: str, path: str, threshold: float) -> bool:
    """Prints what got slower than in the file of an earlier run; whether anything did.

    Raises:
        OSError, ValueError: the file cannot be read, is none of `bench_kernels.py --out`, or shares no number.
    """
    earlier = json.loads(pathlib.Path(path).read_text())
    if not isinstance(earlier, dict) or "results" not in earlier:
        raise ValueError(f"{path} is no file that bench_kernels.py --out has written.")
    if earlier["device"] != device:
        print(f"{path} was measured on another card: {earlier['device']}, this is {device}.")
    worse, compared = slower(results, earlier["results"], threshold)
    print(f"{len(worse)} of {compared} numbers take more than {threshold:g} % longer than in {path}.")
    if worse:
        print("| what | N x K | bits | tokens | us before | us now | more |\n|---|---|---|---|---|---|---|")
    for us, row in worse:
        cells = (row["what"], f"{row['rows']} x {row['in_features']}", row["bits"], row.get("tokens", "–"))
        print(f"| {' | '.join(map(str, cells))} | {us:.1f} | {row['us']:.1f} | {row['us'] / us - 1:.1%} |")
    return bool(worse)


def _key(row: dict) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in _KEY)
