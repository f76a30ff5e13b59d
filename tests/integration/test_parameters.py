"""What PEFT and Transformers count and look for among the parameters of packed models, beside dense ones."""

import pytest
import torch
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftMixedModel,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_model_status,
    get_peft_model,
)
from small_models import inputs_of, make_model
from transformers import AutoModel

import lowra

PACKED = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"quantize_embeddings": True},  # tied
    "OPTForCausalLM": {"quantize_embeddings": True},
    "PhiForCausalLM": {"quantize_embeddings": True, "quantize_head": True},
    "GPT2LMHeadModel": {"quantize_embeddings": True},
    "MixtralForCausalLM": {},
    "T5ForConditionalGeneration": {"quantize_embeddings": True},
    "BartForConditionalGeneration": {"quantize_embeddings": True},
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A dense model and the same packed, anew at each call."""
    written = {}

    def load(architecture):
        if architecture not in written:
            folder = tmp_path_factory.mktemp(architecture)
            make_model(architecture).save_pretrained(folder / "dense")
            config = lowra.LowRAConfig(bits=2, **PACKED[architecture])
            lowra.quantize_checkpoint(str(folder / "dense"), folder / "packed", config, progress=False)
            written[architecture] = folder / "packed"
        dense = make_model(architecture)
        return dense, type(dense).from_pretrained(written[architecture]).eval()

    return load


@pytest.mark.parametrize("architecture", PACKED)
def test_a_packed_weight_counts_as_its_weights(both, architecture):
    dense, packed = both(architecture)
    for exclude in (False, True):
        assert packed.num_parameters(exclude_embeddings=exclude) == dense.num_parameters(exclude_embeddings=exclude)
    config = {"r": 4, "target_modules": "all-linear", "exclude_modules": r".*(lm_head|experts|gate).*"}
    counts = []
    for model in both(architecture):
        adapted = get_peft_model(model, LoraConfig(**config))
        counts.append(adapted.get_nb_trainable_parameters())
        assert (get_model_status(adapted).trainable_params, get_model_status(adapted).total_params) == counts[-1]
        assert adapted.base_model.model.num_parameters(only_trainable=True) == counts[-1][0]
    (trained, every), (trained_packed, every_packed) = counts
    assert every - trained == every_packed - trained_packed
    assert trained == trained_packed or architecture.startswith("Mixtral")  # PEFT adapts dense experts
    mixed = PeftMixedModel(both(architecture)[1], LoraConfig(**config), "default")
    assert mixed.get_nb_trainable_parameters() == (trained_packed, every_packed)


def test_what_is_printed_is_that_of_the_dense_model(both, capsys):
    for model in both("LlamaForCausalLM"):
        get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and "trainable%" in first


PROMPTS = {
    "prompt tuning": (PromptTuningConfig, {}),
    "from the vocabulary": (PromptTuningConfig, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "several tasks": (MultitaskPromptTuningConfig, {"num_tasks": 2}),
    "prefix": (PrefixTuningConfig, {}),
    "p-tuning": (PromptEncoderConfig, {"encoder_hidden_size": 16}),
}


@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.parametrize("architecture", PACKED)
def test_prompts_are_trained_saved_and_loaded(both, tmp_path, architecture, method):
    dense, packed = both(architecture)
    seq2seq = dense.config.is_encoder_decoder
    if seq2seq and method == "several tasks":
        pytest.skip("needs attention masks, with dense models too")
    kind, options = PROMPTS[method]
    given = {"task_ids": torch.tensor([0, 1])} if method == "several tasks" else {}
    inputs = {**inputs_of(dense), **given}
    found = []
    for model in (dense, packed):
        torch.manual_seed(0)
        config = kind(task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM", num_virtual_tokens=4, **options)
        before = dict(model.named_modules())
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            if model is dense and "Please specify" in str(error):
                pytest.skip(f"this PEFT needs more with dense models too: {error}")
            raise
        assert dict(model.named_modules()) == before
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        assert trained and all(p.grad is not None for p in trained.values())
        found.append({name: p.shape for name, p in trained.items()})
    assert found[0] == found[1]
    assert adapted.word_embeddings is packed.get_input_embeddings()
    logits = adapted.eval()(**inputs).logits
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(both(architecture)[1], tmp_path).eval()
    assert torch.equal(again(**inputs).logits, logits)


def test_prompts_begin_at_rows_of_the_packed_table(both):
    _, packed = both("OPTForCausalLM")
    table = packed.get_input_embeddings().dequantize()
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, prompt_tuning_init="SAMPLE_VOCAB")
    prompts = get_peft_model(packed, config).prompt_encoder["default"].embedding.weight
    assert (prompts[:, None] == table).all(-1).any(-1).all()


def test_bare_models_count_too(both, tmp_path):
    dense, packed = both("LlamaForCausalLM")
    packed.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).num_parameters() == dense.model.num_parameters()
