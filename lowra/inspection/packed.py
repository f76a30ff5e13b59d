"""A packed checkpoint read layer by layer, and what each layer holds."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import torch

from bitsandbytes.backends.lowra import layout

from ..checkpoints.configs import (
    CONFIG_FILE,
    check_packed_folder,
    of_variant,
    packing_described,
    read_model_config,
    refuse_adapter,
)
from ..checkpoints.dense import empty_model, safetensors_files
from ..checkpoints.guarded import read_json
from ..checkpoints.hub import resolve_folder
from ..checkpoints.integrity import DIGESTS_FILE, check_tensors, find_tensors, read_digests
from ..checkpoints.matching import check_packed_names
from ..checkpoints.packed import PackedFiles
from ..checkpoints.reading import read
from ..checkpoints.targets import Target, find_targets
from ..checkpoints.whole_files import OpenFiles
from ..integrations.modules import put_stored
from ..quantization.initial_adapter import ADAPTER_FOLDER
from ..weights.packed import TENSOR_NAMES, PackedWeight

NF4_BITS = 4.127  # QLoRA: 4-bit codes, 8-bit scales per 64 weights, a float32 per 256 scales


@dataclasses.dataclass
class LayerContent:
    """What one packed layer stores.

    Attributes:
        name: of the module.
        kind: the name without block numbers, such as "self_attn.q_proj".
        block: number of the transformer block, -1 for head and embeddings.
        out_features, in_features: N and K.
        channels: channels at 4, 2 and 1 bits.
        code_bytes: bytes of the codes at 4, 2 and 1 bits, padding included.
        scale_bytes: group scales and their steps.
        table_bytes: levels and the precision of each channel.
        adapted: whether adapters are put on it; fused experts, head and embeddings have none.
    """

    name: str
    kind: str
    block: int
    out_features: int
    in_features: int
    channels: dict[int, int]
    code_bytes: dict[int, int]
    scale_bytes: int
    table_bytes: int
    adapted: bool

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features

    @property
    def stored_bytes(self) -> int:
        return sum(self.code_bytes.values()) + self.scale_bytes + self.table_bytes

    @property
    def nominal_bits(self) -> float:
        return sum(bits * count for bits, count in self.channels.items()) / self.out_features

    @property
    def true_bits(self) -> float:
        return 8 * self.stored_bytes / self.parameters


class PackedFolder:
    """A packed checkpoint on disk; holds one layer in memory at a time."""

    def __init__(self, model: str, trust_remote_code: bool = False, variant: str | None = None):
        """Reads headers and configs, and every tensor once to hold it against its digest, as loading does.

        Args:
            model: folder or hub name.
            trust_remote_code: see `empty_model`.
            variant: of the weights; None for the usual ones.

        Raises:
            FileNotFoundError, ValueError: no checkpoint, or one that is not packed by lowra, is cut short, or has
                tensors missing, left over or of another size.
        """
        self.folder = resolve_folder(model)
        refuse_adapter(self.folder)
        if not (self.folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{self.folder} has no config.json; expected a folder written by `lowra quantize`.")
        check_packed_folder(self.folder, variant)
        config = packing_described(self.folder)
        if config is None:
            described = read_model_config(self.folder).get("quantization_config") or {}
            method = described.get("quant_method", "not quantised")
            raise ValueError(
                f"{self.folder} is not packed by lowra ({method}); write one with `lowra quantize {model}`."
            )
        self.config = config
        skeleton = empty_model(self.folder, trust_remote_code)
        self.targets = find_targets(
            skeleton, self.config.modules_to_not_convert, self.config.quantize_head, self.config.quantize_embeddings
        )
        paths = safetensors_files(self.folder, variant)
        self.total_bytes = sum(path.stat().st_size for path in paths)
        self._files = PackedFiles(paths, self.targets, self.config.group_size)
        put_stored(skeleton, self.targets, self.config.group_size, self._files)
        check_packed_names(paths, skeleton, self._files.names_by_key(), shapes=True)
        self.recorded = read_digests(self.folder / of_variant(DIGESTS_FILE, variant))
        self.found = find_tensors(OpenFiles(paths))
        check_tensors(self.found, self.recorded, self.config, self.folder, variant)

    def weight(self, target: Target) -> PackedWeight:
        """The packed weight of one layer."""
        tensors = read(self._files.of(target.name), torch.device("cpu"))
        named: dict[str, Any] = {name: tensors.get(name) for name in TENSOR_NAMES}
        return PackedWeight(**named, in_features=target.in_features, group_size=self.config.group_size)

    def contents(self) -> Iterator[LayerContent]:
        """Every layer in model order."""
        for target in self.targets.values():
            yield describe(target, self.weight(target))

    def errors(self) -> dict[str, float]:
        """Squared errors over energy of the packed weights and with the initial adapter, where they are recorded."""
        found = {name: self._report.get(name) for name in ("packed_error", "adapted_error")}
        return {name: error for name, error in found.items() if error is not None}

    def trained_token_tables(self) -> list[str] | None:
        """Names of embeddings and head that were trained with the packed weights; None where that is not known."""
        if not self.config.end_to_end:
            return []
        did = self._report.get("end_to_end")  # a model that was loaded and saved again has no report
        if not isinstance(did, dict):
            return None
        return did.get("token_tables", []) if did.get("kept") else []

    @functools.cached_property
    def _report(self) -> dict[str, Any]:
        path = self.folder / "lowra_report.json"
        return read_json(path, "the report of `lowra quantize`") if path.exists() else {}

    def adapter_rank(self) -> int | None:
        """Rank of the initial adapter written with the checkpoint."""
        path = self.folder / ADAPTER_FOLDER / "adapter_config.json"
        return read_json(path, "the configuration of the initial adapter")["r"] if path.exists() else None


def describe(target: Target, packed: PackedWeight) -> LayerContent:
    """Counts what one packed weight stores."""
    channels = {bits: int((packed.row_bits == bits).sum()) for bits in layout.PRECISIONS}
    return LayerContent(
        name=target.name,
        kind=kind_of(target.name),
        block=block_of(target.name),
        out_features=target.out_features,
        in_features=target.in_features,
        channels=channels,
        code_bytes={bits: count * layout.row_bytes(target.in_features, bits) for bits, count in channels.items()},
        scale_bytes=_bytes(packed.scales) + (0 if packed.scale_steps is None else _bytes(packed.scale_steps)),
        table_bytes=_bytes(packed.levels) + _bytes(packed.row_bits),
        adapted=target.adapted,
    )


def kind_of(name: str) -> str:
    """The part of a module's name after its block number; encoder and decoder are told apart."""
    side = next((f"{part} " for part in ("encoder", "decoder") if f"{part}." in f"{name}."), "")
    return side + re.split(r"\.\d+\.", name, maxsplit=1)[-1]


def block_of(name: str) -> int:
    """Number of the transformer block that a module belongs to; -1 for head and embeddings."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else -1


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
