"""Packed modules whose tensors change under them: other packings, averages, moves, copies, inference mode."""

import copy
import functools
import io
import pickle
import re
from multiprocessing.reduction import ForkingPickler

import accelerate
import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from peft import LoraConfig, get_peft_model
from small_models import inputs_of, logits_of, make_model, packed_layers
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import lowra
from lowra.nn import packed_module
from lowra.nn.trained_tables import train_tables
from lowra.weights.packed import TENSOR_NAMES

# architecture, and what is packed beside its linear layers
KINDS = {
    "linear": ("LlamaForCausalLM", {}),
    "tied": ("GemmaForCausalLM", {"quantize_embeddings": True}),
    "untied": ("LlamaForCausalLM", {"quantize_embeddings": True, "quantize_head": True}),
    "experts": ("Qwen3MoeForCausalLM", {}),
    "t5": ("T5ForConditionalGeneration", {"quantize_embeddings": True}),
}


@pytest.fixture(scope="module")
def packing(tmp_path_factory):
    """Loads a packing of a kind; another seed has other weights and other precisions of the rows."""
    folder = tmp_path_factory.mktemp("packings")

    @functools.cache
    def write(kind, seed, options):
        architecture, packed = KINDS[kind]
        name = "-".join([kind, str(seed), *(f"{value}" for _, value in options)])
        make_model(architecture, seed=seed).save_pretrained(folder / f"{name}-dense")
        config = lowra.LowRAConfig(**{"bits": 1.75, **dict(options)}, **packed)
        lowra.quantize_checkpoint(str(folder / f"{name}-dense"), folder / name, config, progress=False)
        return folder / name

    def load(kind, seed=0, **options):
        auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
        return auto.from_pretrained(write(kind, seed, tuple(options.items()))).eval()

    return load


def by_state_dict(model, other):
    model.load_state_dict(other.state_dict())


def by_assigning(model, other):
    model.load_state_dict(other.state_dict(), assign=True)


def by_module(model, other):
    for one, another in zip(model.modules(), other.modules(), strict=True):
        one.load_state_dict(another.state_dict())


def by_new_parameters(model, other):
    """As engines do that shard."""
    for one, another in zip(model.modules(), other.modules(), strict=True):
        for name, parameter in another.named_parameters(recurse=False):
            one._parameters[name] = torch.nn.Parameter(parameter.data.clone(), requires_grad=False)


def by_data(model, other):
    for parameter, another in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = another.data.clone()


def by_copying(model, other):
    with torch.no_grad():
        for parameter, another in zip(model.parameters(), other.parameters(), strict=True):
            parameter.copy_(another)


def by_copying_data(model, other):
    for parameter, another in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data.copy_(another.data)


def by_accelerate(model, other):
    for name, parameter in other.named_parameters(remove_duplicate=False):
        set_module_tensor_to_device(model, name, "cpu", value=parameter.data.clone())


