"""Long contexts: inputs of layers on the host, MLPs by tiles. What is trained is what would be without."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from layer_recorder import StandIn, stand_in
from peft import LoraConfig
from small_models import ARCHITECTURES, adapted, make_model
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config

import lowra
from lowra.integrations import offloading, tiled_mlp
from lowra.nn.host_store import HostStore
from lowra.nn.tiled import tiled

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    monkeypatch.setattr(offloading._Offloading, "takes", staticmethod(lambda device: True))
    monkeypatch.setattr(tiled_mlp, "TILE", 10)
    return request.param


def learned(model, device, autocast=False, shape=(2, 17), steps=2, **inputs):
    """Losses and gradients of passes that are added up.

    Args:
        inputs: of the model beside tokens.
    """
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(5)
    losses = []
    for _ in range(steps):
        ids = torch.randint(3, 90, shape, generator=generator).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
        loss.backward()
        losses.append(loss.item())
    return losses, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.3}, {"tables": True}, {"reentrant": True}, {"autocast": True}], ids=str
)
def test_with_inputs_on_the_host_numbers_are_the_same(packed_llama, device, options, monkeypatch):
    autocast = options.pop("autocast", False)
    usual = learned(adapted(packed_llama, device, **options), device, autocast)
    model = adapted(packed_llama, device, **options)
    lowra.offload_activations(model)
    put = []
    monkeypatch.setattr(HostStore, "put", lambda self, x, put_=HostStore.put: put.append(x.shape) or put_(self, x))
    losses, gradients = learned(model, device, autocast)
    assert len(put) == 2 * 2  # layers, passes
    if device == "cpu":
        assert losses == usual[0]
        assert all(map(torch.equal, gradients, usual[1]))
    else:  # kernels that add in any order
        torch.testing.assert_close(losses, usual[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradients, usual[1], rtol=2e-2, atol=2e-3)


def test_inputs_do_not_stay_on_the_device(packed_llama, device):
    model = adapted(packed_llama, device)
    lowra.offload_activations(model)
    inputs = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    ids = torch.arange(3, 40, device=device)[None]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    gc.collect()
    assert [storage() is None for storage in inputs] == [True, False]  # the last need not leave
    loss.backward()
    gc.collect()
    assert all(storage() is None for storage in inputs[:2])


@pytest.mark.parametrize("shape", [(1, 31), (2, 17), (3, 4)], ids=str)
@pytest.mark.parametrize("tables", [False, True])
def test_by_tiles_numbers_are_the_same_to_rounding(packed_llama, device, tables, shape):
    usual = learned(adapted(packed_llama, device, tables=tables), device, shape=shape)
    model = adapted(packed_llama, device, tables=tables)
    lowra.tile_mlps(model)
    lowra.offload_activations(model)
    found = learned(model, device, shape=shape)
    tight = {"rtol": 1e-5, "atol": 1e-6} if device == "cpu" else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(found, usual, **tight)


def test_several_adapters_at_once_by_tiles_on_the_host(packed_llama, device):
    def make():
        model = adapted(packed_llama, device)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["gate_proj", "q_proj"]))
        model.base_model.set_adapter(["default", "second"])
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                torch.nn.init.constant_(parameter, 0.02)
        return model

    assert_as_without(make, device)


def test_rows_of_several_conversations_by_tiles_on_the_host(packed_llama, device):
    """Their attention mask is an input of every layer, and the same one for all."""
    positions = torch.tensor([[*range(9), *range(14), *range(8)]], device=device)
    assert_as_without(lambda: adapted(packed_llama, device), device, shape=(1, 31), position_ids=positions)
    with_it = learned(adapted(packed_llama, device), device, shape=(1, 31), position_ids=positions)
    assert with_it[0] != learned(adapted(packed_llama, device), device, shape=(1, 31))[0]


def assert_as_without(make, device, **inputs):
    usual = learned(make(), device, **inputs)
    model = make()
    lowra.tile_mlps(model)
    lowra.offload_activations(model)
    found = learned(model, device, **inputs)
    assert len(found[1]) == len(usual[1])
    tight = {"rtol": 1e-5, "atol": 1e-6} if device == "cpu" else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(found, usual, **tight)


def test_tiled_layers_are_not_captured_and_train_as_without(packed_llama, monkeypatch, caplog):
    """`lowra finetune` does not ask for both; where a program does, one line says which of them it gets."""
    monkeypatch.setattr(tiled_mlp, "TILE", 10)
    usual = learned(adapted(packed_llama, "cpu"), "cpu", steps=3)
    model = adapted(packed_llama, "cpu")
    lowra.tile_mlps(model)
    lowra.capture_layers(model)
    stand_in(monkeypatch.setattr)
    torch.testing.assert_close(learned(model, "cpu", steps=3), usual, rtol=1e-5, atol=1e-6)
    assert StandIn.recorded == 0
    assert caplog.text.count("the forward of a module in it has been replaced") == 1


def test_checkpointing_and_tiles_compute_each_mlp_twice(packed_llama, device):
    model = adapted(packed_llama, device)
    lowra.tile_mlps(model)
    tokens = []
    gate = model.get_base_model().model.layers[0].mlp.gate_proj
    gate.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0].shape[-2]))
    learned(model, device, shape=(1, 25), steps=1)
    assert tokens == [10, 10, 5] * 2


@pytest.mark.parametrize("whole", [False, True])
def test_tiles_draw_the_same_numbers_again(device, whole):
    """Dropout's: a backward pass that drew others would not be that of the loss."""
    torch.manual_seed(2)
    mlp = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 6)).to(device)
    x = torch.randn(2, 11, 6, device=device, requires_grad=True)
    trained = [*mlp.parameters()]
    torch.manual_seed(3)
    expected = torch.cat([mlp(part) for part in x.split(4, dim=-2)], dim=-2)
    expected_gradients = torch.autograd.grad(expected.square().sum(), [x, *trained])
    torch.manual_seed(3)
    if whole:
        found = torch.utils.checkpoint.checkpoint(lambda x: tiled(mlp, x, 4, trained), x, use_reentrant=False)
    else:
        found = tiled(mlp, x, 4, trained)
    after = torch.rand(1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), [x, *trained]), expected_gradients)
    torch.manual_seed(3)
    _ = [mlp(part) for part in x.split(4, dim=-2)]
    assert torch.equal(after, torch.rand(1))


