"""Layers as CUDA graphs: what is trained is what would be without them, and what a graph cannot do is left to PyTorch.

Where there is no GPU, a stand-in for the recorder replays the operations that it saw (layer_recorder.py), so that
everything but the graphs themselves is tried.
"""

import contextlib
import copy
import functools
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
from layer_recorder import StandIn, stand_in
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from small_models import adapted
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lowra
from lowra.integrations import layer_graphs
from lowra.integrations.decided import Decided
from lowra.nn.captured import NotCapturable, Recorder

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if request.param == "cpu":
        stand_in(monkeypatch.setattr)
    return request.param


def batches(device, count, shape=(2, 16)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 90, shape, generator=generator).to(device) for _ in range(count)]


def trained(model, ids, accumulation=1, autocast=False):
    """Losses of a training loop, and the parameters after it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    torch.manual_seed(5)
    losses = []
    for step, batch in enumerate(ids):
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=batch, labels=batch).loss
        (loss / accumulation).backward()
        losses.append(loss.item())
        if step % accumulation == accumulation - 1:
            torch.nn.utils.clip_grad_norm_(parameters, 0.3)
            optimizer.step()
            optimizer.zero_grad()
    return losses, [parameter.detach().clone() for parameter in parameters]


def assert_as_without(folder, device, make=adapted, steps=12, **options):
    def run(captured):
        model = make(folder, device, **{k: v for k, v in options.items() if k in ("dropout", "tables", "use_dora")})
        if captured:
            lowra.capture_layers(model)
        loop = {k: v for k, v in options.items() if k in ("accumulation", "autocast")}
        return trained(model, batches(device, steps), **loop)

    (losses, parameters), (usual_losses, usual_parameters) = run(True), run(False)
    if device == "cpu":
        assert StandIn.recorded, "nothing was captured"
        assert losses == usual_losses
        for own, usual in zip(parameters, usual_parameters, strict=True):
            assert torch.equal(own, usual)
    else:
        torch.testing.assert_close(losses, usual_losses, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 50},
        {"accumulation": 4},
        {"autocast": True},
        {"dropout": 0.3},
        {"dropout": 0.1, "autocast": True, "accumulation": 2, "steps": 50},
        {"tables": True},
        {"tables": "shared"},
        {"use_dora": True},
    ],
    ids=str,
)
def test_steps_are_those_without(packed_llama, device, options, caplog):
    assert_as_without(packed_llama, device, **options)
    assert "not captured" not in caplog.text


def test_a_trainer_that_enables_checkpointing_again(packed_llama, device, tmp_path):
    def losses(captured):
        model = adapted(packed_llama, device)
        if captured:
            lowra.capture_layers(model)
        arguments = TrainingArguments(
            tmp_path, max_steps=6, logging_steps=1, per_device_train_batch_size=2, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False}, report_to=[], save_strategy="no",
            use_cpu=device == "cpu", seed=3,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in batches("cpu", 1, (12, 16))[0]]
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-4, atol=1e-4)
    if device == "cpu":
        assert StandIn.recorded == 2 * 2 * 1  # layers, passes, shapes


def test_a_shape_that_comes_once_is_not_captured(packed_llama, device):
    model = adapted(packed_llama, device)
    lowra.capture_layers(model)
    for length in (8, 9, 10):
        (ids,) = batches(device, 1, (1, length))
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(not layer._gradient_checkpointing_func._captured for layer in model.get_base_model().model.layers)


def test_more_shapes_than_there_is_memory_for(packed_llama, device, caplog):
    model = adapted(packed_llama, device)
    lowra.capture_layers(model)
    usual = adapted(packed_llama, device)
    for _ in range(2):
        for length in range(8, 15):
            (ids,) = batches(device, 1, (1, length))
            for one in (model, usual):
                one.zero_grad()
                one(input_ids=ids, labels=ids).loss.backward()
            for own, other in zip(model.parameters(), usual.parameters(), strict=True):
                if other.grad is not None:
                    torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert caplog.text.count("shapes of batches have graphs already") == 1


def step(model, ids, **inputs):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def captured(model, device):
    """The model with its layers captured, and the batch that they were captured with."""
    lowra.capture_layers(model)
    (ids,) = batches(device, 1)
    for _ in range(3):
        step(model, ids)
    return model, ids


def mask_out(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"attention_mask": mask}


def scale(model, ids):
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.scaling["default"] *= 3
    return {}


def freeze_some(model, ids):
    for name, parameter in model.named_parameters():
        if "lora_A" in name and "layers.0" in name:
            parameter.requires_grad_(False)
    return {}


def write_adapter(model, ids):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-2)
    return {}


def replace_adapter(model, ids):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = -2 * parameter.data
    return {}


def second_adapter(model, ids):
    torch.manual_seed(9)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("second")
    return {}


def hook(model, ids):
    model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    return {}


def hook_of_layer(model, ids):
    model.get_base_model().model.layers[1].register_forward_hook(lambda module, args, output: 2 * output)
    return {}


def own_forward(model, ids):
    mlp = model.get_base_model().model.layers[1].mlp
    usual = mlp.forward
    mlp.forward = lambda x: 3 * usual(x)
    return {}


def other_norm(model, ids):
    model.get_base_model().model.layers[1].input_layernorm.variance_epsilon = 0.5
    return {}


def other_activation(model, ids):
    model.get_base_model().model.layers[0].mlp.act_fn = torch.nn.Tanh()
    return {}


def private_number(model, ids):
    model.get_base_model().model.layers[1].mlp._gain = 4.0
    return {}


def entry_of_a_dictionary(model, ids):
    model.get_base_model().model.layers[1].mlp.gains["own"] = 3.0
    return {}


def plain_tensor(model, ids):
    model.get_base_model().model.layers[1].mlp.shift = torch.full((), 0.5, device=ids.device)
    return {}


def other_class(model, ids):
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.__class__ = type("Doubled", (type(mlp),), {"forward": lambda self, x: 2 * super(type(self), self).forward(x)})
    return {}


def smaller_factors(model, ids):
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a.data, b.data = a.data[:2], b.data[:, :2]
    return {}


def positions(model, ids):
    return {"position_ids": torch.arange(ids.shape[1], device=ids.device).flip(0)[None].expand_as(ids)}


CHANGES = [mask_out, scale, freeze_some, write_adapter, replace_adapter, second_adapter, hook, hook_of_layer,
           own_forward, other_norm, other_activation, private_number,
           entry_of_a_dictionary, plain_tensor, other_class, smaller_factors, positions]  # fmt: skip


def gained(mlp, x):
    return mlp._gain * mlp.gains["own"] * (type(mlp).forward(mlp, x) + (0 if mlp.shift is None else mlp.shift))


def with_a_gain(folder, device):
    """Its second MLP has a number of its own, a dictionary of such, and may have a tensor that is no buffer."""
    model = adapted(folder, device)
    mlp = model.get_base_model().model.layers[1].mlp
    mlp._gain, mlp.gains, mlp.shift, mlp.forward = 1.0, {"own": 1.0}, None, types.MethodType(gained, mlp)
    return model


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_between_steps_counts(packed_llama, device, change):
    model, usual = with_a_gain(packed_llama, device), with_a_gain(packed_llama, device)
    model, ids = captured(model, device)
    before = step(model, ids)
    inputs, usual_inputs = change(model, ids), change(usual, ids)
    for _ in range(3):
        (loss, gradients), (usual_loss, usual_gradients) = step(model, ids, **inputs), step(usual, ids, **usual_inputs)
        assert loss == pytest.approx(usual_loss, rel=1e-5)
        for own, other in zip(gradients, usual_gradients, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)
    assert loss != pytest.approx(before[0], rel=1e-6) or change in (freeze_some, smaller_factors)


@pytest.mark.parametrize("where", ["registry", "module"])
def test_attention_that_is_put_in_the_place_of_another_counts(packed_llama, device, monkeypatch, where):
    model, ids = captured(adapted(packed_llama, device), device)
    loss, _ = step(model, ids)
    kind = type(model.get_base_model().model.layers[0].self_attn)
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if where == "registry":

        def louder(*args, **keywords):
            return 20 * usual(*args, **keywords)[0], None

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", louder)
    else:
        monkeypatch.setattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", lambda q, k, *_: (20 * q, 20 * k))
    changed, _ = step(model, ids)
    assert changed == pytest.approx(step(adapted(packed_llama, device), ids)[0], rel=1e-5)
    assert changed != pytest.approx(loss, rel=1e-4)


def test_steps_are_compared_at_a_glance(packed_llama, device, monkeypatch):
    """Nothing that layers name is written at every step: it would be read in full each time."""
    model, ids = captured(adapted(packed_llama, device), device)
    step(model, ids)
    monkeypatch.setattr(Decided, "_read", lambda self: pytest.fail("read in full"))
    for _ in range(2):
        step(model, ids)


def test_a_hook_of_all_modules_is_called(packed_llama, device):
    model, ids = captured(adapted(packed_llama, device), device)
    called = set()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: called.add(type(module)))
    step(model, ids)
    handle.remove()
    assert any("MLP" in kind.__name__ for kind in called)


def test_a_mode_of_torch_sees_what_is_called(packed_llama, device):
    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.add(func)
            return func(*args, **kwargs or {})

    model, ids = captured(adapted(packed_llama, device), device)
    called = set()
    with Seen():
        step(model, ids)
    assert torch.nn.functional.silu in called


def test_numbers_drawn_on_the_host_are_noticed():
    recorder = Recorder.__new__(Recorder)
    for draw in (lambda: torch.rand(1), random.random, np.random.rand):
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        with pytest.raises(NotCapturable, match="random numbers on the host"), recorder.without_chance():
            draw()
        assert torch.equal(torch.rand(1), expected)
    with recorder.without_chance():
        pass


def test_written_codes_are_refused_as_without(packed_llama, device):
    model, ids = captured(adapted(packed_llama, device), device)
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.add_(1)
    with pytest.raises(ValueError, match="written into"):
        step(model, ids)


def test_gradients_of_earlier_batches_stay_what_they_were(packed_llama, device):
    """They would lie in the memory that the next replay writes into."""
    model, usual = adapted(packed_llama, device), adapted(packed_llama, device)
    lowra.capture_layers(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    usual_parameters = [p for p in usual.parameters() if p.requires_grad]
    kept = []
    for ids in batches(device, 4):
        own = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters)
        kept.append((own, torch.autograd.grad(usual(input_ids=ids, labels=ids).loss, usual_parameters)))
    for own, other in kept:
        for ours, theirs in zip(own, other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def widened(mlp, x):
    return type(mlp).forward(mlp, x).double()


def narrowed(norm, x):
    return type(norm).forward(norm, x.float())


def test_layers_that_put_out_other_types(packed_llama, device):
    """The second layer's output is wider than the first's, whose input has the same type: each has its own place."""

    def make(*args, **kwargs):
        model = adapted(*args, **kwargs)
        body = model.get_base_model().model
        body.layers[1].mlp.forward = types.MethodType(widened, body.layers[1].mlp)
        body.norm.forward = types.MethodType(narrowed, body.norm)
        return model

    assert_as_without(packed_llama, device, make)


def writing(attention, *args, position_embeddings, **others):
    position_embeddings[0].add_(0)
    return type(attention).forward(attention, *args, position_embeddings=position_embeddings, **others)


def test_a_layer_that_writes_into_its_arguments(packed_llama, device, caplog):
    """The next layer would be given what this one was."""

    def make(*args, **kwargs):
        model = adapted(*args, **kwargs)
        attention = model.get_base_model().model.layers[0].self_attn
        attention.forward = types.MethodType(writing, attention)
        return model

    assert_as_without(packed_llama, device, make, steps=4)
    assert caplog.text.count("it writes into its arguments") == 1


def test_what_a_trainer_does_with_saved_tensors_is_no_part_of_a_graph(packed_llama, device):
    """TRL's activation_offloading copies them to the host, which a capture cannot."""
    model = adapted(packed_llama, device)
    lowra.capture_layers(model)
    saved = []
    for batch in batches(device, 3):
        saved.append(0)

        def count(tensor):
            saved[-1] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    assert saved[1] == saved[2] > 0  # captured in the second


