"""Where the arithmetic runs."""

import contextlib
from collections.abc import Iterator

import torch


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """A device by name, or a GPU if there is one.

    Raises:
        ValueError: no device, or one that is not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{name!r} is no device: give cpu, cuda or cuda:0 and so on.") from None
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"There is no {name}: PyTorch {torch.__version__} sees {gpus} GPUs here. Give cpu instead.")
    if device.type not in ("cpu", "cuda"):
        other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if other is None or other.type != device.type or (device.index or 0) >= torch.accelerator.device_count():
            raise ValueError(f"There is no {name} that PyTorch {torch.__version__} can use here. Give cpu instead.")
    if device.type == "cpu" and device.index:
        raise ValueError(f"There is no {name}: to PyTorch all processors are one. Give cpu instead.")
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 itself: GPUs before Ampere emulate it, many times slower than float16."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch to one thread: small operations meet at a barrier every few microseconds.

    Where another process holds a core, the barriers took the shapes of a 7B adapter from 15 to 276 seconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