@pytest.mark.parametrize("way", [by_state_dict, by_assigning, by_module, by_new_parameters])
@pytest.mark.parametrize("options", [{}, {"bits": 1.25}, {"bits": 3, "menu": (2, 4)}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_another_packing_put_into_a_model_is_used_as_it_is(packing, kind, options, way):
    model, other = packing(kind), packing(kind, seed=1, **options)
    before, wanted = logits_of(model), logits_of(other)
    assert not torch.allclose(before, wanted, atol=1e-2)
    way(model, other)
    assert torch.equal(logits_of(model), wanted)
    for name, layer in packed_layers(model).items():
        twin = other.get_submodule(name)
        assert layer.row_counts == twin.row_counts and torch.equal(layer.dequantize(), twin.dequantize())


@pytest.mark.parametrize("scales", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["linear", "tied"])
def test_scales_of_another_storage_are_loaded_with_the_rest(packing, kind, scales):
    model, other = packing(kind), packing(kind, seed=1, scales=scales)
    by_state_dict(model, other)
    assert torch.equal(logits_of(model), logits_of(other))
    back = packing(kind)
    by_state_dict(model, back)
    assert torch.equal(logits_of(model), logits_of(back))


@pytest.mark.parametrize("way", [by_data, by_copying, by_copying_data, by_accelerate])
@pytest.mark.parametrize("kind", KINDS)
def test_other_ways_are_followed_or_refused(packing, kind, way):
    model, other = packing(kind), packing(kind, seed=1)
    logits_of(model)
    try:
        way(model, other)
        assert torch.equal(logits_of(model), logits_of(other))
    except (ValueError, RuntimeError) as error:  # of ours, or sizes that do not fit
        assert "written into" in str(error) or "size" in str(error) or "shape" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_another_order_are_followed(packing, kind):
    """The same counts, so that every size fits."""
    for layer in packed_layers(packing(kind)).values():
        whole = layer.dequantize()
        order = layer.row_bits.argsort(stable=True)
        if torch.equal(layer.row_bits, layer.row_bits[order]):
            continue
        expected = torch.empty_like(whole)  # rows of a precision keep their order among themselves
        for bits in (4, 2, 1):
            expected[layer.row_bits[order] == bits] = whole[layer.row_bits == bits]
        layer.row_bits.copy_(layer.row_bits[order].clone())
        assert torch.equal(layer.dequantize(), expected)


def test_a_compiled_layer_follows_too(packing):
    model, other = packing("linear"), packing("linear", seed=1, bits=1.25)
    layer, twin = (one.model.layers[0].mlp.up_proj for one in (model, other))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, layer.in_features)
    assert torch.equal(compiled(x), layer(x))
    layer.load_state_dict(twin.state_dict())
    assert torch.equal(compiled(x), twin(x))


def in_place(layer, name):
    with torch.no_grad():
        layer.get_parameter(name).copy_(layer.get_parameter(name).flip(0))


def in_data(layer, name):
    layer.get_parameter(name).data = layer.get_parameter(name).flip(0)


def anew(layer, name):
    layer._parameters[name] = torch.nn.Parameter(layer.get_parameter(name).flip(0), requires_grad=False)


def assert_refused_until_prepared(compiled, layer, x, name, change, same=torch.equal):
    change(layer, name)
    with pytest.raises(RuntimeError, match=f"{name} of a packed layer"):
        compiled(x)
    layer.prepare()  # it was meant
    assert same(compiled(x), layer(x))


@pytest.mark.parametrize("how", [in_place, in_data, anew])
@pytest.mark.parametrize("name", ["row_bits", "weight"])
def test_a_compiled_layer_refuses_what_came_past_load_state_dict(packing, name, how):
    """Of the same sizes, which no guard of the compiler notices."""
    layer = packing("linear").model.layers[0].mlp.up_proj
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, layer.in_features)
    assert torch.equal(compiled(x), layer(x))
    assert_refused_until_prepared(compiled, layer, x, name, how)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", [in_place, anew])
@pytest.mark.parametrize("name", ["row_bits", "weight"])
def test_compiled_code_for_a_gpu_has_its_ops_ask(packing, monkeypatch, name, how, backend):
    """There contents are not compared, which would make it wait: so without what goes past the counter of changes."""
    monkeypatch.setattr(packed_module, "_ASKED_BY_OPS", ("cpu",))
    layer = packing("linear").model.layers[0].mlp.up_proj
    layer._accept(layer.row_layout())
    factor = torch.nn.Parameter(torch.ones(()))
    compiled = torch.compile(lambda x: layer(x * factor), fullgraph=True, backend=backend)
    x = torch.randn(3, layer.in_features)
    compiled(x).sum().backward()
    assert torch.equal(compiled(x), layer(x))
    assert_refused_until_prepared(compiled, layer, x, name, how)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("how", [in_place, anew])
