"""Two processes on the CPU (gloo) read what one reads, and give the same weights; shards are put together again."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from hf_posext.training import Evaluation

from ..evaluation.helpers import random_texts
from ..helpers import ROOT, TWO_PROCESSES, run_python
from .helpers import train

CONFIGS = ROOT / "examples" / "accelerate_configs"

TRAIN = """
import sys
from tests.evaluation.helpers import random_texts
from tests.training.helpers import train
from tests.training.test_resume import Stops
from hf_posext.training import Evaluation

given = {"steps": 4, "save_every": 2, "accumulation": 2, "pose": 2}
given["evaluation"] = Evaluation(random_texts(2, 200), [128], every=2)
try:
    train(sys.argv[1], **given, callbacks=[Stops(2)])
except KeyboardInterrupt:
    result = train(sys.argv[1], **given, resume=True)
measured = [entry["eval_perplexity_128"] for entry in result.log if "eval_perplexity_128" in entry]
print(f"measured {measured}")
"""

GATHER = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hf_posext import evaluate_perplexity
from hf_posext.training.finetune import _gather
from tests.conftest import tiny_llama, tokens
from tests.evaluation.helpers import character_tokenizer, random_texts
from tests.training.helpers import adapted, preset, weights

network = adapted(tiny_llama(tie_word_embeddings=True), preset("lora-plus"))
whole, mesh = weights(network), init_device_mesh("cpu", (2,))
asked = character_tokenizer(), random_texts(1, 80), [48]
(expected,) = evaluate_perplexity(network, *asked).rows
for layer in network.get_base_model().model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(network, mesh=mesh)
inputs = network.get_input_embeddings().modules_to_save["default"]
assert len(inputs.weight.to_local()) == 64, "half of 128 rows"
(found,) = evaluate_perplexity(network, *asked).rows
assert abs(found["perplexity"] / expected["perplexity"] - 1) < 1e-6
network(input_ids=tokens(48), labels=tokens(48)).loss.backward()
assert all(weight.grad is not None for weight in network.parameters() if weight.requires_grad)
network.zero_grad()
_gather(network)
again = weights(network)
assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
assert network.get_output_embeddings().modules_to_save["default"].weight is inputs.weight
print("gathered")
torch.distributed.destroy_process_group()  # or its threads may outlive what they need
"""

OWN = """
import sys
from pathlib import Path
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hf_posext import find_patch, load_adapter, load_patched, patch_model, unpatch_model
from tests.adapters.helpers import with_adapter
from tests.conftest import logits, realigned, tiny_llama, tokens
from tests.patching.test_whoever_writes import trainer

ids, out = tokens(192), Path(sys.argv[1]).parent
for method in ("yarn", "rerope"):
    base = tiny_llama()  # with the seed of every process
    patch_model(base, method, factor=4)
    network = with_adapter(base)
    run = trainer(network, out / method, max_steps=2)
    run.train()
    run.save_model(out / method / "final")
    run.accelerator.wait_for_everyone()
    for saved in ("checkpoint-2", "final"):
        opened = load_adapter(out / method / saved, tiny_llama())
        assert torch.equal(logits(realigned(opened), ids), logits(realigned(network.eval()), ids))

    model = tiny_llama()
    plain = logits(model, ids)
    patch_model(model, method, factor=4)
    whole = logits(model, ids)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert torch.equal(logits(model, ids), whole)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if run.is_world_process_zero():
        model.save_pretrained(out / method / "sharded", state_dict=weights)
    run.accelerator.wait_for_everyone()
    assert torch.equal(logits(realigned(load_patched(out / method / "sharded")), ids), whole)
    unpatch_model(model)
    assert torch.equal(logits(model, ids), plain)
    patch_model(model, method, factor=4)  # of a model that is sharded already
    assert torch.equal(logits(model, ids), whole)
print("own trainer")
"""


def two_processes(code: str, *words: object) -> str:
    return run_python(*TWO_PROCESSES, "--no_python", sys.executable, "-c", code, *words).stdout


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One launch for all, since starting takes longest: the directory of the run, and what was printed."""
    output = tmp_path_factory.mktemp("two") / "run"
    return output, two_processes(TRAIN + OWN + GATHER, output)


def test_two_processes_give_the_weights_of_one_with_twice_the_rows(launched: tuple[Path, str], tmp_path: Path) -> None:
    output, printed = launched
    evaluation = Evaluation(random_texts(2, 200), [128], every=2)
    single = train(tmp_path, steps=4, save_every=2, accumulation=4, pose=2, evaluation=evaluation)
    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    expected = load_file(single.path / "adapter_model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        # gradients are summed in another order; Adam's first steps divide by their size
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    provenance = json.loads((output / "provenance.json").read_text())
    assert provenance["run"]["processes"] == 2 and provenance["result"]["resumed_from"] == "checkpoint-2"
    perplexities = [entry["eval_perplexity_128"] for entry in single.log if "eval_perplexity_128" in entry]
    printed_numbers = [json.loads(numbers) for numbers in re.findall(r"measured (\[.*?\])", printed)]
    assert len(printed_numbers) == 2 and printed_numbers[0] == printed_numbers[1] == pytest.approx(
        perplexities, rel=1e-5
    )


def test_a_trainer_of_two_processes_and_sharded_weights_keep_the_plan(launched: tuple[Path, str]) -> None:
    assert launched[1].count("own trainer") == 2


def test_shards_are_put_together_and_ties_are_kept(launched: tuple[Path, str]) -> None:
    """As FSDP2 leaves them, which accelerate itself starts on GPUs alone."""
    assert launched[1].count("gathered") == 2


@pytest.mark.parametrize("name", ["train_ddp", "train_fsdp2"])
def test_the_shipped_configurations_are_read_by_accelerate(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    content = yaml.safe_load(path.read_text())
    assert config.distributed_type == content["distributed_type"] and config.num_processes == 4
    assert config.fsdp_config == content.get("fsdp_config", {})
