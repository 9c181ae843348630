"""Tables of positions: the row of position 0 is asked from the model, and what is said to open is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    CLIPTextConfig,
    CLIPTextModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    MraConfig,
    MraForMaskedLM,
    NystromformerConfig,
    NystromformerForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    VisualBertConfig,
    VisualBertModel,
    YosoConfig,
    YosoForMaskedLM,
)

from hf_posext import detect_scheme, load_patched, patch_model
from hf_posext.errors import UnsupportedModelError
from hf_posext.patching.sites import position_tables

from ..conftest import TRAINED, sharpen, tiny_gpt2, tokens

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": TRAINED,
}
BART: dict[str, Any] = {"vocab_size": 128, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], int, int]] = {
    # builder, row of position 0, positions
    "gpt2": (tiny_gpt2, 0, TRAINED),
    "nystromformer": (lambda: NystromformerForMaskedLM(NystromformerConfig(**SIZES)), 2, TRAINED),
    "yoso": (lambda: YosoForMaskedLM(YosoConfig(**SIZES)), 2, TRAINED),
    "mra": (lambda: MraForMaskedLM(MraConfig(**SIZES)), 2, TRAINED),
    "visual_bert": (lambda: VisualBertModel(VisualBertConfig(**SIZES, visual_embedding_dim=32)), 0, TRAINED),
    "roberta": (lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, pad_token_id=1)), 2, TRAINED - 2),
    "clip_text_model": (lambda: CLIPTextModel(CLIPTextConfig(**SIZES)), 0, TRAINED),
    "opt": (
        lambda: OPTForCausalLM(OPTConfig(**{**SIZES, "intermediate_size": None}, ffn_dim=64, word_embed_proj_dim=64)),
        2,
        TRAINED,
    ),
    "bart": (
        lambda: BartForConditionalGeneration(BartConfig(**BART, max_position_embeddings=TRAINED)),
        2,
        TRAINED,
    ),
    "bert2bert": (
        lambda: EncoderDecoderModel(
            config=EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**SIZES), BertConfig(**SIZES))
        ),
        0,
        TRAINED,
    ),
}


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return sharpen(FAMILIES[family][0]())


@torch.no_grad()
def rows_read(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output of each table in a forward, by its path."""
    rows: dict[str, torch.Tensor] = {}
    handles = [
        table.register_forward_hook(lambda _, __, out, path=path: rows.__setitem__(path, out.reshape(-1, 64).clone()))
        for path, table in position_tables(model).items()
    ]
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model(input_ids=ids, **extra)
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_linear_interpolation(family: str, tmp_path: Path) -> None:
    model = build(family)
    _, offset, count = FAMILIES[family]
    model.config.architectures = [type(model).__name__]  # as saved configs have it
    scheme, by_config = detect_scheme(model), detect_scheme(model.config)
    assert scheme.table is not None and (scheme.table.offset, scheme.trained_length) == (offset, count)
    assert by_config.table == scheme.table
    ids = tokens(count).clamp(min=2)  # 1 is RoBERTa's padding, which has no position
    before = rows_read(model, ids)
    assert set(before) == set(position_tables(model)), "every table is read by a text"

    patch = patch_model(model, "table-linear", factor=4)
    positions = torch.arange(count)
    share = (positions % 4 / 4)[:, None]
    after = rows_read(model, ids)
    for path, rows in before.items():
        right = rows[positions // 4] * (1 - share) + rows[(positions // 4 + 1).clamp(max=count - 1)] * share
        torch.testing.assert_close(after[path], right, atol=1e-6, rtol=0)  # one rounding of float32
    longer = rows_read(model, tokens(3 * count).clamp(min=2))
    assert all(len(rows) == 3 * count for rows in longer.values())

    assert patch.native_obstacle is None
    patch.save_pretrained(tmp_path / "model")
    for again in (type(model).from_pretrained(tmp_path / "model"), load_patched(tmp_path / "model")):
        for path, rows in rows_read(again.eval(), tokens(3 * count).clamp(min=2)).items():
            assert torch.equal(rows, longer[path])
    patch.undo()
    undone = rows_read(model, ids)
    assert all(torch.equal(rows, undone[path]) for path, rows in before.items())


def test_a_row_that_nobody_can_tell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of attributes are believed only where the config gives a length that the table then has."""
    model = build("nystromformer")
    monkeypatch.setattr("hf_posext.patching.sites.row_of_position_zero", lambda *_: None)
    assert "which of them position 0 reads could not be asked" in str(detect_scheme(model).obstacle)


def test_weights_that_follow_the_config_and_that_a_text_reads_are_refused() -> None:
    model = build("gpt2")

    class Biased(type(model)):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.biases = torch.nn.Linear(config.n_positions, 2)

    with pytest.raises(
        UnsupportedModelError, match="biases.weight of Biased to keep its shape .2, 64. .* got .2, 256."
    ):
        patch_model(Biased(model.config), "table-linear", factor=4)


def test_an_offloaded_table_is_refused_by_name(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    places = {"transformer.wte": "cpu", "transformer.wpe": "disk", "transformer.h": "cpu", "transformer.ln_f": "cpu"}
    model = type(build("gpt2")).from_pretrained(
        tmp_path, device_map=places | {"transformer.drop": "cpu", "lm_head": "cpu"}, offload_folder=tmp_path / "off"
    )
    with pytest.raises(
        UnsupportedModelError, match="transformer.wpe of gpt2 in memory, got it offloaded .* device_map"
    ):
        patch_model(model, "table-linear", factor=4)
    assert model.transformer.wpe.weight.is_meta, "asking the model left its weights in memory"
