"""Packed checkpoints open in every program that uses Transformers, without an `import lowra` in it.

The wheel installs this file as the module `lowra_autoload` beside `lowra`, and `import torch` calls `install` through
its entry-point group `torch.backends`. From then on each import asks whether Transformers' configurations are there
yet. Once they are, the method that reads config.json is wrapped, and the first one that says `quant_method: lowra`
imports lowra, which takes the wrapper off again. Nothing else is changed, and lowra is not imported for other models.

It stands outside `lowra`, whose import takes seconds and needs a whole torch. It imports nothing but the standard
library and never raises: an exception here would make `import torch` fail for everybody. What went wrong is kept for
`state`. LOWRA_AUTOLOAD=0 turns it off, and so does PyTorch's own TORCH_DEVICE_BACKEND_AUTOLOAD=0.

Rejected: a `.pth` file, which every start of Python pays for; an entry in Transformers' table of quantizers, which is
asked only when the model's class is being loaded already, past most of lowra's checks.
"""

import functools
import importlib
import os
import sys
from typing import Any

_SWITCH = "LOWRA_AUTOLOAD"
_DONE = "on: lowra has been imported"

_state = "never called: PyTorch was not imported, or TORCH_DEVICE_BACKEND_AUTOLOAD=0"
_wrapped: list[tuple[Any, Any, Any]] = []  # PreTrainedConfig, the method put into it, and the one before


def install() -> None:
    """Waits for Transformers, unless it is turned off. Called by `import torch`; a second call does nothing."""
    if os.environ.get(_SWITCH, "1").strip().lower() in ("0", "false", "no", "off"):
        _keep(f"turned off by {_SWITCH}={os.environ[_SWITCH]}")
    elif "lowra" in sys.modules:  # whose import imports torch
        _keep(_DONE)
    elif not _wrapped and not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
        _keep("on: waits for a packed checkpoint")


def leave() -> None:
    """Takes everything back. lowra calls it when it is imported: from then on it does all of this itself."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Watch)]
    if _wrapped:
        configurations, wrapper, original = _wrapped.pop()
        if vars(configurations)["get_config_dict"] is wrapper:
            configurations.get_config_dict = original
    if _state.startswith("on:"):
        _keep(_DONE)


def state() -> str:
    """What became of it in this process: "on: ...", "turned off by ...", "failed: ..." or "never called: ..."."""
    return _state


def _keep(state: str) -> None:
    global _state
    _state = state


class _Watch:
    """A finder that finds nothing: it is asked at each import, until Transformers' configurations are there.

    To wait for the import of their own module would be too late: that is what imports torch.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        configurations = getattr(sys.modules.get("transformers.configuration_utils"), "PreTrainedConfig", None)
        if configurations is None or self not in sys.meta_path:
            return
        sys.meta_path.remove(self)
        try:
            _wrap(configurations)
        except Exception as error:
            _keep(f"failed: {type(error).__name__}: {error}")


def _wrap(configurations: Any) -> None:
    original = vars(configurations)["get_config_dict"]

    @functools.wraps(original.__func__)
    def get_config_dict(cls: Any, *args: Any, **kwargs: Any) -> Any:
        result = original.__func__(cls, *args, **kwargs)
        if not _wrapped or not _describes_packing(result):
            return result
        try:
            importlib.import_module("lowra")
        except Exception as error:
            _keep(f"failed: {type(error).__name__}: {error}")
            raise ImportError(
                f"{args[0] if args else 'This checkpoint'} is packed by lowra, which is installed but cannot be "
                f"imported ({type(error).__name__}: {error}). Mend its installation: `python -c 'import lowra'` shows "
                "where it fails."
            ) from error
        leave()
        return cls.get_config_dict(*args, **kwargs)  # with lowra's own checks

    wrapper = classmethod(get_config_dict)
    configurations.get_config_dict = wrapper
    _wrapped.append((configurations, wrapper, original))


def _describes_packing(result: Any) -> bool:
    content = result[0] if isinstance(result, tuple) and result else None
    described = content.get("quantization_config") if isinstance(content, dict) else None
    return isinstance(described, dict) and described.get("quant_method") == "lowra"


def register_with_vllm() -> None:
    """The format in vLLM, which calls this in each of its processes (entry-point group `vllm.general_plugins`).

    What is registered imports lowra once a checkpoint says `quant_method: lowra`. Never raises: vLLM would not start.
    """
    try:
        quantization = importlib.import_module("vllm.model_executor.layers.quantization")
        quantization.register_quantization_config("lowra")(_vllm_door(quantization.QuantizationConfig))
    except Exception as error:
        _keep(f"failed: vLLM's door: {type(error).__name__}: {error}")


def _vllm_door(base: Any) -> type:
    """A configuration for vLLM's table that makes lowra's own."""

    class LowRA(base):
        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            return importlib.import_module("lowra.integrations.vllm").packed_config(config)

    return LowRA
