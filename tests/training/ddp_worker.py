"""One process of a two-process run: python -m torch.distributed.run --nproc-per-node 2 ddp_worker.py RECIPE.yaml"""

import functools
import os
import pathlib
import sys
import time

from transformers import trainer

from lowra.integrations import tiled_mlp
from lowra.integrations.offloading import _Offloading
from lowra.nn.host_store import HostStore
from lowra.training import finetune, load_recipe
from lowra.training.trainer import training_arguments

SECONDS_LATE = 0.5


def late(sort_checkpoints):
    """Looks into the Trainer's folder once more while another process has nothing left to do but to clear up."""

    @functools.wraps(sort_checkpoints)
    def wait(output_dir, *args, **kwargs):
        time.sleep(SECONDS_LATE)
        os.listdir(output_dir)
        return sort_checkpoints(output_dir, *args, **kwargs)

    return wait


if __name__ == "__main__":
    if os.environ["RANK"] != "0":
        trainer.sort_checkpoints = late(trainer.sort_checkpoints)
    recipe, on_host = load_recipe(sys.argv[1]), []
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    if os.environ.get("ACCELERATE_USE_FSDP"):
        import fsdp_on_cpu

        fsdp_on_cpu.allow()
    if recipe.layer_graphs:
        from layer_recorder import stand_in

        stand_in(setattr)
    if recipe.offload_activations:
        _Offloading.takes = staticmethod(lambda device: True)
        tiled_mlp.TILE, put = 10, HostStore.put
        HostStore.put = lambda self, tensor: on_host.append(True) or put(self, tensor)
    if recipe.layer_graphs or recipe.offload_activations:  # which are for GPUs
        training_arguments.__globals__["check_quick_steps"] = lambda recipe, arguments: None
    finetune(recipe, progress=False)
    assert bool(on_host) == recipe.offload_activations
