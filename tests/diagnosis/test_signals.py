"""The pictures of a diagnosis: what is blue, what is orange, and that each is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from hf_posext.diagnosis import Diagnosis, diagnose
from hf_posext.reporting.drawing import new_figure
from hf_posext.reporting.signals import NEW, SHOWN, draw_class, draw_losses, draw_signal, plot_classes

from ..conftest import TRAINED, longer_gpt2, tiny_bloom, tiny_llama, tiny_t5, tiny_xglm
from ..zoo import build


def with_losses(diagnosis: Diagnosis, departure: int | None = 70) -> Diagnosis:
    curves = [("none", 4.0), ("last 16 tokens", 3.5), ("yarn", 3.7)]
    lines = [
        {"curve": name, "begin": begin, "end": begin + 16, "nll": level, "low": level - 0.1, "high": level + 0.1}
        for name, level in curves
        for begin in range(0, 256, 16)
    ]
    tables = {**diagnosis.tables, "losses": pd.DataFrame(lines)}
    return replace(diagnosis, departure=departure, tables=tables, provenance={"context": 16})


@pytest.fixture(scope="module")
def llama() -> Diagnosis:
    return diagnose(tiny_llama(), methods=["yarn", "ntk"])


@pytest.mark.filterwarnings("error")
def test_a_target_far_away_keeps_the_shades_of_its_values() -> None:
    """All of the trained length is then in one column, by which no dimension can be measured."""
    diagnosis = diagnose(longer_gpt2(), methods=["table-linear"], target_length=2**23)
    pictures = []
    for signal in diagnosis.signals:
        panel = new_figure(2).subplots()
        draw_signal(panel, signal, diagnosis)
        pictures.append(np.asarray(panel.images[0].get_array()))
    plain, extended = pictures
    assert (plain[:, 1:, :3] == 0.93).all() and (plain[:, 0, :3] != 0.93).any(), "grey where the table has ended"
    assert len(np.unique(extended.reshape(-1, 4), axis=0)) > 50, "and not all of them the lightest or the darkest"


def test_orange_is_what_training_has_not_shown(llama: Diagnosis) -> None:
    for signal, beyond in zip(llama.signals, (True, False, True), strict=True):
        panel = new_figure(2).subplots()
        draw_signal(panel, signal, llama)
        image = np.asarray(panel.images[0].get_array())
        orange = image[..., 0] > image[..., 2]  # more red than blue
        assert orange[:, :TRAINED].sum() == 0
        assert orange.any() == beyond == signal.unseen.any()
        assert panel.get_title() == ("as it is" if signal.method == "none" else signal.method)


def test_rows_that_do_not_exist_are_grey() -> None:
    diagnosis = diagnose(longer_gpt2(), methods=[], target_length=5 * TRAINED)
    panel = new_figure(2).subplots()
    draw_signal(panel, diagnosis.signals[0], diagnosis)
    image = np.asarray(panel.images[0].get_array())
    assert (image[:, 3 * TRAINED :] == (0.93, 0.93, 0.93, 1.0)).all()


def test_the_lines_of_a_class_are_blue_then_orange(llama: Diagnosis) -> None:
    panel = new_figure(2).subplots()
    draw_class(panel, replace(llama, signals=llama.signals[:1]))

    def drawn(colour: str) -> list[np.ndarray]:
        lines = [line for line in panel.get_lines() if line.get_color() == colour]
        return [np.flatnonzero(~np.isnan(np.asarray(line.get_ydata(), dtype=float))) for line in lines]

    broken = [(blue, orange) for blue, orange in zip(drawn(SHOWN), drawn(NEW), strict=True) if len(orange)]
    assert broken, "a pair that makes less than one rotation"
    for blue, orange in broken:
        assert blue.min() == 0 and blue.max() == TRAINED and orange.max() == 4 * TRAINED - 1
        assert orange.min() == TRAINED, "the two colours meet at the trained length"
    assert panel.get_xlabel() == "distance (tokens)" and panel.get_title() == "Interpolation"


def test_the_loss_panel_says_where_it_departs(llama: Diagnosis) -> None:
    for departure, label in ((70, "departs at token 70"), (None, "does not depart")):
        panel = new_figure(2).subplots()
        draw_losses(panel, with_losses(llama, departure))
        assert [text.get_text() for text in panel.texts] == [label]
        assert panel.get_legend_handles_labels()[1] == ["as it is", "yarn", "as it is, short context"]


@pytest.mark.parametrize("measured", [False, True])
def test_the_picture_of_a_model_is_1800_pixels_wide(measured: bool, llama: Diagnosis, tmp_path: Path) -> None:
    diagnosis = with_losses(llama) if measured else llama
    diagnosis.plot(tmp_path / "model.png")
    image = imread(tmp_path / "model.png")
    assert image.shape[1] == 1800 and image[..., :3].std() > 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["model.png"]


def test_a_column_for_each_model(llama: Diagnosis, tmp_path: Path) -> None:
    models = [longer_gpt2(), tiny_bloom(), tiny_t5(), tiny_xglm(), build("mamba")]
    runs = [with_losses(llama), *(diagnose(model, methods=[]) for model in models)]
    plot_classes(runs, tmp_path / "classes.png")
    assert imread(tmp_path / "classes.png").shape[1] == 1800
