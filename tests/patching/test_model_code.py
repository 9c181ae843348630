"""Errors of the code of a model become errors that name it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from hf_posext import detect_scheme, patch_model
from hf_posext.errors import PosExtError, UnsupportedModelError
from hf_posext.methods import as_method
from hf_posext.patching.detect import _window

from ..conftest import TRAINED
from ..zoo import tiny_config


class OldConfig(PreTrainedConfig):
    """As remote code for transformers 4 has it: a base, and no `rope_parameters`."""

    model_type = "v4_custom"

    def __init__(self, rope_theta: float = 1e4, max_position_embeddings: int = TRAINED, **kwargs: Any) -> None:
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class Rotary(nn.Module):
    inv_freq: torch.Tensor

    def __init__(self, config: OldConfig, broken: bool = False, scales: bool = True) -> None:
        super().__init__()
        self.config, self.attention_scaling, self.broken, self.scales = config, 1.0, broken, scales
        self.register_buffer("inv_freq", 1 / (1e4 ** (torch.arange(0, 16, 2).float() / 16)), persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.broken:
            raise TypeError("only integers here")
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        scale = self.attention_scaling if self.scales else 1.0
        return angles.cos() * scale, angles.sin() * scale


class OldModel(PreTrainedModel):
    config_class = OldConfig

    def __init__(self, config: OldConfig, broken: bool = False, scales: bool = True) -> None:
        super().__init__(config)
        self.rotary = Rotary(config, broken, scales)
        self.out = nn.Linear(2, 2)
        self.post_init()


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "theta"])
def test_a_config_without_rope_parameters_is_patched(method: str) -> None:
    model, positions = OldModel(OldConfig()), torch.arange(4 * TRAINED)[None]
    before = model.rotary(positions, positions)
    with patch_model(model, method, factor=4) as patch:
        assert not torch.equal(model.rotary(positions, positions)[0], before[0])
        angles = torch.tensor(patch.plan.rotaries[0].inv_freq) * positions[0, :, None]
        torch.testing.assert_close(
            model.rotary(positions, positions)[0][0, :, :8], angles.cos() * model.rotary.attention_scaling
        )
        assert "has no rope_parameters" in str(patch.native_obstacle)
    assert torch.equal(model.rotary(positions, positions)[0], before[0])


def test_a_temperature_that_the_code_never_applies_is_refused() -> None:
    """The attribute is there, and the forward does not read it."""
    model = OldModel(OldConfig(), scales=False)
    with pytest.raises(UnsupportedModelError, match="Expected rotary .Rotary. to multiply its phases by 1.138"):
        patch_model(model, "yarn", factor=4)
    with patch_model(model, "yarn(attention_factor=1.0)", factor=4):
        pass


def test_what_model_code_raises_names_the_model() -> None:
    model = OldModel(OldConfig(), broken=True)
    with pytest.raises(UnsupportedModelError, match=r"positions of Rotary \(rotary\), got TypeError .* only integers"):
        patch_model(model, "yarn", factor=4)
    assert not any("posext" in name for module in model.modules() for name in vars(module))


def test_mistral4_rotates_a_part_of_each_head() -> None:
    """Its own function for plain RoPE knows nothing of that, and its shipped YaRN does."""
    scheme = detect_scheme(CONFIG_MAPPING["mistral4"]())
    (rotary,) = scheme.rotaries
    assert (scheme.kind, rotary.dim, rotary.pairs, rotary.shipped_type) == ("rotary", 64, 32, "yarn")


def test_a_layer_type_with_several_windows_sees_as_far_as_the_widest() -> None:
    """As in NeoMME, which the lowest supported transformers does not have."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    layers = [SimpleNamespace(sliding_window=window) for window in (256, None, 1024)]
    config = SimpleNamespace(is_heterogeneous=True, layer_types=types, per_layer_config=layers)
    assert (_window(config, "sliding_attention"), _window(config, "full_attention")) == (1024, None)
    layers[2].sliding_window = None
    assert _window(config, "sliding_attention") is None


def test_a_window_counts_only_where_masks_are_made_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a layer type is called: frequencies of layers that see all of a text are extended."""
    config = tiny_config("gemma3_text", sliding_window=16)
    assert [rotary.window for rotary in detect_scheme(config).rotaries] == [None, 16]
    monkeypatch.delattr("transformers.models.gemma3.modeling_gemma3.create_sliding_window_causal_mask")
    scheme = detect_scheme(config)
    assert [rotary.window for rotary in scheme.rotaries] == [None, None]
    plan = as_method("yarn").plan(scheme, factor=4)
    assert {entry.name for entry in plan.rotaries} == {"full_attention", "sliding_attention"}


KINDS = ("mistral4", "neomme", "musicflamingo", "autoformer", "chameleon", "dbrx")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in CONFIG_MAPPING])
def test_a_default_config_is_read_or_refused(kind: str) -> None:
    try:
        detect_scheme(CONFIG_MAPPING[kind]())
    except PosExtError as error:
        assert kind in str(error)
