"""Embedding models as people hold them: a `SentenceTransformer`, patched at `model[0].auto_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    XLMRobertaConfig,
)

from hf_posext import ExtensionPlan, find_patch, patch_model
from hf_posext.errors import UnsupportedModelError

from ..conftest import EXAMPLES

TRAINED, FACTOR = 64, 4
SIZE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}
MODELS = {
    "bert": (BertConfig(**SIZE, max_position_embeddings=TRAINED), "table-linear"),
    "mpnet": (MPNetConfig(**SIZE, max_position_embeddings=TRAINED + 2), "table-linear"),
    "xlm-roberta": (XLMRobertaConfig(**SIZE, max_position_embeddings=TRAINED + 1), "table-linear"),
    "modernbert": (
        ModernBertConfig(
            **SIZE,
            cls_token_id=0,
            sep_token_id=0,
            max_position_embeddings=TRAINED,
            local_attention=32,
            global_attn_every_n_layers=1,
        ),
        "yarn",
    ),
    "llama": (LlamaConfig(**SIZE, max_position_embeddings=TRAINED), "self-extend"),
}
"""A config with 64 trained positions for each way in which encoders number theirs, and a method for it."""

START = "The old man went down to the sea and waited for the boats. " * 8
TEXTS = [START + "They brought nothing.", START + "They brought gold!", "A short text."]
"""Two texts that differ past token 64 only, and one that is padded beside them."""


def opened(name: str, folder: Path) -> SentenceTransformer:
    """A sentence transformer (mean pooling) with a tiny model of random weights."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny" / "tiny-rope", model_max_length=TRAINED)
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    AutoModel.from_config(MODELS[name][0]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu")


def alone(model: torch.nn.Module, embedder: SentenceTransformer, length: int) -> np.ndarray:
    """Right embeddings: each text by itself through a plain transformers model, and the mean over its tokens."""
    tokens = [embedder.tokenizer(text, truncation=True, max_length=length, return_tensors="pt") for text in TEXTS]
    with torch.no_grad():
        return np.stack([model(**inputs).last_hidden_state.mean(1)[0].numpy() for inputs in tokens])


@pytest.mark.parametrize("name", MODELS)
def test_a_patch_reads_on_past_the_trained_length_and_undo_is_exact(name: str, tmp_path: Path) -> None:
    embedder, method = opened(name, tmp_path / "model"), MODELS[name][1]
    before = embedder.encode(TEXTS)
    assert (before[0] == before[1]).all(), "truncated before they differ"
    plain = AutoModel.from_pretrained(tmp_path / "model")
    np.testing.assert_allclose(before, alone(plain, embedder, TRAINED), atol=1e-6)  # float32, rows with padding

    patch = patch_model(embedder[0].auto_model, method, factor=FACTOR)
    assert (embedder.encode(TEXTS)[0] == embedder.encode(TEXTS)[1]).all(), "max_seq_length still truncates"
    embedder.max_seq_length = patch.plan.target_length
    after = embedder.encode(TEXTS)
    assert np.abs(after[0] - after[1]).max() > 1e-4, "the ends of the texts count"
    patch_model(plain, method, factor=FACTOR)
    np.testing.assert_allclose(after, alone(plain, embedder, patch.plan.target_length), atol=1e-6)

    patch.undo()
    embedder.max_seq_length = TRAINED
    assert (embedder.encode(TEXTS) == before).all()


@pytest.mark.parametrize("name", MODELS)
def test_save_reopens_equal_or_names_the_plan(name: str, tmp_path: Path) -> None:
    embedder, method = opened(name, tmp_path / "model"), MODELS[name][1]
    patch = patch_model(embedder[0].auto_model, method, factor=FACTOR)
    embedder.max_seq_length = patch.plan.target_length
    embeddings = embedder.encode(TEXTS)
    embedder.save(str(tmp_path / "saved"))
    if patch.plan.bands:  # remapped inside attention, which plain transformers cannot compute
        with pytest.raises(ValueError, match="hf_posext"):
            SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        patch.undo()  # as docs/ecosystem.md says
        embedder.save(str(tmp_path / "embedder"))
        patch.plan.save(tmp_path / "embedder")
        again = SentenceTransformer(str(tmp_path / "embedder"), device="cpu")
        patch_model(again[0].auto_model, ExtensionPlan.load(tmp_path / "embedder"))
        assert again.max_seq_length == TRAINED, "of its config, and raised again by hand"
        again.max_seq_length = patch.plan.target_length
    else:
        again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        assert find_patch(again[0].auto_model) is None, "the positions are in the weights and the config"
    assert again.max_seq_length == patch.plan.target_length
    assert (again.encode(TEXTS) == embeddings).all()


def test_a_sentence_transformer_as_a_whole_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"got `SentenceTransformer`\. Pass model\[0\]\.auto_model"):
        patch_model(opened("bert", tmp_path), "table-linear", factor=FACTOR)
