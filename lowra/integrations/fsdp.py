"""Sharding by FSDP, which Accelerate asks a process for by its environment: what packed weights can take of it."""

import os

import torch
from transformers.utils import strtobool

_SHARDS_INTEGERS = "2.13"  # PyTorch before asks frozen integers for gradients in fully_shard (2.11 was tried)


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
    if torch.__version__ < _SHARDS_INTEGERS:
        raise ValueError(
            f"FSDP2 shards integers, as packed codes are, from PyTorch {_SHARDS_INTEGERS} on, and this is "
            f"{torch.__version__}: with one copy on each GPU (DDP) packed models train with any."
        )
