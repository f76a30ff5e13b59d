"""What all modules with a packed weight have: its tensors, what follows from them, moving, copying and loading."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bitsandbytes.backends.lowra.checks import check_packed
from bitsandbytes.backends.lowra.layout import PackedMatrix

from ..weights.packed import TENSOR_NAMES, PackedWeight
from .first_use import FirstUse
from .packed_state import PackedState
from .row_layout import IN_COMPILED, RowLayout, Seen, Still, is_readable

_FLOAT_TENSORS = ("scales", "scale_steps", "levels")
_CAST = (
    "Levels or scales of a packed layer were cast to 16 bits, which loses digits (DeepSpeed does that where bf16 or "
    "fp16 is on): train by FSDP2 or DDP, or leave both off in DeepSpeed's configuration."
)
_FIXED = (
    "The codes of a packed layer can be neither pruned nor computed anew (torch.nn.utils.prune, parametrize): do that "
    "to the dense model, and pack it then."
)
_ASKED_BY_OPS = ("cuda",)


class PackedModule(PackedState):
    """Holds W [N, K] in packed format 1 (csrc/lowra.h).

    All packed tensors are frozen parameters: DDP would send buffers at every step, and FSDP2 shards parameters.

    Attributes:
        weight, row_bits, scales, scale_steps, levels: see `PackedWeight`; `scale_steps` only for 8-bit scales.
        bias: [N] or None.
        compute_dtype: of the dense layer in whose place this one stands, and of what a merge writes; follows
            `model.to(dtype)`.
        tied: other modules that hold the same tensors, such as the head of tied embeddings.
        is_replaced: other tensors were put in than the model's config describes.
        at_first_use: what has to happen before these tensors are used, or None.
    """

    weight: torch.Tensor
    row_bits: nn.Parameter
    scales: nn.Parameter
    scale_steps: nn.Parameter | None
    levels: nn.Parameter
    bias: Any  # a parameter, or None
    tied: "tuple[PackedModule, ...]" = ()
    is_replaced = False
    at_first_use: FirstUse | None = None
    _parameters: dict[str, Any]  # None for a tensor that this packing lacks

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        packed: dict[str, torch.Tensor],
        bias: torch.Tensor | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ):
        """Takes the packed tensors as they are (on "meta" too, where they only carry shapes)."""
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.compute_dtype = compute_dtype
        self.set_tensors({name: packed.get(name) for name in TENSOR_NAMES})
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self._layout: RowLayout | None = None
        self._seen: dict[str, Seen] = {}
        self._watched: torch.Tensor | None = None  # the row order for compiled code

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.startswith(tuple(f"{known}_" for known in TENSOR_NAMES)):  # as torch.nn.utils.prune does
            raise TypeError(_FIXED)
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name in TENSOR_NAMES:  # as torch.nn.utils.parametrize does
            raise TypeError(_FIXED)
        super().__delattr__(name)

    def set_tensors(self, tensors: dict[str, torch.Tensor | None], rows: RowLayout | None = None) -> None:
        """Puts packed tensors in their places, frozen.

        Args:
            tensors: by name.
            rows: what `layout_of` made of their `row_bits`, where that is known already; saves waiting for a GPU.
        """
        for name, tensor in tensors.items():
            self._parameters[name] = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        if rows is not None:
            self._accept(rows)

    def packed_tensors(self) -> dict[str, nn.Parameter]:
        """The packed tensors that this module has, by name."""
        return {name: self._parameters[name] for name in TENSOR_NAMES if self._parameters[name] is not None}

    def share(self, source: "PackedModule") -> None:
        """Holds the tensors of a module that this one is tied to."""
        self._parameters.update({name: source._parameters[name] for name in TENSOR_NAMES})
        self.prepare()

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, sharing this module's tensors."""
        self._begin_to_use()
        tensors = {name: self._parameters[name] for name in TENSOR_NAMES}
        return PackedWeight(**tensors, in_features=self.in_features, group_size=self.group_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dense weight [N, K], detached."""
        if dtype == torch.float64:  # which the kernels do not know; exact, since levels and scales are narrower
            return self.dequantize(torch.float32).double()
        return torch.ops.bitsandbytes.lowra_dequantize(*self.matrix(), dtype)

    def matrix(self) -> PackedMatrix:
        """The packed weight as the ops take it, on the device where it is now."""
        return self._matrix(self._parameters, self.row_layout(), self.weight.device)

    def _matrix(self, tensors: dict[str, torch.Tensor], rows: RowLayout, device: torch.device) -> PackedMatrix:
        levels, steps = tensors["levels"], tensors.get("scale_steps")
        if levels.dtype == torch.bfloat16 or (steps is not None and steps.dtype != torch.float32):
            raise ValueError(_CAST)
        # PEFT's k-bit preparation casts every float16 parameter to float32, which is exact and is undone here.
        levels = levels if levels.dtype == torch.float16 else levels.to(torch.float16)
        order, sizes = rows.on(device)[0], (*rows.counts, self.in_features, self.group_size)
        if torch.compiler.is_compiling() and self._watched is not None and self._watched.device == device:
            order = self._watched
        return PackedMatrix(tensors["weight"], order, tensors["scales"], steps, levels, *sizes)

    @property
    def row_counts(self) -> tuple[int, int] | None:
        """Rows of 4 and of 2 bits; None until they have been counted."""
        return None if self._layout is None else self.row_layout().counts

    def layout_of(self, row_bits: torch.Tensor) -> RowLayout:
        """What follows from precisions uint8 [N] on the CPU for a module of this kind.

        Raises:
            ValueError: other precisions than 4, 2 and 1.
        """
        return RowLayout(row_bits)

    def prepare(self) -> None:
        """Makes everything that the first forward would have to make, for the tensors as they are now.

        Whoever writes into packed codes on purpose calls it afterwards.

        Raises:
            ValueError: the packed tensors do not belong together.
        """
        rows = self._layout
        if rows is None or not self._is_as_seen():
            rows = self._look(accept=True)
        rows.on(self.weight.device)

    def row_layout(self) -> RowLayout:
        """What follows from `row_bits`, which may have been replaced or changed since it was made.

        Raises:
            ValueError: the packed tensors do not belong together, or their codes were written into.
        """
        self._begin_to_use()
        rows = self._layout
        if rows is None:
            rows = self._look(accept=True)
            rows.on(self.weight.device)
        elif torch.compiler.is_compiling():
            self._assert_as_seen()
        elif not self._is_as_seen():
            rows = self._look(accept=False)
        return rows

    def _begin_to_use(self) -> None:
        if self.at_first_use is not None:
            self.at_first_use()
            self.at_first_use = None

    def _assert_as_seen(self) -> None:
        """In compiled code, which has no host to look with: on a CPU the contents are compared at every run.

        An assertion that fails on a GPU takes its context with it: there the op asks, which is called from the host
        (`_watched`).
        """
        for name, seen in self._seen.items():
            tensor = self._parameters[name]
            if tensor.is_cpu and tensor.device.type not in _ASKED_BY_OPS:
                torch._assert_async(seen.holds(tensor), f"{name} of a packed layer {IN_COMPILED}")

    def row_order(self) -> torch.Tensor:
        """int32 [N]: the row of W that stands at each packed place, on the device of the weight."""
        return self.row_layout().on(self.weight.device)[0]

    def _is_as_seen(self) -> bool:
        parameters = self._parameters
        for name, seen in self._seen.items():  # at every forward: a microsecond counts
            if not seen.is_same(parameters[name]):
                break
        else:
            if self._seen:
                return True
        return not is_readable(parameters["row_bits"])

    def _look(self, accept: bool) -> RowLayout:
        """Looks at the tensors again; codes that were written into are refused unless told otherwise.

        Raises:
            ValueError: see `row_layout`.
        """
        for name in ("weight", "row_bits"):
            if self._parameters[name].dtype != torch.uint8:
                raise ValueError(
                    f"{name} of a packed layer ({self.extra_repr()}) became {self._parameters[name].dtype}, expected "
                    "uint8: codes stand for levels and are no numbers. What writes into all parameters "
                    "(vector_to_parameters) is given those that require a gradient."
                )
        bits = self.row_bits.detach().cpu()  # the only step that waits for a GPU
        rows = self._layout
        self.is_replaced |= rows is not None
        if rows is None or not torch.equal(bits, rows.bits):
            rows = self.layout_of(bits)
        elif not accept:
            written = [name for name, seen in self._seen.items() if seen.was_written_into(self._parameters[name])]
            if written:
                raise ValueError(
                    f"{' and '.join(written)} of a packed layer ({self.extra_repr()}) were written into. Codes stand "
                    "for levels and are no numbers: an average over all parameters (EMA, SWA), noise or decay makes "
                    "others of them. Leave out what requires no gradient; other codes come by load_state_dict, and "
                    "after a change on purpose the layer's prepare() accepts it."
                )
        codes = {name: seen for name, seen in self._seen.items() if name != "row_bits"}
        # Nothing is seen of a module that was unpickled, as in a process that was spawned.
        if not accept and not all(seen.is_same(self._parameters[name]) for name, seen in codes.items()):
            self._refuse_unknown()
        return self._accept(rows)

    def _accept(self, rows: RowLayout, digest: str | None = None) -> RowLayout:
        """Takes the tensors as they are now for those that `rows`, and a digest of codes, were made for.

        Raises:
            ValueError: they do not belong together.
        """
        self._layout, self._seen, self._watched, self._digest = rows, {}, None, digest
        if not is_readable(self.row_bits):
            return rows
        with torch.inference_mode(False):
            for name, tensor in self.packed_tensors().items():
                if tensor.is_inference():  # loaded under inference mode, and of no use for a backward pass
                    self._parameters[name] = nn.Parameter(tensor.detach().clone(), requires_grad=False)
        try:
            check_packed(self._matrix(self._parameters, rows, self.weight.device))
        except RuntimeError as error:
            self._layout = None
            raise ValueError(
                f"The packed tensors of a layer [{self.out_features}, {self.in_features}] do not belong together "
                f"({error}): they are put in all at once, of one packing."
            ) from error
        codes = ("weight", "scales") if self.scales.dtype == torch.uint8 else ("weight",)
        with torch.inference_mode(False):
            self._seen = {name: Seen(self._parameters[name]) for name in codes}
            self._seen["row_bits"] = Seen(self.row_bits, whole=True)
            if self.weight.device.type in _ASKED_BY_OPS:
                watched: Any = rows.on(self.weight.device)[0].detach()
                watched.lowra_still = Still(self)
                self._watched = watched
        return rows

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedModule":
        """Moves the packed tensors but never casts them: `model.to(torch.bfloat16)` must not touch scales or levels."""
        if fn(torch.empty(0, dtype=torch.uint8)).dtype != torch.uint8:
            raise TypeError("model.type(dtype) would cast packed codes too: use model.to(dtype), which leaves them.")
        rows = self._layout if self._layout is not None and self._is_as_seen() else None
        floats = {name: tensor for name, tensor in self.packed_tensors().items() if name in _FLOAT_TENSORS}
        kinds = {name: (tensor.dtype, tensor.requires_grad) for name, tensor in floats.items()}
        self._allow_swapping()
        # Frozen tensors moved under inference mode serve training as well.
        with torch.inference_mode(False):
            for tensor in floats.values():  # the same parameters before and after: tied modules share them
                tensor.requires_grad_(False)  # whoever asks all floating points for gradients asks these
                tensor.data = tensor.data.view(torch.uint8)
            super()._apply(fn, recurse)
            for name, tensor in floats.items():
                dtype, requires_grad = kinds[name]
                for parameter in {tensor, self._parameters[name]}:  # two when coming from "meta"
                    parameter.data = parameter.data.view(dtype)
                    parameter.requires_grad_(requires_grad)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        if rows is not None:
            self._accept(rows, self._digest)
            if self.weight.device.type != "meta":
                self.row_order()  # now, so that a compiled forward finds it
        return self

    def _allow_swapping(self) -> None:
        """Tensors that something refers to weakly cannot be swapped, which PyTorch can be told to do."""
        if torch.__future__.get_swap_module_params_on_conversion():
            for module in (self, *self.tied):
                module._seen = {}

    def __getstate__(self) -> dict:
        self._begin_to_use()
        return {**self.__dict__, "_layout": None, "_seen": {}, "_watched": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if is_readable(self.row_bits):
            # now, so that a compiled forward finds it; looked at again before it is used, because files of the old kind
            # of torch.save have no values yet
            with contextlib.suppress(ValueError):
                self.prepare()
            self._seen, self._watched = {}, None

    def __deepcopy__(self, memo: dict) -> "PackedModule":
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if is_readable(twin.row_bits):
            twin.prepare()  # from now on, what is written into its codes is noticed
        return twin

    def _row_counts(self, rows: RowLayout) -> str:
        four, two = rows.counts
        return f"{four}/{two}/{self.out_features - four - two}"
