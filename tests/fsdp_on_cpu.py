"""FSDP2 through Accelerate on CPUs, which it keeps to GPUs: the rest of its way is the same."""

from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy


def allow() -> None:
    """Several processes on CPUs take the plugin that the environment or the Trainer asks for."""
    original = state.AcceleratorState.__init__

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self._shared_state.get("fsdp_plugin")
        if self.distributed_type == DistributedType.MULTI_CPU and plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
                plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # which takes a GPU

    state.AcceleratorState.__init__ = __init__


def environment(**options: str) -> dict[str, str]:
    """What `accelerate launch` sets for configs/accelerate/fsdp2.yaml."""
    return {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        **options,
    }
