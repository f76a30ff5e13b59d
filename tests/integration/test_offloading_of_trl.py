"""TRL's `activation_offloading`, on a packed model with and without what lowra puts in the place of checkpoints.

It keeps what autograd saves under a number, and gives each number out once. For a GPU; here a CPU takes its place.
"""

import pytest
import torch
from layer_recorder import StandIn, stand_in
from small_models import adapted

import lowra
from lowra.integrations import offloading, tiled_mlp

trl_offloading = pytest.importorskip("trl.models.activation_offloading")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    monkeypatch.setattr(offloading._Offloading, "takes", staticmethod(lambda device: True))
    monkeypatch.setattr(tiled_mlp, "TILE", 10)
    stand_in(monkeypatch.setattr)


def make(folder, checkpointing=True, tables=False, doors=()):
    model = adapted(folder, "cpu", tables=tables)
    if not checkpointing:
        model.gradient_checkpointing_disable()
    for door in doors:
        door(model)
    return model


def losses_and_gradients(model, offloaded, steps=4):
    """Of steps as TRL's trainers take them, and how often it has put something away."""
    context = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    if offloaded:
        with pytest.MonkeyPatch.context() as patch:  # checkpoints ask too
            patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
            context = trl_offloading.get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=False)
    generator = torch.Generator().manual_seed(1)
    losses, gradients, most = [], [], 0
    for _ in range(steps):
        ids = torch.randint(3, 90, (2, 17), generator=generator)
        with context:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            most = max(most, sum(kept[1] for kept in getattr(context, "tracker", {}).values()))
            loss.backward()
        losses.append(loss.item())
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return losses, gradients, most


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpointing": False},
        {"checkpointing": False, "tables": True},
        {"checkpointing": False, "doors": (lowra.tile_mlps,)},
        {"doors": (lowra.tile_mlps, lowra.offload_activations)},
        {"doors": (lowra.capture_layers,)},
    ],
    ids=["checkpoints", "none", "tables", "tiles", "both", "graphs"],
)
def test_losses_are_those_without(packed_llama, options, caplog):
    usual = losses_and_gradients(make(packed_llama, **options), offloaded=False)
    recorded, StandIn.recorded = StandIn.recorded, 0
    found = losses_and_gradients(make(packed_llama, **options), offloaded=True)
    torch.testing.assert_close(found[:2], usual[:2], rtol=1e-5, atol=1e-6)
    assert usual[2] == 0 < found[2]
    assert StandIn.recorded == recorded == 4 * (lowra.capture_layers in options.get("doors", ()))
    assert "not captured" not in caplog.text