def test_two_passes_before_one_backward(packed_llama, device):
    """As DPO makes them: what is recomputed belongs to its own inputs."""
    model, usual = adapted(packed_llama, device, dropout=0.2), adapted(packed_llama, device, dropout=0.2)
    lowra.capture_layers(model)
    found = []
    for one in (model, usual):
        torch.manual_seed(2)
        for first, second in zip(batches(device, 3), batches(device, 6)[3:], strict=True):
            one.zero_grad()
            (one(input_ids=first, labels=first).loss - 2 * one(input_ids=second, labels=second).loss).backward()
        found.append([p.grad.clone() for p in one.parameters() if p.grad is not None])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


def test_copies_and_pickles_are_without(packed_llama, device):
    model = adapted(packed_llama, device)
    lowra.capture_layers(model)
    (ids,) = batches(device, 1)
    for _ in range(3):
        before = step(model, ids)[0]
    twin = copy.deepcopy(model)
    model.get_base_model().disable_input_require_grads()  # which Transformers does by a closure
    for found in (twin, pickle.loads(pickle.dumps(model))):
        functions = [layer._gradient_checkpointing_func for layer in found.get_base_model().model.layers]
        assert not any(isinstance(function, layer_graphs._Checkpointing) for function in functions)
        assert step(found, ids)[0] == pytest.approx(before, rel=1e-5)
    assert step(model, ids)[0] == pytest.approx(before, rel=1e-6)