@pytest.mark.parametrize("name", ["row_bits", "weight"])
def test_compiled_code_on_a_gpu_asks(packing, name, how, backend):
    layer = packing("linear").model.layers[0].mlp.up_proj.cuda()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(3, layer.in_features, device="cuda")
    same = functools.partial(torch.allclose, atol=1e-5)
    assert same(compiled(x), layer(x))
    assert_refused_until_prepared(compiled, layer, x, name, how, same)


def changed(state, suffix, change):
    return {name: change(tensor) if name.endswith(suffix) else tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("q_proj.weight", lambda tensor: tensor.float(), "weight is torch.float32"),
        ("q_proj.weight", lambda tensor: tensor[:-16], "no packing"),
        ("q_proj.row_bits", lambda tensor: tensor + 1, "no packing"),
        ("q_proj.row_bits", lambda tensor: tensor[:-1], "row_bits is"),
        ("q_proj.scales", lambda tensor: tensor.int(), "scales is torch.int32"),
        ("q_proj.levels", lambda tensor: tensor[1:], "no packing"),
        ("q_proj.scales", lambda tensor: tensor.half(), "no packing"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_what_is_no_packing_is_refused_by_name(packing, suffix, change, message, assign):
    model = packing("linear")
    with pytest.raises(RuntimeError, match=f"layers.1.self_attn.q_proj: .*{message}"):
        model.load_state_dict(changed(model.state_dict(), suffix, change), assign=assign)


def test_other_groups_are_refused(packing, tmp_path):
    """Groups of 40 and of 64 are two in a row of 64 or 72: no size would tell them apart."""
    model, other = packing("linear"), packing("linear", group_size=40)
    torch.save(other.state_dict(), tmp_path / "state.pt")
    with pytest.raises(RuntimeError, match="groups of 40"):
        model.load_state_dict(torch.load(tmp_path / "state.pt"))


def test_tables_in_training_do_not_take_other_codes(packing):
    model, other = packing("linear"), packing("linear", seed=1)
    train_tables(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    with pytest.raises(RuntimeError, match="bake_tables"):
        model.load_state_dict(other.state_dict(), strict=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        {"avg_fn": get_ema_avg_fn(0.9)},
        {"avg_fn": lambda averaged, parameter, count: 0.95 * averaged + 0.05 * parameter},
        {},
    ],
    ids=["multi", "single", "own", "mean"],
)
def test_averaged_models_compute_the_same_or_refuse(packing, kind, options):
    model = packing(kind)
    averaged = AveragedModel(model, **options)
    for _ in range(3):
        averaged.update_parameters(model)
    try:
        torch.testing.assert_close(logits_of(averaged.module), logits_of(model), rtol=1e-3, atol=1e-3)
    except ValueError as error:
        assert "no numbers" in str(error)


AVERAGES = {
    "copy": lambda own, other: own.copy_(0.9 * own + 0.1 * other),
    "copy of data": lambda own, other: own.data.copy_(0.9 * own.data + 0.1 * other.data),
    "data": lambda own, other: setattr(own, "data", (0.9 * own.data + 0.1 * other.data).to(own.dtype)),
    "float data": lambda own, other: setattr(own, "data", 0.9 * own.data + 0.1 * other.data),
    "lerp": lambda own, other: own.lerp_(other, 0.1),
    "mul and add": lambda own, other: own.mul_(0.9).add_(other, alpha=0.1),
    "integer mean": lambda own, other: own.copy_((own + other) / 2),
    "zero": lambda own, other: own.zero_(),
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_averages_by_hand_are_refused(packing, kind, average):
    model = packing(kind)
    twin = copy.deepcopy(model)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)), torch.no_grad():
        for own, other in zip(twin.parameters(), model.parameters(), strict=True):
            AVERAGES[average](own, other)
        logits_of(twin)


def test_averaging_what_is_trained_is_no_concern_of_ours(packing):
    model = get_peft_model(packing("linear"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    wanted = logits_of(model.eval())
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        for own, other in zip(averaged.parameters(), model.parameters(), strict=True):
            if own.requires_grad:
                own.lerp_(other, 0.1)
    assert torch.equal(logits_of(averaged), wanted)


def test_averaged_state_dicts_are_refused(packing):
    model = packing("linear")
    mean = {name: (tensor.float() * 3 / 3) for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="averaged like numbers"):
        model.load_state_dict(mean)


def test_codes_changed_on_purpose_are_accepted_by_prepare(packing):
    layer = packing("linear").model.layers[0].mlp.up_proj
    layer.weight.bitwise_not_()
    with pytest.raises(ValueError, match=r"prepare\(\)"):
        layer(torch.ones(1, layer.in_features))
    layer.prepare()
    assert torch.isfinite(layer(torch.ones(1, layer.in_features))).all()


@pytest.mark.parametrize("how", ["forward", "to", "prepare", "load", "load_state_dict", "generate"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_after_inference_mode(packing, kind, how):
    model = packing(kind)
    with torch.inference_mode():
        if how == "forward":
            model(**inputs_of(model))
        elif how == "to":
            model.to("cpu")
        elif how == "prepare":
            for layer in packed_layers(model).values():
                layer.prepare()
        elif how == "load":
            model = packing(kind)
        elif how == "load_state_dict":
            by_state_dict(model, packing(kind, seed=1, bits=1.25))
        else:
            model.generate(inputs_of(model)["input_ids"], max_new_tokens=2, pad_token_id=0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    model.enable_input_require_grads()
    inputs = inputs_of(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_packed_while_it_is_loaded_under_inference_mode(dense_llama):
    """Of a dense checkpoint other threads make the tensors, which know no inference mode."""
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(dense_llama, quantization_config=lowra.LowRAConfig(bits=1.5))
    assert not any(parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["linear", "tied"])
def test_parameters_that_pytorch_swaps(packing, kind, monkeypatch):
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model, other = packing(kind), packing(kind, seed=1)
    logits_of(model)
    by_state_dict(model, other)
    assert torch.equal(logits_of(model), logits_of(other))
    assert torch.equal(logits_of(model.to(torch.bfloat16)), logits_of(other.to(torch.bfloat16)))


@pytest.mark.parametrize("how", ["assign", "deepcopy", "pickle", "bfloat16"])
def test_packed_layers_made_under_inference_mode_train(packing, how):
    """Dense ones would not; what else the model has is as with a dense one."""
    model = packing("linear")
    with torch.inference_mode():
        if how == "assign":
            by_assigning(model, packing("linear", seed=1))
        elif how == "bfloat16":
            model.to(torch.bfloat16)
        else:
            model = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    layer = model.model.layers[0].mlp.up_proj
    x = torch.ones(2, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0
    tables = train_tables(model)
    model.model.layers[0].mlp.up_proj(x).sum().backward()
    assert all(p.grad is not None for name, p in tables.items() if name.startswith("model.layers.0.mlp.up_proj"))


def saved(model, **options):
    file = io.BytesIO()
    torch.save(model, file, **options)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "torch.save": saved,
    "torch.save of old": functools.partial(saved, _use_new_zipfile_serialization=False),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "another process": lambda model: ForkingPickler.loads(bytes(ForkingPickler.dumps(model))),
    "copy of a copy": lambda model: saved(copy.deepcopy(saved(model))),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapter"])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_compute_the_same_and_are_their_own(packing, kind, how, adapted):
    model = packing(kind)
    if adapted:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config).eval()
    wanted = logits_of(model)
    twin = COPIES[how](model)
    assert torch.equal(logits_of(twin), wanted)
    assert len({id(p) for p in twin.parameters()}) == len({id(p) for p in model.parameters()})  # ties are kept
    if how != "another process":  # there memory is shared, as with dense models
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.is_floating_point():
                    parameter.zero_()
        assert torch.equal(logits_of(model), wanted)


def test_a_copy_can_be_saved_merged_and_made_dense(packing, tmp_path):
    model = copy.deepcopy(packing("t5"))
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits_of(again.eval()), logits_of(model))
    wanted = logits_of(model)
    dense = saved(model).dequantize()
    assert not packed_layers(dense)
    torch.testing.assert_close(logits_of(dense), wanted, rtol=1e-4, atol=1e-4)


def _logits_to(queue, model):
    torch.set_num_threads(1)
    queue.put(logits_of(model).numpy())


@pytest.mark.slow
def test_a_spawned_process_computes_the_same(packing):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    model = packing("tied")
    process = context.Process(target=_logits_to, args=(queue, model))
    process.start()
    while queue.empty() and process.is_alive():
        process.join(0.1)
    assert not queue.empty(), "it ended without a word"
    logits = torch.from_numpy(queue.get())
    process.join()
    assert torch.equal(logits, logits_of(model))


@pytest.mark.parametrize("kind", KINDS)
def test_offloading_hooks_bring_what_a_forward_needs(packing, kind):
    model, offloaded, other = packing(kind), packing(kind), packing(kind, seed=1)
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(offloaded(**inputs_of(model), use_cache=False).logits, logits_of(model))
    accelerate.hooks.remove_hook_from_submodules(offloaded)
    by_state_dict(offloaded, other)
    assert torch.equal(logits_of(offloaded), logits_of(other))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_models_move_to_every_floating_type(packing, kind, dtype):
    model = packing(kind)
    wanted = logits_of(model)
    moved = packing(kind).to(dtype)
    logits = logits_of(moved)
    assert logits.dtype == dtype
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-6, torch.bfloat16: 0.1, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(logits, wanted.to(dtype), rtol=tolerance, atol=tolerance)
    assert torch.equal(logits_of(moved.to(torch.float32)), wanted) or dtype in (torch.bfloat16, torch.float16)
    adapted = get_peft_model(moved.to(dtype), LoraConfig(r=4, target_modules="all-linear"))
    adapted.enable_input_require_grads()
    inputs = inputs_of(adapted)
    with torch.autocast("cpu", enabled=False):
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()


@pytest.mark.parametrize("kind", ["linear", "tied", "experts"])
def test_what_was_asked_for_gradients_moves(packing, kind):
    model, wanted = packing(kind), logits_of(packing(kind))
    asked = [parameter.requires_grad_() for parameter in model.parameters() if parameter.is_floating_point()]
    model.to(torch.bfloat16).to(torch.float32)
    assert all(parameter.requires_grad for parameter in asked)
    torch.testing.assert_close(logits_of(model), wanted, rtol=0.1, atol=0.1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for parameter in asked:
        parameter.requires_grad_()
    adapted.merge_adapter()
    adapted.unmerge_adapter()  # puts packed layers on their device


def test_double_precision_is_double(packing):
    layer = packing("linear").model.layers[0].mlp.up_proj.double()
    x = torch.randn(2, layer.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), x @ layer.dequantize().double().T)
    assert torch.autograd.gradcheck(layer, x)


def test_casting_integers_is_refused(packing):
    with pytest.raises(TypeError, match="use model.to"):
        packing("linear").type(torch.float16)


@pytest.mark.parametrize("kind", ["tied", "t5"])
def test_moving_keeps_what_is_tied_tied(packing, kind):
    model = packing(kind)
    count = len(list(model.parameters()))
    model.to("cpu").to(torch.bfloat16)
    assert len(list(model.parameters())) == count


def test_memory_of_nothing_yet_is_filled_by_loading(packing):
    model, other = packing("tied"), packing("tied", seed=1)
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    by_state_dict(empty, other)
    for name, buffer in other.named_buffers():
        empty.get_buffer(name).copy_(buffer)  # not in the state dict
    assert torch.equal(logits_of(empty), logits_of(other))


def of_tied(model):
    """The packed tensors of input embeddings, and of all that holds the same."""
    table = model.get_input_embeddings()
    return [module._parameters for module in (table, *table.tied)]


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("before", ["double_quant", "float16"])
@pytest.mark.parametrize("after", ["double_quant", "float16"])
@pytest.mark.parametrize("kind", ["tied", "t5"])
def test_what_is_tied_stays_so_with_scales_of_another_storage(packing, kind, before, after, assign, tmp_path):
    model, other = packing(kind, scales=before), packing(kind, seed=1, scales=after)
    wanted, size = logits_of(other), sum(p.nbytes for p in other.parameters())
    model.load_state_dict(other.state_dict(), assign=assign)
    model.tie_weights()  # as Trainer and PEFT do
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float32)):
        first, *others = of_tied(twin)
        assert others and all(
            tensor is first[name] for each in others for name, tensor in each.items() if name in first
        )
        assert sum(p.nbytes for p in twin.parameters()) == size  # counted once
        assert twin.num_parameters() == other.num_parameters()
        assert torch.equal(logits_of(twin), wanted)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again), wanted)
    assert len({id(each["weight"]) for each in of_tied(again)}) == 1


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_state_that_names_the_table_alone_is_that_of_the_head_too(packing, assign):
    """As safetensors files do, and Transformers for models whose embeddings are tied."""
    model, other = packing("tied", scales="float16"), packing("tied", seed=1)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=True)).eval()
    state = {name: tensor for name, tensor in other.state_dict().items() if not name.startswith("lm_head")}
    model.get_base_model().load_state_dict(
        {re.sub(r"_proj\.", "_proj.base_layer.", name): tensor for name, tensor in state.items()},
        strict=False,
        assign=assign,
    )
    assert torch.equal(logits_of(model), logits_of(other))


