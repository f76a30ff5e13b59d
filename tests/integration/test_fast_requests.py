"""`lowra.fast_decoding` on requests and models that it does not cover, or that changed: no other tokens in silence."""

import gc
import inspect
import threading
import weakref

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import lowra
from bitsandbytes.backends.lowra import native_cpu
from lowra.generation import fast
from lowra.nn.linear import LowRALinear


@pytest.fixture
def model(packed_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(packed_llama).eval()


def prompt(seed=3):
    return torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(seed))


def both(model, ids=None, **options):
    """Tokens of Transformers' loop and of ours."""
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "use_cache": True, **options}
    ids = prompt() if ids is None else ids
    mask = torch.ones_like(ids)
    plain = model.generate(input_ids=ids, attention_mask=mask, **options)
    found = model.generate(input_ids=ids, attention_mask=mask, **options, custom_generate=lowra.fast_decoding)
    return plain, found


def assert_same(model, **options):
    plain, found = both(model, **options)
    assert torch.equal(found, plain)
    return plain


class Favourite(LogitsProcessor):
    """Prefers one token; as long a tensor as a user's own would have."""

    def __init__(self, token, count):
        self.scores = torch.zeros(count)
        self.scores[token] = 1e4

    def __call__(self, ids, scores):
        return scores + self.scores[: scores.shape[1]]


class Counting(LogitsProcessor):
    """Forces the first two tokens."""

    def __init__(self):
        self.calls = 0

    def __call__(self, ids, scores):
        self.calls += 1
        if self.calls <= 2:
            scores = torch.full_like(scores, -1e4)
            scores[:, 7] = 0
        return scores


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_trained_prompts_count(model, kind):
    bare = assert_same(model)
    tuned = get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "prompt" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert not torch.equal(assert_same(tuned), bare)


def test_each_call_has_its_own_processors(model):
    for token in (11, 12):
        processors = LogitsProcessorList([Favourite(token, 5000)])
        assert (assert_same(model, logits_processor=processors)[:, 9:] == token).all()
    for _ in range(2):
        assert_same(model, guidance_scale=1.5)
    for _ in range(2):  # a new one each time, in the state it begins with
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        plain = model.generate(prompt(), logits_processor=LogitsProcessorList([Counting()]), **options)
        options["custom_generate"] = lowra.fast_decoding
        assert torch.equal(
            model.generate(prompt(), logits_processor=LogitsProcessorList([Counting()]), **options), plain
        )
    for tokens in (list(range(4, 40)), list(range(8, 44))):
        assert_same(model, suppress_tokens=tokens)


def test_a_model_goes_although_a_processor_held_it(packed_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(packed_llama).eval()
    assert_same(model, guidance_scale=1.5)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_threads_and_streamers_get_tokens_of_their_own(model):
    prompts = [prompt(seed) for seed in range(4)]
    expected = [both(model, ids, max_new_tokens=30)[0] for ids in prompts]
    found = [None] * 4

    def run(number):
        found[number] = both(model, prompts[number], max_new_tokens=30)[1]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    class Nested(TextStreamer):
        def __init__(self):
            pass

        def put(self, tokens):
            assert_same(model, ids=prompts[1], max_new_tokens=3)

        def end(self):
            pass

    ids = prompts[0][:1]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, streamer=Nested(), custom_generate=lowra.fast_decoding, **options), plain)


