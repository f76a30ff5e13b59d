"""What vLLM asks of a quantisation method: which layers are packed, and is this a checkpoint to be served?"""

import logging
import pathlib
from typing import Any

import torch
import vllm
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.transformers_utils.config import get_safetensors_params_metadata

from ...checkpoints.configs import CONFIG_FILE
from ...checkpoints.dense import safetensors_files
from ...checkpoints.integrity import DIGESTS_FILE, changed_settings, check_tensors, known_tensors, read_digests
from ...checkpoints.whole_files import OpenFiles
from ...config import LowRAConfig
from ..missing_start import start_of
from . import TESTED
from .layers import PackedEmbeddingMethod, PackedLinearMethod
from .patches import PATCHES

logger = logging.getLogger(__name__)

_ROW_BITS = ".row_bits"


class PackedConfig(QuantizationConfig):
    """The quantisation method "lowra" of vLLM.

    Attributes:
        config: of the packed checkpoint.
        folder: of the checkpoint, or its name on the hub; None until vLLM has told it.
        packed: names of the packed modules, as the checkpoint has them and as vLLM calls them.
        is_tied: the head is the embeddings.
    """

    def __init__(self, config: LowRAConfig):
        super().__init__()
        self.config = config
        self.folder: str | None = None
        self.packed: set[str] = set()
        self.is_tied = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedConfig":
        """From `quantization_config` in config.json.

        Raises:
            ValueError: it is none of this version of lowra.
        """
        if not vllm.__version__.startswith(f"{TESTED}."):
            logger.warning(
                "lowra: packed models were tested with vLLM %s, and this is %s: compare its answers with those of "
                "Transformers before you rely on it, or install vllm==%s.*.",
                TESTED,
                vllm.__version__,
                TESTED,
            )
        return cls(LowRAConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Looks which modules of the checkpoint are packed. A local one is read through and held against its digests.

        Raises:
            ValueError: no packed weights, or others than were written.
        """
        self.folder = model_name
        text = hf_config.get_text_config() if hf_config is not None else None
        self.is_tied = bool(getattr(text, "tie_word_embeddings", False))
        folder = pathlib.Path(model_name)
        if folder.is_dir():
            names = self._check_files(folder)
        else:
            names = list(get_safetensors_params_metadata(model_name, revision=revision))
        self.packed = {name.removesuffix(_ROW_BITS) for name in names if name.endswith(_ROW_BITS)}
        if not self.packed:
            raise ValueError(
                f"{model_name} says quant_method: lowra in its {CONFIG_FILE}, and no packed weights were found in its "
                "safetensors files: copy or download the whole checkpoint."
            )
        self._tell_start(folder)

    def _check_files(self, folder: pathlib.Path) -> list[str]:
        recorded = read_digests(folder / DIGESTS_FILE)
        found = known_tensors(OpenFiles(safetensors_files(folder)), recorded)
        check_tensors(found, recorded, self.config, folder)
        if changes := [] if recorded is None else changed_settings(recorded, folder):
            logger.warning(
                "lowra: %s of %s was changed after the weights were written: %s.",
                CONFIG_FILE,
                folder,
                "; ".join(changes),
            )
        return list(found.digests)

    def _tell_start(self, folder: pathlib.Path) -> None:
        start = start_of(folder, self.config)
        if start is not None:
            logger.warning(
                "lowra: this base was packed together with an initial adapter (%s) that holds a part of its weights; "
                "answers of the base alone are far off. Serve that adapter, or those trained from it, and ask for them "
                "by name: --enable-lora --lora-modules start=%s/initial_adapter (docs/guide/serving.md).",
                start,
                self.folder,
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Learns what vLLM calls the packed modules; called for every model class that renames some."""
        self.packed |= set(hf_to_vllm_mapper.apply_list(sorted(self.packed)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How vLLM is to load and compute a layer of its own; None for those that no method is for.

        Raises:
            ValueError: parts of a merged layer are dense, or experts are packed.
        """
        if isinstance(layer, LinearBase):
            return PackedLinearMethod(self) if self._is_packed(prefix) else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead):
            packed = prefix in self.packed or (self.is_tied and self.config.quantize_embeddings)
            return PackedEmbeddingMethod(self) if packed else None
        if isinstance(layer, VocabParallelEmbedding):  # of which many models do not tell the name
            packed = prefix in self.packed if prefix else self.config.quantize_embeddings
            return PackedEmbeddingMethod(self) if packed else None
        if isinstance(layer, RoutedExperts):
            if any(".experts." in name for name in self.packed):  # below names that are others in vLLM
                raise ValueError(
                    f"{prefix} holds packed experts, which lowra does not serve in vLLM: `transformers serve`, or "
                    "`lowra merge` for a dense model."
                )
            return UnquantizedFusedMoEMethod(layer.moe_config)
        return None

    def _is_packed(self, prefix: str) -> bool:
        """Whether a linear layer of vLLM, which may stand for several of the checkpoint, is packed."""
        above, _, leaf = prefix.rpartition(".")
        parts = [f"{above}.{part}" for part in self.packed_modules_mapping.get(leaf, [])]
        if prefix in self.packed or not parts:
            return prefix in self.packed
        dense = [part for part in parts if part not in self.packed]
        if dense and len(dense) < len(parts):
            raise ValueError(
                f"vLLM computes {', '.join(parts)} as one layer, and of these {', '.join(dense)} is dense: pack all of "
                "them, or none (modules_to_not_convert, --keep-dense)."
            )
        return not dense

    def get_name(self) -> str:
        return "lowra"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Turing: docs/guide/cards.md."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json says all


for patch in PATCHES:  # here, since a worker that unpickles a configuration imports this and nothing else
    patch.install()
