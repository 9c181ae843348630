"""The card of an extended or trained model: its figures are those that were measured, side by side."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_posext import patch_model
from hf_posext.adapters import save_adapter
from hf_posext.errors import InvalidParameterError, PlanError
from hf_posext.evaluation import Results, compare, evaluate_perplexity
from hf_posext.reporting import before_after, write_model_card
from hf_posext.reporting.card import PICTURE, THIS_MODEL
from tests.adapters.helpers import KINDS, files, train, with_adapter
from tests.conftest import TRAINED, tiny_llama
from tests.evaluation.helpers import character_tokenizer, random_texts

TEXTS, LENGTHS = random_texts(3, 2 * TRAINED), [TRAINED // 2, 2 * TRAINED]
TRAINING = {"run": {"preset": {"name": "lora", "rank": 4}, "settings": {"steps": 3}}, "result": {"seconds": 1.5}}


@pytest.fixture(scope="module")
def before() -> Results:
    return compare(tiny_llama(), character_tokenizer(), TEXTS, ["none"], lengths=LENGTHS, factor=2.0)


def measure(model: object) -> Results:
    return evaluate_perplexity(model, character_tokenizer(), TEXTS, LENGTHS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """A trained adapter, and what it measures."""
    model = tiny_llama()
    patch_model(model, "yarn", factor=2)
    peft = with_adapter(model, **KINDS["lora"])
    train(peft, 2 * TRAINED)
    path = tmp_path_factory.mktemp("card") / "my-adapter"
    return save_adapter(peft, path), measure(peft)


def test_before_and_after_are_what_one_comparison_would_have_measured(before: Results) -> None:
    """Of an untrained model both ways exist, and must agree to the last digit."""
    compared = compare(tiny_llama(), character_tokenizer(), TEXTS, ["none", "yarn"], lengths=LENGTHS, factor=2.0)
    model = tiny_llama()
    patch_model(model, "yarn", factor=2)
    joined = before_after(before, measure(model))
    for row in compared.rows:
        name = THIS_MODEL if row["method"] == "yarn" else "none"
        assert joined.row(name, row["length"]) == row | {"method": name}
    assert joined.short_context() == [entry | {"method": THIS_MODEL} for entry in compared.short_context()]


def test_without_a_control_there_is_no_gain(before: Results) -> None:
    alone = measure(tiny_llama())
    model = tiny_llama()
    patch_model(model, "yarn", factor=2)
    row = before_after(alone, measure(model)).row(THIS_MODEL, LENGTHS[-1])
    assert row["gain"] is None and row["change"] is not None


def test_what_cannot_be_compared(before: Results, adapter: tuple[Path, Results]) -> None:
    _, after = adapter
    several = compare(tiny_llama(), character_tokenizer(), TEXTS, ["linear", "yarn"], lengths=LENGTHS, factor=2.0)
    with pytest.raises(InvalidParameterError, match="got those of linear, yarn. Pass"):
        before_after(before, several)
    altered = copy.deepcopy(after)
    altered.provenance["protocol"] = "sliding"
    with pytest.raises(InvalidParameterError, match=r"protocol .prefix, sliding.*Measure both in the same"):
        before_after(before, altered)
    shorter = compare(tiny_llama(), character_tokenizer(), TEXTS, ["none"], lengths=LENGTHS[1:], factor=2.0)
    with pytest.raises(InvalidParameterError, match="Expected truncated at every length of the model after"):
        before_after(shorter, after)
    with pytest.raises(InvalidParameterError, match="got those of no method"):
        before_after(before, Results())


def test_card_of_an_adapter(before: Results, adapter: tuple[Path, Results]) -> None:
    path, after = adapter
    contents = {name: content for name, content in files(path).items() if name != "README.md"}
    card = ModelCard(write_model_card(path, before, after, training=TRAINING).read_text())
    joined = before_after(before, after)

    data = card.data
    assert data.library_name == "peft" and {"hf_posext", "yarn"} <= set(data.tags)
    assert data.model_name == "my-adapter"
    values = {
        (entry.metric_name, entry.dataset_args["length"]): entry.metric_value
        for entry in data.eval_results
        if entry.dataset_args["method"] == "yarn"
    }
    assert len(values) == len(data.eval_results) > 0  # of this model alone
    for length in LENGTHS:
        row = joined.row(THIS_MODEL, length)
        assert values["Perplexity", length] == row["perplexity"]
        assert values["Gain over the truncated context", length] == row["gain"]

    text = card.text
    change = joined.short_context()[0]["change"]
    for words in (
        "made to read 128 tokens instead of 64 by yarn",
        "yarn: 64 -> 128 tokens",
        f"]({PICTURE})",
        "| truncated to 64 |",
        "| none |",
        "| this model x2 |",
        f"| this model x2 | {100 * change:+.1f} %",
        "model = load_adapter(",
        "AutoConfig.from_pretrained(",
        "| run.preset.name | lora |",
        "| result.seconds | 1.5 |",
        "Nothing above 128 tokens was measured.",
        "Whether it retrieves distant information was not measured",
        "inherits the training data, the licence, and the biases",
    ):
        assert words in text, words
    assert (path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert {name: content for name, content in files(path).items() if name in contents} == contents


def test_card_of_a_checkpoint(before: Results, tmp_path: Path) -> None:
    for method, words in (
        ("yarn", "AutoModelForCausalLM.from_pretrained("),
        ("rerope(window=16)", "not possible, since positions are remapped inside attention"),
    ):
        model = tiny_llama()
        patch = patch_model(model, method, factor=2)
        path = tmp_path / patch.plan.parameters[0]["name"]
        patch.save_pretrained(path)
        card = ModelCard(write_model_card(path, before, measure(model)).read_text())
        assert card.data.library_name == "transformers" and card.data.base_model is None
        assert "load_patched" in card.text and words in card.text
        assert "## Training" not in card.text


def test_directory_without_a_plan(before: Results, adapter: tuple[Path, Results], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no plan at"):
        write_model_card(tmp_path, before, adapter[1])
    assert files(tmp_path) == {}