def in_halves(layer, x, **others):
    """A forward that checkpoints two functions, whose arguments look alike."""
    checkpoint = layer._gradient_checkpointing_func
    x = checkpoint(functools.partial(layer.input_layernorm), x)
    return checkpoint(functools.partial(layer.post_attention_layernorm), x) + checkpoint(
        functools.partial(torch.add, x.detach()), x
    )


def test_a_layer_that_is_checkpointed_in_parts(packed_llama, device, caplog):
    models = [adapted(packed_llama, device), adapted(packed_llama, device)]
    lowra.capture_layers(models[0])
    models[1].get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for model in models:
        layer = model.get_base_model().model.layers[0]
        layer.input_layernorm.weight.data.uniform_(generator=torch.Generator(device).manual_seed(1))
        layer.input_layernorm.weight.requires_grad_()
        x = torch.ones(2, 3, 64, device=device).cumsum(-1).requires_grad_()
        for _ in range(3):
            out = in_halves(layer, x)
            found.append((out, *torch.autograd.grad(out.sum(), (x, layer.input_layernorm.weight))))
    for own, usual in zip(found[:3], found[3:], strict=True):
        for one, other in zip(own, usual, strict=True):
            torch.testing.assert_close(one, other)
    assert caplog.text.count("it is checkpointed in parts") == 1


