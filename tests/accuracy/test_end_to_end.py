"""All blocks trained together towards the dense model: what it brings, what is packed of it, and killed runs."""

import copy
import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_reconstruction import CONFIG, SQUARES, packed_and_adapted, quantize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lowra import AdapterRecipe, LowRAConfig, calibrate, merge_into_dense
from lowra.checkpoints.targets import find_targets
from lowra.config import PRECISIONS
from lowra.inspection import requirements
from lowra.integrations.exporting import export_adapter
from lowra.quantization import end_to_end, joint_training, planning
from lowra.quantization.calibration import Calibration
from lowra.quantization.card import CARD_FILE
from lowra.quantization.initial_adapter import ADAPTER_FOLDER
from lowra.quantization.joint_training import JointTraining
from lowra.quantization.learner import learn_codebook
from lowra.quantization.loftq import LowRank, initialize
from lowra.quantization.pack import quantize_matrix
from lowra.quantization.token_tables import token_tables
from lowra.quantization.trained_stack import stacked
from lowra.quantization.trained_weight import TrainedWeight
from lowra_command import main

TOGETHER = dataclasses.replace(CONFIG, reconstruct=2, end_to_end=12)


@pytest.fixture(scope="module")
def calibration(tiny_llama):
    return calibrate(str(tiny_llama), [SQUARES], 1024, "cpu", True, False, reconstruct_tokens=1024, end_to_end=3)


