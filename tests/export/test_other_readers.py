"""Converters that are not installed here: what ollama and mlx-lm compute from a saved config, by their sources.

Read from `convert/convert_llama.go` of ollama (017eb8ae4) and `mlx_lm/models/{llama,rope_utils}.py` of mlx-lm
(17772c052, 060aa4349), and written anew. Both read `rope_theta` and `rope_scaling`, and no `rope_parameters`.
"""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_posext import LongRoPE, patch_model
from hf_posext.adapters import save_adapter
from hf_posext.adapters.load import AdapterDirectory
from hf_posext.adapters.save import how_to_open, serving_commands
from hf_posext.export import export_checkpoint
from hf_posext.export.servers import serving_obstacle

from ..adapters.helpers import with_adapter
from ..conftest import TRAINED, tiny_llama

FACTOR = 4
LISTS = {"long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0], "short_factor": [1.0] * 8}
METHODS = ("theta", "ntk", "linear", "llama3", "yarn", "yarn(attention_factor=1.5)")


def exported(method: Any, path: Path) -> tuple[dict[str, Any], torch.Tensor, float, str]:
    """Export for transformers; returns the config, frequencies and attention factor in force, and SERVING.md."""
    model = tiny_llama()
    patch_model(model, method, factor=FACTOR)
    export_checkpoint(model, path, "transformers")
    rotary = model.model.rotary_emb
    config = json.loads((path / "config.json").read_text())
    return config, rotary.inv_freq.double(), rotary.attention_scaling, (path / "SERVING.md").read_text()


def llama3(base: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Wavelengths above the long bound are stretched by the factor, those between the bounds in part."""
    length, low, high = (
        scaling[f"{name}"] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = length * base / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return base * (share + (1 - share) / scaling["factor"])


def by_mlx(config: dict[str, Any], dim: int) -> tuple[torch.Tensor, float]:
    """Frequencies and the number that multiplies queries and keys."""
    scaling = config.get("rope_scaling") or {}
    base = config["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    kind = scaling.get("type") or scaling.get("rope_type", "default")
    if kind in ("default", "linear"):
        return base / scaling.get("factor", 1.0) if kind == "linear" else base, 1.0
    if kind == "llama3":
        return llama3(base, scaling), 1.0
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    if kind == "longrope":
        stretch = config["max_position_embeddings"] / length
        return base / torch.tensor(scaling["long_factor"]), math.sqrt(1 + math.log(stretch) / math.log(length))
    assert kind == "yarn"

    def pair(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config["rope_theta"]))

    low = max(math.floor(pair(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair(scaling.get("beta_slow", 1))), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    usual = 0.1 * math.log(factor) + 1
    return base * (1 - ramp) + base / factor * ramp, scaling.get("attention_factor", usual)


def by_ollama(config: dict[str, Any], dim: int) -> torch.Tensor:
    """Frequencies of its GGUF file for Llama: a base, a `linear` factor by the key `type`, or Llama 3's divisors."""
    scaling = config.get("rope_scaling") or {}
    base = config["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if scaling.get("type") == "linear":
        return base / scaling["factor"]
    return llama3(base, scaling) if scaling.get("rope_type") == "llama3" else base


@pytest.mark.parametrize("method", METHODS)
def test_mlx_computes_the_same(method: str, tmp_path: Path) -> None:
    config, frequencies, attention, _ = exported(method, tmp_path)
    read, scale = by_mlx(config, 2 * len(frequencies))
    torch.testing.assert_close(read, frequencies, rtol=1e-6, atol=0)  # ours are float32
    assert scale == pytest.approx(attention, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_ollama_computes_the_same_or_is_named(method: str, tmp_path: Path) -> None:
    config, frequencies, _, instructions = exported(method, tmp_path)
    read = by_ollama(config, 2 * len(frequencies))
    equal = torch.allclose(read, frequencies, rtol=1e-6, atol=0)
    assert equal == ("ollama's converter" not in instructions) == (not method.startswith("yarn"))


def test_longrope_is_named(tmp_path: Path) -> None:
    config, frequencies, attention, instructions = exported(LongRoPE(**LISTS, attention_factor=1.25), tmp_path)
    read, scale = by_mlx(config, 2 * len(frequencies))
    assert scale != pytest.approx(attention, rel=1e-2)
    assert "mlx-lm (060aa4349) takes the long factors alone" in instructions
    assert "ollama's converter (017eb8ae4) ignores `longrope`" in instructions


# Adapters beside their base


def by_vllm(config: dict[str, Any], max_rank: int) -> None:
    """The checks of vLLM's `lora/peft_helper.py`: the type of the adapter is not among them."""
    scaling = config["lora_alpha"] / config["r"]
    assert scaling > 0
    saved = [name for name in config.get("modules_to_save") or [] if name not in ("classifier", "score")]
    highest = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if saved or config.get("use_dora") or config.get("bias", "none") != "none" or highest > max_rank:
        raise ValueError("refused")


@pytest.mark.parametrize(
    ("options", "obstacles"),
    [
        ({"r": 4}, {}),
        ({"r": 9, "use_rslora": True}, {"SGLang": "use_rslora"}),
        ({"use_dora": True}, dict.fromkeys(("vLLM", "SGLang"), "use_dora")),
        ({"modules_to_save": ["norm"]}, dict.fromkeys(("vLLM", "SGLang"), "modules_to_save")),
        ({"bias": "all"}, dict.fromkeys(("vLLM", "SGLang"), "bias")),
        ({"r": 4, "rank_pattern": {"q_proj": 12}}, {"SGLang": "rank_pattern"}),
    ],
    ids=str,
)
def test_adapters_that_servers_load(options: dict[str, Any], obstacles: dict[str, str], tmp_path: Path) -> None:
    model = tiny_llama()
    patch = patch_model(model, "yarn", factor=FACTOR)
    patch.save_pretrained(tmp_path / "base")
    save_adapter(with_adapter(model, **options), tmp_path / "adapter", base_model=str(tmp_path / "base"))
    adapter = AdapterDirectory.read(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    for server, words in serving_commands(adapter).items():
        assert serving_obstacle(adapter.config, server) == obstacles.get(server)
        refusal = f"{server} does not load it beside its base ({obstacles.get(server)})"
        assert (refusal in card, " ".join(words) in card) == (server in obstacles, server not in obstacles)
    vllm = serving_commands(adapter)["vLLM"]
    limit = int(vllm[vllm.index("--max-lora-rank") + 1])
    if "vLLM" not in obstacles:
        by_vllm(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()), limit)
        assert limit == (8 if options == {"r": 4} else 16)
    assert ["--max-model-len", str(FACTOR * TRAINED)] == vllm[3:5]


@pytest.mark.parametrize("start", ["PiSSA", "pissa_niter_4", "olora", "loftq", "lora_ga"])
def test_adapters_that_changed_the_base_are_named(start: str) -> None:
    config = {"peft_type": "LORA", "init_lora_weights": start}
    assert [serving_obstacle(config, server) for server in ("vLLM", "SGLang")] == ["init_lora_weights"] * 2
    assert serving_obstacle(config | {"init_lora_weights": "orthogonal"}, "vLLM") is None


def test_a_base_names_nothing_but_itself_in_a_card(tmp_path: Path) -> None:
    model = tiny_llama()
    patch_model(model, "yarn", factor=FACTOR)
    path = save_adapter(with_adapter(model), tmp_path / "adapter")
    config = json.loads((path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = 'me/<script>[a](b) "x"`'
    (path / "adapter_config.json").write_text(json.dumps(config))
    text = how_to_open(path)
    outside, code = text.split("```python\nimport json")
    assert "<script" not in outside and "](b)" not in outside
    line = next(line for line in code.splitlines() if line.startswith("base ="))
    assert ast.literal_eval(line.split("from_pretrained(")[1].split(", config=")[0]) == 'me/<script>[a](b) "x"`'


def test_servers_stop_at_an_adapter_that_needs_the_plan(tmp_path: Path) -> None:
    model = tiny_llama()
    patch_model(model, "rerope", factor=FACTOR)
    with_adapter(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "hf_posext plan (rerope" in config["r"]
    with pytest.raises(TypeError):
        by_vllm(config, 64)