def waiting(mlp, x):
    return type(mlp).forward(mlp, x) * (1 + 0 * x.sum().item())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("noticed", [True, False], ids=["before", "while it is captured"])
def test_a_layer_that_waits_for_the_gpu(packed_llama, monkeypatch, caplog, noticed):
    if not noticed:
        monkeypatch.setattr(layer_graphs.Recorder, "without_waiting", lambda self: contextlib.nullcontext())

    def make(*args, **kwargs):
        model = adapted(*args, **kwargs)
        mlp = model.get_base_model().model.layers[1].mlp
        mlp.forward = types.MethodType(waiting, mlp)
        return model

    assert_as_without(packed_llama, "cuda", make, steps=6, dropout=0.2)
    assert caplog.text.count("it waits for the GPU" if noticed else "PyTorch could not capture it") == 1
    torch.randn(3, device="cuda")  # the generator is as it should be


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_run_on_a_full_gpu_goes_on_without_graphs(packed_llama, caplog):
    run = lambda model: trained(model, batches("cuda", 6))[0]  # noqa: E731
    without = run(adapted(packed_llama, "cuda"))
    model = adapted(packed_llama, "cuda")
    lowra.capture_layers(model)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.reset_peak_memory_stats()
    hog = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")  # once at the peak, and it may come back
    del hog
    torch.cuda.empty_cache()
    # Other tests leave segments of which a part is in use; growing ones may keep what the hog left.
    held = torch.cuda.memory_reserved()
    if held - torch.cuda.memory_allocated() >= 1 << 32:
        held = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_per_process_memory_fraction((held + (1 << 29)) / total)
        assert run(model) == without
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [record.message for record in caplog.records if "no room for graphs" in record.message]


@pytest.mark.parametrize("place", [(StandIn, "record"), (layer_graphs, "Buffers")], ids=["trial", "buffers"])
def test_memory_that_is_short_after_all(packed_llama, monkeypatch, caplog, place):
    """What had room may still find none: those layers run as without."""
    stand_in(monkeypatch.setattr)
    usual, calls = getattr(*place), []

    def short(*args):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(*args)

    monkeypatch.setattr(*place, short)
    assert_as_without(packed_llama, "cpu", steps=4)
    assert caplog.text.count("a trial of it failed (CUDA out of memory)") == 1


def test_where_there_is_no_gpu_one_warning_says_so(packed_llama, caplog):
    model = adapted(packed_llama, "cpu")
    lowra.capture_layers(model)
    (ids,) = batches("cpu", 1)
    for _ in range(3):
        step(model, ids)
    assert caplog.text.count("it is on cpu, and graphs are for NVIDIA GPUs") == 1


def test_a_model_without_layers_to_capture_is_refused():
    with pytest.raises(ValueError, match="Linear has no layers that Transformers checkpoints"):
        lowra.capture_layers(torch.nn.Linear(2, 2))
