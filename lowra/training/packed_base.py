"""A base that is packed already: what it has stands, whatever the recipe asks for."""

import dataclasses
import logging
import pathlib

from ..checkpoints.dense import read_config
from ..checkpoints.guarded import read_json
from ..checkpoints.records import BASE_RECORD
from ..config import LowRAConfig
from ..quantization.initial_adapter import ADAPTER_FOLDER
from .recipe import Recipe

logger = logging.getLogger(__name__)

_WARNINGS = {
    "bits": "%s has %g bits; the recipe's %g bits are not used.",
    "rank": "%s has rank %d; the recipe's rank of %d is not used.",
    "alpha": "%s has alpha %g; the recipe's alpha of %g is not used.",
    "method": "%s was packed as %s does; the recipe's method of %s is not used.",
}


def adapter_fields(recipe: Recipe) -> list[str]:
    """Fields of the recipe that shape an adapter which starts anew, and that a fitted start has no form for."""
    return [name for name in ("target_modules", "rslora", "dora") if getattr(recipe, name)]


def packed_config(source: pathlib.Path, recipe: Recipe) -> dict | None:
    """The `quantization_config` of a checkpoint that lowra packed, or None for a dense one.

    Raises:
        ValueError: another program quantised it.
    """
    packed = getattr(read_config(source, recipe.trust_remote_code), "quantization_config", None)
    if packed is None:
        return None
    packed = packed if isinstance(packed, dict) else packed.to_dict()
    if packed.get("quant_method") != "lowra":
        raise ValueError(f"{source} is quantised by {packed.get('quant_method')}; give a dense or a lowra checkpoint.")
    return packed


def on_packed_base(recipe: Recipe, source: pathlib.Path, packed: dict) -> Recipe:
    """The recipe with what the packed base has in place of what it asks for.

    Raises:
        ValueError: an override that the base does not agree with.
    """
    agreed = {}
    for name, asked in recipe.quantization.items():
        if LowRAConfig.from_dict({**packed, name: asked}).to_dict()[name] == packed[name]:
            agreed[name] = asked
        elif {"quantization", f"quantization.{name}"} & set(recipe.given):
            raise ValueError(
                f"{source} is packed already, with {name}={_text(packed[name])}: quantization.{name}={_text(asked)} "
                "has no effect on it. Leave that out, or quantise the original anew."
            )
        else:
            logger.warning(
                "%s was packed with %s=%s; the recipe's %s is not used.",
                source,
                name,
                _text(packed[name]),
                _text(asked),
            )
    if "init_steps" in recipe.given:
        raise ValueError(f"{source} is packed already: init_steps has no effect on it. Leave it out.")
    own: dict = {"bits": float(packed["bits"])}
    started = None
    if (source / ADAPTER_FOLDER).exists():
        adapter = read_json(source / ADAPTER_FOLDER / "adapter_config.json", "the base's initial adapter")
        own |= {"rank": adapter["r"], "alpha": float(adapter["lora_alpha"])}
        record = source / ADAPTER_FOLDER / BASE_RECORD
        started = read_json(record, "the record of the initial adapter")["init"] if record.exists() else None
        if started != "lora":
            if fields := adapter_fields(recipe):
                raise ValueError(
                    f"{source} begins with an adapter fitted to what quantisation lost, in all packed layers and "
                    f"in LoRA's plain form: {fields[0]} cannot be used with it. Leave it out, or quantise without "
                    "--rank."
                )
    own["method"] = _method(packed, started)
    for name, value in own.items():
        asked = getattr(recipe, name)
        if name == "alpha" and asked is None:
            continue
        if asked != value and name in recipe.given:
            raise ValueError(
                f"{source} is packed already, with {name}={_text(value)}: {name}={_text(asked)} has no effect on it. "
                "Leave that out, or quantise the original anew."
            )
        if asked != value:
            logger.warning(_WARNINGS[name], source, value, asked)
    if recipe.init_steps != Recipe.init_steps:
        logger.warning("%s is packed already; the recipe's init_steps=%d are not taken.", source, recipe.init_steps)
    return dataclasses.replace(recipe, **own, quantization=agreed, init_steps=Recipe.init_steps)


def _method(packed: dict, started: str | None) -> str:
    """The preset that is nearest to a packed base and the start of its adapter."""
    if packed["codebook"] == "learned":
        return "lowra"
    if packed["assigner"] != "layer_order":
        return "assigner_only"
    return {None: "qlora", "lora": "qlora", "pissa": "pissa"}.get(started, "loftq")


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
