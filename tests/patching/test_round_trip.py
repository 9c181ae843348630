"""Train, save, open in a fresh process, merge, export, open in plain transformers: equal logits at each step."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_posext import patch_model
from hf_posext.adapters import save_adapter
from tests.adapters.helpers import KINDS, train, with_adapter
from tests.conftest import TRAINED, logits, realigned, tiny_llama, tokens
from tests.helpers import run_python

METHODS = {"frequencies": "yarn", "remapping": "self-extend"}
CASES = [f"{kind}-{plan}" for kind in KINDS for plan in METHODS]
IDS = tokens(3 * TRAINED)

FRESH = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from hf_posext import load_patched
from hf_posext.adapters import load_adapter
from hf_posext.errors import ExportError
from hf_posext.export import export_checkpoint
from hf_posext.patching import find_patch
from tests.conftest import logits, realigned

root, found, refused = Path(sys.argv[1]), {}, {}
ids = load_file(root / "ids.safetensors")["ids"]
for case in sys.argv[2:]:
    model = load_adapter(root / case / "adapter")
    found[f"{case} loaded"] = logits(realigned(model), ids)
    merged = model.merge_and_unload()
    found[f"{case} merged"] = logits(realigned(merged), ids)
    find_patch(merged).save_pretrained(root / case / "merged")
    found[f"{case} reopened"] = logits(realigned(load_patched(root / case / "merged")), ids)
    try:
        export_checkpoint(merged, root / case / "exported")
    except ExportError as error:
        refused[case] = str(error)
save_file(found, root / "fresh.safetensors")
(root / "refused.json").write_text(json.dumps(refused))
"""

PLAIN = """
import sys
sys.modules["hf_posext"] = None
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
root, found = Path(sys.argv[1]), {}
ids = load_file(root / "ids.safetensors")["ids"]
for case in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(root / case / "exported").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        found[case] = model(input_ids=ids).logits
    found[f"{case} limit"] = torch.tensor(model.config.max_position_embeddings)
save_file(found, root / "plain.safetensors")
"""


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Logits of every case: as trained, as a fresh process had them, as plain transformers had them."""
    root = tmp_path_factory.mktemp("journey")
    tiny_llama().save_pretrained(root / "base")
    save_file({"ids": IDS}, root / "ids.safetensors")
    trained = {}
    for case in CASES:
        kind, _, plan = case.rpartition("-")
        model = type(tiny_llama()).from_pretrained(root / "base")
        patch_model(model, METHODS[plan], factor=4)
        peft = with_adapter(model, **KINDS[kind])
        untrained = logits(realigned(peft), IDS)
        train(peft, 2 * TRAINED)
        trained[case] = logits(realigned(peft), IDS)
        assert (trained[case] - untrained).abs().max() > 1e-3
        save_adapter(peft, root / case / "adapter")
    run_python("-c", FRESH, root, *CASES)
    refused = json.loads((root / "refused.json").read_text())
    assert set(refused) == {case for case in CASES if case.endswith("remapping")}
    assert all("remapped inside attention" in reason for reason in refused.values())
    run_python("-c", PLAIN, root, *[case for case in CASES if case not in refused])
    return {
        "trained": trained,
        "fresh": load_file(root / "fresh.safetensors"),
        "plain": load_file(root / "plain.safetensors"),
    }


@pytest.mark.parametrize("case", CASES)
def test_fresh_process_has_the_logits_of_the_training(case: str, journey: dict[str, dict[str, torch.Tensor]]) -> None:
    assert torch.equal(journey["fresh"][f"{case} loaded"], journey["trained"][case])


@pytest.mark.parametrize("case", CASES)
def test_merging_keeps_logits_and_patch(case: str, journey: dict[str, dict[str, torch.Tensor]]) -> None:
    fresh = journey["fresh"]
    # one product of matrices instead of three, in float32
    torch.testing.assert_close(fresh[f"{case} merged"], fresh[f"{case} loaded"], atol=2e-5, rtol=1e-5)
    assert torch.equal(fresh[f"{case} reopened"], fresh[f"{case} merged"])


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("frequencies")])
def test_plain_transformers_has_the_logits_of_the_merged(
    case: str, journey: dict[str, dict[str, torch.Tensor]]
) -> None:
    assert torch.equal(journey["plain"][case], journey["fresh"][f"{case} merged"])
    assert journey["plain"][f"{case} limit"] == 4 * TRAINED
