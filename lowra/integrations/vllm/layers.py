"""vLLM's linear layers, head and embeddings with packed weights: loading, the rank's share, and the product.

The sizes of packed tensors follow from the precisions of the channels. So vLLM is given empty parameters, whose loaders
keep what the checkpoint has, and the tensors to compute with are made once everything has come.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from bitsandbytes.backends.lowra.checks import ascends
from bitsandbytes.backends.lowra.layout import PackedMatrix
from bitsandbytes.backends.lowra.ops import linear

from ...nn.embedding import TableLayout, rows_of_table
from ...weights.packed import STORAGES, TENSOR_DTYPES, PackedWeight
from .sharing import Share, packed_weight, rows_of_rank, take_share

if TYPE_CHECKING:
    from .config import PackedConfig

_SCALES = {storage: dtype for dtype, storage in STORAGES.items()}
_QKV = {"q": 0, "k": 1, "v": 2}
# Attributes of a layer: while it is being loaded, tensors by leaf, by outputs; K, and K and rows of each output here.
_LOADED, _SIZES = "lowra_loaded", "lowra_sizes"


class PackedPart(nn.Module):
    """The tensors of one packed weight [N, K] on the device where they are multiplied, and its sizes.

    Attributes:
        rows: N.
    """

    scale_steps: nn.Parameter | None

    def __init__(self, weight: PackedWeight, device: torch.device):
        super().__init__()
        matrix = weight.matrix()
        self.sizes, self.rows = matrix.sizes, matrix.rows
        for name, tensor in zip(PackedMatrix._fields, matrix.tensors, strict=False):
            moved = None if tensor is None else nn.Parameter(tensor.to(device), requires_grad=False)
            self.register_parameter(name, moved)
        ascends(self.matrix().row_order, *self.sizes[:2])  # now: a GPU is waited for, once

    def matrix(self) -> PackedMatrix:
        matrix: Any = (self.codes, self.row_order, self.scales, self.scale_steps, self.levels, *self.sizes)
        return PackedMatrix(*matrix)


class PackedLinearMethod(LinearMethodBase):
    """How a packed linear layer is loaded and computed.

    Attributes:
        config: of the model.
    """

    def __init__(self, config: "PackedConfig"):
        self.config = config

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty parameters for the tensors of a packed weight; see vLLM's base class for the arguments."""
        setattr(layer, _LOADED, {})
        setattr(layer, _SIZES, (input_size, input_size_per_partition, tuple(output_partition_sizes)))
        dtypes = {leaf: kinds[0] for leaf, kinds in TENSOR_DTYPES.items()}
        dtypes["scales"] = _SCALES[self.config.config.scales]
        if dtypes["scales"] != torch.uint8:
            del dtypes["scale_steps"]
        for leaf, dtype in dtypes.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = _keeper(layer, leaf)  # type: ignore[attr-defined]
            layer.register_parameter(leaf, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Puts the tensors to compute with in the place of those that were loaded.

        Raises:
            ValueError: see `take_share`.
        """
        self._put(layer, self._taken(layer))

    def _taken(self, layer: Any) -> list[PackedWeight]:
        """What this rank has of the packed weights that were loaded."""
        share = self._share(layer)
        loaded: dict[tuple[int, ...], dict[str, torch.Tensor]] = getattr(layer, _LOADED)
        group_size = self.config.config.group_size
        parts = {
            outputs: packed_weight(share.name, tensors, share.in_features, group_size)
            for outputs, tensors in loaded.items()
        }
        return take_share(parts, share)

    def _share(self, layer: Any) -> Share:
        in_features, columns, rows = getattr(layer, _SIZES)
        wholes = _wholes(layer)
        taken = [
            rows_of_rank(layer.prefix, whole, count, layer.tp_rank, layer.tp_size)
            for whole, count in zip(wholes, rows, strict=True)
        ]
        first = 0 if columns == in_features else layer.tp_rank * columns
        return Share(layer.prefix, in_features, wholes, tuple(taken), range(first, first + columns))

    def _put(self, layer: Any, weights: list[PackedWeight]) -> None:
        device = layer.weight.device
        for leaf in TENSOR_DTYPES:
            layer._parameters.pop(leaf, None)
        delattr(layer, _LOADED)
        layer.lowra_parts = nn.ModuleList(PackedPart(weight, device) for weight in weights)
        layer.weight = layer.lowra_parts[0].codes  # by which vLLM's LoRA layers find the device

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times the transposed weight, plus bias [N]: [..., N] in the dtype of x."""
        parts = list(layer.lowra_parts)
        if len(parts) == 1:
            return linear(x, parts[0].matrix(), bias)
        biases = [None] * len(parts) if bias is None else bias.split([part.rows for part in parts])
        products = [linear(x, part.matrix(), own) for part, own in zip(parts, biases, strict=True)]
        return torch.cat(products, dim=-1)


class PackedEmbeddingMethod(PackedLinearMethod):
    """The same for the table [V, K] of embeddings and for the output head. vLLM pads V to a multiple of 64."""

    def _share(self, layer: Any) -> Share:
        indices = layer.shard_indices
        rows = range(indices.org_vocab_start_index, indices.org_vocab_end_index)
        name = layer.prefix or "embeddings"
        if not rows:
            raise ValueError(
                f"{name} has {layer.org_vocab_size} rows, of which rank {layer.tp_rank} of {layer.tp_size} would have "
                "none: serve with a smaller tensor-parallel size."
            )
        in_features, columns, _ = getattr(layer, _SIZES)
        return Share(name, in_features, (layer.org_vocab_size,), (rows,), range(columns))

    def process_weights_after_loading(self, layer: Any) -> None:
        """See `PackedLinearMethod`; a table that is looked up in also gets the places of its rows."""
        (weight,) = self._taken(layer)
        self._put(layer, [weight])
        if not isinstance(layer, ParallelLMHead):
            _, places = TableLayout(weight.row_bits, weight.in_features).on(layer.weight.device)
            layer.lowra_places = nn.Parameter(places, requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, those of the padding zero."""
        (part,) = layer.lowra_parts
        logits = linear(x, part.matrix(), None if bias is None else bias[: part.rows])
        return nn.functional.pad(logits, (0, layer.num_embeddings_per_partition - part.rows))

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Rows of the table in the dtype of the model, for indices that count from the rank's first row."""
        (part,) = layer.lowra_parts
        matrix = part.matrix()
        tensors, sizes = list(matrix.tensors), list(matrix.sizes)
        found = lookup(input_.reshape(-1), layer.lowra_places, tensors, sizes, layer.params_dtype)
        return found.view(*input_.shape, matrix.in_features)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The embeddings themselves, which can be multiplied as well."""
        return embed_tokens


# An op of its own: vLLM compiles for any number of tokens, and this goes through them in slices.
@torch.library.custom_op("lowra::lookup", mutates_args=())
def lookup(
    indices: torch.Tensor,
    places: torch.Tensor,
    tensors: Sequence[Optional[torch.Tensor]],  # noqa: UP045 - the only way in which PyTorch reads it
    sizes: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dense rows [T, K] of a packed table, for indices [T] and the places of a `TableLayout`.

    tensors, sizes: those of a `PackedMatrix`.
    """
    matrix: Any = (*tensors, *sizes)
    return rows_of_table(PackedMatrix(*matrix), places, indices, dtype)


@lookup.register_fake
def _(indices: torch.Tensor, places: torch.Tensor, tensors: Any, sizes: Any, dtype: torch.dtype) -> torch.Tensor:
    return places.new_empty(indices.shape[0], sizes[2], dtype=dtype)


def _wholes(layer: Any) -> tuple[int, ...]:
    """Rows of each output of a linear layer in the checkpoint."""
    if isinstance(layer, QKVParallelLinear) and len(layer.output_partition_sizes) == 3:
        keys = layer.total_num_kv_heads  # of which several ranks may have the same
        return layer.total_num_heads * layer.head_size, keys * layer.head_size, keys * layer.v_head_size
    return tuple(getattr(layer, "output_sizes", None) or [layer.output_size])


def _keeper(layer: nn.Module, leaf: str) -> Callable:
    """The loader of one tensor; vLLM tells it the outputs that it belongs to, if these are a part of the layer."""

    def keep(parameter: nn.Parameter, loaded: torch.Tensor, shard: Any = None) -> None:
        *_, rows = getattr(layer, _SIZES)
        outputs = _outputs(shard, len(rows))
        getattr(layer, _LOADED).setdefault(outputs, {})[leaf] = loaded

    return keep


def _outputs(shard: Any, count: int) -> tuple[int, ...]:
    """The outputs that vLLM means: all of them, q, k or v, one by its number, or several.

    Raises:
        ValueError: others, of layers that only some architectures have.
    """
    if shard is None:
        return tuple(range(count))
    outputs = shard if isinstance(shard, (tuple, list)) else (_QKV.get(shard, shard),)
    if not all(isinstance(output, int) for output in outputs):
        raise ValueError(f"lowra does not serve this architecture in vLLM: it has layers with an output {shard!r}.")
    return tuple(outputs)
