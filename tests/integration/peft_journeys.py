"""What users of PEFT and Transformers do with dense models, run by `test_patches` with and without `import lowra`.

python peft_journeys.py FOLDER [--lowra]  writes FOLDER/results.json: for each journey what came out, what was raised,
what was warned of, and digests of the files that were written.
"""

import contextlib
import copy
import hashlib
import inspect
import io
import json
import os
import pathlib
import pickle
import sys
import tempfile
import warnings

if "--lowra" in sys.argv:
    import lowra  # noqa: F401

import peft
import torch
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from transformers import LlamaConfig, T5Config

SIZES = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SIZES, max_position_embeddings=32, pad_token_id=0)
T5 = T5Config(vocab_size=48, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
LAYERS = ["q_proj", "v_proj"]
JOURNEYS = {}


def journey(function):
    JOURNEYS[function.__name__] = function
    return function


def for_each(**cases):
    """A journey for each case, which is handed to it."""

    def register(function):
        for name, case in cases.items():
            JOURNEYS[f"{function.__name__}: {name}"] = lambda case=case: function(case)
        return function

    return register


def llama(model_class=transformers.LlamaForCausalLM, dtype=torch.float32):
    torch.manual_seed(0)
    return model_class(copy.deepcopy(LLAMA)).to(dtype).eval()


def tokens():
    return torch.arange(3, 21).view(2, 9)


@torch.no_grad()
def out(model, **inputs):
    """What a model computes, as a digest."""
    inputs = inputs or {"input_ids": tokens()}
    result = model(**inputs)
    return digest(result[0] if isinstance(result, tuple) else next(iter(result.values())))


def digest(tensor):
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()[:16]


def state(model):
    """What a model is, but for its outputs."""
    own = {name: repr(value)[:200] for name, value in vars(model).items() if not name.startswith("_")}
    configs = getattr(model, "peft_config", None) or {}
    return {
        "attributes": {name: text for name, text in own.items() if " at 0x" not in text},
        "names": sorted(name for name in vars(model) if name != "_modules"),
        "modules": [f"{name} {type(m).__module__}.{type(m).__qualname__}" for name, m in model.named_modules()],
        "tensors": {name: digest(t) for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)},
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
        "configs": {name: repr(sorted(vars(config).items(), key=str)) for name, config in configs.items()},
        "training": model.training,
    }


def lora(model=None, adapter="default", seed=1, mixed=False, **options):
    """A model with a LoRA that computes something."""
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": LAYERS} | options))
    torch.manual_seed(seed)
    adapted = get_peft_model(llama() if model is None else model, config, adapter_name=adapter, mixed=mixed)
    return noise(adapted, seed)


