"""Table and picture of a grid: one row for each method and budget, mean and spread over seeds."""

import pathlib
import statistics

from ..optional import require

_METRICS = {
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
}


def summarize(results: list[dict]) -> list[dict]:
    """Rows of the table, in the order of the grid.

    Each has label, method, bits, nominal_bits, true_bits, seeds, untuned and tuned: {metric: {mean, spread}}, the
    spread the sample standard deviation over seeds (None for one seed), the mean None where a run diverged.
    """
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault((result["label"], result["bits"]), []).append(result)
    rows = []
    for (label, bits), members in groups.items():
        first = members[0]
        rows.append(
            {
                "label": label,
                "method": first["method"],
                "bits": bits,
                "nominal_bits": first["nominal_bits"],
                "true_bits": first["true_bits"],
                "seeds": [member["recipe"]["seed"] for member in members],
                "steps": first["steps"],
                "untuned": _over_seeds([member["untuned"] for member in members]),
                "tuned": _over_seeds([member["tuned"] for member in members]),
            }
        )
    return rows


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    metrics = [key for key in _METRICS if key in rows[0]["tuned"]]
    head = [
        "method",
        "bits",
        "true bits",
        f"untuned {_METRICS[metrics[0]]}",
        *(_METRICS[key] for key in metrics),
        "runs",
    ]
    lines = [head, [":--" if i == 0 else "--:" for i in range(len(head))]]
    for row in rows:
        bits = [f"{row['nominal_bits']:.3g}", f"{row['true_bits']:.3f}"]
        tuned = [_number(row["tuned"][key], key) for key in metrics]
        lines.append(
            [row["label"], *bits, _number(row["untuned"][metrics[0]], metrics[0]), *tuned, str(len(row["seeds"]))]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """The first metric after fine-tuning over nominal bits, a line for each method, the dense base across."""
    require("The picture of a grid", "matplotlib")
    import matplotlib  # not needed before a grid has something to draw

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric = next(key for key in _METRICS if key in rows[0]["tuned"])
    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=120)
    for label in dict.fromkeys(row["label"] for row in rows):
        members = [r for r in rows if r["label"] == label and r["tuned"][metric]["mean"] is not None]
        members.sort(key=lambda row: row["nominal_bits"])
        if not members:
            continue
        means = [row["tuned"][metric]["mean"] for row in members]
        if members[0]["method"] == "lora16":
            axes.axhline(means[0], linestyle="--", color="grey", label=label)
            continue
        spreads = [row["tuned"][metric]["spread"] or 0.0 for row in members]
        axes.errorbar([r["nominal_bits"] for r in members], means, spreads, marker="o", capsize=3, label=label)
    if metric == "perplexity":
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="nominal bits per quantised parameter", ylabel=f"{_METRICS[metric]} after fine-tuning")
    if axes.get_legend_handles_labels()[0]:  # none where all runs diverged
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _over_seeds(measurements: list[dict]) -> dict[str, dict]:
    summary: dict[str, dict] = {}
    for key in measurements[0]:
        values = [measurement[key] for measurement in measurements]
        if None in values:
            summary[key] = {"mean": None, "spread": None}
        else:
            spread = statistics.stdev(values) if len(values) > 1 else None
            summary[key] = {"mean": statistics.fmean(values), "spread": spread}
    return summary


def _number(value: dict, metric: str) -> str:
    if value["mean"] is None:
        return "diverged"
    digits = 3 if metric == "accuracy" else 2
    spread = "" if not value["spread"] else f" ± {value['spread']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"
