"""`offload_activations`: what gradient checkpointing keeps of each layer, its input, waits in the host's memory.

Those inputs are what grows with layers times tokens: 256 KiB a token of an 8B. Each is copied while its layer computes,
and is back one layer before backward asks for it (`lowra.nn.host_store`), below whatever trainer there is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ..nn.host_store import HostStore, Stored
from .checkpointed_layers import InPlaceOfCheckpoint, checkpointed_layers, put_in_place, replace_checkpointing

_OF_INPUTS = ("_require_grads_hooks", "_require_grads_hook")  # what enable_input_require_grads leaves


def offload_activations(model: nn.Module) -> None:
    """Keeps the inputs of checkpointed layers in the host's memory between forward and backward.

    A sequence may then be as long as one layer allows; the host needs 2 bytes x tokens x hidden size x layers of pinned
    memory. Losses and gradients are those without it; only the embeddings' output gets no gradient any more where
    checkpoints are not reentrant (`disable_input_require_grads`). Layers on a CPU run as before. Holds until the model
    is loaded anew; a copy of the model, or one that is pickled, is without it.

    Args:
        model: a model of Transformers, or a PeftModel on one; its adapters may come later. Gradient checkpointing is
            turned on if it is not.

    Raises:
        ValueError: its architecture has no layers that Transformers checkpoints one by one, or they run as CUDA graphs
            (`lowra.capture_layers`).
    """
    replace_checkpointing(model, _install, "offload")


def _install(bare: Any) -> None:
    stores: dict[torch.device, HostStore] = {}
    usuals = [layer._gradient_checkpointing_func for layer in checkpointed_layers(bare) if layer.gradient_checkpointing]
    if any(vars(bare).get(name) for name in _OF_INPUTS) and all(map(_needs_no_gradient, usuals)):
        # Made for reentrant checkpointing, it keeps the first input on the device, and its gradient at the end.
        bare.disable_input_require_grads()
    put_in_place(bare, lambda _, usual: _Offloading(usual, stores))


def _needs_no_gradient(usual: Any) -> bool:
    """Whether a checkpoint trains what is in it also where its input needs no gradient."""
    return isinstance(usual, _Offloading) or getattr(usual, "keywords", {}).get("use_reentrant") is False


class _Offloading(InPlaceOfCheckpoint):
    """In the place of torch.utils.checkpoint for one layer.

    Args:
        usual: the function that was there.
        stores: of all layers of a model, which take turns.
    """

    def __init__(self, usual: Callable[..., Any], stores: dict[torch.device, HostStore]):
        super().__init__(usual)
        self._stores = stores

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        """What `usual(run, *args)` gives."""
        hidden = args[0] if args else None
        if not isinstance(hidden, torch.Tensor) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._usual(run, *args)
        if not self.takes(hidden.device):
            return self._usual(run, *args)
        if hidden.device not in self._stores:
            self._stores[hidden.device] = HostStore(hidden.device)
        store = self._stores[hidden.device]
        place, shape = hidden.data_ptr(), hidden.shape  # autograd keeps `pack` too, which must not keep the tensor

        def pack(tensor: torch.Tensor) -> Any:
            if tensor.data_ptr() == place and tensor.shape == shape:
                return store.put(tensor)
            return tensor.detach()  # the same for all layers, as what an encoder gave

        def unpack(kept: Any) -> torch.Tensor:
            return store.get(kept) if isinstance(kept, Stored) else kept

        # What the layer itself saves is the checkpoint's, whose hooks lie within these.
        with saved_tensors_hooks(pack, unpack):
            return self._usual(run, *args)

    @staticmethod
    def takes(device: torch.device) -> bool:
        """Whether a device has memory of its own."""
        return device.type == "cuda"
