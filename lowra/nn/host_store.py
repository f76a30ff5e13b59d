"""Tensors that wait in the host's memory between forward and backward, and are back before they are asked for.

Copies run on a stream of their own, beside what a GPU computes. On the way out a tensor stays until the next one
leaves, by when its copy has long been done; the last one never has to come back. On the way back the one that left
before it is fetched ahead. Memory is PyTorch's own on both sides, so that nothing is held between steps but what its
allocators keep, and freed where the stream that computes has it, in that stream's order: the host, which is far ahead
of a GPU in long contexts, cannot make more of it live at once.

`torch.autograd.graph.save_on_cpu` makes host and GPU wait for every copy. TRL's and torchtune's OffloadActivations hold
five tensors where one has to be, and fetch none ahead.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch

# PyTorch rounds pinned memory to a power of two, which pieces of one hardly notice and a whole tensor can double.
_PIECE_BYTES = 32 << 20


class Stored:
    """A tensor that left.

    Args:
        pieces: of it on the host, flat.
        shape: of the whole.
        before: what left before it, if it is still wanted.
    """

    def __init__(self, pieces: Sequence[torch.Tensor], shape: torch.Size, before: "Stored | None"):
        self.pieces, self.shape = pieces, shape
        self._before = None if before is None else weakref.ref(before)

    @property
    def before(self) -> "Stored | None":
        return None if self._before is None else self._before()


class HostStore:
    """Where tensors of one device go, in the order of a forward pass, and come from, last one first.

    Another order costs waiting and gives the same tensors. On a CPU it is a copy.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._streams: Any = torch.get_device_module(device)
        self._beside = self._streams.Stream(device) if device.type == "cuda" else self._streams.Stream()
        self._last: weakref.ref[Stored] | None = None
        # each with the event after its copy
        self._leaving: tuple[torch.Tensor, Any] | None = None
        self._coming: tuple[weakref.ref[Stored], torch.Tensor, Any] | None = None

    def put(self, tensor: torch.Tensor) -> Stored:
        """Begins to copy a tensor, which nobody may write into."""
        self._let_go(self._leaving)
        if self._coming is not None and self._coming[0]() is None:
            self._arrived()  # of a backward pass that broke off
        computing = self._streams.current_stream(self._device)
        flat = tensor.detach().contiguous().view(-1)
        self._beside.wait_stream(computing)
        with self._streams.stream(self._beside):
            pieces = [self._copied(piece) for piece in flat.split(max(1, _PIECE_BYTES // flat.element_size()))]
            copied = self._beside.record_event()
        stored = Stored(pieces, tensor.shape, None if self._last is None else self._last())
        self._last = weakref.ref(stored)
        self._leaving = flat, copied
        return stored

    def get(self, stored: Stored) -> torch.Tensor:
        """The tensor, contiguous; the one before it sets out."""
        if self._last is not None and self._last() is stored and self._leaving is not None:
            flat, copied = self._leaving
            self._streams.current_stream(self._device).wait_event(copied)
            self._leaving = None
            tensor = flat.view(stored.shape)
        elif self._coming is not None and self._coming[0]() is stored:
            tensor = self._arrived()
        else:
            self._fetch(stored)
            tensor = self._arrived()
        if stored.before is not None:
            self._fetch(stored.before)
        return tensor

    def _copied(self, piece: torch.Tensor) -> torch.Tensor:
        on_host = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=self._device.type == "cuda")
        return on_host.copy_(piece, non_blocking=True)

    def _fetch(self, stored: Stored) -> None:
        if self._coming is not None:
            self._arrived()
        tensor = torch.empty(stored.shape, dtype=stored.pieces[0].dtype, device=self._device)
        # its memory may be read until now by what the GPU has still to compute
        self._beside.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._beside):
            flat = tensor.view(-1)
            for place, piece in zip(flat.split(len(stored.pieces[0])), stored.pieces, strict=True):
                place.copy_(piece, non_blocking=True)
            copied = self._beside.record_event()
        self._coming = weakref.ref(stored), tensor, copied

    def _arrived(self) -> torch.Tensor:
        assert self._coming is not None
        _, tensor, copied = self._coming
        self._coming = None
        self._streams.current_stream(self._device).wait_event(copied)
        return tensor

    def _let_go(self, leaving: tuple[torch.Tensor, Any] | None) -> None:
        """Has the stream that computes wait for the copy, before it can write something else into that memory."""
        if leaving is not None:
            self._streams.current_stream(self._device).wait_event(leaving[1])
        self._leaving = None