def noise(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def saved(folder="adapter", seed=1, **options):
    model = lora(seed=seed, **options).eval()
    model.save_pretrained(folder)
    return folder


TASKS = {
    "CAUSAL_LM": transformers.LlamaForCausalLM,
    "SEQ_CLS": transformers.LlamaForSequenceClassification,
    "TOKEN_CLS": transformers.LlamaForTokenClassification,
    "QUESTION_ANS": transformers.LlamaForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.LlamaModel,
}


@for_each(**{task: task for task in TASKS})
def tasks_train_save_and_load(task):
    model = lora(llama(TASKS[task]), task_type=TaskType[task]).train()
    result = model(input_ids=tokens())
    first = result.logits if hasattr(result, "logits") else next(iter(result.values()))
    first.sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    returned = model.eval().save_pretrained("adapter")
    again = PeftModel.from_pretrained(llama(TASKS[task]), "adapter")
    resumed = PeftModel.from_pretrained(llama(TASKS[task]), "adapter", "named", True)
    return [returned, out(model), out(again), state(model), state(again), state(resumed)]


@journey
def encoder_and_decoder():
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens()}
    torch.manual_seed(0)
    base = transformers.T5ForConditionalGeneration(T5).eval()
    model = lora(copy.deepcopy(base), target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM").eval()
    model.save_pretrained("adapter")
    again = PeftModel.from_pretrained(base, "adapter")
    return [out(model, **inputs), out(again, **inputs), state(again)]


METHODS = {
    "AdaLora": {"total_step": 10, "target_modules": LAYERS},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "Vera": {"r": 4, "target_modules": LAYERS},
    "OFT": {"r": 0, "oft_block_size": 8, "target_modules": LAYERS},
    "BOFT": {"boft_block_size": 8, "target_modules": LAYERS},
    "LoHa": {"r": 4, "target_modules": LAYERS},
    "LoKr": {"r": 4, "target_modules": LAYERS},
    "FourierFT": {"n_frequency": 10, "target_modules": LAYERS},
    "HRA": {"r": 4, "target_modules": LAYERS},
    "VBLoRA": {"r": 4, "num_vectors": 8, "vector_length": 16, "topk": 2, "target_modules": LAYERS},
    "LNTuning": {"target_modules": ["norm"]},
    "TrainableTokens": {"token_indices": [3, 4]},
    "PromptTuning": {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"},
    "PrefixTuning": {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"},
    "PromptEncoder": {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM", "encoder_hidden_size": 16},
    "AdaptionPrompt": {"adapter_len": 4, "adapter_layers": 1, "task_type": "CAUSAL_LM"},
    "Shira": {"r": 4, "target_modules": LAYERS},
    "LoraMoreThanOne": {"config": "Lora", "r": 4, "target_modules": "all-linear", "use_dora": True},
    "LoraPissa": {"config": "Lora", "r": 4, "target_modules": LAYERS, "init_lora_weights": "pissa"},
    "LoraOlora": {"config": "Lora", "r": 4, "target_modules": LAYERS, "init_lora_weights": "olora"},
    "LoraOrthogonal": {"config": "Lora", "r": 4, "target_modules": LAYERS, "init_lora_weights": "orthogonal"},
    "LoraParameters": {"config": "Lora", "r": 4, "target_modules": [], "target_parameters": ["q_proj.weight"]},
    "LoraModules": {"config": "Lora", "r": 4, "target_modules": LAYERS, "modules_to_save": ["embed_tokens", "lm_head"]},
    "LoraTokens": {"config": "Lora", "r": 4, "target_modules": LAYERS, "trainable_token_indices": [3, 5]},
    "LoraReplicated": {"config": "Lora", "r": 4, "target_modules": LAYERS, "layer_replication": [[0, 2], [1, 2]]},
    "LoraEmbeddings": {"config": "Lora", "r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
}


@for_each(**METHODS)
def methods_save_load_and_merge(options):
    options = dict(options)
    kind = options.pop("config", None) or next(name for name, given in METHODS.items() if given == options)
    torch.manual_seed(1)
    model = noise(get_peft_model(llama(), getattr(peft, f"{kind}Config")(**options))).eval()
    model.save_pretrained("adapter")
    again = PeftModel.from_pretrained(llama(), "adapter").eval()
    result = [out(model), out(again), state(model), state(again)]
    if not hasattr(again, "merge_and_unload"):
        return result
    merged = again.merge_and_unload()
    return [*result, out(merged), state(merged)]


@journey
def several_adapters():
    saved("one", task_type="CAUSAL_LM"), saved("two", 2, r=4, task_type="CAUSAL_LM")
    model = PeftModel.from_pretrained(llama(), "one", adapter_name="one").eval()
    result = [str(model.load_adapter("two", "two")), out(model), state(model)]
    model.set_adapter("two")
    result += [out(model), model.active_adapters]
    model.add_weighted_adapter(["one", "two"], [0.5, 0.25], "both", combination_type="linear")
    model.add_weighted_adapter(["one", "two"], [0.5, 0.25], "cat", combination_type="cat")
    model.set_adapter("both")
    result += [out(model), out(model, input_ids=tokens(), adapter_names=["one", "__base__"])]
    model.save_pretrained("all", selected_adapters=["both", "cat"])
    with model.disable_adapter():
        result.append(out(model))
    model.merge_adapter(["one"])
    result.append(out(model))
    model.unmerge_adapter()
    model.delete_adapter("both")
    result += [out(model), state(model)]
    unloaded = model.unload()
    return [*result, out(unloaded), state(unloaded)]


@for_each(same="default", other="other")
def deleted_and_loaded_again(name):
    saved()
    model = PeftModel.from_pretrained(llama(), "adapter").eval()
    model.delete_adapter("default")
    loaded = model.load_adapter("adapter", name)
    before = state(model)
    model.set_adapter(name)
    return [str(loaded), before, out(model), state(model)]


@journey
def deleted_among_others():
    saved()
    model = PeftModel.from_pretrained(llama(), "adapter", "a").eval()
    model.load_adapter("adapter", "b")
    model.delete_adapter("a")
    model.load_adapter("adapter", "a")
    model.add_adapter("c", LoraConfig(r=2, target_modules=LAYERS))
    model.save_pretrained("again")
    return [out(model), state(model)]


@for_each(mixed_up=("law-v2", "law"), part=("default", "de"), prefix=("x", "lora"), whole=("q_proj", "proj"))
def names_within_names(names):
    first, second = names
    saved("one"), saved("two", 2)
    model = PeftModel.from_pretrained(llama(), "one", adapter_name=first).eval()
    loaded = model.load_adapter("two", second)
    model.set_adapter(second)
    return [str(loaded), out(model), state(model)]


@journey
def mixed_models():
    saved("one"), saved("two", 2)
    model = PeftMixedModel.from_pretrained(llama(), "one").eval()
    loaded = model.load_adapter("two", adapter_name="two")
    result = [str(loaded), out(model), state(model)]
    model.add_adapter("three", peft.LoHaConfig(r=4, target_modules=["k_proj"]))
    noise(model)
    model.set_adapter(["default", "two", "three"])
    result += [out(model), state(model)]
    model.delete_adapter("two")
    merged = model.merge_and_unload()
    return [*result, out(merged), state(merged)]


@journey
def mixed_models_made_and_not_saved():
    model = lora(mixed=True).eval()
    return [out(model), state(model), type(model).__name__, what_is_raised(lambda: model.save_pretrained("adapter"))]


CALLS = {
    "positional": (("adapter", "new", True, "cpu", False, False, True), {}),
    "keywords": ((), {"model_id": "adapter", "adapter_name": "new", "torch_device": "cpu", "is_trainable": True}),
    "device object": (("adapter", "new"), {"torch_device": torch.device("cpu")}),
    "path": ((pathlib.Path("adapter"), "new"), {}),
    "offload": (("adapter", "new"), {"ephemeral_gpu_offload": True}),
    "little memory": (("adapter", "new"), {"low_cpu_mem_usage": True}),
    "own dtype": (("adapter", "new"), {"autocast_adapter_dtype": False}),
    "mapped": (("adapter", "new"), {"key_mapping": {"q_proj": "k_proj"}}),
    "mismatched": (("adapter", "default"), {"ignore_mismatched_sizes": True}),
    "subfolder": ((".", "new"), {"subfolder": "adapter"}),
    "onto itself": (("adapter", "default"), {"is_trainable": True}),
    "no such folder": (("nowhere", "new"), {}),
    "no such path": (("/nowhere/at all", "new"), {}),
    "strange name": (("a/b/c/d", "new"), {}),
    "no name": (("adapter",), {}),
    "nothing": ((), {}),
    "too much": (("adapter", "new", True, "cpu", True, False, False, None, "more"), {}),
    "unknown": (("adapter", "new"), {"something": 1}),
    "no adapter": ((".", "new"), {}),
    "none": ((None, "new"), {}),
}


@for_each(**CALLS)
def ways_to_call_load_adapter(call):
    args, kwargs = call
    saved()
    model = lora(llama(dtype=torch.bfloat16), seed=3).eval()
    loaded = model.load_adapter(*args, **kwargs)
    result = [str(loaded), state(model)]
    model.set_adapter(list(model.peft_config)[-1])
    return [*result, out(model)]


@for_each(
    positional=((llama, "adapter", "new", True), {}),
    keywords=((llama,), {"model_id": "adapter", "adapter_name": "new", "low_cpu_mem_usage": True}),
    configured=((llama, "adapter"), {"config": LoraConfig(r=4, lora_alpha=2, target_modules=LAYERS)}),
    smaller=((llama, "adapter"), {"config": LoraConfig(r=4, target_modules=["q_proj"])}),
    larger=((llama, "adapter"), {"config": LoraConfig(r=4, target_modules="all-linear")}),
    other_rank=((llama, "adapter"), {"config": LoraConfig(r=2, target_modules=LAYERS)}),
    offload=((llama, "adapter"), {"ephemeral_gpu_offload": True}),
    half=((lambda: llama(dtype=torch.bfloat16), "adapter"), {"autocast_adapter_dtype": False}),
    nowhere=((llama, "nowhere"), {}),
    wrong_config=((llama, "adapter"), {"config": "text"}),
)
def ways_to_call_from_pretrained(call):
    (make, *args), kwargs = call
    saved()
    model = PeftModel.from_pretrained(make(), *args, **copy.deepcopy(kwargs))
    return [out(model), state(model)]


@for_each(
    positional=(("saved", False, ["default"], True, True), {}),
    bin=(("saved",), {"safe_serialization": False}),
    embeddings=(("saved",), {"save_embedding_layers": True}),
    not_main=(("saved",), {"is_main_process": False}),
    keywords=((), {"save_directory": pathlib.Path("saved"), "selected_adapters": ["second"]}),
    unknown_adapter=(("saved",), {"selected_adapters": ["third"]}),
    nothing=((), {}),
    file=(("file",), {}),
)
def ways_to_call_save_pretrained(call):
    args, kwargs = call
    pathlib.Path("file").write_text("")
    model = lora()
    model.add_adapter("second", LoraConfig(r=2, target_modules=LAYERS))
    return [model.save_pretrained(*args, **kwargs), state(model)]


@journey
def trained_by_the_trainer_and_resumed():
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in torch.arange(3, 39).view(6, 6)]
    with tempfile.TemporaryDirectory() as folder:  # what it writes has times in it
        options = {"output_dir": folder, "per_device_train_batch_size": 2, "save_steps": 2, "report_to": "none"}
        options |= {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1}

        def trained(steps, **resumed):
            arguments = transformers.TrainingArguments(**options, max_steps=steps)
            trainer = transformers.Trainer(lora(llama(), modules_to_save=["lm_head"]), arguments, train_dataset=rows)
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train(**resumed)
            return [[entry.get("loss") for entry in trainer.state.log_history], state(trainer.model)]

        return [trained(2), trained(4, resume_from_checkpoint=True)]


@journey
def converted_from_pissa():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=LAYERS, init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained("start")
    noise(model)
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained("converted", path_initial_model_for_weight_conversion="start")
    again = PeftModel.from_pretrained(llama(), "converted").eval()
    return [out(model.eval()), out(again), state(again)]


@journey
def hotswapped():
    saved("one"), saved("two", 2)
    model = PeftModel.from_pretrained(llama(), "one").eval()
    result = [out(model)]
    result += [hotswap_adapter(model, "two", "default"), out(model), state(model)]
    result.append(what_is_raised(lambda: hotswap_adapter(model, saved("three", target_modules=["k_proj"]), "default")))
    return result


@journey
def state_dicts_of_adapters():
    model = lora().eval()
    tensors = get_peft_model_state_dict(model)
    plain = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS), llama())
    loaded = set_peft_model_state_dict(plain, tensors)
    return [sorted(tensors), str(loaded), out(plain.eval()), state(plain)]


@journey
def resized_embeddings():
    base = llama()
    base.save_pretrained("base")
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    torch.manual_seed(1)
    base.resize_token_embeddings(52)
    model = lora(base, modules_to_save=["embed_tokens", "lm_head"]).eval()
    model.save_pretrained("adapter")
    other = transformers.AutoModelForCausalLM.from_pretrained("base")
    other.resize_token_embeddings(52)
    again = PeftModel.from_pretrained(other, "adapter")
    result = [out(model), out(again), state(again)]
    unchanged = transformers.AutoModelForCausalLM.from_pretrained("base")
    return [*result, what_is_raised(lambda: PeftModel.from_pretrained(unchanged, "adapter"))]


@for_each(frozen=False, trained=True)
def auto_classes(trainable):
    llama().save_pretrained("base")
    model = lora(transformers.AutoModelForCausalLM.from_pretrained("base"), task_type="CAUSAL_LM").eval()
    model.save_pretrained("adapter")
    again = AutoPeftModelForCausalLM.from_pretrained("adapter", is_trainable=trainable)
    plain = transformers.AutoModelForCausalLM.from_pretrained("adapter")
    return [out(model), out(again), state(again), out(plain), state(plain)]


@for_each(
    folder=lambda model: model.load_adapter("adapter"),
    keywords=lambda model: model.load_adapter(peft_model_id="adapter", adapter_name="named", is_trainable=True),
    positional=lambda model: model.load_adapter("adapter", "named"),
    subfolder=lambda model: model.load_adapter(".", adapter_kwargs={"subfolder": "adapter"}),
    tensors=lambda model: model.load_adapter(
        adapter_state_dict={
            k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(lora()).items()
        },
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS),
    ),
    twice=lambda model: [model.load_adapter("adapter"), model.load_adapter("adapter")],
    two=lambda model: [model.load_adapter("adapter", "law-v2"), model.load_adapter("adapter", "law")],
    dora=lambda model: model.load_adapter(saved("dora", use_dora=True)),
    nothing=lambda model: model.load_adapter(),
    nowhere=lambda model: model.load_adapter("nowhere"),
    unknown=lambda model: model.load_adapter("adapter", something=1),
    added=lambda model: model.add_adapter(LoraConfig(r=4, target_modules=LAYERS), "added"),
    deleted=lambda model: [
        model.load_adapter("adapter"),
        model.delete_adapter("default"),
        model.load_adapter("adapter"),
    ],
    hot=lambda model: [model.load_adapter("adapter"), model.load_adapter(saved("two", 2), hotswap=True)],
)
def adapters_without_peft_model(step):
    saved()
    model = llama()
    result = step(model)
    kinds = [type(part).__name__ for part in (result if isinstance(result, list) else [result])]
    before = [kinds, out(model.eval()), state(model)]
    model.save_pretrained("saved")
    return before


@for_each(
    plain=(("base",), {}),
    positional=(("base", True, None, False, "20KB"), {}),
    not_main=(("base",), {"is_main_process": False}),
    keywords=((), {"save_directory": "base", "max_shard_size": "20KB"}),
    nothing=((), {}),
)
def models_saved_and_loaded(call):
    args, kwargs = call
    model = llama()
    returned = model.save_pretrained(*args, **kwargs)
    half = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.bfloat16)
    plain = transformers.LlamaForCausalLM.from_pretrained("base")
    return [returned, out(plain), state(plain), str(half.dtype), str(plain.dtype)]


