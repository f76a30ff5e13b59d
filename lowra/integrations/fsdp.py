"""Sharding by FSDP, which Accelerate asks a process for by its environment: what packed weights can take of it."""

import os

from transformers.utils import strtobool


def is_sharded_run() -> bool:
    """Whether Accelerate has been told to shard the model by FSDP."""
    return bool(strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def check_fsdp() -> None:
    """
    Raises:
        ValueError: Accelerate has been told to shard in a way that packed weights cannot take.
    """
    if not is_sharded_run():
        return
    if os.environ.get("FSDP_VERSION", "1") == "1":
        raise ValueError(
            "FSDP1 flattens weights into one floating-point tensor and cannot hold packed integers: use FSDP2 "
            "(`fsdp_version: 2` in accelerate's configuration)."
        )
    if strtobool(os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false")):
        raise ValueError(
            "`fsdp_activation_checkpointing` gives the layers other names, and PEFT then saves adapters without a "
            "tensor: leave it out and set gradient_checkpointing=True in the Trainer's arguments."
        )
