"""The loss curve of a run: a bar while it runs, JSON and a picture afterwards."""

import logging
import pathlib
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoints.atomic import save_json
from ..optional import how_to_install, installed

logger = logging.getLogger(__name__)


class LossBar(TrainerCallback):
    """One progress bar with the last loss, in place of a line for each logged step, and one for each evaluation."""

    _evaluating: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._evaluating is None:
            self._evaluating = tqdm(total=len(eval_dataloader), desc="evaluating", leave=False)
        self._evaluating.update(1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._evaluating is not None:
            self._evaluating.close()
            self._evaluating = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()


class Evaluations(TrainerCallback):
    """Of one training run, whose time they are part of.

    Attributes:
        seconds: that they took.
    """

    seconds = 0.0

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.seconds += (metrics or {}).get("eval_runtime", 0.0)


def save_curve(curve: list[dict], folder: pathlib.Path, title: str) -> None:
    """`curve.json` and, where matplotlib is installed, `curve.png` in the folder.

    Args:
        curve: the Trainer's log entries with `step` and `loss` (training) or `eval_loss`.
    """
    save_json(curve, folder / "curve.json")
    if not installed("matplotlib"):
        logger.warning("The loss curve is not drawn, without matplotlib: %s.", how_to_install("matplotlib"))
        return
    import matplotlib  # not needed before a run has something to draw

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=120)
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[key]) for entry in curve if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None, markersize=3)
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)", title=title)
    if curve:  # none of a run that ended before it logged
        axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "curve.png.tmp", format="png")
    (folder / "curve.png.tmp").replace(folder / "curve.png")
    pyplot.close(figure)


def mean_loss(curve: list[dict]) -> float | None:
    """Mean training loss over all steps of a run; of one that was resumed, the Trainer knows the last part only."""
    total, last = 0.0, 0
    for entry in curve:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)  # the mean since the last entry
            last = entry["step"]
    return total / last if last else None