@pytest.fixture(scope="module")
def trained(tiny_llama, calibration, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "llama"
    return output, quantize(tiny_llama, output, calibration, TOGETHER)


def divergence(folder, original, tokens):
    with torch.no_grad():
        wanted = original(tokens).logits.log_softmax(dim=-1)
        found = packed_and_adapted(folder)(tokens).logits.log_softmax(dim=-1)
        return float((wanted.exp() * (wanted - found)).sum(dim=-1).mean())


def test_the_packed_model_is_as_near_to_the_dense_one_as_the_report_says(tiny_llama, calibration, trained):
    output, report = trained
    did = report["end_to_end"]
    before, after = did["divergence"]
    tables = ["model.embed_tokens.weight"]
    assert did == {
        "steps": 12, "tokens": 12 * 16 * 128, "token_tables": tables, "divergence": [before, after], "kept": True
    }  # fmt: skip
    assert after < 0.95 * before
    table, learned = (load_file(folder / "model.safetensors")[tables[0]] for folder in (tiny_llama, output))
    assert learned.dtype == table.dtype and not torch.equal(learned, table)
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert divergence(output, original, calibration.further[-9:]) == pytest.approx(after, rel=1e-2)
    card = (output / CARD_FILE).read_text()
    assert len(report["block_errors"]) == 2 and "trained end to end | 24,576 tokens" in card
    assert f"so not\nthose of the base: `{tables[0]}`. Everything else is" in card


def test_inspecting_tells_of_trained_embeddings(trained, tmp_path, capsys):
    folder = shutil.copytree(trained[0], tmp_path / "copy")

    def said():
        assert main(["inspect", str(folder)]) == 0
        return capsys.readouterr().out

    assert "(end to end), and so not the base's: model.embed_tokens.weight\n" in said()
    report = json.loads((folder / "lowra_report.json").read_text())
    report["end_to_end"]["kept"] = False
    (folder / "lowra_report.json").write_text(json.dumps(report))
    assert "end to end" not in said()
    (folder / "lowra_report.json").unlink()  # as of a model that was loaded and saved again
    assert "may have been trained with the packed weights (end to end)" in said()


def test_what_was_learned_goes_onto_the_original_with_its_own_embeddings(tiny_llama, trained):
    """Those of the packed base were trained to make up for its codes, which the original does not have."""
    merged = merge_into_dense(packed_and_adapted(trained[0]), tiny_llama, trained[0] / ADAPTER_FOLDER)
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, msg=name)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize(
    "more",
    [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [5]}, {"target_modules": ["embed_tokens"]}],
)
def test_embeddings_of_an_adapter_go_onto_those_of_the_original_or_not_at_all(tiny_llama, trained, tmp_path, more):
    base = AutoModelForCausalLM.from_pretrained(trained[0], dtype=torch.float32)
    config = LoraConfig(r=4, **{"target_modules": ["q_proj"], **more}, init_lora_weights="gaussian")
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="use `lowra merge`|holds .*, which was trained with the packed"):
        export_adapter(tmp_path / "adapter", None, tmp_path / "exported")
    if "target_modules" not in more:
        with pytest.raises(ValueError, match="was trained with .* and is trained whole with this adapter: merge into"):
            merge_into_dense(model, tiny_llama)
        return
    merged = merge_into_dense(model, tiny_llama).get_input_embeddings().weight
    assert torch.equal(merged.bfloat16(), load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"])


@pytest.mark.parametrize("method", [None, "lora"])
def test_without_an_adapter_or_with_one_that_starts_from_nothing(tiny_llama, calibration, tmp_path, method):
    """And without the blocks' own training, and with the embeddings packed as well, which stay as they are."""
    config = dataclasses.replace(TOGETHER, reconstruct=0, quantize_embeddings=True, feedback=0, sensitivity="layer")
    adapter = None if method is None else AdapterRecipe(4, method=method)
    before = quantize(tiny_llama, tmp_path / "plain", calibration, dataclasses.replace(config, end_to_end=0), adapter)
    after = quantize(tiny_llama, tmp_path / "llama", calibration, config, adapter)
    assert after["end_to_end"]["divergence"][1] < 0.95 * after["end_to_end"]["divergence"][0]
    assert before["end_to_end"] is None and before["true_bits"] == after["true_bits"]
    tables = [load_file(tmp_path / run / "model.safetensors") for run in ("plain", "llama")]
    same = {key for key in tables[0] if torch.equal(tables[0][key], tables[1][key])}
    assert "model.embed_tokens.weight" in same and "model.layers.0.mlp.up_proj.weight" not in same
    if method:
        start = [load_file(tmp_path / run / ADAPTER_FOLDER / "adapter_model.safetensors") for run in ("plain", "llama")]
        assert all(torch.equal(start[0][key], start[1][key]) for key in start[0])


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_run_ends_in_the_same_bytes(  # noqa: PLR0917 - fixtures
    tiny_llama, calibration, trained, tmp_path, monkeypatch, caplog, damaged
):
    class Killed(BaseException):
        pass

    steps = []

    def killing(self, until, real=end_to_end.JointTraining.run):
        steps.append(self.done)
        if len(steps) == 4:
            raise Killed
        return real(self, self.done + 1)

    monkeypatch.setattr(end_to_end, "KEEP_AFTER", 0.0)
    monkeypatch.setattr(end_to_end.JointTraining, "run", killing)
    with pytest.raises(Killed):
        quantize(tiny_llama, tmp_path / "llama", calibration, TOGETHER)
    if damaged:
        (state,) = tmp_path.glob("llama*/end_to_end/*")
        with safe_open(state, "pt") as content:
            save_file({name: content.get_tensor(name) for name in list(content.keys())[1:]}, state, content.metadata())
    report = quantize(tiny_llama, tmp_path / "llama", calibration, TOGETHER)
    assert steps == [*range(4), *range(0 if damaged else 3, 12)] and ("begins anew" in caplog.text) == damaged
    assert report["end_to_end"] == trained[1]["end_to_end"]
    assert report["resumed"] and not trained[1]["resumed"]
    for file in ("model.safetensors", f"{ADAPTER_FOLDER}/adapter_model.safetensors"):
        assert (tmp_path / "llama" / file).read_bytes() == (trained[0] / file).read_bytes(), file


def test_what_was_not_for_the_better_is_not_kept(tiny_llama, calibration, tmp_path, monkeypatch, caplog):
    values, config = itertools.count(1.0), dataclasses.replace(TOGETHER, reconstruct=1, end_to_end=1)
    monkeypatch.setattr(end_to_end.JointTraining, "divergence", lambda self, sequences: next(values))
    monkeypatch.setattr(planning, "FISHER_COSTS", planning.TRAINED_COSTS)  # both with the same precisions
    report = quantize(tiny_llama, tmp_path / "llama", calibration, config)
    blocks = quantize(tiny_llama, tmp_path / "blocks", calibration, dataclasses.replace(config, end_to_end=0))
    assert report["end_to_end"]["divergence"] == [1, 2] and not report["end_to_end"]["kept"]
    assert "not for the better" in caplog.text and "; not kept" in (tmp_path / "llama" / CARD_FILE).read_text()
    assert "level table. Everything else is as\nin the base." in (tmp_path / "llama" / CARD_FILE).read_text()
    for file in ("model.safetensors", f"{ADAPTER_FOLDER}/adapter_model.safetensors"):
        found = [load_file(tmp_path / run / file) for run in ("llama", "blocks")]
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[1]), file
    assert report["packed_error"] == blocks["packed_error"]


