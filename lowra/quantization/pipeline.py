"""From a dense checkpoint to a packed one, tensor by tensor: learn -> assign -> quantise and initialise -> write.

Memory holds one tensor (and the tables of all). Every finished tensor is on disk at once, in `OUTPUT.partial`; a killed
run that is started again with the same arguments goes on where it stopped, and `OUTPUT` appears complete or not at all.
"""

import contextlib
import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from ..checkpoints.atomic import locked, save_json
from ..checkpoints.companions import companions
from ..checkpoints.dense import DenseCheckpoint, check_finite, empty_model, safetensors_files
from ..checkpoints.hub import resolve_folder
from ..checkpoints.matching import count_and_names
from ..checkpoints.places import expanded, new_folder
from ..checkpoints.targets import check_skips, find_targets
from ..config import LowRAConfig
from ..device import choose_device
from ..optional import require
from ..version import __version__
from .assembling import assemble
from .block_stream import block_names
from .calibration import Calibration
from .end_to_end import check_text, train_end_to_end
from .group_size import best_group_size
from .initial_adapter import MOST_ROUNDS, AdapterRecipe, check_rank
from .job import Job
from .pieces import write_pieces
from .planning import Planner, check_budget, fisher_costs, learn
from .reconstruction import open_stream, reconstruct
from .work import ADAPTER, JOINT_ADAPTER, TRAINED_ADAPTER, WorkFolder, identities

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
    group_sizes: Sequence[int] = (),
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
        group_sizes: of which the one is taken that leaves the least error at the budget, which should be a true one;
            with none that of `config`.

    Returns:
        the report that is also written to `output/lowra_report.json`: bits, bytes, squared errors over energy (`error`
        of the plan, `packed_error`, and `adapted_error` with the initial adapter), bound, seconds of each stage
        and in all; where an earlier run had been killed (`resumed`), those of the last run alone.

    Raises:
        OSError, ValueError: input that cannot be used, or an output that cannot be written; nothing has been written to
            `output` then.
    """
    stages = _Stages()
    _check_rounds(config)
    if config.assigner == "two_level":
        require("assigner=two_level", "pulp", "highspy", "sklearn")
    output = expanded(output)
    work = WorkFolder(new_folder(output))
    folder = resolve_folder(model)
    device = choose_device(device)
    files = safetensors_files(folder)
    skeleton = empty_model(folder, trust_remote_code, files)
    if getattr(skeleton.config, "quantization_config", None):
        raise ValueError(f"{model} is quantised already; give the original checkpoint in 16 or 32 bits.")
    check_skips(skeleton, config.modules_to_not_convert)
    targets = find_targets(skeleton, config.modules_to_not_convert, config.quantize_head, config.quantize_embeddings)
    check_budget(config, targets, group_sizes)
    if adapter is not None:
        check_rank(adapter.rank, targets)
    if config.reconstruct or config.end_to_end:
        block_names(skeleton, targets)
    source = DenseCheckpoint(files, skeleton)
    source.check_stored(targets)
    if source.unplaced:
        logger.warning(
            "lowra: the checkpoint holds %s that %s of its config.json has no place for; left out.",
            count_and_names(source.unplaced),
            type(skeleton).__name__,
        )
    with stages.time("check"):
        for name in source.names():
            if name not in targets:  # the learner looks at the others
                for key, tensor in source.load(name).items():
                    check_finite(key, tensor)
    beside = companions(folder, outside=(work.folder, work.place))
    with locked(work.folder):
        resumed = work.has_text()
        if callable(calibration):
            with stages.time("calibrate"):
                calibration = calibration()
        _check_moments(config, adapter, calibration)
        if group_sizes:
            with stages.time("choose the group size"):
                size = best_group_size(group_sizes, config, source, targets, calibration, device, progress)
            config = dataclasses.replace(config, group_size=size)
        job = Job(
            source=source,
            targets=targets,
            config=config,
            adapter=adapter,
            calibration=calibration,
            model=str(model),
            folder=folder,
            companions=beside,
            output=output,
            work=work,
            device=device,
            progress=progress,
        )
        resumed |= work.begin(_recipe(job, files))
        try:
            report = _stream(job, stages, resumed)
        except ValueError:
            work.clear()  # input that cannot be used: there is nothing to go on with
            raise
        work.finish()
    return report


def _check_rounds(config: LowRAConfig) -> None:
    """Raises ValueError for rounds that would never end."""
    for name in ("iterations", "refine", "feedback", "reconstruct"):
        if (rounds := getattr(config, name)) > MOST_ROUNDS:
            raise ValueError(f"{name} must be at most {MOST_ROUNDS} rounds, of which a few do; got {rounds}.")


def _check_moments(config: LowRAConfig, adapter: AdapterRecipe | None, calibration: Calibration | None) -> None:
    """Raises ValueError where the recipe needs second moments and there are none."""
    for wanted, name in (
        (adapter is not None and adapter.method == "cloq", "method=cloq"),
        (config.feedback, "feedback"),
    ):
        if wanted and not (calibration and calibration.has_moments):
            raise ValueError(
                f"{name} needs second moments of the inputs: calibrate with moments=True (--calibrate FILE)."
            )


class _Stages:
    """Seconds of each stage of a run, and of the whole."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - begun

    def seconds(self) -> dict[str, float]:
        found = {**self._seconds, "in all": time.perf_counter() - self._started}
        return {stage: round(value, 3) for stage, value in found.items()}


def _stream(job: Job, stages: _Stages, resumed: bool) -> dict:
    """Learns, assigns, quantises and assembles in the work folder; the finished checkpoint lies in `job.work.final`."""
    with stages.time("reconstruct") if job.config.reconstruct else contextlib.nullcontext():
        stream = open_stream(job)  # first, because it may find that the model is none for it
    check_text(job)
    planner = Planner(job.config, job.work, job.calibration)
    with stages.time("learn"):
        learn(planner, job.source, job.targets, job.device, job.progress)
    with stages.time("assign"):
        plan = planner.assign()
    with stages.time("quantise and initialise" if job.adapter else "quantise"):
        pieces = write_pieces(job, plan)

    adapter, together = ADAPTER, None
    if stream is not None:
        with stages.time("reconstruct"):
            pieces, adapter = reconstruct(job, plan, stream, pieces), TRAINED_ADAPTER
    if job.config.end_to_end:
        with stages.time("end to end"):
            pieces, together = train_end_to_end(job, plan, pieces)
        adapter = JOINT_ADAPTER if together["kept"] else adapter

    with stages.time("write"):
        report = assemble(job, plan, pieces, adapter, together)
    report |= {"seconds": stages.seconds(), "resumed": resumed}
    save_json(report, job.work.final / "lowra_report.json")
    return report


def _recipe(job: Job, files: list[pathlib.Path]) -> dict:
    """All that the pieces depend on."""
    trains = job.config.reconstruct or job.config.end_to_end
    return {
        "version": __version__,
        "source": identities(files),
        "config": job.config.to_dict(),
        "fisher_costs": list(fisher_costs(job.config, job.calibration)),
        "adapter": dataclasses.asdict(job.adapter) if job.adapter else None,
        "calibration": [job.calibration.digest(), job.calibration.digest_of_moments()] if job.calibration else None,
        "text": job.calibration.digest_of_text() if job.calibration and trains else None,
    }
