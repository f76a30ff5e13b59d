"""The one configuration of a quantisation: what the user asks for, and what was reached."""

import dataclasses
import difflib
import numbers
import reprlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

FORMAT_VERSION = 1
PRECISIONS = (1, 2, 4)
MOST_GROUP = 256  # weights that share a scale
# filled in by the quantiser, not asked for
FILLED_IN = (
    "format_version",
    "nominal_bits",
    "true_bits",
    "error",
    "base",
    "fingerprint",
    "packing",
    "initial_adapter",
    "calibration",
    "needs",
)
# In config.json, for a reader whose Transformers stopped at "Unknown quantization type, got lowra".
NEEDS = "the Python package lowra: with it installed, Transformers and PEFT load this folder like any other"

_CHOICES = {
    "budget": ("nominal", "true"),
    "scales": ("double_quant", "float16", "float32"),
    "codebook": ("learned", "normal_float"),
    "block_weight": ("absmax_squared", "absmax"),
    "thresholds": ("channel", "matrix"),
    "assigner": ("exact", "two_level", "layer_order"),
    "sensitivity": ("layer", "none", "fisher"),
}

_MOST = 2**31 - 1  # rounds, and what else is counted


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and (_is_text(entry) or _is_number(entry)) for key, entry in value.items()
    )


# The schema of `quantization_config` in a config.json, which anybody may have written: what each field holds. Not
# in pydantic, with which `import lowra` would take 0.3 s more.
_KINDS: dict[tuple[str, ...], tuple[Callable[[Any], bool], str]] = {
    ("quant_method", "base", "fingerprint", "calibration", "needs", *_CHOICES): (_is_text, "text"),
    ("bits", "nominal_bits", "true_bits", "error"): (_is_number, "a number"),
    ("group_size", "iterations", "refine", "feedback", "reconstruct", "end_to_end", "format_version"): (
        _is_whole,
        f"a whole number of at most {_MOST}",
    ),
    ("quantize_head", "quantize_embeddings"): (lambda value: isinstance(value, bool), "true or false"),
    ("menu",): (
        lambda value: (
            isinstance(value, (list, tuple, set))
            and all(isinstance(bits, numbers.Integral) and not isinstance(bits, bool) for bits in value)
        ),
        "a list of precisions, such as [1, 2, 4]",
    ),
    ("modules_to_not_convert",): (
        lambda value: isinstance(value, (list, tuple)) and all(map(_is_text, value)),
        "a list of names",
    ),
    ("packing",): (lambda value: _is_record(value) and all(map(_is_text, value.values())), "digests by name"),
    ("initial_adapter",): (_is_record, "numbers and words by name"),
}


