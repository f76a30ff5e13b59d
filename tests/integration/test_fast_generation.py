"""`model.generate(custom_generate=lowra.fast_decoding)`: the tokens of Transformers' own loop, on CPU and GPU."""

import logging
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import lowra
from bitsandbytes.backends.lowra import reference
from bitsandbytes.backends.lowra.native_cpu import instructions
from lowra.generation import fast

SIZES = dict(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
)
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=6),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "phi3": Phi3Config(**SIZES, pad_token_id=0, eos_token_id=1, bos_token_id=2),
    "gemma": GemmaConfig(**SIZES, head_dim=32),
    "gemma2": Gemma2Config(**SIZES, head_dim=32, sliding_window=6),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense checkpoint of each architecture."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp("fast") / name
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


@pytest.fixture
def warnings(caplog):
    """Messages of a fall back to Transformers' loop; each appears anew in every test."""
    fast._warn.cache_clear()
    caplog.set_level(logging.WARNING, logger="lowra.generation.fast")
    return caplog


def load(folder, device="cpu"):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    dtype = torch.float16 if device == "cuda" else torch.float32
    options = {"load_in_lowra": True, "lowra_bits": 3, "dtype": dtype, "device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def batch(device="cpu", padded=True):
    ids = torch.randint(5, 250, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
        mask[2, :9] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def both(model, inputs, **options):
    """What Transformers' loop and ours generate."""
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": 7, **options}
    return model.generate(**inputs, **options), model.generate(**inputs, **options, custom_generate=lowra.fast_decoding)


@torch.no_grad()
def assert_same(model, found, expected):
    """The same tokens; in 16 bits on a GPU up to where two tokens were as likely but for rounding.

    A random model's logits lie close together, and sums come in another order.
    """
    if not found.is_cuda:
        assert torch.equal(found, expected)
        return
    for mine, theirs in zip(found, expected, strict=True):
        length = min(len(mine), len(theirs))
        differ = (mine[:length] != theirs[:length]).nonzero()
        if len(differ):
            at = int(differ[0])
            logits = model(theirs[None, :at]).logits[0, -1].float()
            assert (logits[mine[at]] - logits[theirs[at]]).abs() <= 0.05 * logits.std()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_tokens(folders, name, padded, device, warnings):
    model = load(folders[name], device)
    expected, found = both(model, batch(device, padded))
    if padded and device == "cuda":  # where padding lies, only rows without it can be run again by themselves
        found, expected = found[:1], expected[:1]
    assert_same(model, found, expected)
    again = both(model, batch(device, padded))[1]
    assert torch.equal(again[: len(found)], found)  # by the session kept
    assert not warnings.records


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_and_its_changes_are_seen(folders, device, warnings):
    model = get_peft_model(load(folders["llama"], device), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    first, found = both(model, batch(device, padded=False))
    assert_same(model, found, first)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
    second, found = both(model, batch(device, padded=False))
    assert_same(model, found, second)
    assert not torch.equal(first, second)
    with model.disable_adapter():
        bare, found = both(model, batch(device, padded=False))
        assert_same(model, found, bare)
        assert not torch.equal(bare, second)
    assert not warnings.records


@pytest.mark.parametrize("device", DEVICES)
def test_each_sequence_goes_through_its_own_adapter(folders, device, warnings):
    model = get_peft_model(load(folders["llama"], device), LoraConfig(r=4, target_modules="all-linear"), "law")
    model.add_adapter("news", LoraConfig(r=8, target_modules=["q_proj", "down_proj"]))
    model.add_adapter("sport", LoraConfig(r=4, target_modules=["v_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    active, _ = both(model, batch(device))  # from here on there is a session
    for names in (
        ["news", "law", "__base__"],
        ["law", "news", "law"],
        ["law", "law", "law"],
        ["sport", "news", "sport"],
        ["__base__", "__base__", "__base__"],
    ):
        expected, found = both(model, batch(device), adapter_names=names)
        if device == "cuda":  # padded rows cannot be run again by themselves
            expected, found = expected[:1], found[:1]
        with model.base_model._enable_peft_forward_hooks(adapter_names=names[: len(found)]):
            assert_same(model.get_base_model(), found, expected)
        assert torch.equal(expected[0], active[0]) == (names[0] == "law")
    expected, found = both(model, batch(device))
    assert_same(model, found[:1], expected[:1])
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "custom_generate": lowra.fast_decoding}
    options["adapter_names"] = ["news", "law", "law"]
    before = model.generate(**batch(device), **options)
    with torch.no_grad():  # what is not a sequence's own may be anything
        model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["news"].weight.fill_(torch.inf)
    assert torch.equal(model.generate(**batch(device), **options)[1:], before[1:])
    assert not warnings.records


def test_hooks_of_others_are_called_by_the_usual_loop(folders, warnings):
    model = load(folders["llama"])
    model.enable_input_require_grads()  # as after a training
    plain, found = both(model, batch())
    assert torch.equal(found, plain) and not warnings.records
    steered = model.model.layers[1].register_forward_hook(lambda layer, inputs, output: -output)
    expected, found = both(model, batch())
    assert torch.equal(found, expected) and not torch.equal(found, plain)
    assert "LlamaDecoderLayer has a hook" in warnings.text
    steered.remove()
    assert torch.equal(both(model, batch())[1], plain)


@pytest.mark.parametrize("device", DEVICES)
def test_what_changes_scores(folders, device, warnings):
    model = load(folders["llama"], device)
    expected, found = both(model, batch(device), repetition_penalty=1.5)
    assert torch.equal(found, expected)
    expected, found = both(model, batch(device), no_repeat_ngram_size=2)  # depends on the length: not captured
    assert torch.equal(found, expected)
    options = {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.8, "max_new_tokens": 12}
    inputs = batch(device)
    torch.manual_seed(1)
    first = model.generate(**inputs, **options, custom_generate=lowra.fast_decoding, pad_token_id=0)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**inputs, **options, custom_generate=lowra.fast_decoding, pad_token_id=0), first)
    assert not warnings.records


@pytest.mark.parametrize("device", DEVICES)
def test_sampling_takes_the_likely_tokens_as_often(folders, device):
    """One step from one prompt, many times: frequencies near the model's own probabilities."""
    model = load(folders["llama"], device)
    ids = torch.full((400, 4), 9, device=device)
    torch.manual_seed(0)
    options = {"max_new_tokens": 1, "do_sample": True, "top_k": 3, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(ids, **options, custom_generate=lowra.fast_decoding)[:, -1]
    with torch.no_grad():
        shares = model(ids[:1]).logits[0, -1].float().topk(3)
    expected = shares.values.softmax(dim=-1)
    for token, share in zip(shares.indices, expected.tolist(), strict=True):
        assert float((tokens == token).float().mean()) == pytest.approx(share, abs=0.1)


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


@pytest.mark.parametrize("device", DEVICES)
def test_stopping_and_streaming(folders, device, capsys, tiny_llama):
    from transformers import AutoTokenizer

    model = load(folders["llama"], device)
    expected, found = both(model, batch(device), stopping_criteria=StoppingCriteriaList([StopAt(17)]))
    assert found.shape == (3, 17) and torch.equal(found, expected)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    inputs = {name: value[:1] for name, value in batch(device, padded=False).items()}
    shown = []
    for options in ({}, {"custom_generate": lowra.fast_decoding}):
        streamer = TextStreamer(tokenizer)
        model.generate(**inputs, max_new_tokens=13, do_sample=False, pad_token_id=0, streamer=streamer, **options)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and len(shown[0]) > 11
    try:
        model.generate(**inputs, max_new_tokens=1, stop_strings=["é"], tokenizer=tokenizer)
    except ValueError as error:
        pytest.skip(f"this Transformers finds no such token: {error}")
    expected, found = both(model, inputs, stop_strings=["é"], tokenizer=tokenizer)
    assert torch.equal(found, expected)


def test_the_end_of_sequence_ends_it(folders):
    model = load(folders["llama"])
    ids = batch(padded=False)["input_ids"]
    free = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    for eos in {int(free[0, 15]), int(free[1, 12]), int(free[2, 30])}:
        expected, found = both(model, {"input_ids": ids}, eos_token_id=eos)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"num_beams": 2}, "the mode is beam search"),
        ({"return_dict_in_generate": True, "output_scores": True}, "scores or states are asked for"),
        ({"prefill_chunk_size": 4}, "the prompt is to be taken in chunks"),
    ],
)
def test_what_is_not_covered_falls_back_and_says_so(folders, options, reason, warnings):
    expected, found = both(load(folders["llama"]), batch(), **options)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert torch.equal(found.sequences, expected.sequences)
    assert reason in warnings.text


