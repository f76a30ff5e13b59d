"""One of two processes of `test_engines.py`: logits and gradients of the packed model under FSDP2 and without."""

import os
import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from small_models import inputs_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

import lowra  # noqa: F401 - registers the format


def adapted(folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def step(model):
    """Logits and adapter gradients of one batch, the same on every process."""
    tokens = inputs_of(model)["input_ids"]
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return output.logits.detach(), grads


def check_that_nothing_is_cast(folder, mesh):
    """Mixed precision, as bf16=True of the Trainer asks for it, is for what is trained and not for packed tensors."""
    model = adapted(folder)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    expected = {name: tensor.clone() for name, tensor in layer.base_layer.packed_tensors().items()}
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    model.base_model.model.model.layers[0].unshard()
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    for name, tensor in layer.base_layer.packed_tensors().items():
        assert torch.equal(tensor, expected[name]), name


def main(folder: str, rendezvous: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    logits, grads = step(adapted(folder))

    model = adapted(folder)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.dtype == torch.uint8 and weight.to_local().numel() == weight.numel() // 2
    sharded_logits, sharded = step(model)
    assert torch.equal(sharded_logits, logits), (sharded_logits - logits).abs().max()
    added = 2 if torch.__version__ < "2.9" else 1  # on a CPU PyTorch 2.8 adds the two gradients, of dense models too
    for name, grad in grads.items():
        torch.testing.assert_close(
            sharded[name].full_tensor() / added, grad, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: n + m
        )
    check_that_nothing_is_cast(folder, mesh)
    dist.barrier()
    dist.destroy_process_group()
    print("checked", flush=True)
    # Everything is compared by now. Gloo's threads have been seen to abort the interpreter's own exit, once in some
    # twenty runs ("terminate called without an active exception").
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
