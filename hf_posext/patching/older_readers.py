"""Config keys with which transformers 4, and readers of its configs, compute the same positions.

transformers 5 writes `rope_parameters`. transformers 4 does not know the name and, without a word, computes the
positions of a plain model: it reads `rope_scaling` and `rope_theta`, as the converters of ollama and MLX do. Both can
stand in one config. transformers 5 takes `rope_scaling` first where both are there, so that both have to be right.

Read from transformers 4.57.6, the last of version 4: `modeling_rope_utils.py`, `models/*/modeling_*.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEAST = "4.57"

TYPES = ("default", "linear", "yarn", "llama3", "longrope")

FAMILIES = frozenset(
    "apertus arcee aria_text bitnet cohere cohere2 dots1 emu3_text_model ernie4_5 ernie4_5_moe flex_olmo "
    "gemma gemma2 granite granitemoe granitemoeshared helium jetmoe llama ministral mistral mixtral nemotron "
    "olmoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2 vaultgemma".split()
)
"""Model types whose config takes every rope type there, and whose rotary module reads all of it for the whole head."""


def entries_of_4(text: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return what the text part of a config needs beside `rope_parameters`, or the reason why nothing would do.

    Args:
        text (`Mapping`): entries of `config.json`, or of its text part.
    """
    rope = text.get("rope_parameters")
    if not rope:
        return {}
    family, kind = text.get("model_type"), rope.get("rope_type", "default")
    if any(isinstance(entry, Mapping) for entry in rope.values()):
        return "its frequencies differ between layer types, which transformers 4 reads for no rope type"
    if family not in FAMILIES:
        return f"{family} is not among the families of transformers 4 that read rope_scaling in full"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "transformers 4 reads the share of rotated channels elsewhere"
    if kind not in TYPES or "mrope_section" in rope:
        return f"transformers 4 has no rope type {kind!r} like that of transformers 5"
    entries: dict[str, Any] = {"rope_theta": float(rope["rope_theta"])}
    if kind == "default":
        return entries
    elsewhere = ("rope_theta", "partial_rotary_factor")
    scaling = {key: _as_float(key, value) for key, value in rope.items() if key not in elsewhere}
    if kind == "longrope" and rope["short_factor"] != rope["long_factor"]:
        entries["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return {**entries, "rope_scaling": scaling}


def _as_float(key: str, value: Any) -> Any:
    """transformers 4 logs an error for whole numbers, except lengths."""
    whole = isinstance(value, int) and not isinstance(value, bool) and key != "original_max_position_embeddings"
    return float(value) if whole else value
