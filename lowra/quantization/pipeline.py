"""From a dense checkpoint to a packed one, tensor by tensor: learn -> assign -> quantise and initialise -> write.

Memory holds one tensor (and the tables of all). Every finished tensor is on disk at once, in `OUTPUT.partial`; a killed
run that is started again with the same arguments goes on where it stopped, and `OUTPUT` appears complete or not at all.
"""

import dataclasses
import logging
import pathlib
import shutil
import time
from collections.abc import Callable

import torch

from ..checkpoints.atomic import locked, move_folder, refuse_existing, save_json
from ..checkpoints.dense import (
    DenseCheckpoint,
    check_finite,
    count_and_names,
    empty_model,
    resolve_folder,
    safetensors_files,
)
from ..checkpoints.guarded import read_json
from ..checkpoints.targets import check_skips, find_targets
from ..config import LowRAConfig
from ..device import choose_device
from ..version import __version__
from .assembling import assemble
from .calibration import Calibration
from .initial_adapter import AdapterRecipe, check_rank
from .job import Job
from .pieces import write_pieces
from .planning import Planner, learn

logger = logging.getLogger(__name__)


def quantize_checkpoint(
    model: str,
    output: str | pathlib.Path,
    config: LowRAConfig,
    adapter: AdapterRecipe | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    calibration: Calibration | Callable[[], Calibration] | None = None,
    *,
    trust_remote_code: bool = False,
) -> dict:
    """Writes the packed checkpoint of a dense one and, with a recipe, its initial adapter.

    Args:
        model: local folder or hub name of a checkpoint in safetensors.
        output: folder to create.
        config: recipe and budget.
        adapter: the adapter for `output/initial_adapter`, or None.
        device: where the arithmetic runs; a GPU if there is one.
        progress: show progress bars.
        calibration: for sensitivity "fisher" and method "cloq"; written to `output/calibration.safetensors`. A function
            that makes one is called when all that headers tell has been checked.
        trust_remote_code: run the Python code that the checkpoint brings, where its architecture is its own.

    Returns:
        the report that is also written to `output/lowra_report.json`: bits, bytes, squared errors over energy (`error`
        of the plan, `packed_error`, and `adapted_error` with the initial adapter), bound, seconds of each stage.

    Raises:
        FileNotFoundError, ValueError: input that cannot be used; nothing has been written to `output` then.
    """
    output = pathlib.Path(output)
    refuse_existing(output)
    folder = resolve_folder(model)
    device = choose_device(device)
    files = safetensors_files(folder)
    skeleton = empty_model(folder, trust_remote_code, files)
    if getattr(skeleton.config, "quantization_config", None):
        raise ValueError(f"{model} is quantised already; give the original checkpoint in 16 or 32 bits.")
    check_skips(skeleton, config.modules_to_not_convert)
    targets = find_targets(skeleton, config.modules_to_not_convert, config.quantize_head, config.quantize_embeddings)
    if adapter is not None:
        check_rank(adapter.rank, targets)
    source = DenseCheckpoint(files, skeleton)
    if source.unplaced:
        logger.warning(
            "lowra: the checkpoint holds %s that %s of its config.json has no place for; left out.",
            count_and_names(source.unplaced),
            type(skeleton).__name__,
        )
    for name in source.names():
        if name not in targets:  # the learner looks at the others
            for key, tensor in source.load(name).items():
                check_finite(key, tensor)
    if callable(calibration):
        calibration = calibration()
    for wanted, name in (
        (adapter is not None and adapter.method == "cloq", "method=cloq"),
        (config.feedback, "feedback"),
    ):
        if wanted and not (calibration and calibration.has_moments):
            raise ValueError(
                f"{name} needs second moments of the inputs: calibrate with moments=True (--calibrate FILE)."
            )
    work = output.with_name(output.name + ".partial")
    job = Job(
        source=source,
        targets=targets,
        config=config,
        adapter=adapter,
        calibration=calibration,
        model=str(model),
        folder=folder,
        output=output,
        work=work,
        device=device,
        progress=progress,
    )
    with locked(work):
        _clear_work_of_other_recipe(job, files)
        try:
            report = _stream(job)
        except ValueError:
            shutil.rmtree(work)  # input that cannot be used: there is nothing to go on with
            raise
        move_folder(job.final, output)
        shutil.rmtree(work)
    return report


def _stream(job: Job) -> dict:
    """Learns, assigns, quantises and assembles in the work folder; the finished checkpoint lies in `job.final`."""
    seconds = {}
    clock = time.perf_counter()
    planner = Planner(job.config, job.work / "learned", job.calibration)
    learn(planner, job.source, job.targets, job.device, job.progress)
    seconds["learn"] = time.perf_counter() - clock
    plan = planner.assign()
    seconds["assign"] = plan.assignment.seconds

    clock = time.perf_counter()
    pieces = write_pieces(job, plan)
    seconds["quantise and initialise" if job.adapter else "quantise"] = time.perf_counter() - clock

    clock = time.perf_counter()
    report = assemble(job, plan, pieces)
    seconds["write"] = time.perf_counter() - clock
    report["seconds"] = {stage: round(value, 3) for stage, value in seconds.items()}
    save_json(report, job.final / "lowra_report.json")
    return report


def _clear_work_of_other_recipe(job: Job, files: list[pathlib.Path]) -> None:
    """Empties the work folder unless it was begun with the same source and recipe; the folder itself is held."""
    recipe = {
        "version": __version__,
        "source": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "config": job.config.to_dict(),
        "adapter": dataclasses.asdict(job.adapter) if job.adapter else None,
        "calibration": job.calibration.digest() if job.calibration else None,
    }
    begun = job.work / "recipe.json"
    if begun.exists() and read_json(begun, "the recipe of an earlier run") != recipe:
        begun.unlink()  # first, so that a kill in between leaves nothing that looks like this recipe's
        for path in job.work.iterdir():
            shutil.rmtree(path)
    save_json(recipe, begun)
    shutil.rmtree(job.final, ignore_errors=True)