@for_each(
    nowhere=(("nowhere",), {}),
    nothing=((), {}),
    unknown=(("base",), {"something": 1}),
    configured=((None,), {"config": LLAMA, "state_dict": {}}),
    experts=(("base",), {"experts_implementation": "eager", "attn_implementation": "eager"}),
    quantised=(("base",), {"quantization_config": {"bits": 4}}),
)
def ways_to_call_from_pretrained_of_models(call):
    args, kwargs = call
    llama().save_pretrained("base")
    torch.manual_seed(0)
    return state(transformers.LlamaForCausalLM.from_pretrained(*args, **kwargs))


def own_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    return torch.cat([input_ids, input_ids[:, -1:]], 1), sorted(kwargs)


@for_each(
    greedy={"do_sample": False},
    beams={"num_beams": 2, "do_sample": False},
    sampled={"do_sample": True, "top_k": 5},
    own={"custom_generate": own_loop},
    unknown={"something": 1},
    streamed={"streamer": "a streamer"},
)
def generation(options):
    model = llama()
    result = model.generate(input_ids=tokens(), max_new_tokens=4, **options)
    adapted = lora(task_type="CAUSAL_LM").eval()
    torch.manual_seed(0)
    return [str(result), str(adapted.generate(input_ids=tokens(), max_new_tokens=4, **options))]


