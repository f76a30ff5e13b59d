"""The card beside a trained adapter: what it belongs to, how it was made, how to load it."""

from ..version import __version__
from .methods import Base
from .recipe import Recipe

CARD_FILE = "README.md"

_CARD = """---
library_name: peft
base_model: {base}
tags: [lowra, lora]
---

# LoRA adapter for {base}

Trained by lowra {version} (`lowra finetune`). {belongs}

| | |
|---|---|
| base | `{base}` |
| bits of the base's weights | {nominal:.3g} nominal, {true:.3f} true (everything stored) |
| method | {method} |
| rank, alpha | {rank}, {alpha:g} |
| trained tables | {tables} |
| task | {task} |
| data | {data} |
| training | {training} |

```python
import lowra  # registers the format with Transformers and PEFT
from peft import {door}

model = {door}.from_pretrained("THIS FOLDER")
```

On the command line: `{command}`
"""

_TABLES = {
    "frozen": "none",
    "shared": "`tables.safetensors`: levels and scales, by changes that those of a channel and of an input group share",
    "levels": "`tables.safetensors`: levels",
    "levels_and_scales": "`tables.safetensors`: levels and scales",
}

_DOORS = {"SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM", "CAUSAL_LM": "AutoPeftModelForCausalLM"}


def adapter_card(recipe: Recipe, base: Base, rank: int, alpha: float, steps: int, task_type: str | None) -> str:
    """Text of README.md for a trained adapter.

    Args:
        recipe: settled.
        base: what was trained on.
        rank, alpha: of the adapter, which a packed base may have brought.
        steps: optimiser steps behind it.
        task_type: PEFT's name for what the model is for.
    """
    packed = base.adapter is not None
    verb = "chat" if recipe.task == "chat" else "generate"
    end = "" if recipe.task == "chat" else ' --prompt "..."'
    return _CARD.format(
        base=base.name,
        version=__version__,
        belongs="It started from what quantisation lost and belongs to this packed base, not to the dense one."
        if packed
        else "It belongs to this base.",
        nominal=base.nominal_bits,
        true=base.true_bits,
        method=recipe.method,
        rank=rank,
        alpha=alpha,
        tables=_TABLES[recipe.tables],
        task=recipe.task,
        data=f"`{recipe.train_file or recipe.dataset}`",
        training=f"{steps} steps of {recipe.batch_size} x {recipe.accumulation} sequences a device, learning rate "
        f"{recipe.learning_rate:g} ({recipe.scheduler}), seed {recipe.seed}",
        door=_DOORS.get(task_type or "", "AutoPeftModel"),
        command=f"lowra evaluate {base.name} --adapter THIS_FOLDER --data FILE"
        if task_type == "SEQ_2_SEQ_LM"
        else f"lowra {verb} {base.name} --adapter THIS_FOLDER{end}",
    )
