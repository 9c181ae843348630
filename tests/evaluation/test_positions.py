"""Gain by position, for every protocol that scores tokens without a gap."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from hf_posext import patch_model
from hf_posext.evaluation import compare
from hf_posext.evaluation.rows import STRETCHES, gain_by_position, position_sums, stretch_bounds
from hf_posext.evaluation.windows import Measurement, control_stride
from hf_posext.reporting import plot_gain_by_position

from ..conftest import TRAINED, tiny_t5
from ..reporting.helpers import panels
from .helpers import character_tokenizer, naive_nll, naive_windowed_nll, random_texts

TEXTS = random_texts(3, 140)


def measured(model: Any, **options: Any) -> tuple[Any, list[dict[str, Any]], list[dict[str, Any]]]:
    results = compare(model, character_tokenizer(), TEXTS, ["linear"], lengths=[64, 128], factor=2.0, **options)
    extended, control = (
        [record for record in results.per_document if (record["method"], record["length"]) == (name, 128)]
        for name in ("linear", "truncated")
    )
    return results, extended, control


def test_a_tail_is_divided_into_stretches_of_its_own(
    llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, extended, control = measured(llama, protocol="tail", tail=40)
    stretches = gain_by_position(extended, control, seed=0)
    assert (stretches[0].begin, stretches[-1].end, len(stretches)) == (87, 128, STRETCHES)
    rows = [torch.tensor(character_tokenizer()(text)["input_ids"][:128]) for text in TEXTS]
    cut = [naive_windowed_nll(llama, row, TRAINED, control_stride(TRAINED), False) for row in rows]
    with patch_model(llama, "linear", factor=2.0):
        read = [naive_nll(llama, row) for row in rows]
    for stretch in stretches:
        tokens = slice(max(stretch.begin, 88) - 1, stretch.end - 1)  # nll[0] is of token 1
        saved = np.mean([a[tokens] - b[tokens] for a, b in zip(cut, read, strict=True)])
        assert stretch.gain == pytest.approx(math.exp(saved), rel=1e-5)
    panel = panels(lambda: plot_gain_by_position(results, tmp_path / "gain.png"), monkeypatch)[0]
    assert panel.get_xlim() == (87, 128)


@pytest.mark.parametrize("options", [{"protocol": "rolling"}, {"protocol": "sliding", "stride": 16}], ids=str)
def test_windows_cover_the_document(llama: LlamaForCausalLM, options: dict[str, Any]) -> None:
    _, extended, control = measured(llama, **options)
    stretches = gain_by_position(extended, control, seed=0)
    assert (stretches[0].begin, stretches[-1].end) == (0, 128)
    saved = [sum(record["position_nll_sums"]) for record in extended]
    assert saved == pytest.approx([record["nll_sum"] for record in extended], rel=1e-9)


def test_what_a_decoder_is_asked_for_is_divided_too() -> None:
    results = compare(
        tiny_t5(), character_tokenizer(), TEXTS, ["bucket-linear"], lengths=[128], factor=2.0, trained_length=TRAINED
    )
    extended, control = results.per_document[3:], results.per_document[:3]
    stretches = gain_by_position(extended, control, seed=0)
    assert (extended[0]["first"], extended[0]["tokens"]) == (96, 32)
    assert (stretches[0].begin, stretches[-1].end) == (95, 128)
    assert extended[0]["bytes"] == 32 and results.rows[0]["bits_per_byte"] == pytest.approx(
        results.rows[0]["nll_sum"] / math.log(2) / 96
    )


def test_bounds_and_sums_agree() -> None:
    nll = np.arange(1.0, 21.0)  # of tokens 5 to 24
    bounds = stretch_bounds(5, 20)
    assert (bounds[0], bounds[-1]) == (4, 25)
    expected = [sum(nll[token - 5] for token in range(max(5, a), b)) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert position_sums(Measurement(25, nll, first=5)) == expected and sum(expected) == nll.sum()