def test_other_architectures_and_adapters_fall_back(tiny_llama, folders, warnings):
    from peft import IA3Config
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=1, n_head=2)).eval()
    expected, found = both(model, batch())
    assert torch.equal(found, expected) and "gpt2 is none of the architectures" in warnings.text
    ia3 = get_peft_model(load(folders["llama"]), IA3Config(task_type="CAUSAL_LM"))
    expected, found = both(ia3.eval(), batch())
    assert torch.equal(found, expected) and "is no LoRA" in warnings.text


def another_version(monkeypatch, kind, change):
    """Puts another forward into a class, as a later Transformers would have it there: `change` of what it gave."""
    original = kind.forward

    def forward(self, x):
        return change(original(self, x))

    home = vars(sys.modules[kind.__module__])  # where it was written, which its name alone does not say
    forward = types.FunctionType(forward.__code__, home, closure=forward.__closure__)
    monkeypatch.setattr(kind, "forward", forward)


def test_another_model_behind_the_same_name_is_noticed(folders, monkeypatch, warnings):
    """An architecture that changes under us must not generate other tokens."""
    model = load(folders["llama"])
    another_version(monkeypatch, type(model.model.layers[0].mlp), lambda out: 2 * out + 1)
    expected, found = both(model, batch())
    assert torch.equal(found, expected) and "differ from the model's own" in warnings.text


