"""The model card written with every packed checkpoint."""

import platform

import torch
import transformers

from . import __version__
from .config import LowRAConfig

_CARD = """---
library_name: transformers
base_model: {base}
tags: [lowra, quantized]
---

# {base} in {true_bits:.3f} bits per parameter

{packed} packed by [lowra](https://pypi.org/project/lowra) {version}: every output channel has its own precision and
level table. Everything else is as in the base.

| | |
|---|---|
| base | `{base}` |
| fingerprint of the base | `{fingerprint}` |
| nominal bits (codes alone) | {nominal_bits:.4f} |
| true bits (everything stored) | {true_bits:.4f} |
| packed weights | {packed_mib:.1f} MiB for {parameters:,} parameters |
| squared error / energy | {error:.5f} |
| recipe | {recipe} |
| assigner | {solver}: error {gap:.2e} above the relaxed bound |
| adapter | {adapter} |
| written with | torch {torch}, transformers {transformers}, Python {python} |

```python
import lowra  # registers the format with Transformers and PEFT
from transformers import {architecture}

model = {architecture}.from_pretrained("THIS FOLDER")
```
"""

_ADAPTED = """
To train from the adapter that was fitted to the quantisation error:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(lowra.prepare_for_training(model), "THIS FOLDER/initial_adapter", is_trainable=True)
```
"""


def model_card(config: LowRAConfig, report: dict, adapter, architecture: str) -> str:
    """Text of README.md for a packed checkpoint: base, recipe, bits, error, versions, how to load."""
    packed = ["Linear layers"]
    packed += ["embeddings (with a head that is tied to them)"] if config.quantize_embeddings else []
    packed += ["output head"] if config.quantize_head else []
    recipe = ", ".join(
        f"{name}={getattr(config, name)}"
        for name in ("bits", "menu", "budget", "group_size", "scales", "codebook", "thresholds", "sensitivity")
    )
    initial = "none"
    if adapter is not None:
        initial = f"`initial_adapter`, r = {adapter.rank}, alpha = {adapter.alpha:g}, {adapter.method}"
    card = _CARD if adapter is None else _CARD + _ADAPTED
    return card.format(
        packed=" and ".join(packed),
        architecture=architecture,
        base=config.base,
        fingerprint=config.fingerprint,
        nominal_bits=config.nominal_bits,
        true_bits=config.true_bits,
        packed_mib=report["packed_bytes"] / 2**20,
        parameters=report["quantised_parameters"],
        error=config.error,
        recipe=recipe,
        solver=report["assigner"]["solver"],
        gap=report["assigner"]["gap"],
        adapter=initial,
        version=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
    )
