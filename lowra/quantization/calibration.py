"""What a model feels of an error in its weights, estimated from text: input moments and output gradients of layers.

An error E [N, K] in a weight changes the layer's output by E x for an input x. To second order, with inputs and output
gradients taken as independent, the loss rises by about 1/2 sum_i g_i e_i^T H e_i: g_i the mean squared gradient of the
loss at output i, H = mean x x^T. With the diagonal of H alone this is the squared error weighted by channel and column.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.atomic import save_tensors
from ..checkpoints.dense import empty_model
from ..checkpoints.guarded import read_tensors
from ..checkpoints.hub import resolve_folder
from ..checkpoints.places import expanded
from ..checkpoints.targets import Target, find_targets
from ..corpus import check_token_ids, load_tokenizer, read_text
from ..device import choose_device
from ..nn.checkpointing import enable_checkpointing
from .collector import Collector
from .initial_adapter import task_type
from .joint_training import MOST_WRITTEN, sequences_of
from .kept_text import KeptText, writer_of
from .lowrank import truncated_svd
from .observers import EmbeddingObserver, ExpertObserver
from .own_text import write_text

CALIBRATION_FILE = "calibration.safetensors"
TOKENS = 25_000
# Kept for `LowRAConfig.reconstruct`: blocks that are trained on much less learn the text instead of the model.
RECONSTRUCT_TOKENS = 131_072
SEQUENCE = 1024
# Directions of the inputs' second moment in a file, beside its diagonal (docs/lab/accuracy.md).
MOMENT_RANK = 64
# Columns that hardly saw an input keep this share of the mean: 25,000 tokens do not prove that they never will.
DAMPING = 0.01
# Where the text of a calibration comes from, as files and reports record it.
GIVEN_TEXT, OWN_TEXT = "a given text", "written by the model itself"
_ORIGIN = "text"


@dataclasses.dataclass
class Calibration:
    """Statistics of every quantised layer, by the name of its weight, float32 on the CPU.

    Attributes:
        inputs: [K], mean squared input of each column; ones for embeddings without a tied head.
        gradients: [N], mean squared gradient of the summed loss at each output channel. Fused experts [E * N] count by
            their share of the tokens and relative to the inputs of all; rows of embeddings by how often they occur.
        moments: [K, K], mean x x^T, or empty where it was not asked for.
        factors: [K, r], F with F F^T + a diagonal for mean x x^T; what a file keeps of the moments.
        sequences: token ids [count, T] of the text, for `LowRAConfig.reconstruct`; in no file, because the text may not
            be for those who get the checkpoint.
        further: token ids [count, T] of the text behind those, for `LowRAConfig.end_to_end`; in no file either.
        origin: `GIVEN_TEXT`, `OWN_TEXT`, or None where a file of an earlier version does not tell.
    """

    inputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    factors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    sequences: torch.Tensor | None = None
    further: torch.Tensor | None = None
    origin: str | None = None

    @property
    def has_moments(self) -> bool:
        return bool(self.moments or self.factors)

    def has_moment(self, name: str) -> bool:
        """Whether `moment` knows this layer."""
        return name in self.moments or name in self.factors

    def channel_weights(self, name: str) -> torch.Tensor:
        """[N]: what a unit of squared error costs in each channel.

        Raises:
            ValueError: this layer was not calibrated.
        """
        if name not in self.gradients:
            raise ValueError(
                f"The calibration has no statistics of {name}: it belongs to another model, left that layer dense, or "
                "never ran it. A layer that is never run can stay dense (modules_to_not_convert, --keep-dense)."
            )
        return self.gradients[name] * self.inputs[name].mean()

    def moment(self, name: str) -> torch.Tensor:
        """Damped second moment [K, K] relative to its mean diagonal.

        Raises:
            ValueError: second moments were not collected.
        """
        if not self.has_moment(name):
            raise ValueError(
                f"There is no second moment of the inputs of {name}: calibrate with moments=True, or start the adapter "
                "with loftq and without feedback."
            )
        if name in self.moments:
            moment = self.moments[name]
        else:
            factor = self.factors[name].float()
            rest = self.inputs[name] - factor.square().sum(dim=1)
            moment = factor @ factor.T + rest.clamp(min=0).diag()
        moment = moment / self.inputs[name].mean().clamp(min=torch.finfo(torch.float32).tiny)
        return moment + DAMPING * torch.eye(moment.shape[0])

    def digest(self) -> str:
        """Names these statistics, second moments apart, of which a file keeps less than was collected."""
        return _digest(self.inputs, self.gradients)

    def digest_of_moments(self) -> str:
        """Names the second moments, of those that are larger than the model by the sums of their rows."""
        return _digest({name: moment.sum(dim=1) for name, moment in self.moments.items()}, self.factors)

    def digest_of_text(self) -> str:
        """Names the sequences."""
        kept = {"sequences": self.sequences, "further": self.further}
        return _digest({name: tensor for name, tensor in kept.items() if tensor is not None})

    def save(self, path: pathlib.Path) -> None:
        """Writes inputs, gradients and, of the second moments, which are larger than the packed model, a diagonal and
        `MOMENT_RANK` directions; one copy for layers that see the same inputs.
        """
        parts = {"inputs": self.inputs, "gradients": self.gradients, "factors": {}, "shared": {}}
        first: dict[bytes, str] = {}
        for name in {**self.moments, **self.factors}:
            owner = first.setdefault(self.inputs[name].numpy().tobytes(), name)
            if owner != name:
                parts["shared"][name] = torch.tensor(list(owner.encode()), dtype=torch.uint8)
            elif name in self.factors:
                parts["factors"][name] = self.factors[name]
            else:
                rank = min(MOMENT_RANK, len(self.inputs[name]))
                parts["factors"][name] = truncated_svd(self.moments[name], rank)[0].half()
        tensors = {f"{part}.{name}": t for part, group in parts.items() for name, t in group.items()}
        save_tensors(tensors, path, None if self.origin is None else {_ORIGIN: self.origin})

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Calibration":
        """From the file, or from a checkpoint folder that has one.

        Raises:
            FileNotFoundError, ValueError: no such file, or not one of these.
        """
        path = expanded(path)
        path = path / CALIBRATION_FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: this checkpoint was quantised without a calibration.")
        parts: dict[str, dict[str, torch.Tensor]] = {"inputs": {}, "gradients": {}, "factors": {}, "shared": {}}
        tensors, metadata = read_tensors(path, "the statistics of a calibration")
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            if part not in parts:
                raise ValueError(f"{path} holds {key}, which no calibration has.")
            parts[part][name] = tensor
        for name, owner in parts.pop("shared").items():
            parts["factors"][name] = parts["factors"][bytes(owner.tolist()).decode()]
        origin = next((known for known in (GIVEN_TEXT, OWN_TEXT) if known == metadata.get(_ORIGIN)), None)
        return cls(parts["inputs"], parts["gradients"], factors=parts["factors"], origin=origin)


def _digest(*parts: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for name, tensor in sorted(part.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        digest.update(b"\n")
    return digest.hexdigest()


def calibrate(
    model: str,
    text: str | pathlib.Path | Iterable[str] | None,
    tokens: int = TOKENS,
    device: str | torch.device | None = None,
    moments: bool = False,
    progress: bool = True,
    *,
    reconstruct_tokens: int = RECONSTRUCT_TOKENS,
    end_to_end: int = 0,
    modules_to_not_convert: list[str] | None = None,
    head: bool = False,
    embeddings: bool = False,
    trust_remote_code: bool = False,
    keep_text: pathlib.Path | None = None,
) -> Calibration:
    """Statistics of every linear layer of a dense model's blocks, fused experts included, over running text.

    Memory holds the model in its stored dtype, the activations at the borders of its blocks for one sequence, and the
    sums. On GPUs the model is spread over all of them and the CPU if it has to be.

    Args:
        model: local folder or hub name.
        text: a file of UTF-8 text or of JSON lines with a field `text`, or texts such as the rows of a data set; None:
            as much as is used of it is written by the model itself (`own_text`), always the same.
        tokens: how many to use at most.
        device: "cpu", or a GPU (then all of them); a GPU if there is one.
        moments: collect mean x x^T as well, [K, K] float32 per layer, which `AdapterRecipe(method="cloq")` and
            `LowRAConfig.feedback` need.
        reconstruct_tokens: of the text to keep at most for `LowRAConfig.reconstruct`, beside the statistics.
        end_to_end: steps of `LowRAConfig.end_to_end`, for which as much of the text behind those is kept; the model
            writes no more than 32,768 sequences for them.
        modules_to_not_convert: leaves out what `LowRAConfig.modules_to_not_convert` leaves dense.
        head: that too, as `LowRAConfig.quantize_head`.
        embeddings: those too, as `LowRAConfig.quantize_embeddings`.
        trust_remote_code: run the Python code that the model brings, where its architecture is its own.
        keep_text: a folder for text that the model writes, from which a killed call goes on when it is made again.

    Raises:
        FileNotFoundError, ValueError: model or text that cannot be used.
    """
    for name, count in (("reconstruct_tokens", reconstruct_tokens), ("end_to_end", end_to_end)):
        if count < 0:
            raise ValueError(f"{name} must not be negative; got {count}.")
    folder = resolve_folder(model)
    skeleton = empty_model(folder, trust_remote_code)
    if skeleton.get_output_embeddings() is None and task_type(skeleton) is None:
        raise ValueError(
            f"A calibration goes by the probabilities of tokens, and {type(skeleton).__name__} has no head that gives "
            "them: quantise it without (no --calibrate), or calibrate the language model."
        )
    targets = find_targets(skeleton, modules_to_not_convert, head, embeddings)
    length = min(SEQUENCE, getattr(skeleton.config, "max_position_embeddings", SEQUENCE))
    if tokens < length:
        raise ValueError(f"A calibration takes at least one sequence of {length} tokens; got {tokens}.")
    if 0 < reconstruct_tokens < length:
        raise ValueError(f"reconstruct takes at least one sequence of {length} tokens; got {reconstruct_tokens}.")
    blocks = reconstruct_tokens // length
    behind = sequences_of(end_to_end) if text is not None else min(sequences_of(end_to_end), MOST_WRITTEN)
    most = max(tokens, (blocks + behind) * length)
    kept = None
    if text is not None:
        kept = _sequences(folder, text, most, length, skeleton.config, trust_remote_code)
    device = choose_device(device)
    where: dict[str, Any] = {"dtype": torch.float32}
    if device.type != "cpu":
        where = {"dtype": "auto", "device_map": "auto"}
    if any(target.experts is not None for target in targets.values()):
        where["experts_implementation"] = "eager"  # experts are watched one by one
    dense = type(skeleton).from_pretrained(folder, **where)
    if kept is None:
        tokenizer = load_tokenizer(folder, trust_remote_code)
        earlier = None if keep_text is None else KeptText(keep_text, writer_of(folder, dense, device))
        kept = write_text(dense, tokenizer, most // length, length, progress=progress, kept=earlier)
    if dense.supports_gradient_checkpointing:
        enable_checkpointing(dense)
        dense.train()  # Transformers checkpoints in training mode only
        for module in dense.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    observers = _observers(dense, targets)
    modules = {}
    for name, target in targets.items():
        for place in (target.name, *target.tied) if target.experts is None else ():
            if not isinstance(dense.get_submodule(place), nn.Embedding):
                modules[name] = dense.get_submodule(place)
    calibration = collect(dense, modules, kept[: tokens // kept.shape[1]], moments, progress)
    calibration.origin = OWN_TEXT if text is None else GIVEN_TEXT
    calibration.sequences = kept[:blocks]
    calibration.further = kept[blocks : blocks + behind] if behind else None
    for observer in observers:
        observer.close()
        observer.add_to(calibration, DAMPING)
    return calibration


def _observers(model: nn.Module, targets: dict[str, Target]) -> list[ExpertObserver | EmbeddingObserver]:
    """For the targets that are no linear layers."""
    experts: dict[str, dict[str, str]] = {}
    observers: list[ExpertObserver | EmbeddingObserver] = []
    for name, target in targets.items():
        if target.experts is not None:
            module, _, leaf = target.name.rpartition(".")
            experts.setdefault(module, {})[leaf] = name
            continue
        places = [model.get_submodule(place) for place in (target.name, *target.tied)]
        tables = [place for place in places if isinstance(place, nn.Embedding)]
        if tables:
            observers.append(EmbeddingObserver(name, tables))
    return observers + [ExpertObserver(model.get_submodule(module), leaves) for module, leaves in experts.items()]


def _sequences(
    folder: pathlib.Path,
    text: str | pathlib.Path | Iterable[str],
    most: int,
    length: int,
    config: PreTrainedConfig,
    trust_remote_code: bool,
) -> torch.Tensor:
    """Token ids [count, length] of the beginning of the text, `most` of them at most.

    Raises:
        ValueError: the text has not one sequence.
    """
    if isinstance(text, (str, pathlib.Path)):
        text = read_text(expanded(text))
    tokenizer = load_tokenizer(folder, trust_remote_code)
    ids: list[int] = []
    for row in text:
        ids += tokenizer(row, verbose=False)["input_ids"]
        if len(ids) >= most:
            break
    count = min(len(ids), most) // length
    if len(ids) < length:
        raise ValueError(
            f"The calibration text has {len(ids)} tokens, which is less than one sequence of {length}: give more."
        )
    check_token_ids(set(ids), config, tokenizer, "the calibration text")
    return torch.tensor(ids[: count * length]).view(count, length)


def collect(
    model: PreTrainedModel, modules: dict[str, nn.Module], sequences: torch.Tensor, moments: bool, progress: bool
) -> Calibration:
    """Statistics of `modules` over token sequences [count, length], one sequence at a time.

    The parameters are frozen: gradients flow through activations alone, and the outputs of embeddings start them.

    Raises:
        ValueError: no gradient comes back to one of them.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    # gradients start at a copy, since CTRL scales its embeddings in place
    handles = [t.register_forward_hook(lambda module, args, out: out.requires_grad_(True).clone()) for t in tables]
    collector = Collector(modules, moments)
    for sequence in tqdm(sequences, desc="calibrating", unit="sequence", disable=not progress):
        ids = sequence[None].to(model.get_input_embeddings().weight.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss * ids.shape[1]  # the sum
        loss.backward()
        collector.check_gradients()
    for handle in handles:
        handle.remove()
    for parameter in trainable:
        parameter.requires_grad_(True)
    return Calibration(*collector.means())
