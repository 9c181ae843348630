"""Schemes of real configs, without weights."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    ApertusConfig,
    BartConfig,
    BertConfig,
    BloomConfig,
    CLIPConfig,
    CLIPTextConfig,
    DebertaV2Config,
    DistilBertConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    LongformerConfig,
    MambaConfig,
    MarianConfig,
    MPNetConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
    WhisperConfig,
    XGLMConfig,
    XLMRobertaConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_posext import detect_scheme, patch_model
from hf_posext.errors import MethodNotApplicableError, NoEffectError, UnsupportedModelError

from ..conftest import tiny_llama
from ..zoo import build

LLAMA31 = {
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
QWEN = {
    "max_position_embeddings": 32768,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
}


def small(config: type[PreTrainedConfig], **kwargs: object) -> PreTrainedConfig:
    return config(num_hidden_layers=2, **kwargs)


@pytest.mark.parametrize(
    ("config", "kind", "generalization", "trained", "shipped"),
    [
        (small(LlamaConfig, max_position_embeddings=4096), "rotary", "interpolation", 4096, 4096),
        (small(LlamaConfig, **LLAMA31), "rotary", "interpolation", 8192, 131072),
        (small(LlamaConfig, **QWEN), "rotary", "interpolation", 32768, 131072),
        (small(GptOssConfig), "rotary", "interpolation", 4096, 131072),
        (small(ApertusConfig), "rotary", "interpolation", 8192, 65536),
        (small(Gemma3TextConfig), "rotary", "interpolation", 131072, 131072),
        (small(GPTNeoXConfig), "rotary", "interpolation", 2048, 2048),
        (small(GPT2Config), "learned", "none", 1024, 1024),
        (small(BertConfig), "learned", "none", 512, 512),
        (small(BloomConfig), "alibi", "extrapolation", None, None),
        (small(T5Config), "relative", "extrapolation", None, None),
        (small(XGLMConfig, num_layers=2), "sinusoidal", "extrapolation", 2048, 2048),
        (small(MambaConfig), "none", "none", None, None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_schemes(
    config: PreTrainedConfig, kind: str, generalization: str, trained: int | None, shipped: int | None
) -> None:
    scheme = detect_scheme(config)
    assert (scheme.kind, scheme.generalization) == (kind, generalization)
    assert (scheme.trained_length, scheme.shipped_length) == (trained, shipped)
    assert scheme.model_type == config.model_type
    assert scheme.describe() and scheme.to_dict()["generalization"] == generalization


def test_partial_rotary_counts_the_turning_channels() -> None:
    config = small(GPTNeoXConfig, hidden_size=512, num_attention_heads=8, rope_parameters={
        "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25})  # fmt: skip
    rotary = detect_scheme(config).rotaries[0]
    assert (rotary.dim, rotary.pairs, rotary.slots) == (16, 8, 8)


def test_phi3_tells_its_original_length() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [4.0] * 48}
    config = small(
        Phi3Config,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10_000.0, **factors},
    )
    scheme = detect_scheme(config)
    assert (scheme.trained_length, scheme.shipped_length) == (4096, 131072)
    assert scheme.trained_length_source == "original_max_position_embeddings (longrope)"


def test_layer_types() -> None:
    config = Gemma3TextConfig(num_hidden_layers=6)
    scheme = detect_scheme(config)
    assert scheme.layer_types == ("sliding_attention", "full_attention")
    assert {(rotary.name, rotary.theta) for rotary in scheme.rotaries} == {
        ("sliding_attention", 1e4),
        ("full_attention", 1e6),
    }


def test_a_table_of_sines_is_named_as_the_obstacle() -> None:
    scheme = detect_scheme(GPTJConfig(n_layer=2))
    assert scheme.kind == "rotary" and scheme.obstacle == (
        "gptj cannot be changed: it rotates by a table of sines instead of by frequencies"
    )


def test_the_scheme_of_a_patched_model_is_the_one_it_was_shipped_with() -> None:
    model = tiny_llama()
    scheme = detect_scheme(model)
    with patch_model(model, "yarn", factor=8):
        assert detect_scheme(model) == scheme
    assert detect_scheme(model.config) == scheme


def test_no_weights_are_made_from_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []
    init = torch.nn.Linear.__init__

    def watch(self: torch.nn.Linear, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        devices.append(self.weight.device)

    monkeypatch.setattr(torch.nn.Linear, "__init__", watch)
    detect_scheme(LlamaConfig(num_hidden_layers=2))
    assert {device.type for device in devices} == {"meta"}


def test_a_config_that_transformers_has_no_model_for() -> None:
    class Strange(PreTrainedConfig):
        model_type = "strange"

    with pytest.raises(UnsupportedModelError, match="a model in transformers, got type 'strange'"):
        detect_scheme(Strange())


@pytest.mark.parametrize(
    ("config", "rows", "offset", "trained"),
    [
        (small(RobertaConfig, max_position_embeddings=514), 514, 2, 512),
        (small(XLMRobertaConfig, max_position_embeddings=514, pad_token_id=1), 514, 2, 512),
        (small(MPNetConfig, max_position_embeddings=514), 514, 2, 512),
        (small(OPTConfig), 2050, 2, 2048),
        (BartConfig(encoder_layers=1, decoder_layers=1), 1026, 2, 1024),
        (small(GPTNeoConfig, attention_types=[[["global", "local"], 1]]), 2048, 0, 2048),
        (DistilBertConfig(n_layers=1), 512, 0, 512),
        (CLIPTextConfig(num_hidden_layers=1), 77, 0, 77),
        (CLIPConfig(), 77, 0, 77),  # the image part has a table of its own, which is no concern of ours
        (small(LongformerConfig, max_position_embeddings=4098), 4098, 2, 4096),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_tables(config: PreTrainedConfig, rows: int, offset: int, trained: int) -> None:
    scheme = detect_scheme(config)
    assert (scheme.kind, scheme.trained_length, scheme.shipped_length) == ("learned", trained, trained)
    assert scheme.table is not None and (scheme.table.rows, scheme.table.offset) == (rows, offset)
    assert f"table of {trained} positions" in scheme.describe()


@pytest.mark.parametrize(
    ("config", "kind", "trained"),
    [
        (small(FalconConfig, alibi=True), "alibi", 2048),
        (small(FalconConfig, alibi=False), "rotary", 2048),
        (MptConfig(n_layers=1), "alibi", 2048),
        (small(BloomConfig, seq_length=2048), "alibi", 2048),
        (small(T5Config, n_positions=512), "relative", 512),
        (MarianConfig(encoder_layers=1, decoder_layers=1, vocab_size=99, pad_token_id=98), "sinusoidal", 1024),
        (small(DebertaV2Config, relative_attention=True, position_biased_input=False), "relative", 512),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_other_kinds(config: PreTrainedConfig, kind: str, trained: int | None) -> None:
    scheme = detect_scheme(config)
    assert (scheme.kind, scheme.trained_length) == (kind, trained)
    assert len(scheme.slopes) == (config.num_attention_heads if kind == "alibi" else 0)
    assert (scheme.buckets is not None) == (config.model_type == "t5")


def test_a_speech_model_is_refused_for_its_two_tables() -> None:
    config = WhisperConfig(encoder_layers=1, decoder_layers=1, architectures=["WhisperForConditionalGeneration"])
    scheme = detect_scheme(config)
    assert scheme.obstacle == (
        "whisper cannot be changed: its tables of positions have different sizes (model.encoder.embed_positions of "
        "1500 x 384 and model.decoder.embed_positions of 448 x 384), and a plan has one"
    )


def test_positions_of_pictures_are_refused() -> None:
    """Its 50 rows are of a grid, and of a class token before it."""
    model = build("clip_vision_model", task="base")
    with pytest.raises(MethodNotApplicableError, match="clip_vision_model cannot be changed: it reads no text"):
        patch_model(model, "table-linear", factor=4)


WINDOWED = ("afmoe", "cohere2", "exaone4", "ministral", "mistral", "phi3", "starcoder2")
"""Types in which no layer that rotates sees beyond a window: by their modeling files, others have no positions."""

SEES_ALL = ("cwm", "gemma2", "gpt_oss", "qwen2", "vaultgemma")
"""Types with windows in which some layer that rotates sees all of a text."""


@pytest.mark.parametrize("kind", [*WINDOWED, *SEES_ALL])
def test_a_set_of_frequencies_reaches_as_far_as_the_layers_that_rotate_by_it(kind: str) -> None:
    model = build(kind, sliding_window=20)
    before = {name: id(value) for name, value in vars(model.config).items()}
    for scheme in (detect_scheme(model), detect_scheme(model.config)):
        assert [rotary.window for rotary in scheme.rotaries] == [20 if kind in WINDOWED else None]
    assert {name: id(value) for name, value in vars(model.config).items()} == before


@pytest.mark.parametrize("kind", WINDOWED)
def test_frequencies_that_meet_no_unseen_distance_stay_as_they_are(kind: str) -> None:
    model = build(kind, sliding_window=20)
    for method in ("linear", "yarn", "dynamic-ntk", "theta"):
        with pytest.raises(NoEffectError, match="no layer that rotates sees farther back than 20 tokens"):
            patch_model(model, method, factor=4)
    patch_model(model, "nope").undo()  # meant for all lengths
    with patch_model(model, "yarn", factor=4, trained_length=16) as patch:  # windows are wider than the training
        assert patch.plan.rotaries


MORE_THAN_TEXT = {"clip": "learned", "muse_glimmer_assistant": "rotary"}
"""Kind of scheme of types that read more than text."""


@pytest.mark.parametrize("kind", [kind for kind in MORE_THAN_TEXT if kind in CONFIG_MAPPING])
def test_models_that_read_more_than_text_are_detected(kind: str) -> None:
    """Their skeletons may not run, or contain a weight that is one number."""
    assert detect_scheme(build(kind, task="base")).kind == MORE_THAN_TEXT[kind]


def test_a_text_encoder_of_another_class_is_stretched_with_its_decoder() -> None:
    """T5Gemma 2 reads the long text by an encoder whose config is of another class than that of the decoder."""
    model = build("t5gemma2", task="seq2seq-lm")
    encoder, decoder = model.model.encoder.text_model.rotary_emb, model.model.decoder.rotary_emb
    shipped = [rotary.full_attention_inv_freq.clone() for rotary in (encoder, decoder)]
    with patch_model(model, "yarn", factor=4):
        assert torch.equal(encoder.full_attention_inv_freq, decoder.full_attention_inv_freq)
        assert not torch.equal(encoder.full_attention_inv_freq, shipped[0])
        assert torch.equal(encoder.sliding_attention_inv_freq, decoder.sliding_attention_inv_freq)
    after = [rotary.full_attention_inv_freq for rotary in (encoder, decoder)]
    assert all(torch.equal(*pair) for pair in zip(shipped, after, strict=True))


def test_an_encoder_of_another_trained_length_is_refused() -> None:
    scheme = detect_scheme(CONFIG_MAPPING["dia"]())
    assert scheme.obstacle is not None
    assert scheme.obstacle.startswith(
        "dia_decoder cannot be changed: its decoder states 3072 tokens, its encoder 1024"
    )
