"""The numbers in the figures, against loops and transformers' own code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_posext import compare, load_documents
from hf_posext.app import Shelf, content
from hf_posext.app.view import Choice, View, effect, look, read
from hf_posext.reporting.signals import NEW, SHOWN

from ..conftest import EXAMPLES, TRAINED, longer_gpt2, tiny_bloom, tiny_llama
from ..helpers import shipped_model, shipped_tokenizer
from .test_view import shelf_of

LENGTH = 3 * TRAINED
ROPE = EXAMPLES / "tiny" / "tiny-rope"


def view_of(model: PreTrainedModel, method: str, length: int = LENGTH, trained: int | None = None) -> View:
    return look(shelf_of(model), Choice("model", method, 4, length, trained))


def self_extend(i: int, j: int, group: int = 8, window: int = 16) -> float:
    return i - j if i - j < window else i // group + window - window // group - j // group


def rerope(i: int, j: int, window: int = 20) -> float:
    return min(i - j, window)


def leaky(i: int, j: int, window: int = 20, factor: int = 6) -> float:
    return i - j if i - j < window else window + (i - j - window) / factor


def dual_chunk(i: int, j: int, size: int = 48, local: int = 16) -> float:
    step = size - local
    if i // step == j // step:
        return i % step - j % step
    if i // step - j // step == 1:
        return min(i % step + step, size) - j % step
    return min(2 * step - 1, size) - j % step


MASKS = [
    ("self-extend(group=8, window=16)", self_extend),
    ("rerope(window=20)", rerope),
    ("leaky-rerope(window=20, stride=6.0)", leaky),
    ("dual-chunk(chunk=48, local=16)", dual_chunk),
]


@pytest.mark.parametrize(("method", "formula"), MASKS, ids=[name for name, _ in MASKS])
def test_a_mask_is_the_formula_of_its_paper(method: str, formula: Callable[[int, int], float]) -> None:
    figure = content.mask_figure(view_of(tiny_llama(), method))
    assert figure is not None
    before, after = (figure.axes[panel].images[-1].get_array().filled(np.nan).tolist() for panel in (0, 1))
    for i in range(LENGTH):
        assert before[i][: i + 1] == [i - j for j in range(i + 1)]
        expected = [formula(i, j) for j in range(i + 1)]
        assert np.allclose(after[i][: i + 1], expected, rtol=1e-6, atol=0)  # fractional positions are float32
        assert np.isnan(before[i][i + 1 :]).all() and np.isnan(after[i][i + 1 :]).all()
    line = figure.axes[2].lines[1]
    last = [formula(LENGTH - 1, LENGTH - 1 - distance) for distance in range(LENGTH)]
    assert line.get_xdata().tolist() == list(range(LENGTH))
    assert line.get_ydata().tolist() == pytest.approx(last, rel=1e-6)


def test_a_long_mask_shows_every_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "CELLS", 48)
    figure = content.mask_figure(view_of(tiny_llama(), "self-extend(group=8, window=16)"))
    assert figure is not None
    grid = figure.axes[1].images[-1].get_array()
    assert grid.shape == (48, 48)
    assert all(grid[a, b] == self_extend(4 * a, 4 * b) for a in range(48) for b in range(a + 1))


def test_a_mask_is_blue_within_the_trained_length_and_orange_past_it() -> None:
    figure = content.mask_figure(view_of(tiny_llama(), "rerope(window=20)"))
    assert figure is not None
    image = figure.axes[0].images[-1]
    red, _, blue, _ = image.cmap(image.norm(np.array([0, TRAINED - 2, TRAINED + 2, LENGTH - 1.0]))).T
    assert (blue[:2] > red[:2]).all() and (red[2:] > blue[2:]).all()


def test_a_key_that_is_not_seen_is_grey() -> None:
    figure = content.mask_figure(view_of(tiny_llama(), "sinks(sinks=4, window=32)"))
    assert figure is not None
    unseen = ~figure.axes[1].images[0].get_array().mask
    for i, j in ((LENGTH - 1, 0), (LENGTH - 1, LENGTH - 1), (LENGTH - 1, 60), (0, 60)):
        assert unseen[i, j] == ((i, j) == (LENGTH - 1, 60))
    assert not (~figure.axes[0].images[0].get_array().mask).any()


@pytest.mark.parametrize("method", ["yarn", "linear", "log-n"])
def test_methods_that_remap_nothing_have_no_mask_and_say_who_does(method: str) -> None:
    view = view_of(tiny_llama(), method)
    assert content.mask_figure(view) is None
    assert f"{method} leaves every pair" in content.mask(view) and "self-extend" in content.mask(view)


def test_wavelengths_are_those_of_transformers_own_yarn() -> None:
    model = tiny_llama()
    figure = content.frequency_figure(view_of(model, "yarn"))
    assert figure is not None
    series = {str(line.get_label()): line.get_ydata() for line in figure.axes[0].lines}
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED, "rope_theta": 10_000.0}
    config = LlamaConfig(**{**model.config.to_dict(), "rope_parameters": scaled})
    inv_freq, _ = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert series["yarn x4"].tolist() == pytest.approx([2 * math.pi / radians for radians in inv_freq.tolist()])
    width = model.config.hidden_size // model.config.num_attention_heads
    wavelengths = [2 * math.pi * 10_000.0 ** (2 * pair / width) for pair in range(width // 2)]
    assert series["as it is"].tolist() == pytest.approx(wavelengths)  # float32 frequencies: 1e-7
    (trained,) = (line for line in figure.axes[0].lines if line.get_linestyle() == ":")
    assert set(trained.get_ydata()) == {TRAINED}


def test_points_are_orange_where_the_text_goes_past_what_training_has_shown() -> None:
    """As it is: pairs of less than one rotation within training. With linear x4 and four times the length: none."""
    model = tiny_llama()
    figure = content.frequency_figure(view_of(model, "linear", length=4 * TRAINED))
    assert figure is not None
    points = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    drawn = [
        (to_hex(line.get_color()).upper(), np.flatnonzero(~np.isnan(line.get_ydata())).tolist()) for line in points
    ]
    slow = [pair for pair in range(8) if 2 * math.pi * 10_000.0 ** (pair / 8) > TRAINED]
    fast = [pair for pair in range(8) if pair not in slow]
    assert slow and fast
    assert drawn == [(SHOWN, fast), (NEW, slow), (SHOWN, list(range(8))), (NEW, [])]


def test_a_pair_that_stands_still_has_no_wavelength() -> None:
    figure = content.frequency_figure(view_of(tiny_llama(), "nope"))
    assert figure is not None
    assert all(np.isnan(line.get_ydata()).all() for line in figure.axes[0].lines if line.get_label() == "nope x4")


@pytest.mark.parametrize("build", [longer_gpt2, tiny_bloom])
def test_models_without_frequencies_say_so(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    view = view_of(model, "table-linear" if build is longer_gpt2 else "alibi-linear", trained=TRAINED)
    assert content.frequency_figure(view) is None and content.mask_figure(view) is None
    assert "without frequencies" in content.frequency(view) and "leaves every pair" in content.mask(view)


def test_the_signal_of_a_table_is_its_rows_and_what_lies_between_them() -> None:
    model = longer_gpt2()
    view = view_of(model, "table-linear", trained=TRAINED)
    rows = model.transformer.wpe.weight.detach().double().numpy()
    before, after = view.diagnosis.signals
    for line, dimension in enumerate(before.channels):
        assert before.values[line].tolist() == pytest.approx(rows[:LENGTH, dimension].tolist())
        squeezed = [np.interp(place / 4, range(TRAINED), rows[:TRAINED, dimension]) for place in range(LENGTH)]
        assert after.values[line].tolist() == pytest.approx(squeezed, abs=1e-6)  # float32 rows
    assert before.unseen.tolist() == [[place >= TRAINED for place in range(LENGTH)]] * len(before.channels)
    assert not after.unseen.any()
    figure = content.signal_figure(view)
    assert figure is not None and [panel.get_title() for panel in figure.axes] == ["as it is", "table-linear"]


@pytest.fixture(scope="module")
def two_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stretches of novels."""
    dataset = tmp_path_factory.mktemp("texts") / "two.jsonl"
    lines = (EXAMPLES / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    dataset.write_text(
        "".join(json.dumps({"text": json.loads(line)["text"][8000:9500]}) + "\n" for line in lines), encoding="utf-8"
    )
    return dataset


@pytest.fixture(scope="module")
def measured(two_texts: Path) -> View:
    """The view of tiny-rope as if it were trained on 64 tokens."""
    model = shipped_model()
    tokenizer = shipped_tokenizer()
    shelf = Shelf({"rope": ROPE}, two_texts, 10, lambda _: (model, tokenizer))
    return read(shelf, Choice("rope", "linear", 4, 4 * TRAINED, TRAINED))


def reference(dataset: list[str], **rope: object) -> np.ndarray:
    """NLL of tokens 1, 2, ... by position, mean over texts, by transformers alone."""
    tokenizer = shipped_tokenizer()
    parameters = {"rope_parameters": {"rope_theta": 10_000.0, **rope}} if rope else {}
    model = AutoModelForCausalLM.from_pretrained(ROPE, dtype=torch.float32, **parameters).eval()
    losses = []
    for text in dataset:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][10:]
        bos = tokenizer("a")["input_ids"][:1] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
        row = torch.tensor([*bos, *ids][: 4 * TRAINED])
        with torch.no_grad():
            logits = model(row[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="none").tolist())
    return np.mean(losses, axis=0)


