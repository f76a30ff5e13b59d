"""The model card written with every packed checkpoint."""

import pathlib
import platform
import re

import torch
import transformers

from ..config import FILLED_IN, LowRAConfig
from ..version import __version__
from .initial_adapter import AdapterRecipe

CARD_FILE = "README.md"

UNKNOWN = "not known"

_CARD = """---
library_name: transformers
{base_model}tags: [lowra, quantized]
---

# {title}, packed{at_bits}

{packed} packed by lowra {version}: every output channel has its own precision and level table. {others}

| | |
|---|---|
{rows}

It needs the Python package lowra, {version} or newer. Where that is installed, Transformers and PEFT find the format by
themselves, without an `import lowra`, and so do the tools that are built upon them. Where it is not, Transformers says
"Unknown quantization type, got lowra" and stops at the shapes of the weights.

```python
from transformers import {architecture}

model = {architecture}.from_pretrained("THIS FOLDER"{trust})
```
"""

_ADAPTED = """
To train from the adapter that was fitted to the quantisation error:

```python
import lowra
from peft import PeftModel

model = PeftModel.from_pretrained(lowra.prepare_for_training(model), "THIS FOLDER/initial_adapter", is_trainable=True)
```
"""


def model_card(
    config: LowRAConfig,
    architecture: str,
    parameters: int,
    packed_bytes: int,
    report: dict | None = None,
    adapter: AdapterRecipe | None = None,
) -> str:
    """Text of README.md for a packed checkpoint: base, recipe, bits, error, versions, how to load.

    Args:
        config: of the checkpoint, with what was reached.
        architecture: class of the model.
        parameters, packed_bytes: of the packed weights.
        report: of `quantize_checkpoint`; None for a model that was quantised while loading, or loaded and saved again.
        adapter: recipe of the initial adapter beside it, or None.
    """
    packed = ["Linear layers"]
    packed += ["embeddings (with a head that is tied to them)"] if config.quantize_embeddings else []
    packed += ["output head"] if config.quantize_head else []
    asked = {name: value for name, value in config.to_dict().items() if name not in (*FILLED_IN, "quant_method")}
    base = config.base or UNKNOWN
    of_hub = config.base and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not pathlib.Path(base).exists()
    rows = {
        "base": f"`{base}`" if config.base else base,
        "fingerprint of the base": f"`{config.fingerprint}`" if config.fingerprint else UNKNOWN,
        "nominal bits (codes alone)": _figure(config.nominal_bits, ".4f"),
        "true bits (everything stored)": _figure(config.true_bits, ".4f", " per packed weight"),
        "packed weights": f"{_mib(packed_bytes)} for {parameters:,} (in 16 bits {_mib(2 * parameters)})",
        **_rows_of_report(config, report, adapter),
        "recipe": ", ".join(f"{name}={value}" for name, value in asked.items()),
        "written with": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
    }
    of_transformers = hasattr(transformers, architecture)  # otherwise its code lies beside it
    card = _CARD.format(
        base_model=f"base_model: {base}\n" if of_hub else "",  # the hub refuses cards that name a folder there
        title=base if of_hub else pathlib.Path(base).name if config.base else architecture,
        at_bits="" if config.nominal_bits is None else f" at {config.nominal_bits:.4g} bits",
        packed=" and ".join(packed),
        others=_of_others(config, report),
        version=__version__,
        rows="\n".join(f"| {name} | {content} |" for name, content in rows.items()),
        architecture=architecture if of_transformers else "AutoModelForCausalLM",
        trust="" if of_transformers else ", trust_remote_code=True",
    )
    return card if adapter is None else card + _ADAPTED


def _rows_of_report(config: LowRAConfig, report: dict | None, adapter: AdapterRecipe | None) -> dict[str, str]:
    """Rows that only a finished run of `quantize_checkpoint` knows of; without one, the error that was planned."""
    if report is None:
        return {"squared error / energy": _figure(config.error, ".5f", " (planned)")}
    error = f"{report['packed_error']:.5f}"
    initial = "none"
    if adapter is not None:
        error += f", with the initial adapter {report['adapted_error']:.5f}"
        initial = f"`initial_adapter`, r = {adapter.rank}, alpha = {adapter.alpha:g}, {adapter.method}"
    return {
        "whole checkpoint": _mib(report["checkpoint_bytes"]),
        "squared error / energy": error,
        "assigner": f"{report['assigner']['solver']}: error {report['assigner']['gap']:.2e} above the relaxed bound",
        "adapter": initial,
        **_row_of_training(report["end_to_end"]),
        **({"text of the calibration": text} if (text := report["calibration_text"]) else {}),
    }


def _row_of_training(did: dict | None) -> dict[str, str]:
    if did is None:
        return {}
    before, after = did["divergence"]
    kept = "" if did["kept"] else "; not kept"
    return {"trained end to end": f"{did['tokens']:,} tokens: KL divergence {before:.4f} -> {after:.4f}{kept}"}


def _of_others(config: LowRAConfig, report: dict | None) -> str:
    """What became of that which is not packed: training all blocks together changes embeddings and head."""
    did = None if report is None else report["end_to_end"]
    if did is not None and did["kept"] and did["token_tables"]:
        tables = " and ".join(f"`{name}`" for name in did["token_tables"])
        return f"Trained with them, and so not\nthose of the base: {tables}. Everything else is as in the base."
    if report is None and config.end_to_end:
        return "Embeddings and head may have\nbeen trained with them (end_to_end); everything else is as in the base."
    return "Everything else is as\nin the base."


def _figure(value: float | None, form: str, unit: str = "") -> str:
    """A number that config.json may have lost: files of other tools keep what they know."""
    return UNKNOWN if value is None else f"{value:{form}}{unit}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
