"""Metrics against their definitions and published values."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowra.training.data import IGNORED, Collator, load_tokenizer, text_blocks
from lowra.training.evaluation import language_model_metrics, rouge


def test_perplexity_is_exp_of_the_mean_loss_over_all_predicted_tokens(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    collate = Collator(load_tokenizer(tiny_llama))
    examples = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (5, 11, 8)]
    examples[1]["labels"] = [IGNORED] * 4 + examples[1]["labels"][4:]
    loss, right, tokens = 0.0, 0, 0
    for example in examples:
        ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])[1:]
        scores = model(ids[None]).logits[0, :-1].log_softmax(-1)
        kept = labels != IGNORED
        loss -= scores[kept, labels[kept]].sum().item()
        right += (scores.argmax(-1)[kept] == labels[kept]).sum().item()
        tokens += int(kept.sum())
    for batch_size in (1, 3):  # padding must not change anything
        metrics = language_model_metrics(model, examples, collate, batch_size, progress=False)
        assert metrics["tokens"] == tokens == 4 + 7 + 7
        assert metrics["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(right / tokens)


def test_evaluation_leaves_the_mode_as_it_was(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).train()
    blocks = text_blocks(["some text to score\n"], load_tokenizer(tiny_llama), 8, progress=False)
    language_model_metrics(model, blocks, Collator(load_tokenizer(tiny_llama)), 1, progress=False)
    assert model.training


def test_rouge():
    same = rouge(["The cat sat. It slept."], ["The cat sat. It slept."])
    assert all(value == pytest.approx(100) for value in same.values())
    # Lin (2004), section 3: "police killed the gunman" and "police kill the gunman" share 3 unigrams of 4
    lin = rouge(["police slay the gunman"], ["police killed the gunman"])
    assert lin["rouge1"] == pytest.approx(75) and lin["rougeL"] == pytest.approx(75)
    assert rouge(["killing"], ["killed"])["rouge1"] == pytest.approx(100)  # stemmed
    swapped = rouge(["It slept. The cat sat."], ["The cat sat. It slept."])
    assert swapped["rougeLsum"] > swapped["rougeL"]  # sentences are matched apart from their order
