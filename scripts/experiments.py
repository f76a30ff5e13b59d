"""The small counterparts of the paper's tables: every set of runs behind docs/lab/experiments.md, in parallel.

    python scripts/experiments.py run table2 table3 --jobs 8 --output DIR model=PATH train_file=F validation_file=F
    python scripts/experiments.py best learning_rate --output DIR ...   # prints the override that won
    python scripts/experiments.py report table2 table3 --output DIR ... # tables and pictures

`run` writes one JSON file per cell and needs no plotting library, so that it runs on a bare GPU machine; `report` reads
them. Finished cells are not redone, and sets share cells. Several processes share each GPU, which a model of 30 million
parameters leaves mostly idle: its steps wait for Python.
"""

import argparse
import multiprocessing
import os
import pathlib

import torch

from lowra.training.grid import Cell, finished_cells, plan_grid, run_cells, write_report
from lowra.training.methods import METHODS
from lowra.training.recipe import load_recipe

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"

_WIKITEXT = "base-30m-wikitext2.yaml"
_RATES = ["3e-4", "1e-3", "2e-3", "4e-3", "8e-3"]
_SEEDS = [0, 1, 2]
_READINGS = [
    "lowra",
    "lowra:quantization.sensitivity=none",
    "lowra:quantization.block_weight=absmax",
    "lowra:quantization.thresholds=matrix",
    "lowra:quantization.iterations=2",
    "lowra:quantization.assigner=layer_order",
    "lowra:quantization.scales=float32",
    "lowra:init_steps=1",
]

# the paper's program, alone and with everything else as the paper's text has it
_TWO_LEVEL = "lowra:quantization.assigner=two_level"
_AS_PRINTED = f"{_TWO_LEVEL}:quantization.sensitivity=none:quantization.block_weight=absmax:quantization.iterations=2"

# name: configuration, methods, nominal bits, seeds
SETS = {
    "learning_rate": (_WIKITEXT, [f"lora16:learning_rate={rate}" for rate in _RATES], [], [0]),
    "learning_rate_2bit": (_WIKITEXT, [f"lowra:learning_rate={rate}" for rate in _RATES], [2], [0]),
    "table2": (_WIKITEXT, ["lora16", "qlora", "loftq", "lowra"], [1.5, 1.75, 2, 2.5, 3, 4], _SEEDS),
    "table3": (_WIKITEXT, ["lowra"], [1.0, 1.15, 1.25], _SEEDS),
    "ablation": (_WIKITEXT, ["qlora", "loftq", "assigner_only", "lowra"], [2, 2.5, 3, 4], _SEEDS),
    "initialisation": (_WIKITEXT, ["pissa", "loftq"], [2, 2.5, 3, 4], _SEEDS),
    "hqq": (_WIKITEXT, ["hqq"], [1, 2, 3, 4], _SEEDS),
    "readings": (_WIKITEXT, _READINGS, [1.5, 2], _SEEDS),
    "menu": (_WIKITEXT, ["lowra", "lowra:quantization.menu=[2,4]"], [2, 2.5, 3], _SEEDS),
    "two_level": (_WIKITEXT, ["lowra", _TWO_LEVEL, _AS_PRINTED], [1.5, 2], _SEEDS),
    "summaries": (
        "small-bart-xsum.yaml",
        ["lora16", "qlora", "loftq", "assigner_only", "lowra"],
        [1.5, 2, 2.5, 4],
        _SEEDS,
    ),
    "openassistant": ("base-30m-openassistant.yaml", ["lora16", "qlora", "loftq", "lowra"], [1.5, 2, 3, 4], _SEEDS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "best", "report"))
    parser.add_argument("sets", nargs="+", metavar="SET", help=f"of {', '.join(SETS)}; or overrides key=value")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the machine's GPUs")
    args = parser.parse_intermixed_args()
    names = [entry for entry in args.sets if "=" not in entry]
    overrides = [entry for entry in args.sets if "=" in entry]
    unknown = [name for name in names if name not in SETS]
    if unknown:
        parser.error(f"there is no set {', '.join(unknown)}; the sets are {', '.join(SETS)}")
    for config in dict.fromkeys(SETS[name][0] for name in names):
        chosen = [name for name in names if SETS[name][0] == config]
        folder = args.output / pathlib.Path(config).stem
        if args.action == "run":
            run(config, overrides, chosen, folder, args.jobs)
        elif args.action == "best":
            print(best(config, overrides, chosen, folder))
        else:
            report(config, overrides, chosen, folder)


def cells_of(config: str, overrides: list[str], names: list[str]) -> list[Cell]:
    """The cells of some sets of one configuration, each once."""
    recipe = load_recipe(CONFIGS / config, overrides)
    cells = {}
    for name in names:
        _, methods, bits, seeds = SETS[name]
        cells.update({cell.name: cell for cell in plan_grid(recipe, methods, bits, seeds)})
    return list(cells.values())


def run(config: str, overrides: list[str], names: list[str], folder: pathlib.Path, jobs: int) -> None:
    cells = cells_of(config, overrides, names)
    groups: dict[str, list[Cell]] = {}
    for cell in cells:  # cells on the same packed base go to the same process, which quantises it once
        packed = METHODS[cell.recipe.method].quantization is not None
        groups.setdefault(cell.base_key if packed else cell.name, []).append(cell)
    print(f"{config}: {len(cells)} cells in {len(groups)} groups, {jobs} processes", flush=True)
    work = [(config, overrides, group, folder) for group in groups.values()]
    if jobs == 1:
        for arguments in work:
            _work(*arguments)
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(gpu) for gpu in range(max(1, torch.cuda.device_count()))] if visible is None else visible.split(",")
    gpus = gpus[:jobs]
    pools = []
    for number, gpu in enumerate(gpus):
        # A process must find its GPU in its environment when it starts: importing bitsandbytes already chooses one.
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        pools.append(multiprocessing.get_context("spawn").Pool(len(range(number, jobs, len(gpus))), _one_thread))
    running = [pool.starmap_async(_work, work[i :: len(gpus)], chunksize=1) for i, pool in enumerate(pools)]
    for results in running:
        results.get()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _work(config: str, overrides: list[str], cells: list[Cell], folder: pathlib.Path) -> None:
    # On the CPU: each small step that waits for a shared GPU waits for the time slices of all other processes as well,
    # 70 s for a base that takes 3 s on one core.
    run_cells(load_recipe(CONFIGS / config, overrides), cells, folder, progress=False, quantize_on="cpu")


def best(config: str, overrides: list[str], names: list[str], folder: pathlib.Path) -> str:
    """The overrides of the finished cell with the lowest perplexity."""
    finished = [r for r in finished_cells(cells_of(config, overrides, names), folder) if r["tuned"]["perplexity"]]
    return " ".join(min(finished, key=lambda result: result["tuned"]["perplexity"])["label"].split(":")[1:])


def report(config: str, overrides: list[str], names: list[str], folder: pathlib.Path) -> None:
    for name in names:
        cells = cells_of(config, overrides, [name])
        results = finished_cells(cells, folder)
        print(f"## {name}: {len(results)} of {len(cells)} runs\n")
        if results:
            write_report(results, folder)
            for part in ("table.md", "table.json", "comparison.png"):
                (folder / part).replace(folder / f"{name}{pathlib.Path(part).suffix}")
            print((folder / f"{name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
