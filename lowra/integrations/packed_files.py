"""Where the tensors of a packed checkpoint lie in its files, and whether all are there."""

import pathlib

import torch

from ..quantize import TENSOR_NAMES
from ..targets import Target
from .reading import Place, places_of

_PACKED_DTYPES = (torch.uint8, torch.float16, torch.float32)


class PackedFiles:
    """The places of the packed tensors of all targets, and of some dense ones.

    Attributes:
        places: by the model's name of the tensor, such as "model.layers.0.mlp.up_proj.row_bits".
    """

    def __init__(self, files: list[pathlib.Path], targets: dict[str, Target], dense: dict[str, torch.Tensor]):
        """Reads headers only.

        Args:
            files: of the checkpoint.
            targets: packed weights.
            dense: further tensors by name; those are left out that the files do not have in the same type and shape.

        Raises:
            ValueError: a file is cut short, or a target's tensors are missing or of another type or size.
        """
        self.places: dict[str, Place] = {}
        modules = _names_with_and_without_base([target.name for target in targets.values()])
        others = _names_with_and_without_base(list(dense))
        for place in (place for path in files for place in places_of(path)):
            module, _, leaf = place.key.rpartition(".")
            name = modules.get(module) or modules.get(module.partition(".")[2])
            if name is not None and leaf in TENSOR_NAMES:
                self.places[f"{name}.{leaf}"] = place
                continue
            name = others.get(place.key) or others.get(place.key.partition(".")[2])
            if name is not None and (place.dtype, place.shape) == (dense[name].dtype, tuple(dense[name].shape)):
                self.places[name] = place
        for target in targets.values():
            self._check(target)

    def of(self, name: str) -> dict[str, Place]:
        """The places of one target's tensors by leaf."""
        keys = {leaf: f"{name}.{leaf}" for leaf in TENSOR_NAMES}
        return {leaf: self.places[key] for leaf, key in keys.items() if key in self.places}

    def _check(self, target: Target) -> None:
        places = self.of(target.name)
        for place in places.values():
            if place.dtype not in _PACKED_DTYPES:
                raise ValueError(
                    f"{place.key} has another type than packed tensors have: this is no checkpoint written by lowra, "
                    "or it was converted by another program."
                )
        needed = {"weight", "row_bits", "scales", "levels"}
        if "scales" in places and places["scales"].dtype == torch.uint8:
            needed.add("scale_steps")
        absent = needed - set(places)
        if absent:
            raise ValueError(f"The packed checkpoint lacks {', '.join(sorted(absent))} of {target.name}.")
        (rows,) = places["row_bits"].shape
        if rows != target.out_features:
            raise ValueError(
                f"{target.name}.row_bits has {rows} channels, but the layer of this config.json has "
                f"{target.out_features}."
            )


def _names_with_and_without_base(names: list[str]) -> dict[str, str]:
    """The model may be known by its base's names in the file, and the other way round."""
    return {name.partition(".")[2]: name for name in names} | {name: name for name in names}