def test_what_cannot_be_trained_is_refused(tiny_llama, calibration, trained, tmp_path):
    alone = dataclasses.replace(TOGETHER, reconstruct=0)
    one = dataclasses.replace(calibration, sequences=calibration.sequences[:1], further=None)
    for given, why in (
        (Calibration.load(trained[0]), "end_to_end trains on .* holds none: give the text"),
        (one, "there is one: give more text"),
    ):
        with pytest.raises(ValueError, match=why):
            quantize(tiny_llama, tmp_path / "llama", given, alone)
    with pytest.raises(ValueError, match="end_to_end must not be negative"):
        LowRAConfig(end_to_end=-1)
    with pytest.raises(ValueError, match="use end_to_end=0 with it"):
        LowRAConfig(codebook="normal_float", end_to_end=1)


def test_a_machine_that_is_too_small_is_refused_beforehand(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(requirements, "_BYTES_END_TO_END", 1e9)
    arguments = ["quantize", str(tiny_llama), "--output", str(tmp_path / "llama"), "--device", "cpu"]
    assert main([*arguments, "--calibrate", "self", "--end-to-end", "1"]) == 2
    said = capsys.readouterr().err
    assert "Training all blocks of this model together needs about" in said and "Leave out --end-to-end" in said
    assert not (tmp_path / "llama").exists()


def test_the_command_trains_on_text_that_the_model_writes(tiny_llama, tmp_path, capsys):
    options = "--bits 1.5 --rank 4 --calibrate self --calibration-tokens 256 --end-to-end 1 --device cpu".split()
    assert main(["quantize", str(tiny_llama), "--output", str(tmp_path / "llama"), *options]) == 0
    said = capsys.readouterr().out
    assert "end to end: KL divergence from the dense model" in said
    *stages, whole = json.loads((tmp_path / "llama" / "lowra_report.json").read_text())["seconds"].values()
    assert f"{whole:.1f} seconds: check " in said and ", calibrate " in said  # which writes the text, too
    assert 0.9 * whole < sum(stages) <= whole + 0.01
    packed_and_adapted(tmp_path / "llama")


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_are_trained_as_one_where_they_are_tied(tied):
    config = LlamaConfig(vocab_size=32, hidden_size=8, num_attention_heads=1, tie_word_embeddings=tied)
    config.num_hidden_layers, config.intermediate_size = 1, 8
    assert token_tables(LlamaForCausalLM(config)) == ["model.embed_tokens.weight", "lm_head.weight"][: 2 - tied]


def test_embeddings_of_tokens_that_the_text_lacks_stay_as_they_are(tmp_path):
    """Zeros of padding among them, whatever Adam's small second moments would make of small gradients."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    config.pad_token_id = 0
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stored_as = dict.fromkeys(token_tables(model), torch.float16)
    training, _ = joint(tmp_path, 4, token_tables=stored_as, tokens=range(8, 16))
    training.run(4)
    learned = training.token_tables.stored()
    name = "model.embed_tokens.weight"
    same = (learned[name] == before[name].half()).all(dim=1)
    assert same.tolist() == [token not in range(8, 16) for token in range(32)] and not learned[name][0].any()
    assert not torch.equal(learned["lm_head.weight"], before["lm_head.weight"].half())


def some_weights(scales):
    """Three, of two widths, of which one has an adapter that starts from nothing."""
    torch.manual_seed(0)
    config = LowRAConfig(scales=scales)
    weights = {}
    for number, (rows, columns) in enumerate(((9, 136), (7, 136), (5, 64))):
        weight = torch.randn(rows, columns)
        row_bits = torch.tensor(PRECISIONS * 3, dtype=torch.uint8)[:rows]
        book = learn_codebook(weight, config)

        def pack(part, book=book, row_bits=row_bits):
            return quantize_matrix(part, book, row_bits, config)

        packed, factors = initialize(weight, pack, 2, 4.0)
        if number == 1:
            factors = LowRank(factors.lora_A, torch.zeros_like(factors.lora_B))
        weights[str(number)] = TrainedWeight(weight, packed, factors, 2.0)
        with torch.no_grad():
            for name, parameter in weights[str(number)].named_parameters():
                parameter += 0.01 * torch.randn_like(parameter) * (number != 1 or "lora" not in name)
    return weights


@pytest.mark.parametrize("scales", ["double_quant", "float32"])
def test_weights_of_a_stack_are_made_and_learn_as_each_by_itself(scales):
    weights = some_weights(scales)
    alone = copy.deepcopy(weights)
    stacks = stacked(weights)
    assert [list(stack.weights) for stack in stacks] == [["0", "1"], ["2"]]
    made = {name: weight for stack in stacks for name, weight in stack().items()}
    toward = {name: torch.randn_like(weight) for name, weight in made.items()}
    for name, weight in alone.items():
        own = weight()
        assert torch.equal(own, made[name])
        own.backward(toward[name])
    torch.autograd.backward(list(made.values()), [toward[name] for name in made])
    for stack in stacks:
        for part in ("dense", "scale_change"):
            wanted = stack.gathered(getattr(alone[name], part).grad for name in stack.weights)
            torch.testing.assert_close(getattr(stack, part).grad, wanted, msg=part)
        assert float(stack.level_change.grad.sum()) == pytest.approx(
            sum(float(alone[name].level_change.grad.sum()) for name in stack.weights), rel=1e-4, abs=1e-3
        )


@pytest.mark.parametrize("fixed_cells", [True, False])
def test_what_a_stack_learned_is_what_is_packed(fixed_cells):
    """Also where codes are found by the tables of the start, and not by those of the end."""
    weights = some_weights("double_quant")
    stacks = stacked(weights, fixed_cells=fixed_cells)
    with torch.no_grad():
        for parameter in [own for stack in stacks for own in stack.parameters()]:
            parameter += 0.1 * torch.randn_like(parameter)
        made = {name: weight.clone() for stack in stacks for name, weight in stack().items()}
    for stack in stacks:
        stack.unstack()
    for name, weight in weights.items():
        torch.testing.assert_close(weight(), made[name], rtol=0, atol=1e-6)
        stored = weight.packed()
        product = 2.0 * weight.factors().lora_B @ weight.factors().lora_A
        torch.testing.assert_close(stored.dequantize() + product, made[name], rtol=0, atol=1e-6)
        assert not torch.equal(stored.levels, weight.start.levels)


def joint(folder, steps, device="cpu", token_tables=None, tokens=range(256)):
    """A training of a model at 2 bits, and its text of these tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    targets = find_targets(model, None)
    weights = {}
    for name in targets:
        weight, config = model.get_parameter(name).detach(), LowRAConfig()
        row_bits = torch.full((len(weight),), 2, dtype=torch.uint8, device=device)
        packed = quantize_matrix(weight, learn_codebook(weight, config), row_bits, config)
        weights[name] = TrainedWeight(weight, packed, None, 1.0)
    text = torch.randint(tokens[0], tokens[-1] + 1, (64, 128), generator=torch.Generator().manual_seed(0))
    return JointTraining(model, targets, weights, text, steps, token_tables=token_tables), text


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_steps_on_a_gpu_are_recorded_and_compiled_and_learn_the_same(tiny_llama, monkeypatch):
    losses = []
    for recorded, compiled in ((True, False), (False, False), (True, True)):
        monkeypatch.setattr(joint_training, "WORTH_COMPILING", 0 if compiled else 500)
        training, _ = joint(tiny_llama, 12, "cuda")
        if not recorded:
            training.recorded = False
        losses.append(torch.cat([training.run(8), training.run(12)]).cpu())
        assert (training.recorded, training.compiled) == (recorded, compiled)
        training.finish()
    for other in losses[1:]:
        torch.testing.assert_close(losses[0], other, rtol=0.05, atol=1e-6)


def test_where_nothing_can_be_compiled_steps_are_made_without(tiny_llama, monkeypatch, caplog):
    def broken(forward, dynamic):
        def fails(*args, **kwargs):
            raise torch._dynamo.exc.TorchDynamoException("no compiler here")

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    losses = []
    for could in (None, False):
        training, text = joint(tiny_llama, 3)
        training.compiled = could
        losses.append(training.run(3))
        assert training.compiled is False
        assert training.divergence(text[:4]) > 0
    assert torch.equal(*losses) and "not compiled: no compiler here" in caplog.text


def lacking(state):
    del state["0.second." + next(iter(state)).partition(".")[2].partition(".")[2]]


def with_another(state):
    state["more"] = torch.zeros(1)


def of_another_shape(state):
    name = next(iter(state))
    state[name] = state[name].reshape(-1)[:1].clone()


def of_another_type(state):
    name = next(iter(state))
    state[name] = state[name].double()


@pytest.mark.parametrize("change", [None, lacking, with_another, of_another_shape, of_another_type])
def test_no_state_but_its_own_is_gone_on_from(tiny_llama, change):
    training, _ = joint(tiny_llama, 3)
    before = {name: tensor.clone() for name, tensor in training.state().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    if change is not None:
        change(state)
    with pytest.raises(ValueError, match="A state of this training was expected") as caught:
        training.restore(state, 4 if change is None else 2)
    assert "\n" not in str(caught.value) and training.done == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.state().items())
