"""NLL of tokens: equal to full logits for every kind of head, without ever making them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_posext import patch_model
from hf_posext.errors import InvalidParameterError, UnsupportedModelError
from hf_posext.evaluation import forwards, scorer
from hf_posext.evaluation.forwards import SlicedHead, check_positions
from hf_posext.evaluation.scorer import TokenScorer
from hf_posext.patching import detect_scheme
from hf_posext.patching.modes import evaluation_mode
from hf_posext.patching.sites import sinusoids

from ..conftest import TRAINED, default_dtype, tiny_bloom, tiny_llama, tiny_xglm, tokens
from ..zoo import build
from .helpers import naive_nll

HEADS = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {},
    "bloom": {},
    "opt": {},
    "llama4_text": {},
}
"""Plain heads, what follows the head in others (a softcap, a division, a factor), and trunks that are not called as
the model's prefix has it: a decoder inside, or under another name."""


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Seven rows of logits at a time, so that 50 tokens take eight slices, the last a shorter one."""
    monkeypatch.setattr(scorer, "LOGITS_ROWS", 7)
    monkeypatch.setattr(scorer, "CACHED_BYTES", 3 * 4 * 128)
    yield 7


def head_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Grows by the shape of every output of the head."""
    shapes: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape)))
    return shapes


def test_a_model_that_returns_tuples_is_refused_by_name() -> None:
    model = tiny_llama()
    model.config.return_dict = False
    with pytest.raises(UnsupportedModelError, match=r"return_dict=False in its config. Set model.config.return_dict"):
        TokenScorer(model)


def test_the_default_dtype_does_not_count() -> None:
    """NLL is float32 whatever dtype tensors of the process have by default."""
    model, ids = tiny_llama(), tokens(50)
    wanted = TokenScorer(model).token_nll(ids)
    with default_dtype(torch.bfloat16):
        assert torch.equal(TokenScorer(model).token_nll(ids), wanted)


@pytest.mark.parametrize("model_type", HEADS)
def test_equals_full_logits(model_type: str, small_slices: int, caplog: pytest.LogCaptureFixture) -> None:
    model = build(model_type, **HEADS[model_type])
    ids = tokens(50)
    nll = TokenScorer(model).token_nll(ids)[0].double().numpy()
    expected = naive_nll(model, ids[0])
    # The only difference is the float32 softmax: a few eps (1.2e-7) of each value; sums are closer.
    assert nll == pytest.approx(expected, rel=2e-6, abs=2e-6)
    assert nll.sum() == pytest.approx(expected.sum(), rel=1e-6)
    assert not caplog.records, "the head runs in slices"


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "cohere"])
def test_what_follows_the_head_matters(model_type: str) -> None:
    """The parameter of each head changes the NLL, so that the test above would see it forgotten."""
    (name,) = HEADS[model_type]
    plain, scaled = (build(model_type, **{name: HEADS[model_type][name] * times}) for times in (1, 2))
    assert abs(naive_nll(plain, tokens(50)[0]) - naive_nll(scaled, tokens(50)[0])).mean() > 1e-3


def test_scores_from_the_first_token_asked_for_and_in_batches(llama: LlamaForCausalLM, small_slices: int) -> None:
    ids = tokens(50, rows=3)
    nll = TokenScorer(llama).token_nll(ids, first=20)
    assert nll.shape == (3, 30) and nll.dtype == torch.float32
    for row in range(3):
        assert nll[row].numpy() == pytest.approx(naive_nll(llama, ids[row])[19:], rel=2e-6, abs=2e-6)


def test_peft_model(small_slices: int) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids = tokens(50)
    nll = TokenScorer(model).token_nll(ids)[0].numpy()
    assert nll == pytest.approx(naive_nll(model, ids[0]), rel=2e-6, abs=2e-6)
    assert abs(nll - naive_nll(tiny_llama(), ids[0])).mean() > 1e-3, "the adapter counts"


def test_large_logits_are_never_made(llama: LlamaForCausalLM, small_slices: int) -> None:
    shapes = head_shapes(llama)
    TokenScorer(llama).token_nll(tokens(50))
    in_full = [shape for shape in shapes if shape[1] > small_slices]
    assert in_full == [(1, forwards.PROBE_LENGTH, 128)] * 2, "only the check of the first 16 tokens"
    assert sum(shape[1] for shape in shapes if shape[1] == small_slices) == 49