@pytest.mark.parametrize("ending", [".weight", ".row_bits"])
def test_half_of_another_packing_is_refused(packing, ending):
    model, other = packing("linear"), packing("linear", seed=1)
    before = logits_of(model)
    half = {name: tensor for name, tensor in other.state_dict().items() if name.endswith(ending) and "layers" in name}
    with pytest.raises(RuntimeError, match="another packing's and .* is missing: they are loaded together"):
        model.load_state_dict(half, strict=False)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith(ending)}
    model.load_state_dict(own, strict=False)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("given", [("weight", "row_bits"), ("scales",), None])
def test_altered_codes_are_refused_however_few_of_the_tensors_come(packing, given):
    model, name = packing("linear"), "model.layers.0.mlp.up_proj."
    before, own = logits_of(model), model.state_dict()
    some = {key: own[key].clone() for key in own if key.rpartition(name)[2] in (given or TENSOR_NAMES)}
    model.load_state_dict(some, strict=False)
    assert torch.equal(logits_of(model), before)
    altered = some[name + ("scales" if given == ("scales",) else "weight")]
    if altered.dtype != torch.uint8:
        pytest.skip("scales of this storage are numbers, and may be trained")
    altered.view(-1)[3] ^= 1
    with pytest.raises(
        RuntimeError, match="codes are none that this process has loaded|without the codes that they belong to"
    ):
        model.load_state_dict(some, strict=False)
    assert torch.equal(logits_of(model), before)


def as_a_vector(model):
    every = list(model.parameters())
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(every), every)


def pruned(model):
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)


def pruned_everywhere(model):
    layers = [(layer.mlp.up_proj, "weight") for layer in model.model.layers]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)


def parametrized(model):
    parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", torch.nn.Identity())


@pytest.mark.parametrize("change", [as_a_vector, pruned, pruned_everywhere, parametrized])
def test_codes_are_not_taken_for_weights(packing, change):
    model = packing("linear")
    before = logits_of(model)
    with pytest.raises((ValueError, TypeError), match=r"are no numbers|can be neither pruned|that require") as error:
        change(model)
        logits_of(model)
    assert "\n" not in str(error.value)
    if change is not as_a_vector:
        assert torch.equal(logits_of(model), before)
