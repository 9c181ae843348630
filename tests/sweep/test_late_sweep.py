"""
Every rotary causal-LM type of the installed transformers, with its positions remapped inside attention.

With a window beyond the input, remapping gives what the unpatched model gives: in a full forward, in a left-padded
batch, and in cached decoding. With all positions doubled inside attention, it gives what the unpatched model gives
when it is called with doubled positions. With a window within the input, the logits change, and cached decoding
agrees with the full forward. Undo puts every bit back and leaves no trace. A type works, or is refused by name.

The outcome of each type goes to pytest's cache, as that of the frequency sweep does.
"""

import sys
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_posext import detect_scheme, patch_model
from hf_posext.errors import PosExtError
from hf_posext.methods import LogN, Method, ReRoPE, SelfExtend
from hf_posext.patching.modes import cache_of, with_cache
from hf_posext.plan import Band, PositionMap
from tests.helpers import positions_of
from tests.zoo import TRAINED_LENGTH, build, candidate_types, token_ids

from .native import given_length, logits

pytestmark = pytest.mark.sweep

CHECKS = ("full", "padded", "decode", "doubled", "remapped", "undo")
LENGTH, LONG, PREFILL = 24, 40, 12
BEYOND, WITHIN = ReRoPE(window=TRAINED_LENGTH) + LogN(), SelfExtend(group=4, window=8)
"""Both components of the first act past the trained length only. ReRoPE alone is refused where no layer sees so far,
and as a component by its name; a plan that was made before is not."""
DOUBLED = (Band(PositionMap(rate=2), PositionMap(rate=2)),)

ASKED_FOR = {"moshi": {"sliding_window": TRAINED_LENGTH}, "zamba2": {"chunk_size": TRAINED_LENGTH}}
"""Sizes that the zoo does not set. Moshi's cache is cut to a window that its mask ignores, so that transformers' own
decoding differs from its full forward unless the window holds the whole input. Mamba layers of zamba2 add up their
chunks wrongly in transformers 5.10.1, for which its forwards depend on the length unless one chunk holds the input."""

SCALES_QUERIES = ("beam",)
"""Types whose layers without phases scale queries by position, which remapping leaves as it is: where phases shall be
at doubled positions, only the rotary modules are given these."""

REFUSED = {
    "deepseek_v4": "uses rotated states elsewhere",  # rotates the attention's output back, and has compressed keys
    "dory": "mixes more than two channels",  # scales each channel of a query by itself, after the rotation
}
"""Types that are refused for what their attention does, with some words of the reason."""

_DSA = {"index_topk": 8, "index_n_heads": 16}
_QSA = {"indexer_budget": 8}
INDEXED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4"), _DSA),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), _QSA),
}
"""Types whose indexer selects keys by their rotated states, and the sizes with which it selects eight of them. Of few
heads, all may score exactly 0 for many keys; which of these are selected then depends on the shapes. Older versions
have fewer of these types."""

# Only the order of float32 sums differs: at most 6e-6 of the largest logit. The smallest effect of doubled positions
# is 2e-3 (jetmoe).
EQUAL, CHANGED = 1e-5, 1e-3

# The unpatched models differ as well between a full forward and decoding: most by 1e-6, zamba2, whose recurrent
# layers sum in another order then, by 1e-4.
AGREES = 2e-4


@torch.no_grad()
def padded_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits `(tokens, vocabulary)` of the real tokens of a left-padded batch of three lengths."""
    lengths = torch.tensor([[LENGTH], [LENGTH - 7], [LENGTH - 13]])
    mask = (torch.arange(LENGTH) >= LENGTH - lengths).long()
    positions = positions_of(mask)
    ids = token_ids(LENGTH, batch=3) * mask
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]


@torch.no_grad()
def decoded_logits(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Logits `(length, vocabulary)` of one row that is read in one piece first, then token by token, with a cache."""
    ids, out = token_ids(length), []
    # recurrent_gemma takes a cache, but neither returns nor keeps the one that it makes itself
    cache = DynamicCache(config=model.config) if model.config.model_type == "recurrent_gemma" else None
    for start, stop in [(0, PREFILL), *((position, position + 1) for position in range(PREFILL, length))]:
        step = model(
            input_ids=ids[:, start:stop],
            attention_mask=torch.ones(1, stop, dtype=torch.long),
            position_ids=torch.arange(start, stop)[None],
            use_cache=True,
            **with_cache(model.forward, cache),
        )
        cache = cache_of(step) or cache
        out.append(step.logits[0])
    return torch.cat(out)


def doubled_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits `(length, vocabulary)` with all phases at doubled positions, by transformers alone."""
    if model.config.model_type not in SCALES_QUERIES:
        return logits(model, LENGTH, stride=2)
    modules = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    double = lambda module, args: (args[0], 2 * args[1], *args[2:])  # noqa: E731
    hooks = [module.register_forward_pre_hook(double) for module in modules]
    doubled = logits(model, LENGTH)
    for hook in hooks:
        hook.remove()
    return doubled


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest logit."""
    return float((actual - expected).abs().max() / expected.abs().max())