def test_leaves_no_trace(llama: LlamaForCausalLM) -> None:
    before = {name: dict(vars(module)) for name, module in llama.named_modules()}
    TokenScorer(llama).token_nll(tokens(20))
    assert {name: dict(vars(module)) for name, module in llama.named_modules()} == before


def test_a_forward_set_on_the_instance_survives(llama: LlamaForCausalLM) -> None:
    """As accelerate's hooks set one."""
    original = llama.model.forward
    calls: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    llama.model.forward = counting
    TokenScorer(llama).token_nll(tokens(20))
    assert llama.model.forward is counting
    assert len(calls) == 4, "two checks, the trunk of the check in slices, and the trunk itself: once each"


def test_trunk_is_restored_when_the_model_raises(llama: LlamaForCausalLM) -> None:
    scorer = TokenScorer(llama)
    scorer.token_nll(tokens(20))

    def broken(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = llama.lm_head.register_forward_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        scorer.token_nll(tokens(20))
    handle.remove()
    assert "forward" not in vars(llama.model)


class PositionBias(LlamaForCausalLM):
    """Adds to the logits what only the whole input tells."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        bias = torch.arange(input_ids.shape[1])[:, None] * torch.linspace(0, 0.1, output.logits.shape[-1])
        output.logits = output.logits + bias
        return output


class OnePiece(LlamaForCausalLM):
    """Log-likelihoods of the model inside, computed without it."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutputWithPast:
        hidden = LlamaModel.forward(self.model, input_ids=input_ids, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


@pytest.mark.parametrize(("cls", "reason"), [(PositionBias, "slices differ"), (OnePiece, "run once in a forward")])
def test_other_heads_keep_full_logits_and_say_so(
    cls: type[LlamaForCausalLM], reason: str, small_slices: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = cls(tiny_llama().config).eval()
    ids = tokens(50)
    scorer = TokenScorer(model)
    nll = [scorer.token_nll(ids)[0].numpy() for _ in range(2)][1]
    assert nll == pytest.approx(naive_nll(model, ids[0]), rel=2e-6, abs=2e-6)
    assert [reason in record.getMessage() for record in caplog.records] == [True], "said once"


def test_softmax_is_float32_in_a_bfloat16_model() -> None:
    model = tiny_llama().to(torch.bfloat16)
    nll = TokenScorer(model).token_nll(tokens(50))[0].numpy()
    # The naive loop takes the same bfloat16 logits to float64; a bfloat16 softmax would be off by 1e-2.
    assert nll == pytest.approx(naive_nll(model, tokens(50)[0]), rel=2e-6, abs=2e-6)


@pytest.mark.parametrize(
    "model",
    [
        lambda: build("bert", task="masked-lm"),
        lambda: build("t5", task="seq2seq-lm"),
        lambda: LlamaModel(tiny_llama().config),
    ],
    ids=["encoder", "encoder-decoder", "no head"],
)
def test_models_without_causal_loss_are_refused(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="Expected a causal language model.*AutoModelForCausalLM") as error:
        TokenScorer(model())
    assert "\n" not in str(error.value)


def test_an_encoder_with_a_language_model_head_is_refused() -> None:
    config = BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(UnsupportedModelError, match="Expected a causal model"):
        TokenScorer(BertLMHeadModel(config).eval()).token_nll(tokens(20))


def test_prompt_tuning_is_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        TokenScorer(get_peft_model(tiny_llama(), config))


def test_slices_lie_in_the_same_memory(llama: LlamaForCausalLM) -> None:
    """Unless the head is more than a product: here it has a bias, so that its own forward runs."""
    for bias in (False, True):
        llama.lm_head = nn.Linear(llama.config.hidden_size, llama.config.vocab_size, bias=bias)
        trunk = SlicedHead(llama, llama.model)
        with torch.inference_mode():
            read = trunk.read(tokens(20), use_cache=False)
            first, second = (trunk.logits(read, *bounds) for bounds in ((0, 12), (12, 20)))
            assert (first.data_ptr() == second.data_ptr()) is not bias
            assert torch.allclose(second, llama(tokens(20)).logits[:, 12:], atol=1e-6)


def test_logits_keep_the_float32_sums_that_a_device_gives(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No CPU gives them, so the product of one that does stands in."""
    trunk, product = SlicedHead(llama.bfloat16(), llama.model), torch.mm

    def summing(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype, **out: torch.Tensor) -> torch.Tensor:
        return product(a.to(out_dtype), b.to(out_dtype), **out)

    with torch.inference_mode():
        read = trunk.read(tokens(20), use_cache=False)
        rounded = trunk.logits(read, 0, 20).clone()
        forwards.sums_in_float32.cache_clear()
        monkeypatch.setattr(torch, "mm", summing)
        try:
            logits = trunk.logits(trunk.read(tokens(20), use_cache=False), 0, 20)
        finally:
            forwards.sums_in_float32.cache_clear()
        exact = forwards.hidden_states(read.trunk).double() @ llama.lm_head.weight.T.double()
    assert (rounded.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    off, rounding = ((values.double() - exact).abs().max() for values in (logits, rounded))
    assert off <= 1e-6 * exact.abs().max() < rounding  # 32 products are summed


def test_large_vocabulary_and_tokens_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token ids above 65,535, which two bytes do not hold; 300 tokens take three slices of 119 rows."""
    vocabulary = 70_000
    monkeypatch.setattr(scorer, "LOGITS_BYTES", 119 * 4 * vocabulary)
    model = tiny_llama(vocab_size=vocabulary, hidden_size=8, num_attention_heads=2, num_key_value_heads=1)
    ids = torch.randint(0, vocabulary, (1, 300), generator=torch.Generator().manual_seed(0))
    ids[0, [0, 7, 200, 299]] = torch.tensor([vocabulary - 1, 0, 65_536, vocabulary - 1])
    shapes = head_shapes(model)
    nll = TokenScorer(model).token_nll(ids)[0].double().numpy()
    assert [shape[1] for shape in shapes[-3:]] == [119, 119, 61]
    expected = naive_nll(model, ids[0])
    assert nll == pytest.approx(expected, rel=2e-6, abs=2e-6)
    assert nll.sum() == pytest.approx(expected.sum(), rel=1e-6)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bloom, tiny_xglm], ids=["rotary", "alibi", "sinusoidal"])
def test_texts_beyond_the_limit_of_the_model(make: Callable[[], nn.Module]) -> None:
    model, ids = make(), tokens(2 * TRAINED + 9)
    nll = TokenScorer(model).token_nll(ids)[0].double().numpy()
    assert nll == pytest.approx(naive_nll(model, ids[0]), rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("model_type", ["codegen", "ctrl", "gptj", "marian", "mpt", "pegasus", "roformer"])
def test_texts_beyond_a_table_are_refused(model_type: str) -> None:
    """Cases in which the model itself would read past the end of something."""
    model, scheme = build(model_type), detect_scheme(build(model_type))
    assert scheme.kind != "learned" and scheme.ends and scheme.shipped_length == TRAINED
    check_positions(scheme, None, TRAINED)
    model(input_ids=tokens(TRAINED), use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=tokens(TRAINED + 1), use_cache=False)
    with pytest.raises(InvalidParameterError, match=f"64 tokens, the positions of the table of {model_type}, got 65"):
        check_positions(scheme, None, TRAINED + 1)


@pytest.mark.parametrize(("model_type", "method"), [("mpt", "alibi-ntk"), ("pegasus", "sinusoid-linear")])
def test_a_patch_makes_a_longer_table(model_type: str, method: str) -> None:
    model, ids = build(model_type), tokens(2 * TRAINED)
    for table in sinusoids(model).values():
        table.weight.data.div_(4)  # the zoo sharpens what are no weights, but sines
    with patch_model(model, method, factor=2) as patch:
        check_positions(patch.plan.scheme, patch.plan, 2 * TRAINED)
        nll = TokenScorer(model).token_nll(ids)[0].double().numpy()
        assert nll == pytest.approx(naive_nll(model, ids[0]), rel=2e-6, abs=2e-6)


def test_evaluation_mode_restores_every_module(llama: LlamaForCausalLM) -> None:
    llama.train()
    llama.lm_head.eval()
    with pytest.raises(KeyboardInterrupt), evaluation_mode(llama):
        assert not any(module.training for module in llama.modules())
        raise KeyboardInterrupt
    assert [name for name, module in llama.named_modules() if not module.training] == ["lm_head"]
