"""How far the packed channels are from the original ones."""

import dataclasses
import pathlib

import torch

from ..checkpoints.dense import DenseCheckpoint, empty_model, safetensors_files
from ..checkpoints.guarded import open_tensors, read_json
from ..checkpoints.hub import resolve_folder
from ..checkpoints.targets import Target
from ..quantization.initial_adapter import ADAPTER_FOLDER
from ..weights.fingerprint import fingerprint_of, weight_digest
from .packed import PackedFolder

QUANTILES = (0.05, 0.5, 0.95, 1.0)


@dataclasses.dataclass
class ChannelErrors:
    """Relative error ||w - q||^2 / ||w||^2 of every channel of one layer.

    Attributes:
        name: of the module.
        row_bits: uint8 [N].
        base: float32 [N], the packed weight alone.
        adapted: float32 [N], with the initial adapter added; None where there is none.
    """

    name: str
    row_bits: torch.Tensor
    base: torch.Tensor
    adapted: torch.Tensor | None


class Original:
    """The dense weights that a packed checkpoint was made from."""

    def __init__(self, model: str, packed: PackedFolder, trust_remote_code: bool = False):
        """Reads headers.

        Args:
            model: folder or hub name.
            packed: what was made from it.
            trust_remote_code: see `empty_model`.

        Raises:
            FileNotFoundError, ValueError: no checkpoint, or one of other layers.
        """
        folder = resolve_folder(model)
        skeleton = empty_model(folder, trust_remote_code)
        if getattr(skeleton.config, "quantization_config", None):
            raise ValueError(f"{model} is quantised itself; --original takes the checkpoint in 16 or 32 bits.")
        self.source = DenseCheckpoint(safetensors_files(folder), skeleton)
        self.packed = packed
        absent = set(packed.targets) - set(self.source.names())
        if absent:
            raise ValueError(f"{model} has no {sorted(absent)[0]}: it is not the base of {packed.folder}.")

    def weight(self, name: str, target: Target) -> torch.Tensor:
        """float32 [N, K]."""
        weight = target.as_matrix(self.source.load(name)[name])
        if weight.shape != (target.out_features, target.in_features):
            raise ValueError(
                f"{name} of the original is {list(weight.shape)}, of the packed checkpoint "
                f"[{target.out_features}, {target.in_features}]: they do not belong together."
            )
        return weight


def channel_errors(packed: PackedFolder, original: Original) -> list[ChannelErrors]:
    """Errors of every channel of the model.

    Raises:
        ValueError: the original's fingerprint is not that of the packed checkpoint's base.
    """
    errors, digests = [], {}
    adapter = packed.folder / ADAPTER_FOLDER
    for name, target in packed.targets.items():
        weight = original.weight(name, target)
        digests[name] = weight_digest(name, weight)
        weight = weight.float()
        content = packed.weight(target)
        residual = weight - content.dequantize()
        energy = weight.square().sum(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        adapted = None
        if adapter.is_dir() and target.adapted:
            adapted = (residual - _adapter_product(adapter, target.name)).square().sum(dim=1) / energy
        errors.append(ChannelErrors(target.name, content.row_bits, residual.square().sum(dim=1) / energy, adapted))
    if packed.config.fingerprint and fingerprint_of(digests) != packed.config.fingerprint:
        raise ValueError(
            f"The original has fingerprint {fingerprint_of(digests)[:16]}…, {packed.folder} was packed from "
            f"{packed.config.base} with fingerprint {packed.config.fingerprint[:16]}…. Give that as --original."
        )
    return errors


def _adapter_product(folder: pathlib.Path, module: str) -> torch.Tensor:
    """scaling * B A of one layer, float32 [N, K]."""
    config = read_json(folder / "adapter_config.json", "the initial adapter's configuration")
    with open_tensors(folder / "adapter_model.safetensors", "the initial adapter's factors") as content:
        factors = [content.get_tensor(f"base_model.model.{module}.lora_{side}.weight").float() for side in "BA"]
    return config["lora_alpha"] / config["r"] * (factors[0] @ factors[1])


def quantiles(errors: list[ChannelErrors]) -> dict[str, dict]:
    """Quantiles of the relative errors by precision, of the base alone and with the initial adapter."""
    found: dict[str, dict] = {}
    for bits in (4, 2, 1):
        for which in ("base", "adapted"):
            parts = [getattr(e, which)[e.row_bits == bits] for e in errors if getattr(e, which) is not None]
            values = torch.cat(parts) if parts else torch.empty(0)
            if values.numel():
                at = torch.quantile(values.double(), torch.tensor(QUANTILES, dtype=torch.float64))
                found.setdefault(f"{bits} bit" + ("s" if bits > 1 else ""), {})[which] = {
                    "channels": values.numel(),
                    **{f"{share:.0%}": float(value) for share, value in zip(QUANTILES, at, strict=True)},
                }
    return found