@for_each(lora=LAYERS, embeddings=["embed_tokens"], everything="all-linear")
def counts(targets):
    model = lora(target_modules=targets)
    base = model.get_base_model()
    counted = [base.num_parameters(), base.num_parameters(True), base.num_parameters(exclude_embeddings=True)]
    counted += [model.num_parameters(True, True), model.get_nb_trainable_parameters(), base.get_memory_footprint()]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        model.print_trainable_parameters()
    return [counted, printed.getvalue()]


@for_each(
    list="[]",
    null="null",
    text="{",
    empty="",
    nested="[" * 2000 + "]" * 2000,
    number={"hidden_size": "many"},
    kind={"model_type": 7},
    quantised={"quantization_config": {"quant_method": 3}},
    other={"quantization_config": []},
)
def damaged_configs(content):
    llama().save_pretrained("base")
    config = pathlib.Path("base/config.json")
    config.write_text(content if isinstance(content, str) else json.dumps(json.loads(config.read_text()) | content))
    cases = [
        lambda: transformers.AutoModelForCausalLM.from_pretrained("base"),
        lambda: transformers.LlamaForCausalLM.from_pretrained("base"),
        lambda: transformers.AutoConfig.from_pretrained("base"),
        lambda: LlamaConfig.from_pretrained("base"),
        lambda: LlamaConfig.get_config_dict("base"),
    ]
    return [what_is_raised(case) for case in cases]


