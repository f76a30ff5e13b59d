"""Draws the README's pictures of memory and speed from the measured figures in docs/lab/headline.json.

    python scripts/readme_pictures.py

Each figure there names its card, its date, the command that makes it again and where it was recorded. The picture of
accuracy is drawn by scripts/accuracy_report.py.
"""

import json
import pathlib

import matplotlib
from matplotlib import pyplot

ROOT = pathlib.Path(__file__).resolve().parents[1]
_OURS, _OTHERS, _REST = "tab:orange", "tab:gray", "lightgray"


def main() -> None:
    matplotlib.use("Agg")
    figures = json.loads((ROOT / "docs" / "lab" / "headline.json").read_text(encoding="utf-8"))
    folder = ROOT / "docs" / "pictures"
    draw(figures["memory"], ("weights", "rest"), folder / "memory.png", "GiB of GPU memory at the peak of fine-tuning")
    draw(figures["generation"], ("value",), folder / "generation.png", "tokens/s")


def draw(figure: dict, parts: tuple[str, ...], path: pathlib.Path, title: str) -> None:
    """Horizontal bars, ours in colour; a second part is stacked upon the first."""
    bars = figure["bars"][::-1]
    names = [bar["name"] for bar in bars]
    canvas, axes = pyplot.subplots(figsize=(7, 0.5 * len(bars) + 1.1))
    left = [0.0] * len(bars)
    for number, part in enumerate(parts):
        values = [bar[part] for bar in bars]
        first = [_OURS if name.startswith("lowra") else _OTHERS for name in names]
        axes.barh(names, values, left=left, color=_REST if number else first, label=_LABELS.get(part))
        left = [start + value for start, value in zip(left, values, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:g}", va="center")
    if len(parts) > 1:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(-0.02, -0.12), ncols=2, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    canvas.suptitle(f"{title}: {figure['model']}", fontsize=9, x=0.01, horizontalalignment="left")
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
    print(f"{path}: {figure['source']}")


_LABELS = {"weights": "base weights", "rest": "adapter, gradients, optimiser, activations"}

if __name__ == "__main__":
    main()