@pytest.mark.parametrize("name", ["llama", "gemma", "phi3"])
def test_a_model_that_makes_much_of_a_rounding_is_judged_by_that(folders, name, monkeypatch, warnings):
    # The same loop is half a rounding away here, which is as far as any difference is taken to be too much.
    monkeypatch.setattr(fast, "_LARGEST_DEVIATION", 0.0)
    model = load(folders[name]).to(torch.bfloat16)
    inputs = batch()
    model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, custom_generate=lowra.fast_decoding)
    assert not warnings.text
    monkeypatch.setattr(fast.Decoder, "step", lambda self, ids, caches: self._head(self._body.embed_tokens(ids)))
    fast.release(model)
    model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, custom_generate=lowra.fast_decoding)
    assert "differ from the model's own" in warnings.text


def test_a_model_that_a_rounding_turns_into_noise_vouches_for_no_architecture(folders, monkeypatch, warnings):
    model = load(folders["llama"]).to(torch.bfloat16)
    kind = type(model.model.layers[0].mlp)
    another_version(monkeypatch, kind, lambda out: 100 * torch.sin(1e6 * out.float()).to(out.dtype))
    expected, found = both(model, batch())
    assert torch.equal(found, expected) and "differ from the model's own" in warnings.text


def test_a_window_of_one_is_what_transformers_makes_of_it(warnings):
    """Its mask and its cache differ there."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=1)).eval()
    expected, found = both(model, batch())
    assert torch.equal(found, expected) and "its mask has a window of one" in warnings.text


def test_a_prompt_beyond_the_positions_is_refused(folders):
    with pytest.raises(ValueError, match="exceed the 96 positions of llama: shorten the prompt, or lower"):
        both(load(folders["llama"]), batch(padded=False), max_new_tokens=90)


def test_release_frees_the_session(folders):
    model = load(folders["llama"])
    both(model, batch())
    assert fast.session_of(model) is not None
    fast.release(model)
    assert fast.session_of(model) is None
    both(model, batch())
    fast.release(get_peft_model(model, LoraConfig(r=4)))
    assert fast.session_of(model) is None


def test_a_packing_loaded_in_place_is_not_generated_from_with_the_old_numbers(folders):
    model = load(folders["llama"])
    both(model, batch())
    module = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        module.levels.mul_(-1)
    expected, found = both(model, batch())
    assert torch.equal(found, expected)


def test_a_packed_head_goes_the_way_of_the_layers_in_steps_and_never_in_prompts(folders):
    config = lowra.LowRAConfig(bits=3, quantize_head=True)
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], quantization_config=config, dtype=torch.bfloat16)
    model.eval()
    head, x = model.get_output_embeddings(), torch.randn(2, 128).bfloat16()
    decoder = fast.Decoder(model, 96)
    own, found = head(x), decoder._logits(x, is_prompt=False)
    if instructions()[0] == "generic":
        assert torch.equal(found, own)
    else:
        expected = reference.linear_in_integers(x, head.matrix())
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4 * float(expected.abs().max()))
        assert not torch.equal(found, own)
    assert torch.equal(decoder._logits(x, is_prompt=True), own)
    assert torch.equal(fast.Decoder(model, 96, exact=True)._logits(x, is_prompt=False), own)
    assert decoder.is_current(model)
    head.levels = torch.nn.Parameter(-head.levels, requires_grad=False)
    assert not decoder.is_current(model)


def test_commands_speak(tiny_llama, capsys, monkeypatch):
    from lowra.commands import main

    assert main(["generate", str(tiny_llama), "--prompt", "The", "--tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("The") and "5 tokens, the first after" in out
    assert main(["chat", str(tiny_llama)]) == 2
    assert "has no chat template" in capsys.readouterr().err
    template = tiny_llama / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ")
    lines = iter(["Hi", "", "/new", "Ho", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    try:
        assert main(["chat", str(tiny_llama), "--tokens", "4", "--json"]) == 0
    finally:
        template.unlink()
    captured = capsys.readouterr()
    assert '"role": "user", "content": "Ho"' in captured.out and '"Hi"' not in captured.out
    assert captured.err.count("the first after") == 2
