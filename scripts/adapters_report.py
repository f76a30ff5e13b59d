"""Table and picture of what `compare_adapters.py` has measured: rows of one task, method, bits and perplexity each."""

import itertools
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def print_tables(rows: list[dict], tasks: list[str]) -> None:
    """The main table as Markdown: a method a line, its bits averaged over tasks, as Table 1 has them."""
    by_method: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["task"]] = row
    print("| method | AvgBits | " + " | ".join(tasks) + " | mean log perplexity | error of B A |")
    print("|---|---|" + "---|" * (len(tasks) + 2))
    for method, found in sorted(by_method.items(), key=lambda item: sum(row["bits"] for row in item[1].values())):
        values = [found[task] for task in tasks]
        bits = sum(row["bits"] for row in values) / len(values)
        mean = sum(math.log(row["perplexity"]) for row in values) / len(values)
        error = sum(row.get("error", 0.0) for row in values) / len(values)
        shown = " | ".join(f"{row['perplexity']:.2f}" for row in values)
        print(f"| {method} | {bits:.2f} | {shown} | {mean:.3f} | {error:.3f} |")


def draw(rows: list[dict], figures: dict[str, list[dict]], path: Path) -> None:
    """Perplexity on one task against AvgBits: all methods, and the three ablations."""
    figure, axes = plt.subplots(1, 1 + len(figures), figsize=(19, 4.6), layout="constrained")
    float16 = next(row["perplexity"] for row in rows if row["bits"] == 16)
    markers = itertools.cycle("osv^DPX*h<>")
    for row in rows:
        name, value = row["method"], row["perplexity"]
        # RTN at one bit undoes the adapter and would flatten all differences between the others.
        if 0 < row["bits"] < 16 and value < 3 * float16:
            color = "tab:red" if name.startswith("LoraQuant") else "tab:grey"
            axes[0].scatter(row["bits"], value, color=color, marker=next(markers), label=name, zorder=3)
    axes[0].set_title("methods (Table 1)")
    axes[0].legend(fontsize=8)
    for axis, (title, points) in zip(axes[1:], figures.items(), strict=True):
        curves: dict[str, list[dict]] = {}
        for point in points:
            curves.setdefault(point["method"].split(" at ")[0], []).append(point)
        for name, curve in curves.items():
            axis.plot(
                [p["bits"] for p in curve], [p["perplexity"] for p in curve], marker="o", markersize=4, label=name
            )
        axis.set_title(title)
        axis.legend()
    for axis in axes:
        axis.axhline(float16, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel("AvgBits (everything stored)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"perplexity, {rows[0]['task']} validation")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