def test_tiles_of_what_needs_no_gradient():
    mlp = nn.Linear(3, 5)
    x = torch.randn(7, 3)
    assert not tiled(mlp.requires_grad_(False), x, 2, []).requires_grad
    mlp.weight.requires_grad_()
    found = torch.autograd.grad(tiled(mlp, x, 2, [mlp.weight]).sum(), [mlp.weight])
    torch.testing.assert_close(found, torch.autograd.grad(mlp(x).sum(), [mlp.weight]))
    unread = torch.ones(1, requires_grad=True)
    assert torch.autograd.grad(tiled(mlp, x, 2, [mlp.weight, unread]).sum(), [unread], allow_unused=True) == (None,)


def test_a_parameter_with_a_hook_is_hooked_once(packed_llama, device):
    model, hooked = adapted(packed_llama, device), adapted(packed_llama, device)
    lowra.tile_mlps(hooked)
    for each in (model, hooked):
        factor = each.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"].weight
        factor.register_hook(lambda gradient: 0.5 * gradient)
    torch.testing.assert_close(learned(hooked, device), learned(model, device), rtol=2e-2, atol=2e-3)


def test_a_store_gives_what_it_was_given_in_any_order(device):
    store = HostStore(torch.device(device))
    tensors = [torch.randn(3, 5, device=device)[:, ::stride] for stride in (1, 2, 1, 1)]
    stored = [store.put(tensor) for tensor in tensors]
    for place in (3, 2, 0, 1, 1, 3):
        assert torch.equal(store.get(stored[place]), tensors[place])
    del stored[1]
    gc.collect()
    assert stored[1].before is None and torch.equal(store.get(stored[1]), tensors[2])


def test_a_store_cuts_what_is_large(device, monkeypatch):
    monkeypatch.setattr("lowra.nn.host_store._PIECE_BYTES", 16)
    store = HostStore(torch.device(device))
    tensors = [torch.randn(3, 7, device=device) for _ in range(3)]
    stored = [store.put(tensor) for tensor in tensors]
    assert [len(piece) for piece in stored[0].pieces] == [4, 4, 4, 4, 4, 1]
    for tensor, kept in zip(reversed(tensors), reversed(stored), strict=True):
        assert torch.equal(store.get(kept), tensor)


def test_a_second_backward_and_two_graphs_at_once(packed_llama, device):
    def gradients(model):
        ids = torch.arange(3, 40, device=device)[None]
        one, other = (model(input_ids=part, labels=part, use_cache=False).loss for part in (ids[:, :20], ids[:, 20:]))
        (one + 2 * other).backward(retain_graph=True)
        one.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    model = adapted(packed_llama, device)
    lowra.offload_activations(model)
    torch.testing.assert_close(gradients(model), gradients(adapted(packed_llama, device)), rtol=2e-2, atol=2e-3)


def test_a_copy_is_without_and_a_trainer_may_enable_again(packed_llama, device):
    model = adapted(packed_llama, device)
    lowra.offload_activations(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    (layer, *_) = model.get_base_model().model.layers
    assert isinstance(layer._gradient_checkpointing_func, offloading._Offloading)
    (copied, *_) = copy.deepcopy(model).get_base_model().model.layers
    assert not isinstance(copied._gradient_checkpointing_func, offloading._Offloading)
    again = pickle.loads(pickle.dumps(layer._gradient_checkpointing_func))
    assert not isinstance(again, offloading._Offloading)


def test_what_cannot_be_is_refused(packed_llama, device):
    model = adapted(packed_llama, device)
    lowra.offload_activations(model)
    lowra.offload_activations(model)
    with pytest.raises(ValueError, match="not both: load the model anew"):
        lowra.capture_layers(model)
    with pytest.raises(ValueError, match="no layers that Transformers checkpoints"):
        lowra.offload_activations(nn.Linear(2, 2))
    adds = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=96, hidden_size=16, n_layer=1, n_head=2))
    for model in (make_model("OPTForCausalLM"), adds, make_model("MixtralForCausalLM")):
        with pytest.raises(ValueError, match="no MLP that is known to work token by token"):
            lowra.tile_mlps(model)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "PhiForCausalLM", "Gemma2ForCausalLM"])
def test_other_architectures_by_tiles(name, device):
    """The last has a norm behind the MLP, which needs what that gives."""
    if name == "Gemma2ForCausalLM":
        config = Gemma2Config(**ARCHITECTURES["GemmaForCausalLM"], attn_implementation="eager")
        model = AutoModelForCausalLM.from_config(config).to(device).train()
    else:
        model = make_model(name).to(device).train()
    ids = torch.randint(3, 60, (2, 19), generator=torch.Generator().manual_seed(1)).to(device)

    def found():
        torch.manual_seed(4)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return [loss.detach()] + [parameter.grad.clone() for parameter in model.parameters()]

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    usual = found()
    lowra.tile_mlps(model)
    torch.testing.assert_close(found(), usual, rtol=1e-3, atol=1e-5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(found(), usual, rtol=1e-3, atol=1e-5)
