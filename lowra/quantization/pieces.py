"""The pieces of a packed checkpoint: one file per conversion of the source, and one per adapted matrix.

A piece is on disk as soon as it is finished, so that a killed run that is started again makes only those it lacks.
"""

import json
import pathlib

import torch

from ..checkpoints.guarded import open_tensors
from ..checkpoints.reading import STORED_AS
from ..checkpoints.targets import Target
from ..weights.digests import digest_of_tensor
from ..weights.packed import PackedWeight
from .feedback import with_feedback
from .job import Job, with_bar
from .loftq import LowRank, initialize
from .pack import quantize_matrix
from .planning import Plan
from .work import ADAPTER, PIECES


def write_pieces(job: Job, plan: Plan) -> list[pathlib.Path]:
    """Packs or copies every tensor of the source that no piece of an earlier run holds.

    Returns:
        the pieces, in the order of the source.
    """
    names = job.source.names()
    finished = {name for name in names if _is_finished(job, name)}
    for name in with_bar(names, job.targets, finished, "quantising", job.progress):
        if name in finished:
            continue
        if name in job.targets:
            _write_packed(job, plan, name, job.targets[name])
        else:
            _write_dense(job, name)
    return [job.work.path(PIECES, name) for name in names]


def _is_finished(job: Job, name: str) -> bool:
    """Whether an earlier run has made all that this name stands for."""
    kinds = (PIECES, ADAPTER) if job.adapter and name in job.targets and job.targets[name].adapted else (PIECES,)
    return all(job.work.has(kind, name) for kind in kinds)


def _write_dense(job: Job, name: str) -> None:
    """What stays as it is, but for tensors that are another one's copies."""
    tied = set(getattr(job.source.model, "all_tied_weights_keys", {}))
    kept = {key: tensor for key, tensor in job.source.load(name).items() if key not in tied}
    keep_tensors(job, PIECES, name, kept)


def _write_packed(job: Job, plan: Plan, name: str, target: Target) -> None:
    """One packed weight, and the initial adapter's factors on it."""
    weight = target.as_matrix(job.source.load(name)[name]).to(job.device)
    packed, factors = _pack(job, plan, name, target, weight)
    if factors is None and not job.config.refine and not _feedback_rounds(job, name):
        keep_tensors(
            job, PIECES, name, _named(target, packed), squares=_squares(plan, name, plan.loss(name), plan.loss(name))
        )
    else:
        keep_packed(job, plan, name, weight, packed, factors, (PIECES, ADAPTER))


def keep_packed(
    job: Job,
    plan: Plan,
    name: str,
    weight: torch.Tensor,
    packed: PackedWeight,
    factors: LowRank | None,
    kinds: tuple[str, str],
    **metadata: str,
) -> None:
    """Writes a packed weight, and before it the factors of the adapter on it.

    Args:
        weight: the dense weight [N, K].
        kinds: under which they are kept.
        metadata: further entries of the piece.
    """
    target, product = job.targets[name], None
    if factors is not None and job.adapter is not None:
        prefix = f"base_model.model.{target.name}"
        tensors = {f"{prefix}.lora_A.weight": factors.lora_A.cpu(), f"{prefix}.lora_B.weight": factors.lora_B.cpu()}
        job.work.save(kinds[1], name, tensors)
        product = factors.lora_B, factors.lora_A, job.adapter.scaling
    squares = _squares(plan, name, *_squared_errors(weight, packed, product))
    keep_tensors(job, kinds[0], name, _named(target, packed), squares=squares, **metadata)


def _squares(plan: Plan, name: str, lost: float, left: float) -> str:
    """In the piece, so that a resumed run knows the errors of those it does not make again."""
    return json.dumps([plan.energy[name], lost, left])


def _named(target: Target, packed: PackedWeight) -> dict[str, torch.Tensor]:
    return {f"{target.name}.{key}": tensor.cpu() for key, tensor in packed.tensors().items()}


def keep_tensors(job: Job, kind: str, name: str, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    """Writes a piece with the digests of what it is to hold."""
    digests = {key: digest_of_tensor(tensor, STORED_AS[tensor.dtype]) for key, tensor in tensors.items()}
    job.work.save(kind, name, tensors, {"digests": json.dumps(digests), **metadata})


def digests_of_pieces(pieces: list[pathlib.Path]) -> dict[str, str]:
    """Digests by name of everything that was computed."""
    digests: dict[str, str] = {}
    for piece in pieces:
        with open_tensors(piece, "a finished piece") as content:
            digests.update(json.loads(content.metadata()["digests"]))
    return digests


def _pack(job: Job, plan: Plan, name: str, target: Target, weight: torch.Tensor) -> tuple[PackedWeight, LowRank | None]:
    """The packed weight, and the adapter's factors where it takes one."""
    codebook, row_bits = plan.codebooks[name].to(job.device), plan.row_bits[name].to(job.device)

    def pack(matrix: torch.Tensor) -> PackedWeight:
        return quantize_matrix(matrix, codebook, row_bits, job.config)

    adapter = job.adapter if target.adapted else None
    feedback = _feedback_rounds(job, name)
    needed = feedback or (adapter is not None and adapter.method == "cloq")
    moment = job.calibration.moment(name) if needed and job.calibration is not None else None
    if adapter is None:
        return with_feedback(weight.float(), pack(weight), moment, feedback), None
    return initialize(
        weight.float(),
        pack,
        adapter.rank,
        adapter.alpha or adapter.rank,
        adapter.method,
        adapter.steps,
        moment=moment,
        feedback=feedback,
    )


def _feedback_rounds(job: Job, name: str) -> int:
    """Rounds of feedback on one weight; experts and embeddings are calibrated without second moments."""
    return job.config.feedback if job.calibration is not None and job.calibration.has_moment(name) else 0


def _squared_errors(
    weight: torch.Tensor, packed: PackedWeight, product: tuple[torch.Tensor, torch.Tensor, float] | None
) -> tuple[float, float]:
    """What packing loses of a weight [N, K], and what is lost with B, A, scaling added."""
    rest = packed.dequantize().sub_(weight)
    lost = left = _energy(rest)
    if product is not None:
        left = _energy(rest.addmm_(*product[:2], alpha=product[2]))
    return lost, left


def _energy(matrix: torch.Tensor) -> float:
    """Sum of squares, of the rows in the matrix's own type, without another matrix for the squares."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def relative_errors(pieces: list[pathlib.Path]) -> tuple[float, float]:
    """Squared error over energy of all packed weights, alone and with the initial adapter."""
    sums = [0.0, 0.0, 0.0]
    for piece in pieces:
        with open_tensors(piece, "a piece of the packed checkpoint") as content:
            squares = json.loads(content.metadata().get("squares", "[0, 0, 0]"))
        sums = [total + part for total, part in zip(sums, squares, strict=True)]
    energy = max(sums[0], torch.finfo(torch.float64).tiny)
    return sums[1] / energy, sums[2] / energy
