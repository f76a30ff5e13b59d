"""From a dense checkpoint to a packed one, tensor by tensor: learn -> assign -> quantise and initialise -> write.

Memory holds one tensor (and the tables of all). Every finished tensor is on disk at once, in `OUTPUT.partial`; a killed
run that is started again with the same arguments goes on where it stopped, and `OUTPUT` appears complete or not at all.
"""

import dataclasses
import json
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from ..checkpoints.atomic import locked, move_folder, refuse_existing, save_json, save_tensors, save_text
from ..checkpoints.dense import (
    DenseCheckpoint,
    check_finite,
    count_and_names,
    empty_model,
    resolve_folder,
    safetensors_files,
)
from ..checkpoints.targets import Target, check_skips, find_targets
from ..config import LowRAConfig
from ..device import choose_device
from ..version import __version__
from ..weights.packed import PackedWeight
from . import card
from .calibration import CALIBRATION_FILE, Calibration
from .feedback import with_feedback
from .initial_adapter import ADAPTER_FOLDER, AdapterRecipe, check_rank, write_adapter
from .loftq import initialize
from .pack import quantize_matrix
from .planning import Plan, Planner

logger = logging.getLogger(__name__)

SHARD_BYTES = 4 << 30
_COMPANIONS = ("tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens*", "generation_config.json", "*.jinja")


