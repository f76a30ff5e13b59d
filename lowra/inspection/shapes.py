"""What of a model its memory depends on, from its config.json alone."""

import dataclasses
import pathlib
from typing import Any, cast

from huggingface_hub import hf_hub_download
from torch import nn

from ..checkpoints.configs import CONFIG_FILE
from ..checkpoints.dense import empty_model
from ..checkpoints.hub import local_folder, offline_without_connection, told_of_hub
from ..checkpoints.targets import Target, find_targets
from ..config import LowRAConfig
from ..integrations.tiled_mlp import mlps_to_tile

_LOGITS_CHANGED_BY = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # fields of configs


class UnknownMemory(ValueError):
    """A model of a kind whose memory is not known beforehand."""


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A language model of dense decoder blocks.

    Attributes:
        parameters: in all, tied ones once.
        linears: what is packed in the blocks.
        embedding, head: elements of the two tables [vocabulary, hidden]; head 0 where it is tied to the embeddings.
        layers, hidden, vocabulary, positions: positions None where the model does not limit them.
        norms: of a block, over its hidden width.
        mlp: width between the products of an MLP.
        mlp_kept: tensors of that width that a block keeps for backward: gate, its activation, up and their product, or
            two without a gate.
        queries, keys: widths of queries and of keys.
        normed_heads: queries and keys are normed (Qwen3), which keeps them once more in float32.
        tiles: its MLPs can work on some tokens at a time (`lowra.tile_mlps`).
        changes_logits: between head and loss (caps or scales them), for which they are held whole.
        packed: the quantization_config of a folder that lowra packed, or None.
    """

    parameters: int
    linears: tuple[Target, ...]
    embedding: int
    head: int
    layers: int
    hidden: int
    vocabulary: int
    positions: int | None
    norms: int
    mlp: int
    mlp_kept: int
    queries: int
    keys: int
    normed_heads: bool
    tiles: bool
    changes_logits: bool
    packed: LowRAConfig | None = None


def config_folder(model: str) -> pathlib.Path:
    """The folder of a model's config.json: the local one, or one that holds nothing else of a model on the hub.

    Raises:
        FileNotFoundError: neither a folder nor a name the hub knows.
    """
    if (folder := local_folder(model)) is not None:
        return folder
    with told_of_hub(model, "its config.json"), offline_without_connection():  # or it would ask for half a minute
        return pathlib.Path(hf_hub_download(str(model), CONFIG_FILE)).parent


def read_shape(model: str, trust_remote_code: bool = False) -> ModelShape:
    """
    Raises:
        FileNotFoundError: see `config_folder`.
        ValueError: a config that cannot be used, or a model that another program quantised.
        UnknownMemory: it is not of dense decoder blocks.
    """
    skeleton = empty_model(config_folder(model), trust_remote_code)
    packed = getattr(skeleton.config, "quantization_config", None)
    if packed is not None:
        packed = packed if isinstance(packed, dict) else packed.to_dict()
        if packed.get("quant_method") != "lowra":
            raise ValueError(f"{model} is quantised by {packed.get('quant_method')}; give a dense or a lowra model.")
        packed = LowRAConfig.from_dict(packed)
    config: Any = skeleton.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise UnknownMemory(f"{model} is no plain language model, of which alone the memory is known.")
    skip = None if packed is None else packed.modules_to_not_convert
    linears = tuple(find_targets(skeleton, skip).values())
    if any(target.experts for target in linears):
        raise UnknownMemory(f"{model} has mixtures of experts, whose activations are not known beforehand.")
    if not getattr(skeleton, "_supports_sdpa", False) or getattr(config, "attn_logit_softcapping", None):
        raise UnknownMemory(f"{model} holds its attention scores, which grow with the square of the length.")
    head, table = skeleton.get_output_embeddings(), cast(nn.Embedding, skeleton.get_input_embeddings())
    tied = head is None or f"{_name(skeleton, head)}.weight" in getattr(skeleton, "all_tied_weights_keys", {})
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    norms = [
        module
        for module in skeleton.modules()
        if "Norm" in type(module).__name__ and [tuple(each.shape) for each in module.parameters()][:1] == [(hidden,)]
    ]
    mlp, kept = _mlp(linears, config.num_hidden_layers, hidden)
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        linears=linears,
        embedding=table.weight.numel(),
        head=0 if tied else head.weight.numel(),
        layers=config.num_hidden_layers,
        hidden=hidden,
        vocabulary=config.vocab_size,
        positions=getattr(config, "max_position_embeddings", None),
        norms=len(norms) // config.num_hidden_layers,
        mlp=mlp,
        mlp_kept=kept,
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        changes_logits=any(getattr(config, name, None) not in (None, 1.0) for name in _LOGITS_CHANGED_BY),
        tiles=bool(mlps_to_tile(skeleton)),
        normed_heads=any("q_norm" in name for name, _ in skeleton.named_modules()),
        packed=packed,
    )


def _mlp(linears: tuple[Target, ...], layers: int, hidden: int) -> tuple[int, int]:
    """Width of an MLP, and how many tensors of it a block keeps.

    The last product of an MLP is the one that reads the width; a gate makes it written twice, or twice as wide at once.
    """
    width = max(target.in_features for target in linears)
    if width == hidden:  # an MLP no wider than the model
        return width, 4
    written = sum(target.out_features for target in linears if target.in_features == hidden)
    read = sum(target.in_features for target in linears if target.in_features == width)
    gated = any(target.out_features == 2 * width for target in linears) or (
        sum(target.out_features for target in linears if target.out_features == width) >= 2 * read
    )
    return width, 4 if gated and written else 2


def _name(model: Any, module: Any) -> str | None:
    return next((name for name, found in model.named_modules() if found is module), None)
