"""Recipes: the paper's tables as they stand in configs/, overrides, and refusals."""

import pathlib

import pytest

from lowra.training import Recipe, load_recipe

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"

# Tables 10, 13, 12 and 11 of the paper
PAPER = {
    "wikitext2.yaml": dict(
        dataset="wikitext", dataset_config="wikitext-2-raw-v1", rank=64, alpha=64.0, bf16=True, warmup_ratio=0.03,
        scheduler="cosine", gradient_checkpointing=True, batch_size=16, accumulation=4, max_steps=126, eval_steps=20,
        learning_rate=3e-4, beta2=0.999, max_grad_norm=0.3, weight_decay=0.1, seed=0, data_seed=42, block_size=1024,
        max_eval_samples=1000, eval_batch_size=4, workers=3,
    ),
    "openassistant.yaml": dict(
        dataset="timdettmers/openassistant-guanaco", carve_validation=1024, max_eval_samples=500, eval_batch_size=1,
        group_by_length=True, rank=64, alpha=64.0, bf16=True, warmup_ratio=0.03, scheduler="constant", dropout=0.1,
        gradient_checkpointing=True, source_length=16, target_length=512, batch_size=4, accumulation=4, max_steps=1875,
        eval_steps=200, learning_rate=2e-4, beta2=0.999, max_grad_norm=0.3, weight_decay=0.0, seed=0, data_seed=42,
    ),
    "xsum.yaml": dict(
        dataset="xsum", learning_rate=1e-4, seed=11, source_length=512, epochs=25.0, batch_size=4, accumulation=32,
        eval_batch_size=32, eval_epochs=True, model="facebook/bart-large",
    ),
    "cnn_dailymail.yaml": dict(
        dataset="cnn_dailymail", dataset_config="3.0.0", learning_rate=1e-4, seed=11, source_length=512, epochs=15.0,
        batch_size=8, accumulation=32, eval_batch_size=32, eval_epochs=True, model="facebook/bart-large",
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_parses(path):
    assert load_recipe(path).model


@pytest.mark.parametrize("name", PAPER)
def test_configs_have_the_papers_values(name):
    recipe = load_recipe(CONFIGS / name).to_dict()
    assert {key: recipe[key] for key in PAPER[name]} == PAPER[name]


def test_overrides_are_read_as_yaml_and_reach_the_quantisation():
    recipe = load_recipe(
        CONFIGS / "wikitext2.yaml",
        ["bits=1.15", "model=huggyllama/llama-30b", "max_steps=", "learning_rate=1e-4", "quantization.menu=[2,4]"],
    )
    assert (recipe.bits, recipe.model, recipe.max_steps, recipe.learning_rate) == (
        1.15, "huggyllama/llama-30b", None, 1e-4,
    )  # fmt: skip
    assert recipe.quantization == {"menu": [2, 4]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learnig_rate=1", "Did you mean 'learning_rate'"),
        ("bits=many", "bits must be of type float; got 'many'"),
        ("rank=1.5", "rank must be of type int"),
        ("rank=0", "rank must be positive"),
        ("task=poetry", "task must be one of"),
        ("tables=all", "tables must be one of auto, frozen, shared, levels, levels_and_scales"),
        ("bf16=3", "bf16 must be of type bool"),
        ("dropout=1", "dropout must be in"),
        ("max_steps=0", "max_steps must be at least 1"),
        ("rank", "An override is key=value; got 'rank'"),
        ("task=summarization", "needs source_column and target_column"),
    ],
)
def test_refused_overrides(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(CONFIGS / "wikitext2.yaml", [override])


def test_refused_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no recipe"):
        load_recipe(tmp_path / "none.yaml")
    for content, message in (("", "holds no keys"), ("a: [", "not readable as YAML"), ("task: x", "names no model")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_recipe(tmp_path / "bad.yaml")


def test_a_recipe_survives_its_dictionary(recipe):
    assert Recipe.from_dict(recipe.to_dict()) == recipe
