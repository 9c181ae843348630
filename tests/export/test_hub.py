"""Uploads and downloads, in a fresh process against a hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_posext import patch_model
from hf_posext.adapters import push_to_hub, save_adapter
from hf_posext.errors import CheckpointError, PlanError
from tests.adapters.helpers import with_adapter
from tests.conftest import tiny_llama
from tests.helpers import run_python
from tests.reporting.helpers import make_results

from .fake_hub import FakeHub, fake_hub

ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "posext_plan.json", "posext_base.json", "config.json"}

STEPS = """
import logging, sys
from pathlib import Path
import torch
from hf_posext.adapters import load_adapter, push_to_hub, verify_adapter
from hf_posext.evaluation import Results
from hf_posext.reporting.report import push_results
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM
from hf_posext import load_patched, patch_model
from tests.adapters.helpers import with_adapter
from tests.conftest import logits, realigned, tiny_llama, tokens

logging.basicConfig()
root = Path(sys.argv[1])
print(push_to_hub(root / "adapter", "me/adapter"))
print(push_to_hub(root / "plan", "me/plan", commit_message="a plan"))
model = load_adapter("me/adapter")
assert verify_adapter(model, "me/adapter@main")
with torch.no_grad():
    expected = load_adapter(root / "adapter")(torch.arange(1, 100)[None]).logits
    assert torch.equal(model(torch.arange(1, 100)[None]).logits, expected)
results = Results.load_json(root / "results.json")
push_results(results, "me/adapter")
results.rows[0]["perplexity"] += 1
try:
    push_results(results, "me/adapter")
except ValueError as error:
    print("refused:", error)
push_results(results, "me/adapter", overwrite=True)
try:
    load_adapter("me/nothing")
except ValueError as error:
    print("refused:", error)

ids = tokens(192)
for method in ("yarn", "rerope"):
    model = tiny_llama()
    patch_model(model, method, factor=4)
    model.push_to_hub(f"me/{method}")
    assert torch.equal(logits(realigned(load_patched(f"me/{method}")), ids), logits(realigned(model), ids))
    adapted = with_adapter(model)
    adapted.push_to_hub(f"me/{method}-lora")
    opened = load_adapter(f"me/{method}-lora", tiny_llama())
    assert torch.equal(logits(realigned(opened), ids), logits(realigned(adapted), ids))
try:
    AutoModelForCausalLM.from_pretrained("me/rerope")
except ValueError as error:
    print("stopped:", error)
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeHub, str, str, Path]]:
    """The hub after all steps, and what the process printed."""
    root = tmp_path_factory.mktemp("hub")
    tiny_llama().save_pretrained(root / "base")
    model = type(tiny_llama()).from_pretrained(root / "base")
    plan = patch_model(model, "yarn", factor=4).plan
    save_adapter(with_adapter(model), root / "adapter")
    for name in ("adapter_model.bin", "optimizer.pt", "secret.env"):
        (root / "adapter" / name).write_bytes(b"not for others")
    (root / "plan").mkdir()
    plan.save(root / "plan")
    make_results().save_json(root / "results.json")
    with fake_hub() as hub:
        away = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(root / "cache"), "HF_TOKEN": "hf_test"}
        process = run_python("-c", STEPS, root, **away, HF_HUB_DISABLE_TELEMETRY="1")
        yield hub, process.stdout, process.stderr, root


def test_adapter_goes_there_and_comes_back(pushed: tuple[FakeHub, str, str, Path]) -> None:
    hub, printed, _, root = pushed
    assert set(hub.repositories["me/adapter"]) == ADAPTER | {"README.md"}  # no pickles, nothing of the machine
    for name in ADAPTER:
        assert hub.repositories["me/adapter"][name] == (root / "adapter" / name).read_bytes()
    assert printed.splitlines()[0] == f"{hub.url}/me/adapter/commit/main"
    commits = [path for verb, path in hub.log if path.startswith("/api/models/me/adapter/commit")]
    assert len(commits) == 3  # the adapter at once, then twice the card


def test_what_transformers_and_peft_push_contains_the_plan(pushed: tuple[FakeHub, str, str, Path]) -> None:
    hub, printed, _, _ = pushed
    assert 'stopped: Specified `attn_implementation="hf_posext plan (rerope: 64 -> 256 tokens' in printed
    for method in ("yarn", "rerope"):
        assert b"posext_plan" in hub.repositories[f"me/{method}"]["config.json"]
        assert b"posext_plan" in hub.repositories[f"me/{method}-lora"]["adapter_config.json"]


def test_plan_alone(pushed: tuple[FakeHub, str, str, Path]) -> None:
    hub, _, _, root = pushed
    assert hub.repositories["me/plan"] == {"posext_plan.json": (root / "plan" / "posext_plan.json").read_bytes()}


def test_results_are_added_to_the_card(pushed: tuple[FakeHub, str, str, Path]) -> None:
    hub, printed, _, root = pushed
    card = ModelCard(hub.repositories["me/adapter"]["README.md"].decode())
    before = ModelCard((root / "adapter" / "README.md").read_text())
    assert card.text == before.text and set(before.data.tags) <= set(card.data.tags)
    first = make_results().rows[0]
    values = {(e.metric_name, e.dataset_config): e.metric_value for e in card.data.eval_results}
    assert values["Perplexity", f"none x1, {first['length']} tokens"] == first["perplexity"] + 1  # overwritten
    assert "refused: " in printed and "overwrite" in printed


def test_base_that_others_do_not_have_is_told(pushed: tuple[FakeHub, str, str, Path]) -> None:
    _, printed, warned, root = pushed
    assert f"names {root / 'base'} as its base model, which others do not have. They have to pass it" in warned
    assert "neither a directory nor a repository that can be read: me/nothing" in printed


def test_nothing_incomplete_is_pushed(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no plan at"):
        push_to_hub(tmp_path, "me/x")
    model = tiny_llama()
    patch_model(model, "yarn", factor=4)
    path = save_adapter(with_adapter(model), tmp_path / "adapter")
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        push_to_hub(path, "me/x")
