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

Linear layers packed by [lowra](https://pypi.org/project/lowra) {version}: every output channel has 1, 2 or 4 bits and
its own level table. Embeddings, norms and head are as in the base.

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
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
```
"""


def model_card(config: LowRAConfig, report: dict, adapter) -> str:
    """Text of README.md for a packed checkpoint: base, recipe, bits, error, versions, how to load."""
    recipe = ", ".join(
        f"{name}={getattr(config, name)}"
        for name in ("bits", "menu", "budget", "group_size", "scales", "codebook", "thresholds", "sensitivity")
    )
    initial = "none"
    if adapter is not None:
        initial = f"`initial_adapter`, r = {adapter.rank}, alpha = {adapter.alpha:g}, {adapter.method}"
    return _CARD.format(
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