@for_each(index='{"weight_map": {"a": null}}', weights="text", whole=None)
def damaged_weights(content):
    llama().save_pretrained("base")
    if content is not None:
        name = "model.safetensors.index.json" if content.startswith("{") else "model.safetensors"
        pathlib.Path("base/model.safetensors").unlink()
        pathlib.Path("base", name).write_text(content)
    return what_is_raised(lambda: transformers.AutoModelForCausalLM.from_pretrained(pathlib.Path("base")))


@journey
def configs():
    config = LoraConfig(r=4, target_modules=LAYERS)
    again = pickle.loads(pickle.dumps(config))
    config.save_pretrained("config")
    read = peft.PeftConfig.from_pretrained("config")
    same = [config == again, config == read, config == LoraConfig(r=4, target_modules=LAYERS)]
    return [same, *(repr(sorted(vars(c).items(), key=str)) for c in (config, again, read, copy.deepcopy(config)))]


@journey
def refusals():
    cases = [
        lambda: get_peft_model(llama(), LoraConfig(target_modules=["nothing"])),
        lambda: get_peft_model(llama(), LoraConfig(modules_to_save=["nothing"], target_modules=LAYERS)),
        lambda: lora().add_adapter("default", LoraConfig(target_modules=LAYERS)),
        lambda: lora().add_adapter("other", peft.IA3Config(target_modules=LAYERS)),
        lambda: lora().delete_adapter("other"),
        lambda: lora().set_adapter("other"),
        lambda: lora(use_dora=True, target_modules=["norm"]),
        lambda: peft.LoraModel(),
        lambda: peft.LoraModel(llama(), LoraConfig(target_modules=LAYERS)),
        lambda: lora().base_model.inject_adapter(llama(), "other"),
        lambda: lora().base_model.inject_adapter(),
        lambda: get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=2)).merge_and_unload(),
        lambda: peft.utils.ModulesToSaveWrapper(),
        lambda: peft.utils.ModulesToSaveWrapper(torch.nn.Linear(2, 2), "name", None, None),
    ]
    return [what_is_raised(case) for case in cases]


