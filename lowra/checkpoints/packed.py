"""Where the tensors of a packed checkpoint lie in its files, and whether they are what its layers need."""

import math
import pathlib

import torch

from bitsandbytes.backends.lowra import layout

from ..weights.packed import TENSOR_DTYPES, TENSOR_NAMES
from .reading import StoredTensor, read, stored_tensors
from .targets import Target


class PackedFiles:
    """The places of the packed tensors of all targets, and of some dense ones.

    Attributes:
        places: by the model's name of the tensor, such as "model.layers.0.mlp.up_proj.row_bits".
        row_bits: precisions of each target's channels, by the target's name, on the CPU.
    """

    def __init__(
        self,
        files: list[pathlib.Path],
        targets: dict[str, Target],
        group_size: int,
        dense: dict[str, torch.Tensor] | None = None,
    ):
        """Reads headers and the precisions of the channels, from which all sizes follow.

        Args:
            files: of the checkpoint.
            targets: packed weights.
            group_size: weights that share a scale.
            dense: further tensors by name; those are left out that the files do not have in the same type and shape.

        Raises:
            ValueError: a file is cut short, or a target's tensors are missing or of another type or size.
        """
        dense = dense or {}
        self.places: dict[str, StoredTensor] = {}
        modules = _names_with_and_without_base([target.name for target in targets.values()])
        others = _names_with_and_without_base(list(dense))
        for place in (place for path in files for place in stored_tensors(path)):
            module, _, leaf = place.key.rpartition(".")
            name = modules.get(module) or modules.get(module.partition(".")[2])
            if name is not None and leaf in TENSOR_NAMES:
                self.places[f"{name}.{leaf}"] = place
                continue
            name = others.get(place.key) or others.get(place.key.partition(".")[2])
            if name is not None and (place.dtype, place.shape) == (dense[name].dtype, tuple(dense[name].shape)):
                self.places[name] = place
        for target in targets.values():
            self._check_presence(target)
        cpu = torch.device("cpu")
        self.row_bits = read({name: self.places[f"{name}.row_bits"] for name in modules.values()}, cpu)
        for target in targets.values():
            self._check_sizes(target, group_size)

    def of(self, name: str) -> dict[str, StoredTensor]:
        """The places of one target's tensors by leaf."""
        keys = {leaf: f"{name}.{leaf}" for leaf in TENSOR_NAMES}
        return {leaf: self.places[key] for leaf, key in keys.items() if key in self.places}

    def names_by_key(self) -> dict[str, str]:
        """The model's names of the placed tensors by their names in the files."""
        return {place.key: name for name, place in self.places.items()}

    def _check_presence(self, target: Target) -> None:
        places = self.of(target.name)
        needed = {"weight", "row_bits", "scales", "levels"}
        if "scales" in places and places["scales"].dtype == torch.uint8:
            needed.add("scale_steps")
        absent = needed - set(places)
        if absent:
            raise ValueError(f"The packed checkpoint lacks {', '.join(sorted(absent))} of {target.name}.")
        for leaf, place in places.items():
            steps_of_other_scales = leaf == "scale_steps" and leaf not in needed
            if place.dtype not in TENSOR_DTYPES[leaf] or steps_of_other_scales:
                raise ValueError(
                    f"{place.key} has another type than packed tensors have, or scales that do not go with it: this is "
                    "no checkpoint written by lowra, or it was converted by another program."
                )

    def _check_sizes(self, target: Target, group_size: int) -> None:
        row_bits, name = self.row_bits[target.name], target.name
        if row_bits.shape != (target.out_features,):
            raise ValueError(
                f"{name}.row_bits has {' x '.join(map(str, row_bits.shape))} channels, but the layer of this "
                f"config.json has {target.out_features}."
            )
        counts = torch.bincount(row_bits, minlength=5).tolist()
        if sum(counts[bits] for bits in layout.PRECISIONS) != target.out_features:
            raise ValueError(f"{name}.row_bits holds other values than 1, 2 and 4: the packed checkpoint is damaged.")
        rows = target.out_features, counts[4], counts[2]
        sizes = {
            "weight": layout.codes_size(*rows, target.in_features),
            "scales": target.out_features * layout.group_count(target.in_features, group_size),
            "levels": layout.levels_size(*rows),
            "scale_steps": layout.scale_step_count(target.out_features, target.in_features, group_size),
        }
        for leaf, place in self.of(name).items():
            size = math.prod(place.shape)
            if size != sizes.get(leaf, size):
                raise ValueError(
                    f"{name}.{leaf} has {size} elements where {sizes[leaf]} belong to its row_bits and groups of "
                    f"{group_size}: the packed checkpoint is damaged or its config.json was changed."
                )


def _names_with_and_without_base(names: list[str]) -> dict[str, str]:
    """The model may be known by its base's names in the file, and the other way round."""
    return {name.partition(".")[2]: name for name in names} | {name: name for name in names}
