"""Memory of a model for inference and fine-tuning by what it is spent on (LowRA, figures 7 to 9).

Weights are counted; what training adds is estimated for batch 1 x 512 tokens, linear layers only, as in the paper.
"""

import dataclasses

from bitsandbytes.backends.lowra import layout

from .packed import NF4_BITS, LayerContent

TOKENS = 512
PAPER_RANK = 64

_ADAPTER_BYTES = 4  # PEFT trains adapters in float32
_GRADIENT_BYTES = 4
_ADAM_BYTES = 8
_ACTIVATION_BYTES = 2


@dataclasses.dataclass
class Footprint:
    """One bar of the picture.

    Attributes:
        label: such as "2 bits".
        parts: bytes by what they are spent on, in the order they are stacked.
    """

    label: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def footprints(layers: list[LayerContent], dense_bytes: int, rank: int, training: bool) -> list[Footprint]:
    """The model in bf16, NF4, as it is packed, and at a whole 2 and 1 bits.

    Args:
        layers: of the packed checkpoint.
        dense_bytes: what is not packed: embeddings, norms, head, biases.
        rank: of the adapters on every packed layer.
        training: fine-tuning instead of inference.
    """
    parameters = sum(layer.parameters for layer in layers)
    nominal = sum(layer.nominal_bits * layer.parameters for layer in layers) / parameters
    weights = {
        "bf16": {"16-bit weights": 2.0 * parameters},
        "NF4": {"4-bit codes": parameters / 2, "scales": parameters * (NF4_BITS - 4) / 8},
        f"this model\n{nominal:.2f} bits": _packed(layers, None),
        "all 2 bits": _packed(layers, 2),
        "all 1 bit": _packed(layers, 1),
    }
    extra = _training(layers, rank) if training else _inference(layers)
    return [Footprint(label, {**parts, "not packed": float(dense_bytes), **extra}) for label, parts in weights.items()]


def _packed(layers: list[LayerContent], bits: int | None) -> dict[str, float]:
    """Bytes as stored, or as they would be with all channels at `bits`."""
    parts = {"4-bit codes": 0.0, "2-bit codes": 0.0, "1-bit codes": 0.0, "scales": 0.0, "level tables": 0.0}
    for layer in layers:
        codes, tables = layer.code_bytes, layer.table_bytes
        if bits is not None:
            codes = {bits: layer.out_features * layout.row_bytes(layer.in_features, bits)}
            tables = layer.out_features * (2 * 2**bits + 1)
        for precision, size in codes.items():
            parts[f"{precision}-bit codes"] += size
        parts["scales"] += layer.scale_bytes
        parts["level tables"] += tables
    return parts


def _inference(layers: list[LayerContent]) -> dict[str, float]:
    widest = max(layer.in_features + layer.out_features for layer in layers)
    return {"activations (estimated)": float(TOKENS * widest * _ACTIVATION_BYTES)}


def _training(layers: list[LayerContent], rank: int) -> dict[str, float]:
    layers = [layer for layer in layers if layer.adapted]
    adapter = sum(rank * (layer.in_features + layer.out_features) for layer in layers)
    # every adapted layer keeps its input, and the r numbers between A and B, for backward
    kept = sum(layer.in_features + rank for layer in layers)
    return {
        f"adapters, r = {rank}": float(adapter * _ADAPTER_BYTES),
        "gradients (estimated)": float(adapter * _GRADIENT_BYTES),
        "AdamW state (estimated)": float(adapter * _ADAM_BYTES),
        "activations (estimated)": float(TOKENS * kept * _ACTIVATION_BYTES),
    }
