"""What follows from the precisions of a packed weight's rows, and whether its tensors are still those it was made for.

A forward must not ask a GPU for anything, so what follows is made once and kept. Tensors change under it, though: by
`load_state_dict`, offloading and sharding, which put other tensors in; by averages over all parameters, which write
into the codes as if they were numbers.
"""

import sys
import weakref
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from bitsandbytes.backends.lowra import layout

_CPU = torch.device("cpu")
_PLACES_PROBED = 128
IN_COMPILED = (
    "is another one than it was compiled for, put in or written into past load_state_dict: call its prepare() where "
    "that was meant; averages over all parameters (EMA, SWA) leave out what requires no gradient."
)


class RowLayout:
    """Counts and order of the rows of one packed weight [N, K]; never changed, other precisions make another one.

    Attributes:
        bits: uint8 [N] on the CPU, precisions in the order of W.
        counts: rows of 4 and of 2 bits.
    """

    def __init__(self, bits: torch.Tensor):
        """
        Raises:
            ValueError: other precisions than 4, 2 and 1.
        """
        counts = torch.bincount(bits, minlength=5).tolist()
        if counts[4] + counts[2] + counts[1] != bits.numel():
            raise ValueError("row_bits holds other values than 1, 2 and 4: the packed weight is damaged.")
        self.counts = counts[4], counts[2]
        # Made by a first forward under inference mode, the tensors serve training as well.
        with torch.inference_mode(False):
            self.bits = bits.detach().clone()
            self._on = {_CPU: self._tensors()}

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        """int32 [N], the row of W at each packed place, and what else a kind of module looks up."""
        return (layout.row_order(self.bits),)

    def on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Row order and further tensors on a device; they are moved there once."""
        if device not in self._on:
            # Offloading hooks move parameters between devices under our feet; this follows on demand.
            with torch.inference_mode(False):
                self._on[device] = tuple(tensor.to(device) for tensor in self._on[_CPU])
        return self._on[device]


class Seen:
    """A tensor (none of inference mode) as it was, by which to tell whether it still is.

    On the CPU contents are compared, whole or at some places. That would make a GPU wait: there it is the parameter,
    the counter of its changes in place and its memory.
    """

    def __init__(self, tensor: torch.Tensor, whole: bool = False):
        self._tensor = weakref.ref(tensor)  # offloading frees parameters after each forward
        self._version = tensor._version
        self._whole = whole
        self._dtype = tensor.dtype  # `.data` may be given another
        self._storage = tensor.untyped_storage() if whole else None  # kept, so that its address stays its own
        self._probe = self._probed(tensor).clone()

    def _probed(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.detach().reshape(-1)
        return flat if self._whole else flat[:: max(1, flat.numel() // _PLACES_PROBED)]

    def is_same(self, tensor: torch.Tensor) -> bool:
        """Whether it is the same tensor with the same content, as far as that can be told without waiting."""
        if tensor is not self._tensor() or tensor._version != self._version or tensor.dtype != self._dtype:
            return False
        if tensor.is_cpu and get_proxy_mode() is None:  # where a forward is traced, as torch.func.linearize does
            return torch.equal(self._probed(tensor), self._probe)
        return self._storage is None or tensor.untyped_storage()._cdata == self._storage._cdata

    def holds(self, tensor: torch.Tensor) -> torch.Tensor:
        """Whether a tensor has the content of this one at the places compared, as a tensor, for compiled code."""
        return (self._probed(tensor) == self._probe).all()

    def was_written_into(self, tensor: torch.Tensor) -> bool:
        """Whether it is the same tensor with another content; waits for a GPU."""
        return tensor is self._tensor() and not torch.equal(self._probed(tensor).cpu(), self._probe.cpu())


class Still:
    """What an op asks that compiled code called: are the tensors of a packed layer those it was compiled for?

    Raises:
        RuntimeError: they are not.
    """

    def __init__(self, module: Any):
        self._module = weakref.ref(module)

    def __call__(self) -> None:
        module = self._module()
        if module is None or module._is_as_seen():
            return
        changed = [name for name, seen in module._seen.items() if not seen.is_same(module._parameters[name])]
        raise RuntimeError(f"{' and '.join(changed)} of a packed layer {IN_COMPILED}")


def is_readable(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor holds values of its own: not on "meta", sharded or traced."""
    return tensor is not None and type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether parts of a tensor lie on other processes. Nothing is imported for it: who shards has done that."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)
