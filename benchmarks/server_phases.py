"""Cosine and sine that the rotary classes of vLLM and SGLang compute from exports, against those of transformers.

Neither server is installed. Their rotary modules come from an unpacked wheel. Stubs replace all their other imports.

    pip download vllm sglang --no-deps -d wheels && for w in wheels/*.whl; do unzip -q $w -d servers; done
    python benchmarks/server_phases.py --servers servers --output benchmarks/results/server_phases.json
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from output import command, machine
from torch import nn

import hf_posext
from hf_posext.errors import ExportError
from hf_posext.export import export_checkpoint
from hf_posext.methods import LongRoPE, Method, YaRN

sys.path.append(str(Path(__file__).resolve().parent.parent))

from tests.conftest import TRAINED, tiny_llama

ROTARY = {"vllm": "model_executor.layers.rotary_embedding", "sglang": "srt.layers.rotary_embedding"}
FACTOR, WIDTH = 4, 16
METHODS: list[str | Method] = ["theta", "ntk", "linear", "yarn", "llama3", "yarn+resonance", "partial"]
METHODS += [YaRN(attention_factor=1.5), YaRN(truncate=False), YaRN(variant="paper")]
METHODS += [LongRoPE(long_factor=[1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0])]


class Idle:
    """Object that can be called and used as a decorator, has any attribute, and is false."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __bool__(self) -> bool:
        return False


class Layer(nn.Module):
    """Stand-in for the base classes of the servers' operators."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def register(cls, *args: Any, **kwargs: Any) -> Any:
        return lambda kind: kind

    @classmethod
    def enabled(cls) -> bool:
        return False


class Stub(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "publish_role":  # SGLang compares it with None
            return lambda: None
        return Layer if name in ("CustomOp", "PluggableLayer", "BaseFusedOp", "ApplyRotaryEmb") else Idle()


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Importer that makes every module of a server a stub, except for its rotary package."""

    def __init__(self, server: str, root: Path) -> None:
        self.server, self.root = server, root

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        rotary = f"{self.server}.{ROTARY[self.server]}"
        if name.split(".")[0] != self.server or name.startswith(rotary):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = Stub(spec.name)
        module.__path__ = [str(self.root.joinpath(*spec.name.split(".")))]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def phases(server: str, config: dict[str, Any]) -> torch.Tensor:
    """Return cosine and sine of every position up to the target, from the table of the server."""
    rope, limit = config["rope_parameters"], config["max_position_embeddings"]
    package = importlib.import_module(f"{server}.{ROTARY[server]}")
    if server == "vllm":
        served = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=FACTOR * TRAINED))
        package.phi3_long_rope_scaled_rope.get_current_vllm_config = lambda: served
        module = package.get_rope(WIDTH, limit, True, rope, torch.float32)
    else:
        factory = importlib.import_module(f"{package.__name__}.factory")
        module = factory.get_rope(WIDTH, WIDTH, limit, rope["rope_theta"], True, rope, torch.float32)
    two_lists = getattr(module, "long_short_cos_sin_cache", None)  # LongRoPE: the long list follows the short one
    table = module.cos_sin_cache if two_lists is None else two_lists[TRAINED:]
    return table[: FACTOR * TRAINED].float()


def measure(server: str, method: str | Method) -> dict[str, Any]:
    model = tiny_llama()
    plan = hf_posext.patch_model(model, method, factor=FACTOR).plan
    with tempfile.TemporaryDirectory() as directory:
        try:
            serving = export_checkpoint(model, directory, server)
        except ExportError as error:
            return {"server": server, "method": plan.method, "refused": str(error)}
        served = phases(server, json.loads((Path(directory) / "config.json").read_text()))
    cos, sin = model.model.rotary_emb(torch.zeros(1, 1, 1), torch.arange(FACTOR * TRAINED)[None])
    half = cos.shape[-1] // 2
    difference = (served - torch.cat([cos[0, :, :half], sin[0, :, :half]], -1)).abs().max()
    row = {"server": server, "method": plan.method, "read_from": serving.read_from}
    return {**row, "largest_difference": float(difference)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", type=Path, required=True, help="Directory with vllm/ and sglang/ unpacked.")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for server in ROTARY:
        sys.meta_path.insert(0, Stubs(server, arguments.servers))
        for method in METHODS:
            rows.append(measure(server, method))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.output is not None:
        versions = {row["server"]: row.pop("read_from") for row in rows if "read_from" in row}
        origin = {"command": command("benchmarks/server_phases.py", {"servers": arguments.servers.name})}
        content = {**origin, "machine": machine(), "versions": versions, "rows": rows}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
