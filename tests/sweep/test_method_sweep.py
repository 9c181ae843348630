"""
The methods that fade, follow rows or map pairs, on every rotary causal-LM type of the installed transformers.

What they ask of a model beyond the bands of the late sweep is tried here: each changes the logits past the trained
length and leaves no trace, or is refused by name. Groups of pairs that are all alike give what groups of tokens give.
The outcome of each type goes to pytest's cache, as that of the other sweeps does.
"""

import pytest
import torch
from transformers import __version__ as transformers_version

from hf_posext import patch_model
from hf_posext.errors import PosExtError
from hf_posext.methods import DPE, Decay, Fade, JetLong, LaMPE, LeakyReRoPE, Method, ReRoPE, SelfExtend
from tests.zoo import TRAINED_LENGTH, build, candidate_types

from .test_late_sweep import ASKED_FOR, CHANGED, EQUAL, given_length, logits, relative, traces

pytestmark = pytest.mark.sweep

LENGTH = TRAINED_LENGTH + 36

METHODS: dict[str, Method] = {
    "rerope+fade": ReRoPE(window=8) + Fade(reference=4),
    "leaky-rerope+decay": LeakyReRoPE(window=8) + Decay(start=8),
    "jet-long": JetLong(window=4),
    "jet-long(frequencies=True)": JetLong(window=4, frequencies=True),
    "lampe": LaMPE(head=4),
    "dpe": DPE(scales=[4], window=8),
}


@pytest.mark.parametrize("model_type", candidate_types())
def test_rotary_type(model_type: str, request: pytest.FixtureRequest) -> None:
    model = build(model_type, **ASKED_FOR.get(model_type, {}))
    length = given_length(model)
    native = logits(model, LENGTH)
    verdicts, reasons, outputs = {}, {}, {}
    for name, method in {**METHODS, "self-extend": SelfExtend(group=4, window=8)}.items():
        try:
            with patch_model(model, method, factor=4, trained_length=length):
                outputs[name] = logits(model, LENGTH)
        except PosExtError as error:
            verdicts[name], reasons[name] = "refused", str(error)
            continue
        verdicts[name] = "works" if relative(outputs[name], native) > CHANGED / 10 else "fails"  # jetmoe: 5e-4
        assert torch.equal(logits(model, LENGTH), native) and not traces(model), name
    if {"dpe", "self-extend"} <= outputs.keys() and relative(outputs["dpe"], outputs["self-extend"]) > EQUAL:
        verdicts["dpe"] = "fails"
    del verdicts["self-extend"]
    reasons.pop("self-extend", None)
    record = {"transformers": transformers_version, "verdicts": verdicts, "reasons": reasons}
    request.config.cache.set(f"sweep/methods/{model_type}", record)
    assert "fails" not in verdicts.values(), verdicts
