"""Blocks that are run one by one: the hidden states of the whole model, and models that are no plain stack of them."""

import pytest
import torch
from small_models import ARCHITECTURES, VOCABULARY, make_model
from torch import nn
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from lowra.checkpoints.dense import DenseCheckpoint, empty_model, safetensors_files
from lowra.checkpoints.targets import find_targets
from lowra.quantization.block_stream import BlockStream, block_names
from lowra.quantization.block_training import run_block

OF_ONE_STACK = [name for name in ARCHITECTURES if name.endswith("ForCausalLM") and "Moe" not in name]
OF_ONE_STACK.remove("MixtralForCausalLM")
TOKENS = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


def stream_of(folder, batch=2):
    source = DenseCheckpoint(safetensors_files(folder), empty_model(folder))
    targets = find_targets(source.model, None)
    return BlockStream(source, targets, TOKENS, batch, torch.device("cpu"))


@pytest.mark.parametrize("architecture", OF_ONE_STACK)
def test_blocks_in_turn_are_the_model(tmp_path, architecture):
    model = make_model(architecture)
    model.save_pretrained(tmp_path)
    wanted = []
    model.get_submodule(block_names(model, find_targets(model, None))[-1]).register_forward_hook(
        lambda module, args, out: wanted.append(out[0] if isinstance(out, tuple) else out)
    )
    stream = stream_of(tmp_path)
    hidden = stream.inputs()
    for name in stream.names:
        with stream.block(name) as block:
            weights = {key: block.weight(key) for key in block.targets}
            for key, target in block.targets.items():
                assert torch.equal(weights[key], target.as_matrix(model.get_parameter(key)))
            given = run_block(block, {key: 2 * weight for key, weight in weights.items()}, hidden)
            hidden = run_block(block, weights, hidden)
            assert not torch.equal(given, hidden)
        assert all(parameter.is_meta for parameter in stream._model.get_submodule(name).parameters())
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    torch.testing.assert_close(hidden, wanted[0], rtol=1e-5, atol=1e-5)


def test_blocks_may_put_out_lists(tmp_path):
    config = OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path)
    stream = stream_of(tmp_path)
    with stream.block(stream.names[0]) as block:
        assert run_block(block, {}, stream.inputs()).shape == (5, 12, 16)


def test_the_checkpoint_keeps_its_settings(tmp_path):
    make_model("LlamaForCausalLM").to(torch.bfloat16).save_pretrained(tmp_path)
    stream = stream_of(tmp_path)
    assert stream._model.dtype == torch.float32
    assert stream._source.model.config.to_dict() == empty_model(tmp_path).config.to_dict()


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("BartForConditionalGeneration", "2 stacks of blocks"), ("MixtralForCausalLM", "has experts")],
)
def test_other_models_are_refused(architecture, reason):
    model = make_model(architecture)
    with pytest.raises(ValueError, match=f"{reason}.*: use reconstruct=0"):
        block_names(model, find_targets(model, None))


def test_a_model_that_changes_what_its_blocks_hand_on_is_refused(tmp_path, monkeypatch):
    model = make_model("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    kind = type(model.model.layers[0])
    real = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda block, hidden, *args, **more: real(block, 2 * hidden, *args, **more))
    assert isinstance(model.model.layers, nn.ModuleList)
    with pytest.raises(ValueError, match="more than to hand the output of one block to the next"):
        stream_of(tmp_path)