def native_logits(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Outputs of the unpatched model, for each of the checks against it."""
    return {
        "full": logits(model, LENGTH),
        "padded": padded_logits(model),
        "decode": decoded_logits(model, LENGTH),
        "doubled": doubled_logits(model),
        "long": logits(model, LONG),
        "long decode": decoded_logits(model, LONG),
    }


def own_difference(native: dict[str, torch.Tensor]) -> float:
    """Difference between the unpatched model's decoding and its full forward."""
    return relative(native["long decode"], native["long"])


def build_consistent(model_type: str, **sizes: Any) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """
    A model that decodes what it gives in one forward, and its logits.

    transformers 5.10.1 leaves the causal mask out for SDPA though doge and glm_moe_dsa add masks of their own to it.
    A token sees later ones then. Eager attention always gets the mask.
    """
    model = build(model_type, **sizes)
    native = native_logits(model)
    if own_difference(native) > AGREES:
        model.set_attn_implementation("eager")
        native = native_logits(model)
    return model, native


def check_identity(model: PreTrainedModel, method: Method, native: dict[str, torch.Tensor]) -> dict[str, bool]:
    """Checks that a method passes which does not reach the input."""
    plan = method.plan(detect_scheme(model), factor=4, trained_length=given_length(model))
    with patch_model(model, plan):
        readings = {
            "full": logits(model, LENGTH),
            "padded": padded_logits(model),
            "decode": decoded_logits(model, LENGTH),
        }
    return {name: relative(its, native[name]) < EQUAL for name, its in readings.items()}


def check_doubled(model: PreTrainedModel, native: dict[str, torch.Tensor]) -> dict[str, bool]:
    """Return whether doubled positions in attention are doubled positions of the model, and matter."""
    plan = BEYOND.plan(detect_scheme(model), factor=4, trained_length=given_length(model))
    with patch_model(model, plan.with_edits(Band, *DOUBLED)):
        doubled = logits(model, LENGTH)
    matters = relative(native["doubled"], native["full"]) > CHANGED
    return {"doubled": matters and relative(doubled, native["doubled"]) < EQUAL}


def check_remapped(model: PreTrainedModel, native: dict[str, torch.Tensor]) -> dict[str, bool]:
    """Return whether a method that reaches the input changes logits, and decodes what it gives in one forward."""
    with patch_model(model, WITHIN, factor=4, trained_length=given_length(model)):
        full, decoded = logits(model, LONG), decoded_logits(model, LONG)
    noise = own_difference(native)
    agrees = noise < AGREES and relative(decoded, full) < EQUAL + 2 * noise
    return {"remapped": agrees and relative(full, native["long"]) > CHANGED}


def expected_refusal(model: PreTrainedModel) -> str:
    """Some words of the reason for which the installed version's type is refused, and nothing where it is not."""
    if model.config.model_type in REFUSED:
        return REFUSED[model.config.model_type]
    sources = {sys.modules[type(module).__module__] for module in model.modules()}
    return "" if any(hasattr(source, "ALL_ATTENTION_FUNCTIONS") for source in sources) else "AttentionInterface"


def traces(model: PreTrainedModel) -> list[str]:
    """Traces that a patch has left on a model or in the registries of transformers."""
    registries = (AttentionInterface, AttentionMaskInterface)
    traces_left = [name for registry in registries for name in registry._global_mapping if "posext" in name]
    for path, module in model.named_modules():
        traces_left += [f"{path}.{name}" for name in vars(module) if "posext" in name]
        traces_left += [f"hook on {path}"] if module._forward_hooks or module._forward_pre_hooks else []
        traces_left += [f"class of {path}"] if hasattr(type(module), "_posext_base") else []
    return traces_left


@pytest.mark.parametrize("model_type", candidate_types())
def test_rotary_type(model_type: str, request: pytest.FixtureRequest) -> None:
    model, native = build_consistent(model_type, **ASKED_FOR.get(model_type, {}))
    config, reason = model.config.to_dict(), ""
    try:
        passed = check_identity(model, BEYOND, native) | check_doubled(model, native) | check_remapped(model, native)
    except PosExtError as error:
        passed, reason = {}, str(error)
    passed["undo"] = torch.equal(logits(model, LONG), native["long"]) and model.config.to_dict() == config
    passed["undo"] &= not traces(model)
    verdicts = {name: {True: "works", False: "fails", None: "refused"}[passed.get(name)] for name in CHECKS}
    record = {"transformers": transformers_version, "verdicts": verdicts, "reason": reason}
    request.config.cache.set(f"sweep/late/{model_type}", record)
    assert passed["undo"], traces(model)
    assert "fails" not in verdicts.values(), verdicts
    expected = expected_refusal(model)
    assert bool(reason) == bool(expected), reason
    assert not reason or (model_type in reason and expected in reason)


@pytest.mark.parametrize("model_type", sorted(INDEXED.keys() & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()))
@pytest.mark.parametrize("method", [BEYOND, LogN()], ids=["rerope", "log-n"])
def test_an_indexer_selects_the_same_keys(model_type: str, method: Method) -> None:
    """Selection is by the model's own positions, which the patch leaves alone; so is the mask that it makes."""
    model, native = build_consistent(model_type, **INDEXED[model_type])
    all_keys = build_consistent(model_type)[1]
    assert relative(native["full"], all_keys["full"]) > CHANGED, "the selection does not matter"
    assert all(check_identity(model, method, native).values())
    assert check_remapped(model, native)["remapped"]
