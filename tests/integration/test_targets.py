"""Which layers are packed in models that are not built of plain linear layers alone."""

import logging

import pytest
import torch
import transformers
from small_models import ARCHITECTURES, HIDDEN, VOCABULARY, logits_of, make_model, packed_layers
from transformers import AutoModelForCausalLM

import lowra
from lowra.checkpoints.dense import DenseCheckpoint, empty_model, safetensors_files
from lowra.checkpoints.targets import find_targets

DECODER = ARCHITECTURES["LlamaForCausalLM"]


def skeleton(architecture, **fields):
    model_class = getattr(transformers, architecture)
    with torch.device("meta"):
        return model_class(model_class.config_class(**fields))


def test_routers_with_a_forward_of_their_own_stay_dense():
    model = skeleton(
        "Llama4ForCausalLM", **DECODER, num_local_experts=4, intermediate_size_mlp=104, head_dim=16, moe_layers=[1]
    )
    assert isinstance(model.model.layers[1].feed_forward.router, torch.nn.Linear)
    assert not any("router" in name for name in find_targets(model, None))


def test_a_linear_layer_written_anew_is_packed():
    fields = {name: value for name, value in DECODER.items() if name != "intermediate_size"}
    assert len(find_targets(skeleton("FalconForCausalLM", **fields), None)) == 8


def test_layers_too_small_to_gain_stay_dense():
    fields = {**ARCHITECTURES["Qwen3MoeForCausalLM"], "shared_expert_intermediate_size": 40}
    model = skeleton("Qwen2MoeForCausalLM", **fields)
    assert model.model.layers[0].mlp.shared_expert_gate.out_features == 1
    assert not any("shared_expert_gate" in name for name in find_targets(model, None))


def test_convolutions_are_not_taken_for_experts(caplog):
    model = skeleton("MambaForCausalLM", vocab_size=96, hidden_size=64, num_hidden_layers=1, state_size=8)
    caplog.clear()  # before 5.16 Transformers says that kernels are missing
    with caplog.at_level(logging.WARNING, logger="lowra"):
        find_targets(model, None)
    assert not caplog.records


class _Doubled(torch.nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


class _Normed(torch.nn.Embedding):
    embed_scale = 1.0  # and a weight besides

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm = torch.nn.LayerNorm(sizes[1])

    def forward(self, ids):
        return self.norm(super().forward(ids))


@pytest.mark.parametrize("kind", [_Doubled, _Normed])
def test_embeddings_that_do_more_than_look_rows_up_are_not_packed(kind):
    model = make_model("LlamaForCausalLM")
    model.set_input_embeddings(kind(VOCABULARY, HIDDEN))
    assert find_targets(model, None)
    with pytest.raises(ValueError, match=f"is a {kind.__name__}, which does more than look rows up"):
        find_targets(model, None, embeddings=True)


class _Casting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.out = torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden):
        return self.out(self.proj(hidden.to(dtype=self.proj.weight.dtype)).float())


class _CastingUnlessBytes(_Casting):
    def forward(self, hidden):
        if self.proj.weight.dtype != torch.uint8:
            hidden = hidden.to(self.proj.weight.dtype)
        return self.out(self.proj(hidden))


def test_layers_whose_input_is_cast_to_the_dtype_of_their_weight_stay_dense():
    """As in the indexers of DeepSeek V3.2: activations would be cut down to bytes."""
    model = make_model("LlamaForCausalLM")
    one, other = model.model.layers
    one.indexer, other.indexer = _Casting(), _CastingUnlessBytes()
    found = {name for name in find_targets(model, None) if "indexer" in name}
    parts = ("0.indexer.out", "1.indexer.proj", "1.indexer.out")
    assert found == {f"model.layers.{part}.weight" for part in parts}


@pytest.mark.parametrize("options", [{"head": True}, {"embeddings": True}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_whose_input_is_cast_so_is_refused(options, tied):
    sizes = dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, state_size=8)
    model = skeleton("MambaForCausalLM", **sizes, tie_word_embeddings=tied)
    if options == {"embeddings": True} and not tied:
        assert "backbone.embeddings.weight" in find_targets(model, None, **options)
    else:
        with pytest.raises(ValueError, match="head"):
            find_targets(model, None, **options)


def test_weights_that_are_stored_as_one_are_refused(dense_llama):
    """As gate and up projection of HRM: the packing passes by names of the checkpoint's own tensors."""
    source = DenseCheckpoint(safetensors_files(dense_llama), empty_model(dense_llama))
    targets = find_targets(source.model, None)
    source.check_stored(targets)
    gate = "model.layers.0.mlp.gate_proj.weight"
    del source._mappings[gate]
    with pytest.raises(ValueError, match=f"{gate} of this LlamaForCausalLM are stored with others .* --keep-dense"):
        source.check_stored(targets)


def test_initialisation_that_asks_for_a_matrix(packed_llama, dense_llama, monkeypatch):
    """RWKV and xLSTM ask for the shape of each linear layer's weight before they look whether it is initialised."""

    def initialise(model, module):
        assert not isinstance(module, torch.nn.Linear) or module.weight.shape[1]

    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_init_weights", initialise)
    AutoModelForCausalLM.from_pretrained(packed_llama)
    AutoModelForCausalLM.from_pretrained(dense_llama, quantization_config=lowra.LowRAConfig(bits=1.5))


def test_a_rank_that_does_not_fit_names_the_layer(dense_llama, tmp_path):
    with pytest.raises(ValueError, match=r"does not fit model.layers.0.self_attn.k_proj \[32, 64\]: give at most 32"):
        lowra.quantize_checkpoint(str(dense_llama), tmp_path / "out", lowra.LowRAConfig(), lowra.AdapterRecipe(33))


def test_an_adapter_on_experts_alone_is_refused(tmp_path):
    make_model("MixtralForCausalLM").save_pretrained(tmp_path / "dense")
    config = lowra.LowRAConfig(modules_to_not_convert=["self_attn"])
    with pytest.raises(ValueError, match="nothing else is packed: give no rank"):
        lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "out", config, lowra.AdapterRecipe(4))


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_quantising_while_loading_with_a_new_head(dense_llama, tmp_path, head):
    model_class = getattr(transformers, f"AutoModelFor{head}")
    model = model_class.from_pretrained(dense_llama, load_in_lowra=True, lowra_bits=1.5).eval()
    assert len(packed_layers(model)) == 14 and isinstance(model.score, torch.nn.Linear)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(model_class.from_pretrained(tmp_path).eval()), logits_of(model))


def test_models_of_images(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=104, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "dense")
    lowra.quantize_checkpoint(str(tmp_path / "dense"), tmp_path / "packed", lowra.LowRAConfig(), progress=False)
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "packed")
    assert len(packed_layers(model)) == 6
    assert torch.isfinite(model(pixel_values=torch.ones(1, 3, 32, 32)).logits).all()
