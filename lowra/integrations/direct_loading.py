"""Packed tensors that go past Transformers' loader, whose work for each tensor is more than the copying of most."""

import concurrent.futures
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.packed import PackedFiles
from ..checkpoints.reading import read
from ..checkpoints.targets import Target, replace_module
from .model_patches import ignore_unexpected, keep_values


class DirectLoading:
    """Loads the packed tensors of a model, and its large dense ones, where all of the model goes to one device.

    Transformers loads what it finds in the state dict of the model. Until `finish` a hook leaves out of it what is read
    here: for a GPU from the moment its device map is settled, beside all that Transformers and we have to do before and
    after it loads the rest. Spread models are left to Transformers, which knows how to offload.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        targets: dict[str, Target],
        files: PackedFiles,
        only_device: Callable[[], torch.device | None],
    ):
        """
        Args:
            model: on "meta", with packed modules by the time it is loaded.
            targets: what is packed.
            files: of the checkpoint.
            only_device: the device of the whole model; None where it is spread or, before it is loaded, not settled.
        """
        self._model, self._files, self._only_device = model, files, only_device
        self._packed = [target.name for target in targets.values()]
        in_packed = {f"{name}.{leaf}" for name in self._packed for leaf in files.of(name)}
        self._dense = [name for name in files.places if name not in in_packed]
        keep_values(model.get_parameter(name) for name in self._dense)
        self._reader = concurrent.futures.ThreadPoolExecutor(1)
        self._reading: concurrent.futures.Future | None = None

        self._start()

        def hide(model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
            if only_device() is None:
                return
            for name in files.places:
                state_dict.pop(name, None)
            self._start()

        self._hook = model.register_state_dict_post_hook(hide)
        # What the state dict lacks is reported as unexpected. Block numbers are left open: a thousand names are slow.
        unexpected = {re.sub(r"\d+", r"\\d+", re.escape(place.key)) for place in files.places.values()}
        self._report_unexpected = ignore_unexpected(model, {f"^{name}$" for name in unexpected})

    def _start(self) -> None:
        device = self._only_device()
        if self._reading is None and device is not None and device.type == "cuda":
            self._reading = self._reader.submit(read, self._files.places, device)

    def finish(self) -> None:
        """Puts what was read into the modules."""
        self._hook.remove()
        self._report_unexpected()
        device = self._only_device()
        if device is not None:
            with torch.inference_mode(False):  # what is loaded under it serves training as well, as with Transformers
                self._fill(device)
        self._reader.shutdown(wait=False)

    def _fill(self, device: torch.device) -> None:
        modules: dict[str, Any] = {name: self._model.get_submodule(name) for name in self._packed}  # packed ones
        rows = {name: module.layout_of(self._files.row_bits[name]) for name, module in modules.items()}
        loaded = read(self._files.places, device) if self._reading is None else self._reading.result()
        for name, module in modules.items():
            # with the rows, so that nothing waits for the device
            module.set_tensors({leaf: loaded[f"{name}.{leaf}"] for leaf in self._files.of(name)}, rows[name])
        for name in self._dense:
            parameter = nn.Parameter(loaded[name])
            for place in (
                name,
                *(tied for tied, source in self._model.all_tied_weights_keys.items() if source == name),
            ):
                replace_module(self._model, place, parameter)


def large_dense_tensors(model: PreTrainedModel, targets: dict[str, Target]) -> dict[str, torch.Tensor]:
    """Dense weights of embeddings and head by name, which next to packed layers are most of what is to be read."""
    taken = {f"{name}.weight" for target in targets.values() for name in (target.name, *target.tied)}
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    found: dict[str, torch.Tensor] = {}
    for module_name, module in model.named_modules():
        name = f"{module_name}.weight"
        name = model.all_tied_weights_keys.get(name, name)
        is_table = any(module is table for table in tables) and "weight" in module._parameters  # not images' patches
        if is_table and name not in taken and not any(part in name for part in kept):
            found[name] = model.get_parameter(name)
    return found
