"""State dicts of packed modules: what they carry beside tensors, and whether what comes is a packing as it was made."""

from typing import Any

import torch
from torch import nn

from bitsandbytes.backends.lowra.checks import check_packed

from ..weights.packed import TENSOR_DTYPES, TENSOR_NAMES
from .known_codes import Origin, digest_of_codes, digest_of_tables, is_known, learn_codes, origin_of
from .row_layout import Seen, is_readable

_CPU = torch.device("cpu")
_WHOLE = {"weight", "row_bits", "scales", "levels"}  # `scale_steps` go with 8-bit scales only
_NO_NUMBERS = (
    "Codes stand for levels and are no numbers: averaged, interpolated or altered they are other weights. Average "
    "adapters, or the dense models, and pack that."
)


class PackedState(nn.Module):
    """Saves and loads the packed tensors of a `PackedModule`, of which it is a part.

    Attributes:
        origin: of the packing that the codes are of, or None.
    """

    origin: Origin | None = None
    _digest: str | None = None  # of the codes as they were last seen

    # of PackedModule
    in_features: int
    out_features: int
    group_size: int
    weight: torch.Tensor
    row_bits: nn.Parameter
    tied: Any
    _parameters: dict[str, Any]
    _seen: dict[str, Seen]
    _begin_to_use: Any
    _allow_swapping: Any
    _look: Any
    _is_as_seen: Any
    packed_tensors: Any
    layout_of: Any
    _matrix: Any

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._begin_to_use()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # kept by torch.save, not by safetensors
            kept = destination._metadata.setdefault(prefix[:-1], {})
            kept["group_size"] = self.group_size
            tensors = self.packed_tensors()
            if all(map(is_readable, tensors.values())):
                kept.update(codes=self.codes_digest(), tables=digest_of_tables(tensors), origin=self.origin)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads any packing of the same weight: how many bytes of codes and levels there are, its `row_bits` say."""
        given = {name: state_dict[prefix + name] for name in TENSOR_NAMES if prefix + name in state_dict}
        fault = self._fault_of(given, local_metadata.get("group_size", self.group_size)) if given else None
        if fault is None and given and "weight" not in given:
            fault = self._astray(given, local_metadata)
        digest = None
        if fault is None and any(tensor.dtype == torch.uint8 for tensor in given.values()):
            # a part of them stands for what it makes of those that are here (strict=False)
            together = given if _WHOLE <= given.keys() else {**self.packed_tensors(), **given}
            if all(map(is_readable, together.values())):
                digest = self._digest_of_given(together, local_metadata)
                fault = None if digest is None else self._strange(together, digest, local_metadata)
        if fault is not None:
            error_msgs.append(f"{prefix[:-1] or type(self).__name__}: {fault}")
            return
        if _WHOLE <= given.keys() and is_readable(self.row_bits):
            self._make_room(given)
        if given:
            self._allow_swapping()
        arguments = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(*arguments)
        if given and is_readable(self.row_bits):
            try:
                self._look(accept=True)  # now, so that a compiled forward finds it
            except ValueError as error:
                error_msgs.append(f"{prefix[:-1] or type(self).__name__}: {error}")
        if digest is not None:
            self.remember_codes(digest, local_metadata.get("origin", origin_of(digest)))

    def codes_digest(self) -> str:
        """What tells these codes from others; made once for as long as they stay the same. They must be readable."""
        if self._digest is None or not self._seen or not self._is_as_seen():
            self._digest = digest_of_codes(self.packed_tensors())
        learn_codes(self._digest, self.origin)
        return self._digest

    def remember_codes(self, digest: str, origin: Origin | None) -> None:
        """Takes a digest for that of the codes as they are now, which are a packing's."""
        self._digest, self.origin = digest, origin
        learn_codes(digest, origin)

    def _digest_of_given(self, given: dict[str, torch.Tensor], metadata: dict[str, Any]) -> str | None:
        """Digest of the codes in a state dict; None for those that are here already and came without one."""
        codes = {name: tensor for name, tensor in given.items() if tensor.dtype == torch.uint8}
        own = self._parameters
        same = bool(self._seen) and self._is_as_seen() and is_readable(own["row_bits"])
        if same and all(_are_equal(own[name], tensor) for name, tensor in codes.items()):
            return self.codes_digest() if self._digest is not None or "codes" in metadata else None
        return digest_of_codes(codes)

    def _strange(self, given: dict[str, torch.Tensor], digest: str, metadata: dict[str, Any]) -> str | None:
        """Why codes or tables may be none that were packed; None where they are known."""
        if "codes" in metadata:
            others = "codes" if digest != metadata["codes"] else "levels or scales"
            if digest == metadata["codes"] and digest_of_tables(given) == metadata["tables"]:
                return None
            return f"{others} are not those that this state dict was made with. {_NO_NUMBERS}"
        if is_known(digest) or digest == self._digest:
            return None
        return (
            "its codes are none that this process has loaded, packed or read out, and the state dict has lost the "
            "metadata that would tell whether they are a packing's own or an average: load the checkpoint's folder "
            "(from_pretrained), or the state dict as state_dict() made it (torch.save keeps its metadata; a new dict "
            "and a file of safetensors do not)."
        )

    def _astray(self, given: dict[str, torch.Tensor], metadata: dict[str, Any]) -> str | None:
        """Why tables that come without codes may be those of others; None where they belong to the codes here."""
        own = self._parameters
        if not is_readable(own["weight"]) or not all(map(is_readable, given.values())):
            return None
        others = [name for name, tensor in given.items() if not _are_equal(own[name], tensor)]
        if not others:
            return None
        if metadata.get("codes") == self.codes_digest():
            return None
        return (
            f"{' and '.join(others)} came without the codes that they belong to, and are not those of the codes here: "
            "they are loaded together."
        )

    def _refuse_unknown(self) -> None:
        """Looks at codes that were put in as new parameters, in a model that came from somewhere.

        Not where hooks or sharding do so at every forward, nor on a GPU, which would have to wait.

        Raises:
            ValueError: nothing is known of them.
        """
        brought = hasattr(self, "_hf_hook") or torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.origin is None or brought or not self.weight.is_cpu or not is_readable(self.weight):
            return
        if not is_known(digest_of_codes(self.packed_tensors())):
            raise ValueError(
                f"Codes were put into a packed layer ({self.extra_repr()}) that this process has neither loaded, "
                f"packed nor read out. {_NO_NUMBERS} Other packings come by load_state_dict, and after a change on "
                "purpose the layer's prepare() accepts it."
            )

    def _fault_of(self, given: dict[str, torch.Tensor], group_size: int) -> str | None:
        """Why tensors of a state dict cannot be loaded; None where they can, or where PyTorch will say it."""
        for name, tensor in given.items():
            allowed = TENSOR_DTYPES[name]
            if isinstance(tensor, torch.Tensor) and tensor.dtype not in allowed:
                return (
                    f"{name} is {tensor.dtype}, expected {' or '.join(map(str, allowed))}: these are dense weights, "
                    "or codes that were cast or averaged like numbers."
                )
        if group_size != self.group_size:
            return f"it was packed in groups of {group_size}, and this model in groups of {self.group_size}."
        if not all(is_readable(tensor) for tensor in given.values()):
            return None
        for name, other in (("weight", "row_bits"), ("row_bits", "weight")):
            own = self._parameters[name]
            if (
                name in given
                and other not in given
                and is_readable(own)
                and not torch.equal(given[name].cpu(), own.cpu())
            ):
                return f"{name} is another packing's and {other} is missing: they are loaded together."
        if not _WHOLE <= given.keys():
            return None
        if given["row_bits"].shape != (self.out_features,):
            return f"row_bits is {list(given['row_bits'].shape)}, expected [{self.out_features}]."
        try:
            rows = self.layout_of(given["row_bits"].cpu())
            check_packed(self._matrix({name: tensor.cpu() for name, tensor in given.items()}, rows, _CPU))
        except (ValueError, RuntimeError) as error:
            return f"its tensors are no packing of a weight [{self.out_features}, {self.in_features}] ({error})."
        return None

    def _make_room(self, given: dict[str, torch.Tensor]) -> None:
        """Memory of the sizes and types of other tensors, in the same parameters: tied modules share them."""
        sharing = [module for module in (self, *self.tied) if module.weight is self.weight]
        with torch.inference_mode(False):
            for name in TENSOR_NAMES:
                own, tensor = self._parameters[name], given.get(name)
                if tensor is None or own is None:  # steps, which other storages of scales lack
                    made = None
                    if tensor is not None:
                        empty = torch.empty_like(tensor, device=self.weight.device)
                        made = nn.Parameter(empty, requires_grad=False)
                    for module in sharing:
                        module._parameters[name] = made
                elif own.shape != tensor.shape or (own.dtype != tensor.dtype and name == "scales"):
                    dtype = tensor.dtype if name == "scales" else own.dtype
                    own.data = torch.empty(tensor.shape, dtype=dtype, device=own.device)


def _are_equal(own: torch.Tensor | None, other: torch.Tensor) -> bool:
    return (
        own is not None
        and own.shape == other.shape
        and own.dtype == other.dtype
        and torch.equal(own.cpu(), other.cpu())
    )
