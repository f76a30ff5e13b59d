"""`lowra.fast_decoding` under options of `generate` and in models somebody has changed: as Transformers, or refused."""

import copy
import functools

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import lowra
from lowra.generation import fast

LENGTH = 9
FALLBACK = "Transformers' own loop generates"


@pytest.fixture
def model(packed_llama):
    fast._warn.cache_clear()
    return AutoModelForCausalLM.from_pretrained(packed_llama).eval()


def prompt(seed=3, batch=2):
    return torch.randint(5, 60, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def generate(model, ids=None, **options):
    ids = prompt() if ids is None else ids
    usual = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, **{**usual, **options})


def fastly(model, ids=None, **options):
    return generate(model, ids, custom_generate=lowra.fast_decoding, **options)


def assert_same(model, **options):
    expected = generate(model, **options)
    assert torch.equal(fastly(model, **options), expected)
    return expected


class Streamed(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        pass


def test_modes_that_transformers_keeps_elsewhere_are_refused_in_one_sentence(model):
    for options in ({"penalty_alpha": 0.6, "top_k": 4}, {"force_words_ids": [[5]], "num_beams": 2}):
        with pytest.raises(ValueError, match="Transformers keeps this mode at .* on the hub"):
            fastly(model, **options)


def test_an_assistant_is_asked(model, packed_llama, caplog):
    assistant, calls = AutoModelForCausalLM.from_pretrained(packed_llama), []
    ids = prompt(batch=1)
    expected = generate(model, ids, assistant_model=assistant)
    assistant.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(fastly(model, ids, assistant_model=assistant), expected) and calls
    assert "the mode is assisted generation" in caplog.text


class Eleven(StoppingCriteria):
    """Ends a sequence at a token; `generate` then pads it, as it does where any criterion has this attribute."""

    eos_token_id = torch.tensor([95])

    def __init__(self, token):
        self.token = token

    def __call__(self, ids, scores, **kwargs):
        return ids[:, -1] == self.token


class Late(EosTokenCriteria):
    def __call__(self, ids, scores, **kwargs):
        return super().__call__(ids, scores) & (ids.shape[1] > LENGTH + 8)


def test_criteria_of_the_caller_count_as_they_do_in_transformers(model):
    free = generate(model, eos_token_id=None)
    first, second = int(free[0, LENGTH + 1]), int(free[1, LENGTH + 4])
    for criteria in (
        [EosTokenCriteria(first), EosTokenCriteria(second)],
        [Eleven(first)],
        [Late(first)],
        [MaxLengthCriteria(LENGTH + 20)],
    ):
        assert_same(model, eos_token_id=None, pad_token_id=3, stopping_criteria=StoppingCriteriaList(criteria))


def test_masks_that_are_no_left_padding_go_the_usual_way(model, caplog):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    for other in (2 * mask, 0.5 * mask, mask * torch.tensor([[1], [0]])):
        assert_same(model, attention_mask=other)
    assert "other values than 0 and 1" in caplog.text and "a sequence is padding alone" in caplog.text
    with pytest.raises(IndexError):  # Transformers' own
        fastly(model, attention_mask=mask[:1])
    assert "the attention mask is [1, 9] for ids of [2, 9]" in caplog.text


def test_a_prompt_is_there_and_on_the_devices_of_the_model(model):
    for shape in ((1, 0), (0, 5)):
        with pytest.raises(ValueError, match="The prompt has no tokens: give at least one"):
            fastly(model, torch.zeros(shape, dtype=torch.long))
    with pytest.raises(fast.Unsupported, match="the prompt lies on meta and the model on cpu"):
        lists = LogitsProcessorList(), StoppingCriteriaList()
        fast.Request(model, prompt().to("meta"), *lists, model.generation_config, {})


def test_a_penalty_that_leaves_the_prompt_out_leaves_out_its_last_token(model):
    for left_out in (LENGTH, torch.tensor([LENGTH, LENGTH]), torch.tensor([2, 0])):
        try:
            processor = RepetitionPenaltyLogitsProcessor(1e-6, prompt_ignore_length=left_out)  # prefers what occurred
        except ValueError:  # before Transformers took tensors
            continue
        assert_same(model, logits_processor=LogitsProcessorList([processor]))


class Filled(LogitsProcessor):
    def __init__(self, value):
        self.value = value

    def __call__(self, ids, scores):
        return torch.full_like(scores, self.value)


@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_no_token_is_drawn_by_scores_that_are_none(model, value):
    processors = LogitsProcessorList([Filled(value)])
    with pytest.raises(ValueError, match="No token could be drawn"):
        fastly(model, do_sample=True, logits_processor=processors)
    assert_same(model, logits_processor=processors)  # the likeliest is one to Transformers
    fastly(model, do_sample=True)


def test_what_a_request_gave_may_be_trained_on_and_stays_as_it_is(model):
    kept = []

    class Keeping(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            kept.append(ids)
            return torch.zeros(len(ids), dtype=torch.bool)

    streamed = Streamed()
    ids = fastly(model, streamer=streamed, stopping_criteria=StoppingCriteriaList([Keeping()]))
    fallen_back = fastly(model, return_dict_in_generate=True, output_scores=True)
    tensors = [ids, *kept, *streamed.tokens, fallen_back.sequences, *fallen_back.scores]
    assert not any(tensor.is_inference() for tensor in tensors)
    fastly(model, prompt(seed=4))
    assert torch.equal(torch.stack(streamed.tokens[1:], dim=1), ids[:, LENGTH:]) and torch.equal(kept[-1], ids)
    with torch.inference_mode():
        assert fastly(model).is_inference() == generate(model).is_inference()


def test_a_processor_may_differentiate(model):
    class Steering(LogitsProcessor):
        def __call__(self, ids, scores):
            with torch.enable_grad():
                scores = scores.detach().requires_grad_()
                return scores.detach() + torch.autograd.grad((scores**2).sum(), scores)[0]

    assert_same(model, logits_processor=LogitsProcessorList([Steering()]))


def test_a_partial_of_it_streams_too(model):
    streamed = Streamed()
    ids = generate(model, custom_generate=functools.partial(lowra.fast_decoding, exact=True), streamer=streamed)
    assert torch.equal(torch.cat([streamed.tokens[0], *(t[:, None] for t in streamed.tokens[1:])], dim=1), ids)


def other_head(model):
    head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    head.weight.data.copy_(model.lm_head.weight.flip(0))
    model.lm_head = head


def other_attention(model):
    first = model.model.layers[0]
    first.self_attn = copy.deepcopy(model.model.layers[1].self_attn)
    first.self_attn.layer_idx = 0


def other_feed_forward(model):
    model.model.layers[0].mlp = model.model.layers[1].mlp


def other_scaling(model):
    model.model.layers[0].self_attn.scaling *= 20


def other_rotation(model):
    model.model.rotary_emb.inv_freq.mul_(2)


def other_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()


def other_class(model):
    class Louder(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return 1.02 * super().forward(x)

    for layer in model.model.layers:
        layer.mlp.__class__ = Louder


def other_interface(model):
    def louder(*args, **keywords):
        out, weights = sdpa_attention_forward(*args, **keywords)
        return 20 * out, weights

    AttentionInterface.register("louder", louder)
    model.config._attn_implementation = "louder"


def other_embeddings(model):
    model.model.embed_tokens.double()
    model.lm_head.double()


def other_norm(model):
    model.model.layers[0].input_layernorm.to(torch.bfloat16)


CHANGES = {
    other_head: None,
    other_attention: None,
    other_feed_forward: None,
    other_scaling: None,
    other_rotation: None,
    other_activation: "its activation is ReLU",
    other_class: "the forward of Louder is by",
    other_interface: "attention is computed by a function of its own (louder)",
    other_embeddings: "its norms are torch.float32 and its embeddings torch.float64",
    other_norm: "some of its norms are torch.float32 and some are not",
}


@pytest.mark.parametrize("change, reason", CHANGES.items())
@pytest.mark.parametrize("before", [False, True])
def test_what_was_changed_in_a_model_counts(model, caplog, change, reason, before):
    if not before:
        assert_same(model)
        caplog.clear()
    change(model)
    assert before or not fast.session_of(model).decoder.is_current(model)
    assert_same(model)
    assert reason in caplog.text if reason else FALLBACK not in caplog.text


def test_a_class_with_a_loop_of_its_own_generates_by_that(model, caplog):
    class Stopping(type(model)):
        def _sample(self, input_ids, *args, **kwargs):
            return input_ids

    model.__class__ = Stopping
    assert torch.equal(fastly(model), prompt()) and "the _sample of Stopping is by" in caplog.text


def test_a_forward_that_was_put_into_a_class_is_called(model, caplog, monkeypatch):
    assert_same(model)
    kind, original = type(model.model.layers[0].mlp), type(model.model.layers[0].mlp).forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 1.02 * original(self, x))
    assert_same(model)
    assert f"the forward of {kind.__name__} is by" in caplog.text


def test_what_lowra_puts_in_the_place_of_forwards_computes_the_same(model, caplog):
    lowra.tile_mlps(model)
    assert_same(model.eval())
    assert FALLBACK not in caplog.text


def test_autocast_computes_in_its_own_type(model, caplog):
    assert_same(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model)
    assert "autocast computes in torch.bfloat16 and the model is torch.float32" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_buffers_have_types_of_their_own_whatever_the_default_is(model, dtype):
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"), "a")
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj"]))
    model.eval()
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert_same(model, adapter_names=["a", "b"])
    finally:
        torch.set_default_dtype(usual)
    session = fast.session_of(model.get_base_model())
    gains = [shares.of_steps.factors for shares in session.decoder._shares.values()]
    assert gains and {buffer.dtype for buffer in (*gains, session._caches[0].workspace)} == {torch.float32}


class Louder(TorchFunctionMode):
    """Activations twice as large, whoever asks for them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        return 2 * out if func is nn.functional.silu else out


class Counting(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += "linear" in str(func)
        return func(*args, **kwargs or {})


def test_modes_of_torch_see_what_is_called(model, caplog):
    plain = assert_same(model)
    with torch.device("cpu"):
        assert_same(model)
    assert FALLBACK not in caplog.text
    with Louder():
        assert not torch.equal(assert_same(model), plain)
    assert "Louder, in which the model is called" in caplog.text
    with Counting() as fast_ones:
        fastly(model)
    with Counting() as usual_ones:
        generate(model)
    assert fast_ones.products == usual_ones.products > 0


def test_dropout_of_a_part_of_the_model_counts(model, caplog):
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)).eval()
    assert_same(model)
    model.get_base_model().model.layers[0].train()
    fastly(model)
    assert "the model is in training mode, with dropout" in caplog.text
    caplog.clear()
    fast._warn.cache_clear()
    model = model.unload().eval()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert_same(model)
    assert FALLBACK not in caplog.text
    fastly(model.train())
    assert "the model is in training mode, with dropout" in caplog.text


def test_attention_of_another_method_is_told_of(model, caplog):
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)
    assert_same(get_peft_model(model, config).eval())
    assert "AdaptedAttention has no layers q_proj, k_proj, v_proj" in caplog.text