@dataclasses.dataclass(repr=False)
class LowRAConfig(QuantizationConfigMixin):
    """How to quantise a model to a bit budget.

    Attributes:
        bits: budget in bits per quantised parameter, from the smallest to the largest of `menu`.
        menu: precisions a channel may get, a subset of (1, 2, 4). The paper leaves out 1 for LLaMA from 2.0 bits on.
        budget: "nominal" counts codes alone, as the paper does; "true" counts everything stored (codes, padding, group
            scales, levels, precisions).
        group_size: consecutive weights of a channel that share a scale; a multiple of 8 up to 256.
        scales: storage of the group scales: "double_quant" (8 bits and a float32 per 256), "float16" or "float32".
        codebook: "learned" (weighted Lloyd-Max per channel) or "normal_float" (NF4, NF2; no 1-bit form).
        iterations: limit of the Lloyd-Max iterations; it stops earlier where the error no longer falls. The paper: 2.
        block_weight: weight of a group in the search: "absmax_squared" (the true squared error) or "absmax" (the text
            of section 5).
        thresholds: one set per "channel", or per "matrix" (averaged, levels refitted; section 5's remark on stability).
        assigner: "exact", "two_level" (the paper's integer programs) or "layer_order" (4 bits for the first layers, 2
            for the rest, as LoftQ and QLoRA below 4 bits do).
        sensitivity: weight of a channel's error in the assignment: "layer" (1 / energy of its matrix; head and
            embeddings also by their size), "none" (the paper's plain squared error) or "fisher" (squared output
            gradients x squared inputs, from a calibration; an error at one bit counts three times).
        refine: rounds of least squares that fit group scales and levels to the weight when it is packed; 0, as in the
            paper, leaves the scales at the absmax. No more bits, less error; only with learned codebooks.
        feedback: rounds after that which choose codes and levels for the layers' outputs
            (`lowra.quantization.feedback`), of the layers whose inputs' second moments a calibration has. No more bits;
            only with learned codebooks.
        reconstruct: passes over the text of a calibration in which the blocks, one after the other, are trained to put
            out what the dense ones do (`lowra.quantization.block_training`): codes, levels, scales and the initial
            adapter. No more bits; only with learned codebooks.
        end_to_end: steps of 16 sequences in which after that all blocks together are trained towards the logits of the
            dense model (`lowra.quantization.joint_training`), on text of the calibration that the blocks have not seen
            as far as there is some, and with them embeddings and head where those are not packed: their values are no
            longer the base's. What it does not improve on text that was held out stays as it was. No more bits; only
            with learned codebooks.
        quantize_head: pack the output head as well. Where it is tied to the embeddings, pack those. No adapter on it.
        quantize_embeddings: pack the token embeddings as well, and with them the head that is tied to them. Only the
            rows that are looked up are decoded. No adapter on them.
        modules_to_not_convert: names or parts of names of modules that stay dense, beside embeddings and head.

    The remaining attributes are filled in by the quantiser and travel in config.json: `format_version`, `nominal_bits`
    and `true_bits` per quantised parameter, `error` (of the plan: sum of squared differences over the sum of squares
    before a low-rank part, `refine` or `feedback` change them), `base` (name or path of the original), `fingerprint`
    (of the base's weights), `packing` (digests of the codes and of the tables, which tell this packing from others of
    the same base), `initial_adapter` (rank, alpha, method and steps of the adapter that was fitted while packing: the
    packed weights alone are then less than the base by its product), `calibration` (digest of the statistics used) and
    `needs` (a sentence for whoever opens the folder without lowra). `packing`, `initial_adapter` and `calibration` are
    None in checkpoints of earlier versions.
    """

    quant_method: Any = "lowra"  # how Transformers finds this class; it has an enumeration of its own methods
    bits: float = 2.0
    menu: tuple[int, ...] = PRECISIONS
    budget: str = "nominal"
    group_size: int = 64
    scales: str = "double_quant"
    codebook: str = "learned"
    iterations: int = 20
    block_weight: str = "absmax_squared"
    thresholds: str = "channel"
    assigner: str = "exact"
    sensitivity: str = "layer"
    refine: int = 0
    feedback: int = 0
    reconstruct: int = 0
    end_to_end: int = 0
    quantize_head: bool = False
    quantize_embeddings: bool = False
    modules_to_not_convert: list[str] | None = None
    format_version: int = FORMAT_VERSION
    nominal_bits: float | None = None
    true_bits: float | None = None
    error: float | None = None
    base: str | None = None
    fingerprint: str | None = None
    packing: dict[str, str] | None = None
    initial_adapter: dict | None = None
    calibration: str | None = None
    needs: str = NEEDS

    def __post_init__(self) -> None:
        if isinstance(self.modules_to_not_convert, str):  # its letters would be taken for parts of names
            self.modules_to_not_convert = [self.modules_to_not_convert]
        optional = {field.name for field in dataclasses.fields(self) if field.default is None}
        for names, (fits, kind) in _KINDS.items():
            for name in names:
                value = getattr(self, name)
                if not fits(value) and not (value is None and name in optional):
                    raise ValueError(f"{name} must be {kind}; got {reprlib.repr(value)}.")
        _check_format(self.format_version)
        self.menu = tuple(sorted({int(bits) for bits in self.menu}))
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {reprlib.repr(value)}.")
        if not self.menu or not set(self.menu) <= set(PRECISIONS):
            raise ValueError(f"menu must be a non-empty subset of {PRECISIONS}; got {reprlib.repr(self.menu)}.")
        if self.codebook == "normal_float":
            self.menu = tuple(bits for bits in self.menu if bits > 1)  # there is no 1-bit NormalFloat
            if not self.menu:
                raise ValueError("codebook=normal_float has no form at 1 bit: give a menu with 2 or 4, or learned.")
        if self.group_size % 8 or not 8 <= self.group_size <= MOST_GROUP:
            raise ValueError(f"group_size must be a multiple of 8 from 8 to {MOST_GROUP}; got {self.group_size}.")
        for name in ("iterations", "refine", "feedback", "reconstruct", "end_to_end"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}.")
        for name in ("refine", "feedback", "reconstruct", "end_to_end"):
            if getattr(self, name) and self.codebook != "learned":
                raise ValueError(f"{name} fits levels, which codebook=normal_float keeps fixed: use {name}=0 with it.")
        if self.quant_method != "lowra":
            raise ValueError(f"quant_method must be 'lowra'; got {reprlib.repr(self.quant_method)}.")
        if self.budget == "true" and not 0 < self.bits <= 32:
            raise ValueError(f"A budget of {self.bits:g} true bits makes no sense: give one from 1 to 5.")
        if self.budget == "nominal" and not self.menu[0] <= self.bits <= self.menu[-1]:
            raise ValueError(
                f"A budget of {self.bits} nominal bits cannot be met with channels of {_words(self.menu)} bits: give "
                f"bits from {self.menu[0]} to {self.menu[-1]}"
                + (", or codebook=learned for budgets below 2." if self.codebook == "normal_float" else ".")
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From a dictionary of the attributes above (config.json, YAML). An unknown key is refused by name."""
        if not isinstance(config_dict, dict):
            raise ValueError(f"quantization_config must be a dictionary; got {reprlib.repr(config_dict)}.")
        _check_format(config_dict.get("format_version", FORMAT_VERSION))  # first: another format has other keys
        check_keys(config_dict, [field.name for field in dataclasses.fields(cls)], "LowRAConfig")
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict:
        return {**dataclasses.asdict(self), "menu": list(self.menu)}


def _check_format(version: object) -> None:
    if not _is_whole(version) or version != FORMAT_VERSION:
        raise ValueError(
            f"This checkpoint has packed format {reprlib.repr(version)}, this lowra reads format {FORMAT_VERSION}. "
            "Install the version of lowra that wrote it, or quantise the base again."
        )


def check_keys(given: Iterable[str], known: Collection[str], what: str) -> None:
    """Raises ValueError for keys that are not known, naming the nearest one that is."""
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else f" Known keys: {', '.join(sorted(known))}."
            raise ValueError(f"{what} has no key {reprlib.repr(key)}.{hint}")


def _words(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)
