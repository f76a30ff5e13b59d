"""A grid of runs: methods x bits x seeds in one process, one table and one picture. Finished cells are not redone.

OUTPUT/bases/KEY        packed bases with their initial adapters, one for each quantisation, shared by seeds
OUTPUT/cells/NAME.json  result of each cell
OUTPUT/adapters/NAME    trained adapter of each cell, where they are kept
OUTPUT/table.md, table.json, comparison.png
"""

import dataclasses
import gc
import hashlib
import json
import pathlib
import re
import tempfile
import time

import torch

from ..checkpoints.atomic import save_json, save_text
from ..checkpoints.guarded import read_json
from .data import load_data
from .finetune import train, write_adapter
from .methods import METHODS, check_method, prepare_base, supports
from .recipe import Recipe
from .report import draw, markdown, summarize
from .settled import settle, without_idle_fields
from .trainer import training_arguments

_BASE_FIELDS = ("model", "method", "bits", "rank", "alpha", "dropout", "init_steps", "quantization", "bf16")
_GRID_FIELDS = ("method", "bits", "seed", "output", "resume", "save_steps")  # a cell that was killed starts anew
# the model, what it is read with and the data, which are read once
_SHARED_FIELDS = (
    "model", "trust_remote_code", "task", "dataset", "dataset_config", "train_file", "validation_file", "train_split",
    "validation_split", "carve_validation", "text_column", "source_column", "target_column", "max_train_samples",
    "max_eval_samples", "block_size", "source_length", "target_length", "data_seed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        label: method with its overrides, such as "lowra:quantization.sensitivity=none".
        recipe: complete.
    """

    label: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """A file name for the cell."""
        safe = re.sub(r"[^A-Za-z0-9.]+", "_", self.label).strip("_")
        bits = "" if self.recipe.method == "lora16" else f"-{self.recipe.bits:g}bit"
        return f"{safe}{bits}-seed{self.recipe.seed}"

    @property
    def base_key(self) -> str:
        """Names what the base depends on."""
        content = {name: getattr(self.recipe, name) for name in _BASE_FIELDS}
        if self.recipe.fp16:  # a younger field: without it the names of bases stay what they were
            content["fp16"] = True
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.recipe.method}-{self.recipe.bits:g}bit-{digest}"


def plan_grid(recipe: Recipe, methods: list[str], bits: list[float], seeds: list[int]) -> list[Cell]:
    """The cells of a grid, those left out that a method has no form for (2-bit methods below 2, say).

    Args:
        recipe: of everything the grid does not vary.
        methods: names, with overrides of any field behind colons: "lowra:quantization.sensitivity=none:rank=16".

    Raises:
        ValueError: an unknown method or key, an override without effect, or no cell at all.
    """
    if recipe.tables == "auto":  # which could train those of one cell and not those of another
        recipe = dataclasses.replace(recipe, tables="frozen")
    for name in _GRID_FIELDS:
        if name in recipe.given:
            raise ValueError(f"{name} has no effect in a grid, which has its own: leave {name}= out.")
    for name, values in (("method", methods), ("number of bits", bits), ("seed", seeds)):
        if again := [value for number, value in enumerate(values) if value in values[:number]]:
            raise ValueError(f"The {name} {again[0]} is given twice: a grid has each once.")
    packs = any(label.partition(":")[0] != "lora16" for label in methods)
    for budget in bits:
        if packs and not any(supports(method, budget) for method in METHODS if method != "lora16"):
            raise ValueError(f"No method has a form at {budget:g} bits: give from 1 to 4.")
    # an override that has an effect with one of the methods may have none with another
    without_idle_fields(dataclasses.replace(recipe, given=recipe.given - {"init_steps"}))
    here = pathlib.Path(recipe.model).is_dir()  # what is finished can be shown where the model is not
    cells = []
    for label in methods:
        method, *overrides = label.split(":")
        names = {entry.partition("=")[0] for entry in overrides}
        if shared := names & set(_SHARED_FIELDS):
            raise ValueError(f"{min(shared)} is the same for all of a grid: give it for the whole, not in {label!r}.")
        if own := names & {"output", "resume", "save_steps"}:  # of the others `changed` says that they come twice
            raise ValueError(f"{min(own)} has no effect in {label!r}: a grid has its own. Leave it out.")
        if method not in METHODS:
            raise ValueError(f"There is no method {method!r}; the methods are {', '.join(METHODS)}.")
        for budget in [16.0] if method == "lora16" else bits:
            if not supports(method, budget):
                continue
            for seed in seeds:
                changed = recipe.changed([f"method={method}", f"bits={budget}", f"seed={seed}", *overrides])
                changed = dataclasses.replace(changed, given=frozenset({"method", "bits"} | names))
                cells.append(Cell(label, settle(changed) if here else without_idle_fields(changed)))
                if not here:
                    check_method(cells[-1].recipe)
    if not cells:
        raise ValueError(f"None of the methods {', '.join(methods)} has a form at {', '.join(map(str, bits))} bits.")
    return cells


def run_grid(
    recipe: Recipe, cells: list[Cell], output: pathlib.Path, progress: bool = True, keep_adapters: bool = False
) -> dict:
    """Runs what is not there yet, then writes table and picture.

    Args:
        keep_adapters: write every cell's trained adapter, too; a cell without one is not finished then, but for those
            that diverged.

    Returns:
        {"rows": the table, "cells": number of cells, "run": number of them run now, paths}.
    """
    finished = len(finished_cells(cells, output, keep_adapters))
    rows = write_report(run_cells(recipe, cells, output, progress, keep_adapters=keep_adapters), output)
    return {
        "rows": rows,
        "cells": len(cells),
        "run": len(cells) - finished,
        "table": str(output / "table.md"),
        "picture": str(output / "comparison.png"),
    }


def write_report(results: list[dict], output: pathlib.Path) -> list[dict]:
    """Writes table and picture of some cells' results; returns the table's rows."""
    rows = summarize(results)
    save_json(rows, output / "table.json")
    save_text(markdown(rows), output / "table.md")
    draw(rows, output / "comparison.png")
    return rows


def finished_cells(cells: list[Cell], output: pathlib.Path, with_adapters: bool = False) -> list[dict]:
    """The results of those cells that have run already."""
    return [result for cell in cells if (result := _finished(cell, output, with_adapters)) is not None]


def adapter_folder(cell: Cell, output: pathlib.Path) -> pathlib.Path:
    """Where a grid that keeps adapters writes that of the cell."""
    return output / "adapters" / cell.name


def run_cells(
    recipe: Recipe,
    cells: list[Cell],
    output: pathlib.Path,
    progress: bool = True,
    quantize_on: str | None = None,
    keep_adapters: bool = False,
) -> list[dict]:
    """The result of every cell, from its file where it is finished.

    Data is read once, each base is quantised once (on the device `quantize_on`, or where it is trained), and untuned
    metrics are taken once for each base.
    """
    earlier = {cell.name: _finished(cell, output, keep_adapters) for cell in cells}
    results = {name: result for name, result in earlier.items() if result is not None}
    missing = [cell for cell in cells if cell.name not in results]
    if not missing:
        return [results[cell.name] for cell in cells]
    settled_cells = {cell.name: dataclasses.replace(settle(cell.recipe), save_steps=None) for cell in missing}
    with tempfile.TemporaryDirectory() as scratch:  # of all, before the first one works
        for settled in settled_cells.values():
            training_arguments(settled, pathlib.Path(scratch) / "checkpoints")
    data = load_data(recipe, progress)
    untuned = {cell.base_key: results[cell.name]["untuned"] for cell in cells if cell.name in results}
    start_of_all = time.perf_counter()
    for number, cell in enumerate(missing, start=1):
        started = time.perf_counter()
        settled = settled_cells[cell.name]
        with tempfile.TemporaryDirectory() as scratch:
            arguments = training_arguments(settled, pathlib.Path(scratch) / "checkpoints")
            device = torch.device(quantize_on or arguments.device)
            base = prepare_base(settled, output / "bases" / cell.base_key, device, progress)
            ready = time.perf_counter()
            result, model = train(settled, base, data, arguments, untuned.get(cell.base_key), progress)
            if keep_adapters and result["diverged_at"] is None:
                write_adapter(model, settled, base, data, result["steps"], adapter_folder(cell, output))
            del model
        gc.collect()  # model and Trainer refer to each other, and two 7B models may not fit
        result["label"] = cell.label
        result["prepare_seconds"] = round(ready - started, 3)
        result["seconds"] = round(time.perf_counter() - started, 3)
        untuned[cell.base_key] = result["untuned"]
        save_json(result, output / "cells" / f"{cell.name}.json")
        results[cell.name] = result
        left = (time.perf_counter() - start_of_all) / number * (len(missing) - number)
        to_come = f", about {_spelt(left)} to go" if left else ""
        print(
            f"[{number}/{len(missing)}] {cell.name}: {_headline(result)}, {result['seconds']:.1f} s{to_come}",
            flush=True,
        )
    return [results[cell.name] for cell in cells]


def _finished(cell: Cell, output: pathlib.Path, with_adapter: bool) -> dict | None:
    """The result of an earlier run of the same recipe; paths apart, which may differ between machines."""
    path = output / "cells" / f"{cell.name}.json"
    if not path.exists():
        return None
    result = read_json(path, "the result of a finished cell")
    if with_adapter and result.get("diverged_at") is None and not adapter_folder(cell, output).is_dir():
        return None
    paths = ("model", "output", "train_file", "validation_file", "report_to", "workers", "save_steps")
    # fields newer than the result take their defaults, which of this one was another
    recipes = (cell.recipe, without_idle_fields(Recipe.from_dict({"tables": "frozen"} | result["recipe"])))
    ours, theirs = ({k: v for k, v in r.to_dict().items() if k not in paths} for r in recipes)
    return result if ours == theirs else None


def _headline(result: dict) -> str:
    key = "perplexity" if "perplexity" in result["tuned"] else "rouge1"
    before, after = (result[stage].get(key) for stage in ("untuned", "tuned"))
    return f"{key} {'-' if before is None else f'{before:.2f}'} -> {'-' if after is None else f'{after:.2f}'}"


def _spelt(seconds: float) -> str:
    """Such as "50 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
