"""Read a trained PEFT LoRA folder, and refuse what cannot be quantised before anything is written.

Only safetensors and JSON are read. An adapter saved as adapter_model.bin is a pickle, which can run code, and is
refused.
"""

import dataclasses
import logging
import pathlib

import torch

from ..checkpoints.guarded import read_json, read_tensors
from ..checkpoints.places import expanded
from ..checkpoints.records import TABLES_FILE, check_adapter_folder, check_trained

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# (suffix of A, suffix of B) as PEFT writes them: linear and convolution layers, embeddings.
_FACTOR_SUFFIXES = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))

# Fields of LoraConfig that change what the factors mean; with one of them set the layer is no longer x A^T B^T.
_UNSUPPORTED_FIELDS = {
    "use_dora": "DoRA rescales the merged weight",
    "use_qalora": "QALoRA pools the input of A",
    "use_bdlora": "BD-LoRA factors are block diagonal",
    "kasa_config": "KaSA scales the rank dimension by learned values",
    "monteclora_config": "MonteCLoRA adds sampled parts",
    "arrow_config": "Arrow routes between adapters by their SVD",
    "target_parameters": "factors of fused expert parameters hold many experts in one matrix",
}


@dataclasses.dataclass
class LoraFactors:
    """One LoRA layer: B [m, r] and A [r, n] float32, so that the update is scaling * B A."""

    name: str  # PEFT's name of the layer, as in the keys of the adapter file
    suffixes: tuple[str, str]  # what PEFT appends to the name for A and for B
    b: torch.Tensor
    a: torch.Tensor

    @property
    def parameters(self) -> int:
        return self.b.numel() + self.a.numel()


@dataclasses.dataclass
class LoraAdapter:
    """A trained adapter: PEFT configuration, layers, and tensors that stay as they are.

    Attributes:
        config: of PEFT.
        layers: pairs of factors.
        kept: biases and saved modules.
        folder: that it was read from.
        tables: levels and scales that were trained with it, as its tables.safetensors has them.
    """

    config: dict
    layers: list[LoraFactors]
    kept: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    folder: pathlib.Path | None = None
    tables: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


def _check_config(folder: pathlib.Path, config: dict) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{folder / CONFIG_FILE} has peft_type {kind!r}; expected 'LORA'. Only LoRA adapters are products of two "
            "low-rank factors; keep this adapter in its own format."
        )
    for option, reason in _UNSUPPORTED_FIELDS.items():
        if config.get(option):
            raise ValueError(
                f"{folder / CONFIG_FILE} sets {option}; expected a plain LoRA. {reason}, so quantising its factors "
                f"would change more than their precision. Train without {option}, or keep the adapter as it is."
            )


def _check_factor(path: pathlib.Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(
            f"Tensor {name} of {path} has shape {list(tensor.shape)}; expected a matrix. Convolution adapters are not "
            "supported, and an empty factor means that sharded weights were not gathered before saving."
        )
    if not tensor.is_floating_point():
        raise ValueError(
            f"Tensor {name} of {path} has dtype {tensor.dtype}; expected floating point. The adapter is already "
            "quantised, or is no LoRA: give the folder that training wrote."
        )
    check_trained([(name, tensor)], path)


def read_adapter(folder: str | pathlib.Path) -> LoraAdapter:
    """Reads a PEFT LoRA folder.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        FileNotFoundError: the folder or one of its files is missing. ValueError: not a plain LoRA, a cut file,
            unpaired factors, NaN or infinite values; the message names the tensor.
    """
    folder = expanded(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; expected a trained PEFT LoRA adapter with {CONFIG_FILE} and {WEIGHTS_FILE}."
        )
    config = read_json(folder / CONFIG_FILE, "the configuration of a PEFT adapter")
    _check_config(folder, config)
    path = folder / WEIGHTS_FILE
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{folder} holds adapter_model.bin, a pickle, which can run code when read; expected {WEIGHTS_FILE}. Load "
            "it where you trust it and save it again with save_pretrained(..., safe_serialization=True)."
        )
    tensors, _ = read_tensors(path, "the weights of a PEFT LoRA adapter")

    layers = []
    for suffixes in _FACTOR_SUFFIXES:
        suffix_a, suffix_b = suffixes
        for key in sorted(name for name in tensors if name.endswith(suffix_a)):
            layer = key.removesuffix(suffix_a)
            if layer + suffix_b not in tensors:
                raise ValueError(f"{path} has {key} and no {layer + suffix_b}; expected both factors. Save it again.")
            a, b = tensors.pop(key), tensors.pop(layer + suffix_b)
            _check_factor(path, key, a)
            _check_factor(path, layer + suffix_b, b)
            if a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"Layer {layer} of {path} has A {list(a.shape)} and B {list(b.shape)}; expected A [r, n] and "
                    "B [m, r] of one rank r. The two files come from different adapters or were edited."
                )
            layers.append(LoraFactors(layer, suffixes, b.to(torch.float32), a.to(torch.float32)))
    strays = [name for name in tensors if ".lora_" in name and not name.endswith(".lora_B.bias")]
    if strays:
        raise ValueError(
            f"{path} holds {strays[0]}, which is no factor of a plain LoRA; expected pairs of lora_A and lora_B. "
            "The adapter is of a variant that is not supported; keep it in its own format."
        )
    if not layers:
        raise ValueError(
            f"{path} holds no pair of lora_A and lora_B among its {len(tensors)} tensors; expected a LoRA adapter."
        )
    layers.sort(key=lambda layer: layer.name)
    _, changes = check_adapter_folder(folder)
    if changes:
        logger.warning("lowra: %s of %s was changed after it was saved: %s.", CONFIG_FILE, folder, "; ".join(changes))
    tables = read_tensors(folder / TABLES_FILE, "trained tables")[0] if (folder / TABLES_FILE).exists() else {}
    return LoraAdapter(config, layers, tensors, folder, tables)
