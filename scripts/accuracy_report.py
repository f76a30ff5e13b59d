"""Tables and the picture of docs/lab/accuracy.md from the rows that accuracy_grid.py measured.

python scripts/accuracy_report.py docs/lab/accuracy.json --picture docs/pictures/accuracy.png --panels base-30m base-36m
python scripts/accuracy_report.py docs/lab/accuracy.json --add results.json --source "H200, 22 Nov 2026"   # more rows
"""

import argparse
import json
import pathlib
import statistics

# A variant by the switches that differ from accuracy_grid.py's defaults; the rest of them name what is measured.
_SWITCHES = (
    "sensitivity", "refine", "method", "steps", "menu", "group_size", "scales", "codebook", "assigner", "power",
    "aware", "feedback", "feedback_part", "budget", "train", "table_rate", "distill",
    "distill_blocks", "rank", "train_steps", "reconstruct", "reconstruct_blocks", "rates", "calibrate_on",
    "reconstruct_on", "blocks", "one_bit", "emphasis", "end_to_end", "only",
)  # fmt: skip
_DEFAULTS = {
    "sensitivity": "layer", "refine": 0, "method": "loftq", "steps": 5, "menu": [1, 2, 4], "group_size": 64,
    "scales": "double_quant", "codebook": "learned", "assigner": "exact", "power": None, "aware": False, "feedback": 0,
    "feedback_part": "both", "budget": "nominal", "train": "lora", "table_rate": 1.0, "distill": 0,
    "distill_blocks": 24, "rank": 8, "train_steps": 120, "reconstruct": 0, "reconstruct_blocks": 24, "rates": {},
    "calibrate_on": "given", "reconstruct_on": "given", "blocks": {}, "one_bit": 1.0, "emphasis": [], "end_to_end": {},
    "only": "",
}  # fmt: skip
_CALIBRATED = {"sensitivity": "fisher", "refine": 2, "method": "cloq", "feedback": 1}
_NORMAL_FLOAT = {"codebook": "normal_float", "assigner": "layer_order", "menu": [2, 4]}
_TABLES = {"train": "both"}
_TRUE = {"budget": "true", "group_size": 128}
_RECONSTRUCTED = {**_TRUE, "reconstruct": 4, "reconstruct_blocks": 96, "one_bit": 3.0}
_OWN = {"calibrate_on": "own", "reconstruct_on": "own"}
_TOGETHER = {"on": "own", "blocks": 15000, "steps": 5000, "batch": 16}
_LONGER = {**_TOGETHER, "blocks": 30000, "steps": 10000}
_END_TO_END = {
    **_CALIBRATED, **_TABLES, **_TRUE, **_OWN, "method": "lora", "table_rate": 0.3, "reconstruct": 1,
    "reconstruct_blocks": 1000, "blocks": {"ahead": 0, "batch": 8},
}  # fmt: skip
_NAMES = {
    "end to end": {**_END_TO_END, "end_to_end": _TOGETHER},
    "end to end, twice as long": {**_END_TO_END, "end_to_end": _LONGER},
    "own text, reconstructed, tables trained": {**_CALIBRATED, **_TABLES, **_RECONSTRUCTED, **_OWN},
    "reconstructed, tables trained": {**_CALIBRATED, **_TABLES, **_RECONSTRUCTED},
    "reconstructed": {**_CALIBRATED, **_RECONSTRUCTED},
    "calibrated, tables trained": {**_CALIBRATED, **_TABLES},
    "calibrated": _CALIBRATED,
    "data-free, tables trained": {"refine": 2, **_TABLES},
    "data-free": {"refine": 2},
    "defaults": {},
    "LoftQ": _NORMAL_FLOAT,
    "QLoRA": {**_NORMAL_FLOAT, "method": "lora"},
    "HQQ": {"method": "hqq"},
    "EfficientQAT": {"method": "efficientqat", "reconstruct": 4, "reconstruct_blocks": 96, "train": "steps"},
}
_STYLES = {
    "LoftQ": ("tab:gray", "s--"),
    "QLoRA": ("tab:olive", "v--"),
    "HQQ": ("tab:brown", "^--"),
    "data-free": ("tab:blue", "o-"),
    "data-free, tables trained": ("tab:cyan", "*"),
    "calibrated": ("tab:red", "o-"),
    "calibrated, tables trained": ("tab:orange", "*-"),
    "reconstructed, tables trained": ("tab:green", "D-"),
    "end to end": ("tab:purple", "P-"),
    "end to end, twice as long": ("tab:purple", "*"),
}
_LEAST_BITS = ", group_size 256"  # of points that belong to a line all the same
_TEXT = "wikitext-2"  # of rows that name none
_BASELINES = ("LoftQ", "QLoRA", "HQQ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=pathlib.Path, help="JSON list; docs/lab/accuracy.json")
    parser.add_argument("--add", type=pathlib.Path, help="results of accuracy_grid.py to put into it")
    parser.add_argument("--source", help="with --add: machine and date of these results")
    parser.add_argument("--picture", type=pathlib.Path)
    parser.add_argument("--panels", nargs="+", help="models in the picture; all if not given")
    args = parser.parse_args()
    rows = json.loads(args.rows.read_text()) if args.rows.exists() else []
    if args.add:
        rows += [compact(row, args.source) for row in json.loads(args.add.read_text()) if "tuned" in row]
        args.rows.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    groups = summarize(rows)
    print(markdown(groups), "\n\n", savings(groups), sep="")
    if args.picture:
        draw([group for group in groups if not args.panels or group["model"] in args.panels], args.picture)


def compact(row: dict, source: str | None) -> dict:
    """A row of the grid without defaults and with rounded numbers."""
    kept = {key: row[key] for key in _SWITCHES if key in row and row[key] != _DEFAULTS[key]}
    if "train" not in kept:
        kept.pop("table_rate", None)
    if "distill" not in kept:
        kept.pop("distill_blocks", None)
    if kept.get("sensitivity") != "fisher":
        kept.pop("one_bit", None)
    numbers = ("true_bits", "output_error", "untuned", "own_kl", "distilled", "tuned", "tuned_unpacked")
    kept.update({key: round(row[key], 4) for key in numbers if row.get(key) is not None})
    kept.update({key: row[key] for key in ("tuning_seed", "kl_steps") if row.get(key)})
    if row.get("kl_by_blocks"):
        kept["kl_by_blocks"] = [round(value, 4) for value in row["kl_by_blocks"]]
    model = pathlib.Path(row["model"]).name or "base-30m"
    if row.get("text", _TEXT) != _TEXT:
        kept["text"] = row["text"]
    return {"model": model, "lr": row["lr"], "seed": row["seed"], "bits": row["bits"], **kept, "source": source}


def summarize(rows: list[dict]) -> list[dict]:
    """One entry for each model, learning rate, budget and set of switches: mean and spread over seeds."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        switches = {key: row[key] for key in _SWITCHES if key in row}
        model = f"{row['model']} on {row['text']}" if "text" in row else row["model"]
        key = (model, row["lr"], row["bits"], name_of(row["bits"], switches))
        found.setdefault(key, []).append(row)
    groups = []
    for (model, rate, bits, name), members in found.items():
        tuned = [member["tuned"] for member in members]
        groups.append(
            {
                "model": model,
                "lr": rate,
                "bits": bits,
                "name": name,
                "true_bits": true_bits(name, bits, members[0]["true_bits"]),
                "untuned": statistics.fmean(member["untuned"] for member in members),
                "tuned": statistics.fmean(tuned),
                "spread": statistics.stdev(tuned) if len(tuned) > 1 else None,
                "seeds": len(tuned),
                "output_error": members[0]["output_error"],
            }
        )
    dense = {(group["model"], group["lr"]): group["tuned"] for group in groups if group["name"] == "16-bit"}
    for group in groups:
        base = dense.get((group["model"], group["lr"]))
        group["over"] = None if base is None else 100 * (group["tuned"] / base - 1)
    return sorted(groups, key=lambda group: (group["model"], group["lr"], group["name"], group["true_bits"]))


def name_of(bits: float, switches: dict) -> str:
    """The nearest of the known names and what differs from it."""
    if bits >= 16:
        return "16-bit"

    def differences(name):
        wanted = {**_DEFAULTS, **_NAMES[name]}
        return {key: value for key, value in {**_DEFAULTS, **switches}.items() if value != wanted[key]}

    alike = [name for name in _NAMES if bool(_NAMES[name].get("end_to_end")) == bool(switches.get("end_to_end"))]
    name = min(alike, key=lambda name: len(differences(name)))
    return ", ".join([name, *(f"{key} {value}" for key, value in differences(name).items())])


def true_bits(name: str, bits: float, measured: float) -> float:
    """What is stored; NormalFloat needs no tables of its own, so those baselines pay for codes and scales alone."""
    return bits + 8.125 / 64 if name in ("LoftQ", "QLoRA") else measured


def markdown(groups: list[dict]) -> str:
    lines = [
        "| model | rate | method | bits | true bits | output error | untuned | tuned | over 16-bit | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for g in groups:
        spread = "" if g["spread"] is None else f" ± {g['spread']:.2f}"
        over = "" if g["over"] is None else f"{g['over']:+.1f} %"
        lines.append(
            f"| {g['model']} | {g['lr']:g} | {g['name']} | {g['bits']:g} | {g['true_bits']:.3f} | "
            f"{g['output_error']:.3f} | {g['untuned']:.0f} | {g['tuned']:.2f}{spread} | {over} | {g['seeds']} |"
        )
    return "\n".join(lines)


def savings(groups: list[dict]) -> str:
    """For each run of a baseline, the run of ours with the fewest true bits that is no worse; nothing interpolated."""
    lines = ["| model | rate | baseline | its true bits | its perplexity |", "|---|---|---|---|---|"]
    kinds = ("data-free", "data-free, tables trained", "calibrated", "calibrated, tables trained")
    lines = [lines[0] + "".join(f" {kind} |" for kind in kinds), lines[1] + "---|" * len(kinds)]
    for base in [group for group in groups if group["name"] in _BASELINES]:
        cells = []
        for kind in kinds:
            ours = [g for g in groups if g["name"] == kind and (g["model"], g["lr"]) == (base["model"], base["lr"])]
            least = min((g["true_bits"] for g in ours if g["tuned"] <= base["tuned"]), default=None)
            fewer = None if least is None else base["true_bits"] - least
            word = "" if least is None else f"{abs(fewer):.2f} {'fewer' if fewer > 0 else 'more'}"
            cells.append("none run" if least is None else f"{least:.2f} ({word})")
        start = (base["model"], f"{base['lr']:g}", f"{base['name']} {base['bits']:g}", f"{base['true_bits']:.2f}")
        lines.append("| " + " | ".join([*start, f"{base['tuned']:.2f}", *cells]) + " |")
    return "\n".join(lines)


def draw(groups: list[dict], path: pathlib.Path, rate: float = 4e-3) -> None:
    """Perplexity after fine-tuning over true bits, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [group for group in groups if group["lr"] == rate]
    models = list(dict.fromkeys(group["model"] for group in groups))
    figure, panels = pyplot.subplots(1, len(models), figsize=(6 * len(models), 4.5), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        mine = [group for group in groups if group["model"] == model]
        for name, (colour, style) in _STYLES.items():
            own = [group for group in mine if group["name"].removesuffix(_LEAST_BITS) == name]
            points = sorted((g["true_bits"], g["tuned"], g["spread"] or 0) for g in own)
            if points:
                x, y, spread = zip(*points, strict=True)
                panel.errorbar(x, y, spread, fmt=style, color=colour, label=name, markersize=4, capsize=2)
        for group in mine:
            if group["name"] == "16-bit":
                panel.axhline(group["tuned"], color="black", linewidth=1, label="16-bit")
        best = min(group["tuned"] for group in mine)
        # what has lost the text altogether would flatten the rest
        panel.set(title=model, xlabel="true bits per weight", ylabel="perplexity after fine-tuning", yscale="log")
        panel.set_ylim(0.96 * best, min(2 * best, 1.05 * max(group["tuned"] for group in mine)))
        panel.yaxis.set_major_formatter("{x:.0f}")
        panel.yaxis.set_minor_formatter("{x:.0f}")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
