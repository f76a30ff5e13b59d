"""Finished pieces put together: shards and index, config, the source's other files, adapter, report and card."""

import dataclasses
import pathlib

from ..checkpoints.atomic import save_json, save_tensors, save_text
from ..checkpoints.companions import copy_companions
from ..checkpoints.dense import safetensors_files
from ..checkpoints.guarded import open_tensors
from ..checkpoints.integrity import FoundTensors, find_tensors, write_digests
from ..checkpoints.matching import count_and_names
from ..checkpoints.whole_files import OpenFiles
from ..config import LowRAConfig
from . import card
from .calibration import CALIBRATION_FILE
from .initial_adapter import ADAPTER_FOLDER, write_adapter
from .job import Job
from .pieces import digests_of_pieces, relative_errors
from .planning import Plan
from .reconstruction import block_errors
from .work import ADAPTER

SHARD_BYTES = 4 << 30


def assemble(
    job: Job, plan: Plan, pieces: list[pathlib.Path], adapter: str = ADAPTER, end_to_end: dict | None = None
) -> dict:
    """Writes the checkpoint into the work folder's `final`, all but the report.

    Args:
        pieces: of the weights.
        adapter: kind of the pieces with the factors of the initial adapter.
        end_to_end: what training all blocks together did, or None.

    Returns:
        the report, without the seconds of the stages.
    """
    final = job.work.final
    total, packed_bytes = _write_shards(pieces, final, {target.name for target in job.targets.values()})
    files = OpenFiles(safetensors_files(final))
    written = _read_back(pieces, files)
    packed_error, adapted_error = relative_errors(pieces)
    parameters = sum(target.size for target in job.targets.values())
    reached = _reached(job, plan, parameters, packed_bytes, written.packing)
    model = job.source.model
    model.config.quantization_config = reached
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(final)
    write_digests(final, files, written)
    copy_companions(job.folder, job.companions, final)
    if job.adapter is not None:
        factors = [job.work.path(adapter, name) for name, target in job.targets.items() if target.adapted]
        write_adapter(factors, final / ADAPTER_FOLDER, job.output, model, job.targets, job.adapter, reached)
    if job.calibration is not None:
        job.calibration.save(final / CALIBRATION_FILE)
    report = {
        "model": job.model,
        "bits": job.config.bits,
        "nominal_bits": reached.nominal_bits,
        "true_bits": reached.true_bits,
        "quantised_parameters": parameters,
        "packed_bytes": packed_bytes,
        "checkpoint_bytes": total,
        "error": plan.error,
        "packed_error": packed_error,
        "adapted_error": None if job.adapter is None else adapted_error,
        "block_errors": block_errors(pieces),
        "end_to_end": end_to_end,
        "calibration_text": None if job.calibration is None else job.calibration.origin,
        "assigner": {
            "solver": plan.assignment.solver,
            "error": plan.assignment.error,
            "bound": plan.assignment.bound,
            "gap": plan.assignment.gap,
            "bits_used": plan.assignment.bits_used,
            "budget": plan.assignment.budget,
            "channels": len(plan.assignment.row_bits),
        },
    }
    text = card.model_card(reached, type(model).__name__, parameters, packed_bytes, report, job.adapter)
    save_text(text, final / card.CARD_FILE)
    return report


def _read_back(pieces: list[pathlib.Path], files: OpenFiles) -> FoundTensors:
    """What the finished files hold.

    Raises:
        ValueError: something else than was computed.
    """
    written = find_tensors(files)
    wrong = [key for key, digest in digests_of_pieces(pieces).items() if written.digests.get(key) != digest]
    if wrong:
        raise ValueError(
            f"What was written reads back otherwise in {count_and_names(wrong)}: the disk or the memory of this "
            "machine fails. Nothing was kept; start again, best on another disk."
        )
    return written


def _reached(job: Job, plan: Plan, parameters: int, packed_bytes: int, packing: dict[str, str]) -> LowRAConfig:
    """The recipe with what came of it."""
    nominal = sum(int(plan.row_bits[name].sum()) * target.in_features for name, target in job.targets.items())
    return dataclasses.replace(
        job.config,
        nominal_bits=round(nominal / parameters, 6),
        true_bits=round(8 * packed_bytes / parameters, 6),
        error=plan.error,
        base=job.model,
        fingerprint=plan.fingerprint,
        packing=packing,
        initial_adapter=None if job.adapter is None else job.adapter.started(),
        calibration=None if job.calibration is None else job.calibration.digest(),
    )


def _write_shards(pieces: list[pathlib.Path], final: pathlib.Path, packed: set[str]) -> tuple[int, int]:
    """Gathers the pieces into shards of at most `SHARD_BYTES`, with an index where there are several.

    Returns:
        bytes of the files, and of the tensors of the modules named in `packed`, their biases not counted.
    """
    shards: list[list[pathlib.Path]] = [[]]
    size = total = 0
    for piece in pieces:
        length = piece.stat().st_size
        if size and size + length > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += length
        total += length
    weight_map, packed_bytes = {}, 0
    for number, members in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for piece in members:
            with open_tensors(piece, "a piece of the packed checkpoint") as content:
                tensors.update({key: content.get_tensor(key) for key in content.keys()})  # mapped, not copied
        save_tensors(tensors, final / name)
        weight_map.update(dict.fromkeys(tensors, name))
        for key, tensor in tensors.items():
            module, _, leaf = key.rpartition(".")
            if module in packed and leaf != "bias":
                packed_bytes += tensor.nbytes
    if len(shards) > 1:
        save_json({"metadata": {"total_size": total}, "weight_map": weight_map}, final / "model.safetensors.index.json")
    return sum(path.stat().st_size for path in final.glob("*.safetensors")), packed_bytes
