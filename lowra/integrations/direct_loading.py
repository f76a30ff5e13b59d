"""Packed tensors that go past Transformers' loader, whose work for each tensor is more than the copying of most."""

import concurrent.futures
import re
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..linear import PackedModule
from .modules import count_rows
from .packed_files import PackedFiles


class DirectLoading:
    """Loads the packed tensors of a model from its files, where all of the model goes to one device.

    Transformers loads what it finds in the state dict of the model, once its device map is settled. Until `finish` a
    hook leaves the packed tensors out of it. Spread models are left to Transformers, which knows how to offload.
    """

    def __init__(self, model: PreTrainedModel, files: PackedFiles, only_device: Callable[[], torch.device | None]):
        """
        Args:
            model: with packed modules on "meta".
            files: of the checkpoint.
            only_device: the device of the whole model, or None where it is spread; asked when the map is settled.
        """
        self._model = model
        self._files = files
        self._only_device = only_device
        names = files.names()

        def hide(model, state_dict, prefix, metadata):
            if only_device() is not None:
                for name in names.values():
                    state_dict.pop(name, None)

        self._hook = model.register_state_dict_post_hook(hide)
        # What the state dict lacks is reported as unexpected. Block numbers are left open: a thousand names are slow.
        unexpected = {re.sub(r"\d+", r"\\d+", re.escape(key)) for key in names}
        self._unexpected = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = set(self._unexpected or ()) | {f"^{name}$" for name in unexpected}

    def finish(self) -> None:
        """Reads what was hidden and puts it into the modules."""
        self._hook.remove()
        self._model._keys_to_ignore_on_load_unexpected = self._unexpected
        device = self._only_device()
        if device is None:
            return
        modules: dict[str, PackedModule] = {name: self._model.get_submodule(name) for name in self._files.places}
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            reading = reader.submit(self._files.load, device)
            if device.type != "cpu":  # there it would only be in the way
                for name, tensors in self._files.mapped(("row_bits",)).items():
                    count_rows(name, modules[name], tensors["row_bits"])
            loaded = reading.result()
        for name, module in modules.items():
            module.set_tensors(loaded[name])