def test_an_error_leaves_no_adapter_of_a_mixed_batch_behind(model):
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"), "x")
    model.add_adapter("y", LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    before = assert_same(model)
    with pytest.raises(ValueError, match="positions of llama"):
        model.generate(
            prompt(),
            adapter_names=["y", "y"],
            max_new_tokens=10**5,
            custom_generate=lowra.fast_decoding,
            pad_token_id=0,
        )
    assert torch.equal(assert_same(model), before)


class Failing(TextStreamer):
    def __init__(self, place):
        self.left = place

    def put(self, tokens):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def end(self):
        pass


@pytest.mark.parametrize("custom_generate", [None, lowra.fast_decoding])
@pytest.mark.parametrize(
    "options",
    [{"fails_at": 0}, {"fails_at": 3}, {"no_such_option": 1}, {"max_length": 9}],
    ids=["at the prompt", "at a token", "an option", "no room"],
)
def test_an_error_anywhere_in_a_call_ends_its_names(model, options, custom_generate):
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"), "x").eval()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    layers[0].register_forward_pre_hook(lambda module, inputs: None)  # somebody's own, which stays
    options = {"custom_generate": custom_generate, "pad_token_id": 0, **options}
    if "fails_at" in options:
        options["streamer"] = Failing(options.pop("fails_at"))
    with pytest.raises((KeyboardInterrupt, ValueError)):
        model.generate(prompt()[:1], adapter_names=["x"], **options)
    assert [len(layer._forward_pre_hooks) for layer in layers] == [1, *[0] * (len(layers) - 1)]


def test_what_a_request_brings_counts(model, caplog):
    plain = assert_same(model)
    positions = torch.arange(9).expand(2, -1)
    assert torch.equal(assert_same(model, position_ids=positions), plain)
    assert "positions are given" not in caplog.text
    fast._warn.cache_clear()
    assert_same(model, position_ids=3 * positions)
    assert "positions are given" in caplog.text
    criteria = StoppingCriteriaList([MaxLengthCriteria(12)])
    assert assert_same(model, stopping_criteria=criteria).shape == (2, 12)


def test_what_changes_in_a_model_is_seen(model):
    plain = assert_same(model)
    norm = model.model.layers[0].input_layernorm
    norm.weight = torch.nn.Parameter(norm.weight * torch.linspace(-2, 2, len(norm.weight)))
    assert not torch.equal(assert_same(model), plain)
    mlp = model.model.layers[0].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x) * 1.02 + 0.05
    assert_same(model)
    del mlp.forward
    model.model.layers = model.model.layers[:1]
    assert_same(model)


def test_adapters_of_head_and_embeddings_are_part_of_a_session(model):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]), "a")
    model.add_adapter("b", LoraConfig(r=4, target_modules=["lm_head"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.eval()
    assert_same(model)
    bare = model.get_base_model()
    session = fast.session_of(bare)
    assert session.decoder.is_current(bare)
    model.set_adapter("b")
    assert not session.decoder.is_current(bare)
    assert_same(model)
    with model.disable_adapter():
        assert not fast.session_of(bare).decoder.is_current(bare)


def test_release_takes_what_generates(model):
    adapted = get_peft_model(model, LoraConfig(r=4))
    for given in (model, adapted, adapted.base_model):
        assert_same(adapted)
        fast.release(given)
        assert fast.session_of(model) is None
    for other in (None, LowRALinear, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="A PreTrainedModel or a PeftModel was expected"):
            fast.release(other)


@pytest.mark.parametrize("through_peft", [False, True])
def test_a_cache_of_the_caller_is_filled(model, caplog, through_peft):
    fast._warn.cache_clear()
    if through_peft:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
    lengths = []
    for options in ({}, {"custom_generate": lowra.fast_decoding}):
        cache = DynamicCache(config=model.config)
        ids = prompt()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            **{name: cache},
            **options,
        )
        lengths.append(cache.get_seq_length())
    assert lengths == [9 + 5] * 2
    assert "the cache that was given is to be filled" in caplog.text


def test_activations_are_rounded_unless_exact_is_asked_for(model, monkeypatch):
    """On a CPU with such kernels; a session of the one kind does not serve the other."""
    model, rounded = model.bfloat16(), []
    call = native_cpu.CpuGroup.__call__
    monkeypatch.setattr(native_cpu.CpuGroup, "__call__", lambda self, x: rounded.append(len(x)) or call(self, x))
    for exact in (False, True, False):
        rounded.clear()
        model.generate(prompt(), max_new_tokens=3, pad_token_id=0, custom_generate=lowra.fast_decoding, exact=exact)
        assert bool(rounded) != exact and max(rounded, default=0) <= 18


@pytest.mark.parametrize("kind", ["quantized", "offloaded"])
def test_a_smaller_cache_that_was_asked_for_is_made(model, kind, monkeypatch, caplog):
    """By Transformers, with packages or devices that there are not here."""

    def made(backend=None, config=None, offloading=False):
        return DynamicCache(config=config)

    fast._warn.cache_clear()
    for name in ("QuantizedCache", "DynamicCache"):
        monkeypatch.setattr(f"transformers.generation.utils.{name}", made)
    assert_same(model, cache_implementation=kind)
    assert f"its cache is to be {kind}" in caplog.text
