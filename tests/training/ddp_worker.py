"""One process of a two-process run: python -m torch.distributed.run --nproc-per-node 2 ddp_worker.py RECIPE.yaml"""

import sys

from lowra.training import finetune, load_recipe

if __name__ == "__main__":
    finetune(load_recipe(sys.argv[1]), progress=False)