def quantize_checkpoint(
    model: str,
    output: str | pathlib.Path,
    config: LowRAConfig,
    adapter: AdapterRecipe | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    calibration: Calibration | Callable[[], Calibration] | None = None,
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
    skeleton = empty_model(folder)
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
    with locked(work):
        _clear_work_of_other_recipe(work, files, config, adapter, calibration)
        try:
            report = _stream(
                source, targets, config, adapter, calibration, work, output, folder, model, device, progress
            )
        except ValueError:
            shutil.rmtree(work)  # input that cannot be used: there is nothing to go on with
            raise
        move_folder(work / "final", output)
        shutil.rmtree(work)
    return report


def _stream(
    source: DenseCheckpoint,
    targets: dict[str, Target],
    config: LowRAConfig,
    adapter: AdapterRecipe | None,
    calibration: Calibration | None,
    work: pathlib.Path,
    output: pathlib.Path,
    folder: pathlib.Path,
    model: str,
    device: torch.device,
    progress: bool,
) -> dict:
    """Learns, assigns, quantises and assembles in the work folder; the finished checkpoint lies in `work/final`."""
    seconds = {}
    clock = time.perf_counter()
    planner = Planner(config, work / "learned", calibration)
    learn(planner, source, targets, device, progress)
    seconds["learn"] = time.perf_counter() - clock
    plan = planner.assign()
    seconds["assign"] = plan.assignment.seconds

    clock = time.perf_counter()
    pieces = _write_pieces(source, targets, plan, config, adapter, calibration, work, device, progress)
    seconds["quantise and initialise" if adapter else "quantise"] = time.perf_counter() - clock

    clock = time.perf_counter()
    report = _assemble(work, output, folder, model, source.model, targets, plan, pieces, config, adapter)
    seconds["write"] = time.perf_counter() - clock
    if calibration is not None:
        calibration.save(work / "final" / CALIBRATION_FILE)
    report["seconds"] = {stage: round(value, 3) for stage, value in seconds.items()}
    save_json(report, work / "final" / "lowra_report.json")
    return report


def learn(
    planner: Planner,
    source: DenseCheckpoint,
    targets: dict[str, Target],
    device: torch.device,
    progress: bool,
) -> None:
    """Feeds every target of a checkpoint to the planner, in the order of the checkpoint."""
    names = [name for name in source.names() if name in targets]
    finished = {name for name in names if planner.has_stored(name)}
    for name in _bar(names, targets, finished, "learning", progress):
        target = targets[name]
        if name in finished:
            planner.resume(name, target)
        else:
            planner.add(name, target, target.as_matrix(source.load(name)[name]).to(device))


def _clear_work_of_other_recipe(work: pathlib.Path, files, config, adapter, calibration) -> None:
    """Empties the work folder unless it was begun with the same source and recipe; the folder itself is held."""
    recipe = {
        "version": __version__,
        "source": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "config": config.to_dict(),
        "adapter": dataclasses.asdict(adapter) if adapter else None,
        "calibration": calibration.digest() if calibration else None,
    }
    begun = work / "recipe.json"
    if begun.exists() and json.loads(begun.read_text()) != recipe:
        begun.unlink()  # first, so that a kill in between leaves nothing that looks like this recipe's
        for path in work.iterdir():
            shutil.rmtree(path)
    save_json(recipe, begun)
    shutil.rmtree(work / "final", ignore_errors=True)


def _write_pieces(source, targets, plan: Plan, config, adapter, calibration, work, device, progress) -> list[str]:
    """One file per conversion of the source, and one per adapted matrix; finished ones are kept from an earlier run."""
    names = source.names()
    tied = set(getattr(source.model, "all_tied_weights_keys", {}))
    pieces = {name: work / "pieces" / f"{name}.safetensors" for name in names}
    finished = {name for name, piece in pieces.items() if piece.exists()}
    for name in _bar(names, targets, finished, "quantising", progress):
        piece = pieces[name]
        if name in finished:
            continue
        tensors = source.load(name)
        if name not in targets:
            kept = {key: tensor for key, tensor in tensors.items() if key not in tied}
            save_tensors(kept, piece)
            continue
        target = targets[name]
        weight = target.as_matrix(tensors[name]).to(device)
        codebook, row_bits = plan.codebooks[name].to(device), plan.row_bits[name].to(device)

        def pack(matrix, codebook=codebook, row_bits=row_bits):
            return quantize_matrix(matrix, codebook, row_bits, config)

        # experts and embeddings are calibrated without second moments
        feedback = config.feedback if calibration is not None and calibration.has_moment(name) else 0
        cloq = adapter is not None and target.adapted and adapter.method == "cloq"
        moment = calibration.moment(name) if feedback or cloq else None
        if adapter is None or not target.adapted:
            packed, product = with_feedback(weight.float(), pack(weight), moment, feedback), None
        else:
            packed, factors = initialize(
                weight.float(),
                pack,
                adapter.rank,
                adapter.alpha,
                adapter.method,
                adapter.steps,
                moment=moment,
                feedback=feedback,
            )
            prefix = f"base_model.model.{target.name}"
            save_tensors(
                {
                    f"{prefix}.lora_A.weight": factors.lora_A.cpu(),
                    f"{prefix}.lora_B.weight": factors.lora_B.cpu(),
                },
                work / "adapter" / f"{name}.safetensors",
            )
            product = factors.lora_B, factors.lora_A, adapter.alpha / adapter.rank
        lost = left = plan.loss(name)
        if product is not None or feedback or config.refine:
            lost, left = _squared_errors(weight, packed, product)
        # in the piece, so that a resumed run knows the errors of those it does not make again
        metadata = {"format": "pt", "squares": json.dumps([plan.energy[name], lost, left])}
        tensors = {f"{target.name}.{key}": tensor.cpu() for key, tensor in packed.tensors().items()}
        save_tensors(tensors, piece, metadata)
    return names


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


def _relative_errors(pieces: list[pathlib.Path]) -> tuple[float, float]:
    """Squared error over energy of all packed weights, alone and with the initial adapter."""
    sums = [0.0, 0.0, 0.0]
    for piece in pieces:
        with safe_open(piece, framework="pt") as content:
            squares = json.loads(content.metadata().get("squares", "[0, 0, 0]"))
        sums = [total + part for total, part in zip(sums, squares, strict=True)]
    energy = max(sums[0], torch.finfo(torch.float64).tiny)
    return sums[1] / energy, sums[2] / energy


def _assemble(work, output, folder, model, skeleton, targets, plan: Plan, names, config, adapter) -> dict:
    final = work / "final"
    pieces = [work / "pieces" / f"{name}.safetensors" for name in names]
    total, packed_bytes = _write_shards(pieces, final, {target.name for target in targets.values()})
    packed_error, adapted_error = _relative_errors(pieces)
    parameters = sum(target.size for target in targets.values())
    nominal = sum(int(plan.row_bits[name].sum()) * targets[name].in_features for name in targets) / parameters
    reached = dataclasses.replace(
        config,
        nominal_bits=round(nominal, 6),
        true_bits=round(8 * packed_bytes / parameters, 6),
        error=plan.error,
        base=str(model),
        fingerprint=plan.fingerprint,
    )
    skeleton.config.quantization_config = reached
    skeleton.config.architectures = [type(skeleton).__name__]
    skeleton.config.save_pretrained(final)
    for pattern in _COMPANIONS:
        for path in folder.glob(pattern):
            shutil.copyfile(path, final / path.name)
    if adapter is not None:
        factors = sorted((work / "adapter").glob("*.safetensors"))
        write_adapter(factors, final / ADAPTER_FOLDER, output, skeleton, targets, adapter, reached)
    report = {
        "model": str(model),
        "bits": config.bits,
        "nominal_bits": reached.nominal_bits,
        "true_bits": reached.true_bits,
        "quantised_parameters": parameters,
        "packed_bytes": packed_bytes,
        "checkpoint_bytes": total,
        "error": plan.error,
        "packed_error": packed_error,
        "adapted_error": None if adapter is None else adapted_error,
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
    architecture = type(skeleton).__name__
    save_text(card.model_card(reached, architecture, parameters, packed_bytes, report, adapter), final / card.CARD_FILE)
    return report


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
            tensors.update(load_file(piece))
        save_tensors(tensors, final / name)
        weight_map.update(dict.fromkeys(tensors, name))
        for key, tensor in tensors.items():
            module, _, leaf = key.rpartition(".")
            if module in packed and leaf != "bias":
                packed_bytes += tensor.nbytes
    if len(shards) > 1:
        save_json({"metadata": {"total_size": total}, "weight_map": weight_map}, final / "model.safetensors.index.json")
    return sum(path.stat().st_size for path in final.glob("*.safetensors")), packed_bytes


def _bar(names: list[str], targets: dict[str, Target], finished: set[str], what: str, progress: bool) -> Iterator[str]:
    """The names, under a progress bar of the weights to quantise; its estimate leaves out what an earlier run did."""
    sizes = {name: targets[name].size for name in names if name in targets}
    done = sum(sizes.get(name, 0) for name in finished)
    with tqdm(
        total=sum(sizes.values()), initial=done, desc=what, unit=" weights", unit_scale=True, disable=not progress
    ) as bar:
        for name in names:
            yield name
            if name not in finished:
                bar.update(sizes.get(name, 0))