def test_the_loss_is_that_of_plain_transformers_before_and_after(measured: View) -> None:
    lines = (EXAMPLES / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    texts = [json.loads(line)["text"][8000:9500] for line in lines]
    expected = {"as it is": reference(texts), "linear": reference(texts, rope_type="linear", factor=4.0)}
    panel = content.loss_figure(measured).axes[0]
    drawn = {str(line.get_label()): line for line in panel.lines}
    means = []
    for name, losses in expected.items():
        bounds = [max(1, stretch * 4 * TRAINED // 32) for stretch in range(33)]
        values = [losses[a - 1 : b - 1].mean() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        # Two kernels of attention differ by some 1e-6 in a loss of 5 nats.
        assert drawn[name].get_ydata().tolist() == pytest.approx(values, abs=1e-4)
        means += [losses[TRAINED - 1 :].mean(), losses[: TRAINED - 1].mean()]
    past_before, within_before, past_after, within_after = means
    assert effect(measured).startswith(
        f"Past token 64 the loss is {past_before:.2f} nats per token as it is and {past_after:.2f} with linear; "
        f"up to there it is {within_before:.2f} and {within_after:.2f}. From token 128 on, linear has a gain of "
    )


def test_the_gain_of_the_page_is_the_gain_of_compare(measured: View, two_texts: Path) -> None:
    model = shipped_model()
    tokenizer = shipped_tokenizer()
    lengths = {"lengths": [4 * TRAINED], "trained_length": TRAINED, "start": 10}
    (row,) = compare(model, tokenizer, load_documents(two_texts), ["linear"], factor=4, **lengths).rows
    assert f"linear has a gain of {row['gain']:.3f} over truncating the input to 64 tokens" in effect(measured)


def test_the_verdict_after_reading_tells_of_the_documents(measured: View) -> None:
    assert "on 2 documents the loss" in measured.diagnosis.verdict and "attention" not in measured.diagnosis.tables
