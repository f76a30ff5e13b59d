"""How one weight, and one base, is told from another."""

import hashlib

import torch

_FINGERPRINT_SAMPLES = 4096


def weight_digest(name: str, weight: torch.Tensor) -> str:
    """Digest, in hex, of evenly spread elements of a weight [N, K]: changes with the base, costs nothing."""
    flat = weight.reshape(-1)
    step = max(1, flat.numel() // _FINGERPRINT_SAMPLES)
    values = flat[::step][:_FINGERPRINT_SAMPLES].float().cpu().contiguous()
    return hashlib.sha256(f"{name} {list(weight.shape)}".encode() + values.numpy().tobytes()).hexdigest()


def fingerprint_of(digests: dict[str, str]) -> str:
    """Fingerprint of a base from the digests of its quantised weights by name."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
