"""Every family without rotary positions: reads past its trained length and is undone, or is refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_posext import detect_scheme, find_patch, load_patched, patch_model, unpatch_model
from hf_posext.errors import InvalidParameterError, MethodNotApplicableError, NoEffectError, UnsupportedModelError
from hf_posext.methods import as_method

from ..conftest import (
    TRAINED,
    default_dtype,
    logits,
    realigned,
    tiny_bloom,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_xglm,
    tokens,
)
from ..zoo import TRAINED_LENGTH, build, token_ids

CAUSAL, MASKED, SEQ2SEQ, BASE = "causal-lm", "masked-lm", "seq2seq-lm", "base"
LEARNED = {
    CAUSAL: (
        "gpt2 gpt-sw3 gpt_neo gpt_bigcode opt biogpt openai-gpt bart mbart plbart xlm git trocr whisper prophetnet "
        "bert-generation megatron-bert"
    ),
    MASKED: (
        "bert roberta distilbert electra albert xlm-roberta camembert mpnet deberta deberta-v2 longformer "
        "roberta-prelayernorm data2vec-text ernie rembert big_bird xmod"
    ),
    SEQ2SEQ: "bart mbart plbart mvp blenderbot bigbird_pegasus prophetnet",
    BASE: "clip_text_model layoutlm",
}
OFFSETS = {
    **dict.fromkeys("opt biogpt bart mbart plbart mvp trocr mpnet".split(), 2),
    # padding is token 0 in the zoo
    **dict.fromkeys("roberta xlm-roberta camembert longformer roberta-prelayernorm data2vec-text xmod".split(), 1),
    "prophetnet": 1,
}
OTHERS = {
    "alibi": {CAUSAL: "bloom mpt falcon"},
    "relative": {SEQ2SEQ: "t5 mt5 umt5 longt5 switch_transformers"},
    "sinusoidal": {CAUSAL: "xglm marian pegasus", SEQ2SEQ: "m2m_100 marian pegasus nllb-moe"},
}
METHODS = {
    "learned": "table-linear",
    "alibi": "alibi-ntk",
    "relative": "bucket-linear",
    "sinusoidal": "sinusoid-linear",
}
FAMILIES = [
    pytest.param(kind, family, task, id=f"{family}-{task}")
    for kind, tasks in ({"learned": LEARNED} | OTHERS).items()
    for task, families in tasks.items()
    for family in families.split()
]


def make(family: str, task: str) -> PreTrainedModel:
    model = build(family, task=task, **({"alibi": True} if family == "falcon" else {}))
    for module in model.modules():
        if hasattr(module, "create_weight"):  # the zoo multiplies every weight, and these are sines
            module.weight.data.copy_(module.create_weight())
    return model


@torch.no_grad()
def forward(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))[0]


@pytest.mark.parametrize(("kind", "family", "task"), FAMILIES)
def test_a_family_reads_longer_and_is_undone(kind: str, family: str, task: str, tmp_path: Path) -> None:
    model = make(family, task)
    scheme = detect_scheme(model)
    assert (scheme.kind, scheme.obstacle) == (kind, None)
    original = scheme.trained_length or TRAINED_LENGTH
    if kind == "learned":
        assert scheme.table is not None and scheme.table.offset == OFFSETS.get(family, 0)
        positions = TRAINED_LENGTH - (0 if scheme.table.rows > TRAINED_LENGTH else scheme.table.offset)
        assert original == positions - (family == "prophetnet")  # which reads the position of the token after next
    short, long = token_ids(original // 2), token_ids(2 * original)
    before = forward(model, short)
    config = model.config.to_json_string(use_diff=False)
    state = {path: {*vars(module), type(module)} for path, module in model.named_modules()}
    weights = {name: id(weight) for name, weight in model.named_parameters(remove_duplicate=False)}

    patch = patch_model(model, METHODS[kind], factor=2, trained_length=original)
    longer = forward(model, long)
    assert longer.isfinite().all()
    twin, cast = copy.deepcopy(model), copy.deepcopy(model).bfloat16().float()
    again = pickle.loads(pickle.dumps(model))
    patch.undo()
    assert torch.equal(forward(model, short), before)
    assert model.config.to_json_string(use_diff=False) == config
    assert {path: {*vars(module), type(module)} for path, module in model.named_modules()} == state
    assert {name: id(weight) for name, weight in model.named_parameters(remove_duplicate=False)} == weights

    # what undo restores was rounded by the casts, as all of a model without a patch is
    unpatch_model(cast)
    rounded = copy.deepcopy(model).bfloat16().float()
    restored, expected = ({**each.state_dict(), **dict(each.named_buffers())} for each in (cast, rounded))
    assert restored.keys() == expected.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in expected.items())

    for copied in (twin, again):  # neither copy is touched by the undo, and each has its own
        assert torch.equal(forward(copied, long), longer)
        unpatch_model(copied)
        assert torch.equal(forward(copied, short), before)

    patch = patch_model(model, METHODS[kind], factor=2, trained_length=original)
    patch.save_pretrained(tmp_path / "saved")
    loaded = realigned(load_patched(tmp_path / "saved"))
    assert torch.equal(forward(loaded, long), longer)
    unpatch_model(loaded)
    assert torch.equal(forward(loaded, short), before)
    assert detect_scheme(loaded).same_positions(scheme)
    if kind == "learned":
        assert patch.native_obstacle is None
    if patch.native_obstacle is None:
        assert torch.equal(forward(realigned(type(model).from_pretrained(tmp_path / "saved")), long), longer)


@pytest.mark.parametrize(
    ("family", "task", "reason"),
    [
        ("led", SEQ2SEQ, "encoder.embed_positions of 16384 x 64 and .* of 1024 x 64"),
        ("reformer", CAUSAL, "axial positions"),
        ("xlnet", CAUSAL, "Transformer-XL"),
        ("cpmant", CAUSAL, "segments"),
        ("inkling_text", CAUSAL, "logits of their own"),
        ("ctrl", CAUSAL, "sines are made inside the model"),
        ("fsmt", SEQ2SEQ, "sines are made anew"),
        ("pegasus_x", SEQ2SEQ, "sines are made anew"),
    ],
)
def test_a_family_is_refused_by_name(family: str, task: str, reason: str) -> None:
    model = build(family, task=task)
    method = METHODS[detect_scheme(model).kind]
    with pytest.raises(MethodNotApplicableError, match=f"{family} cannot be changed.*{reason}.*nothing applies"):
        patch_model(model, method, factor=2, trained_length=TRAINED)


@pytest.mark.parametrize("family", "deberta deberta-v2".split())
def test_disentangled_attention_without_a_table_is_refused(family: str) -> None:
    model = build(family, task=MASKED, position_biased_input=False, relative_attention=True, pos_att_type=["c2p"])
    scheme = detect_scheme(model)
    assert scheme.kind == "relative" and scheme.obstacle and "disentangled" in scheme.obstacle


def test_disentangled_attention_keeps_its_relative_positions(tmp_path: Path) -> None:
    """Their number is that of the table by default, so that the saved config must name it."""
    for family in ("deberta", "deberta-v2"):
        model = build(family, task=MASKED, relative_attention=True, pos_att_type=["c2p", "p2c"])
        patch = patch_model(model, "table-linear", factor=2)
        long = token_ids(100)
        longer = forward(model, long)
        patch.save_pretrained(tmp_path / family)
        assert torch.equal(forward(realigned(type(model).from_pretrained(tmp_path / family)), long), longer)


def test_limits_follow_the_table() -> None:
    model = tiny_gpt2()
    model.generation_config.max_length = TRAINED
    tokenizer = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
    tokenizer.model_max_length = TRAINED
    with patch_model(model, "table-linear", factor=4, tokenizer=tokenizer):
        assert model.config.max_position_embeddings == 4 * TRAINED
        assert model.generation_config.max_length == tokenizer.model_max_length == 4 * TRAINED
        prompt = tokens(TRAINED - 2)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        assert out.shape[1] == TRAINED + 6
    assert model.generation_config.max_length == tokenizer.model_max_length == TRAINED


def test_windows_of_gpt_neo_stay_as_wide() -> None:
    """The mask of a local layer is rebuilt: a token beyond the windows of all layers must not be seen."""
    model = build("gpt_neo", attention_types=[[["local"], 6]], window_size=4)
    patch_model(model, "table-linear", factor=4)
    ids = token_ids(100)
    changed = ids.clone()
    changed[0, 0] += 1
    difference = (forward(model, ids) - forward(model, changed)).abs().amax(-1)[0]
    assert difference[18] > 1e-6  # 6 layers of 4 tokens reach 18 back
    assert (difference[19:] == 0).all()


def test_a_trained_table_survives_saving(tmp_path: Path) -> None:
    """Load the longer table as fine-tuning left it; undo gives the original one."""
    model = tiny_gpt2()
    before = logits(model, tokens(TRAINED))
    patch = patch_model(model, "table-linear", factor=2)
    with torch.no_grad():
        model.transformer.wpe.weight += 0.1
    trained = logits(model, tokens(2 * TRAINED))
    patch.save_pretrained(tmp_path / "saved")
    loaded = realigned(load_patched(tmp_path / "saved"))
    assert torch.equal(logits(loaded, tokens(2 * TRAINED)), trained)
    unpatch_model(loaded)
    assert torch.equal(logits(loaded, tokens(TRAINED)), before)

    (tmp_path / "saved" / "posext_replaced" / "tables.safetensors").unlink()
    loaded_again = load_patched(tmp_path / "saved")
    assert torch.equal(logits(realigned(loaded_again), tokens(2 * TRAINED)), trained)
    with pytest.raises(UnsupportedModelError, match="cannot be undone.*Open the original model"):
        unpatch_model(loaded_again)
    assert find_patch(loaded_again) is not None


def test_undo_follows_the_model_to_another_dtype_with_its_own_weights() -> None:
    """An optimizer holds the parameter that was replaced; undo gives that very object back."""
    model = tiny_gpt2()
    weight = model.transformer.wpe.weight
    patch_model(model, "table-linear", factor=2).undo()
    assert model.transformer.wpe.weight is weight and weight.requires_grad


def reference_slopes(heads: int) -> list[float]:
    """Press et al., for a power of two."""
    return [2 ** (-8 * h / heads) for h in range(1, heads + 1)]


def test_slopes_equal_the_formulas() -> None:
    scheme = detect_scheme(tiny_bloom())
    assert scheme.slopes == pytest.approx(reference_slopes(4), rel=1e-7)  # powers of two, in float32
    linear = as_method("alibi-linear").plan(scheme, factor=8, trained_length=TRAINED)
    assert linear.slopes == pytest.approx([slope / 8 for slope in reference_slopes(4)])
    ntk = as_method("alibi-ntk").plan(scheme, factor=8, trained_length=TRAINED)
    assert ntk.slopes == pytest.approx([2 ** (-8 * h / 4) / 8 ** ((h - 1) / 3) for h in range(1, 5)])
    odd = detect_scheme(tiny_bloom(n_head=6, hidden_size=48))
    ntk = as_method("alibi-ntk").plan(odd, factor=8, trained_length=TRAINED)
    assert max(ntk.slopes) == max(odd.slopes) and min(ntk.slopes) == pytest.approx(min(odd.slopes) / 8)


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon"])
def test_dividing_slopes_is_dividing_positions(family: str) -> None:
    """A model whose slopes are smaller from the start, by its own code, gives the same."""
    model = make(family, CAUSAL)
    if family == "mpt":
        model.config.max_seq_len = 128  # its own biases end here
    slopes = detect_scheme(model).slopes
    patch = patch_model(model, "alibi-linear", factor=2, trained_length=TRAINED)
    ids = token_ids(100)
    patched = forward(model, ids)
    patch.undo()
    assert patch.plan.slopes == tuple(slope / 2 for slope in slopes)
    module = __import__(type(model).__module__, fromlist=["_"])
    name = "build_mpt_alibi_tensor" if family == "mpt" else "build_alibi_tensor"
    original = getattr(module, name)
    try:
        setattr(module, name, lambda *args, **kwargs: original(*args, **kwargs) / 2)
        with torch.no_grad():
            reference = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    finally:
        setattr(module, name, original)
    # float32 sums in another order; logits spread by 4
    torch.testing.assert_close(patched, reference, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_biases_are_not_rounded_with_a_bfloat16_model(family: str) -> None:
    """Rounded biases tell far neighbours apart no more; with the weights the same, only biases differ here."""
    model = make(family, CAUSAL).to(torch.bfloat16)
    exact = make(family, CAUSAL)
    for weight, rounded in zip(exact.parameters(), model.parameters(), strict=True):
        weight.data = rounded.data.float()
    plan = as_method("alibi-linear").plan(detect_scheme(exact), factor=1.001, trained_length=TRAINED)
    ids = token_ids(1500)
    native = forward(model, ids).float()
    patch_model(model, plan)
    patch_model(exact, plan)
    expected = forward(exact, ids)
    assert (forward(model, ids).float() - expected).norm() < (native - expected).norm()


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon"])
def test_slopes_in_double_precision(family: str) -> None:
    model, ids = make(family, CAUSAL), token_ids(100)
    patch_model(model, "alibi-linear", factor=4, trained_length=TRAINED)
    single = forward(model, ids)
    torch.testing.assert_close(forward(model.double(), ids).float(), single, atol=2e-4, rtol=0)  # of logits up to 4


def test_left_padding_changes_nothing_under_other_slopes() -> None:
    for family in ("bloom", "mpt", "falcon"):
        model = make(family, CAUSAL)
        patch_model(model, "alibi-ntk", factor=4, trained_length=TRAINED)
        ids = token_ids(40)
        padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], 1)
        mask = torch.cat([torch.zeros(1, 9, dtype=torch.long), torch.ones_like(ids)], 1)
        with torch.no_grad():
            out = model(input_ids=padded, attention_mask=mask)[0][:, 9:]
        torch.testing.assert_close(out, forward(model, ids), atol=2e-4, rtol=0)


def bucket(distance: int, count: int, reach: int, bidirectional: bool) -> int:
    """Raffel et al., for one distance from a query to a key."""
    start = 0
    if bidirectional:
        count //= 2
        start = count if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = count // 2
    if distance < exact:
        return start + distance
    ratio = torch.log(torch.tensor(distance / exact)) / torch.log(torch.tensor(reach / exact))
    return start + min(exact + int(ratio * (count - exact)), count - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_the_formula(bidirectional: bool) -> None:
    model = tiny_t5()
    stack = model.encoder if bidirectional else model.decoder
    attention = stack.block[0].layer[0].SelfAttention
    distances = range(-300, 301)
    for method, divisor, reach in (("bucket-linear", 8, 32), ("bucket-max-distance", 1, 256)):
        with patch_model(model, method, factor=8, trained_length=TRAINED):
            biases = attention.compute_bias(301, 301)[0].permute(1, 2, 0)
        for distance in distances:
            size = -(-abs(distance) // divisor)
            index = bucket(size if distance > 0 else -size, 32, reach, bidirectional)
            query, key = max(0, -distance), max(0, distance)
            assert torch.equal(biases[query, key], attention.relative_attention_bias.weight[index]), (method, distance)


def test_mpnet_has_a_table_and_buckets() -> None:
    scheme = detect_scheme(build("mpnet", task=MASKED))
    assert scheme.kind == "learned" and scheme.table and scheme.buckets and scheme.buckets.max_distance == 128
    with pytest.raises(InvalidParameterError, match="table-linear\\+bucket-linear"):
        as_method("bucket-linear").plan(scheme, factor=2)
    for method in ("bucket-linear", "bucket-max-distance"):
        model = build("mpnet", task=MASKED)
        short, long = token_ids(50), token_ids(300)
        before = forward(model, short)
        with patch_model(model, "table-linear", factor=8):
            alone = forward(model, long)
        with patch_model(model, f"table-linear+{method}", factor=8) as patch:
            assert (forward(model, long) - alone).abs().max() > 1e-3
            assert patch.native_obstacle
        assert torch.equal(forward(model, short), before)


def test_a_raised_maximum_distance_is_said_in_the_config(tmp_path: Path) -> None:
    for family in "t5 mt5 umt5 longt5 switch_transformers".split():
        model = make(family, SEQ2SEQ)
        patch = patch_model(model, "bucket-max-distance", factor=4, trained_length=TRAINED)
        assert patch.native_obstacle is None and model.config.relative_attention_max_distance == 512
        ids = token_ids(300)
        expected = forward(model, ids)
        patch.save_pretrained(tmp_path / family)
        assert torch.equal(forward(realigned(type(model).from_pretrained(tmp_path / family)), ids), expected)
        loaded = realigned(load_patched(tmp_path / family))
        assert torch.equal(forward(loaded, ids), expected)
        unpatch_model(loaded)
        assert loaded.config.relative_attention_max_distance == 128


@pytest.mark.parametrize(
    ("family", "task"), [("xglm", CAUSAL), ("m2m_100", SEQ2SEQ), ("marian", SEQ2SEQ), ("pegasus", SEQ2SEQ)]
)
def test_sines_equal_the_formula(family: str, task: str) -> None:
    model = make(family, task)
    patch_model(model, "sinusoid-linear", factor=4)
    module = next(module for module in model.modules() if "Sinusoidal" in type(module).__name__)
    fixed = isinstance(module, torch.nn.Embedding)
    first, step = (0, 1 / 32) if fixed else (2, 1 / 31)  # width 64; tensor2tensor divides by one less
    table = module.weight if fixed else module.weights
    angle = (first + torch.arange(60) / 4).double()[:, None] * 10_000 ** (-torch.arange(32).double() * step)
    expected = torch.cat([angle.sin(), angle.cos()], -1)
    # float32 sines
    torch.testing.assert_close(table[first : first + 60].double(), expected, atol=1e-6, rtol=0)


def test_every_fourth_token_of_a_squeezed_table_is_where_it_was() -> None:
    model = tiny_xglm()
    before = model.model.embed_positions(torch.arange(16)[None])
    patch_model(model, "sinusoid-linear", factor=4)
    torch.testing.assert_close(model.model.embed_positions(4 * torch.arange(16)[None]), before, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("builder", "method"),
    [(tiny_bloom, "alibi-linear"), (tiny_t5, "bucket-linear"), (tiny_xglm, "sinusoid-linear")],
)
def test_a_factor_of_one_has_no_effect(builder: type, method: str) -> None:
    with pytest.raises(NoEffectError, match="larger factor"):
        patch_model(builder(), method, factor=1, trained_length=TRAINED)


@pytest.mark.parametrize(
    "model, method",
    [
        (tiny_t5, "bucket-linear"),
        (tiny_xglm, "sinusoid-linear"),
        (tiny_gpt2, "table-cubic"),
        (tiny_bloom, "alibi-ntk"),
        (tiny_llama, "dynamic-yarn"),
        (tiny_llama, "leaky-rerope(window=8)+fade(reference=10)+log-n"),
    ],
)
def test_the_default_dtype_does_not_count(model: Callable[[], PreTrainedModel], method: str) -> None:
    """Distances, positions and lengths of rows are divided in float32 at least. bfloat16 has 8 bits."""
    wanted, patched, ids = model(), model(), tokens(16 * TRAINED - 3)
    patch_model(wanted, method, factor=16, trained_length=TRAINED)
    expected = logits(wanted, ids)
    with default_dtype(torch.bfloat16):
        patch_model(patched, method, factor=16, trained_length=TRAINED)
        assert torch.equal(logits(patched, ids).float(), expected)
    assert torch.equal(logits(patched, ids), expected)
