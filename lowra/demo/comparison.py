"""What the demo compares, its table, and whether the methods end in the order they should."""

from ..training.grid import Cell, plan_grid
from ..training.recipe import Recipe

# What people know (16-bit LoRA, QLoRA at 4 bits), what breaks at 2 bits, what LoftQ saves of it, and lowra.
_RUNS = (("lora16", 16.0), ("qlora", 4.0), ("qlora", 2.0), ("loftq", 2.0), ("lowra", 2.0), ("lowra", 1.5))
_NAMES = {"lora16": "16-bit LoRA", "qlora": "QLoRA", "loftq": "LoftQ", "lowra": "lowra"}
_RIVAL = ("loftq", 2.0)


def demo_cells(recipe: Recipe) -> list[Cell]:
    """The runs of the demo, largest base first."""
    return [cell for method, bits in _RUNS for cell in plan_grid(recipe, [method], [bits], [recipe.seed])]


def comparison_table(rows: list[dict], sizes: list[int | None]) -> str:
    """Markdown that reads well on a screen too: a line for each run.

    Args:
        rows: of `lowra.training.report.summarize`.
        sizes: bytes of each base's weights on disk; None where they are not known.
    """
    lines = [["base weights and method", "bits", "true bits", "base on disk", "perplexity before", "after"]]
    for row, size in zip(rows, sizes, strict=True):
        # float32 on a processor has 32, but the checkpoint it was read from is the one on disk
        bits = ["16"] * 2 if row["method"] == "lora16" else [f"{row['nominal_bits']:.3g}", f"{row['true_bits']:.2f}"]
        perplexities = [_perplexity(row, stage) for stage in ("untuned", "tuned")]
        lines.append([_NAMES[row["method"]], *bits, "" if size is None else f"{size / 1e6:.2f} MB", *perplexities])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, rule)
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded) + "\n"


def order_problems(rows: list[dict]) -> list[str]:
    """Every run of lowra that did not end below LoftQ's at 2 bits, in a sentence; none where all is well."""
    ends = {(row["method"], row["bits"]): row["tuned"]["perplexity"]["mean"] for row in rows}
    rival = ends[_RIVAL]
    return [
        f"lowra at {bits:g} bits {_ended(end)}, LoftQ at 2 bits {_ended(rival)}."
        for (method, bits), end in ends.items()
        if method == "lowra" and (end is None or rival is not None and end >= rival)
    ]


def _ended(perplexity: float | None) -> str:
    return "diverged" if perplexity is None else f"ended at a perplexity of {_number(perplexity)}"


def _perplexity(row: dict, stage: str) -> str:
    return _number(row[stage]["perplexity"]["mean"])


def _number(value: float | None) -> str:
    if value is None:
        return "diverged"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
