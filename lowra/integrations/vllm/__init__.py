"""Packed checkpoints in vLLM: `vllm serve PACKED`. Nothing of vLLM is imported before it asks for this.

vLLM finds the plugin by its entry point (lowra/autoload.py), and the packed format by `quant_method` in config.json.
`config` says which of its layers are packed, `layers` loads and multiplies them, `adapters` holds LoRA adapters against
the packing that is served, and `patches` is where vLLM has no door. What a rank has of a packed weight stands in
`sharing`, which knows nothing of vLLM.
"""

from typing import Any

TESTED = "0.32"


def packed_config(described: dict[str, Any]) -> Any:
    """vLLM's configuration of a packed checkpoint, from `quantization_config` in its config.json.

    Raises:
        ValueError: it is none of this version of lowra; this vLLM has changed what the plugin rests on.
    """
    try:
        from .config import PackedConfig
    except ImportError as error:
        import vllm

        raise ValueError(
            f"Packed models are served with vLLM {TESTED}, and this is {vllm.__version__}, in which something that "
            f"lowra rests on has changed ({error}): install vllm=={TESTED}.*, or a newer lowra."
        ) from error
    return PackedConfig.from_config(described)