@journey
def what_there_is():
    """Names and signatures of all that is public."""
    found = {}
    for module in (peft, peft.utils, transformers.modeling_utils, transformers.integrations.peft):
        for name in sorted(dir(module)):
            thing = getattr(module, name, None)
            if name.startswith("_") or not str(getattr(thing, "__module__", "")).startswith(("peft", "transformers")):
                continue
            found[f"{module.__name__}.{name}"] = looks(thing)
            if inspect.isclass(thing):
                for attribute, member in sorted(vars(thing).items()):
                    found[f"{module.__name__}.{name}.{attribute}"] = looks(member)
    return found


def looks(thing):
    thing = getattr(thing, "__func__", getattr(thing, "fget", thing))
    if not callable(thing):
        return type(thing).__name__
    try:
        signature = str(inspect.signature(thing))
    except (TypeError, ValueError):
        signature = ""
    names = [str(getattr(thing, name, None)) for name in ("__module__", "__qualname__", "__doc__")]
    return [type(thing).__name__, *names, signature if " at 0x" not in signature else ""]


def what_is_raised(function):
    try:
        return ["returned", function() and None]
    except Exception as error:
        return [type(error).__module__, type(error).__qualname__, str(error)]


def run(name, function, above):
    folder = above / "".join(c if c.isalnum() else "-" for c in name)
    folder.mkdir()
    os.chdir(folder)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = {"result": function()}
        except Exception as error:
            result = {"raised": [type(error).__module__, type(error).__qualname__, str(error)]}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    result["files"] = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files}
    # torch says once that parts of it are deprecated, when they are first imported
    result["warned"] = [f"{w.category.__name__}: {w.message}" for w in caught if "/torch/" not in w.filename]
    return result


def main():
    torch.set_num_threads(1)
    above = pathlib.Path(sys.argv[1]).resolve()
    work = above / "work"
    work.mkdir()
    results = {name: run(name, function, work) for name, function in JOURNEYS.items()}
    (above / "results.json").write_text(json.dumps(results, indent=1, default=str).replace(str(above), "ABOVE"))


if __name__ == "__main__":
    main()
