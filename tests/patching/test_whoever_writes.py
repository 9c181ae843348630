"""Whoever writes a patched model, its positions are kept: reopened with equal logits, or refused by name."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_model, save_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_posext import detect_scheme, find_patch, load_adapter, load_patched, patch_model, unpatch_model
from hf_posext.adapters import save_adapter
from hf_posext.errors import (
    AlreadyPatchedError,
    CheckpointError,
    PlanError,
    PlanMismatchError,
    TrainingError,
    UnsupportedModelError,
)
from hf_posext.training import KeepsPlan
from tests import zoo
from tests.adapters.helpers import with_adapter
from tests.conftest import TRAINED, logits, realigned, sharpen, tiny_bloom, tiny_gpt2, tiny_llama, tiny_t5, tokens
from tests.helpers import run_python, shipped_tokenizer

IDS = tokens(3 * TRAINED)
PLANS: dict[str, tuple[Callable[[], PreTrainedModel], bool]] = {
    "yarn": (tiny_llama, True),
    "ntk": (tiny_llama, True),
    "linear": (tiny_llama, True),
    "table-linear": (tiny_gpt2, True),
    "rerope": (tiny_llama, False),
    "dynamic-ntk": (tiny_llama, False),
    "log-n": (tiny_llama, False),
    "alibi-linear": (tiny_bloom, False),
    "bucket-linear": (tiny_t5, False),
}
"""By method: the model, and whether its config can say the positions."""


def patched(method: str) -> PreTrainedModel:
    model = PLANS[method][0]()
    patch_model(model, method, factor=4, trained_length=TRAINED)
    return model


def trainer(model: Any, path: Path, max_steps: int = 1, callbacks: Any = None, **options: Any) -> Trainer:
    rows = Dataset.from_dict({"input_ids": tokens(TRAINED, 2).tolist(), "labels": tokens(TRAINED, 2).tolist()})
    settings: dict[str, Any] = {"max_steps": max_steps, "save_steps": 1, "per_device_train_batch_size": 1, **options}
    arguments = TrainingArguments(
        str(path), **settings, learning_rate=1e-3, report_to="none", use_cpu=True, disable_tqdm=True
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)


def by_trainer(model: Any, path: Path) -> Path:
    trainer(model, path).train()
    return path / "checkpoint-1"


def by_save_model(model: Any, path: Path) -> Path:
    trainer(model, path / "run").save_model(str(path))
    return path


def by_accelerate(model: Any, path: Path) -> Path:
    accelerator = Accelerator(cpu=True)
    accelerator.save_model(model, str(path))  # weights alone; no one can open them without a config
    model.config.save_pretrained(path)
    return path


def by_shards(model: Any, path: Path) -> Path:
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    return path


def by_itself(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


WRITERS = (by_trainer, by_save_model, by_accelerate, by_shards, by_itself)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("method", ["yarn", "rerope", "table-linear"])
def test_every_writer_keeps_the_positions(method: str, writer: Callable[[Any, Path], Path], tmp_path: Path) -> None:
    model = patched(method)
    path = writer(model, tmp_path / "saved")
    expected = logits(realigned(model.eval()), IDS)
    opened = load_patched(path)
    assert torch.equal(logits(realigned(opened), IDS), expected)
    assert detect_scheme(opened).trained_length == TRAINED
    if PLANS[method][1]:
        plain = type(model).from_pretrained(path)
        assert torch.equal(logits(realigned(plain.eval()), IDS), expected)
    else:
        with pytest.raises(ValueError, match=f"hf_posext plan .{method}: 64 -> 256 tokens.*load_patched"):
            AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("method", PLANS)
def test_plain_transformers_opens_equal_or_stops(method: str, tmp_path: Path) -> None:
    model = patched(method)
    model.save_pretrained(tmp_path)
    expected = logits(realigned(model), IDS)
    opened = load_patched(tmp_path)
    assert torch.equal(logits(realigned(opened), IDS), expected)
    config = AutoConfig.from_pretrained(tmp_path)  # as tokenizers and tools read it
    scheme = detect_scheme(config)
    assert scheme.trained_length == TRAINED and scheme.trained_length_source.startswith("the plan")
    if not PLANS[method][1]:
        for options in ({}, {"attn_implementation": "eager"}, {"config": config}):
            with pytest.raises(ValueError, match=f"hf_posext plan .{method}: 64 -> 256 tokens"):
                type(model).from_pretrained(tmp_path, **options)
        return
    plain = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(realigned(plain.eval()), IDS), expected)
    with pytest.raises(AlreadyPatchedError, match=f"carries the patch '{method}: 64 -> 256.*load_patched"):
        patch_model(plain, method, factor=4)  # a second stretch
    unpatch_model(load_patched(tmp_path)) if method != "table-linear" else None


SHIPPED: dict[str, dict[str, Any]] = {
    "default": {},
    "the limit is the trained length": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "the limit is between": {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32}
    | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}
"""By what `max_position_embeddings`, 64, stands for: shipped `rope_parameters`."""


@pytest.mark.parametrize("shipped", SHIPPED)
@pytest.mark.parametrize("method", ["yarn", "log-n", "dynamic-ntk"])
def test_undo_after_opening_gives_the_config_before_the_patch(method: str, shipped: str, tmp_path: Path) -> None:
    """The plan has no room for a limit that is not the length that a model claims."""
    model = zoo.build("llama", rope_parameters={"rope_theta": 10_000.0, "rope_type": "default", **SHIPPED[shipped]})
    model.save_pretrained(tmp_path / "plain")
    patch_model(model, method, factor=8)
    model.save_pretrained(tmp_path / "patched")
    opened = load_patched(tmp_path / "patched")
    assert opened.config.max_position_embeddings == model.config.max_position_embeddings
    unpatch_model(opened)
    before, after = (each.config.to_dict() for each in (type(model).from_pretrained(tmp_path / "plain"), opened))
    assert after | {"_name_or_path": before["_name_or_path"]} == before


@pytest.mark.parametrize("method", PLANS)
def test_undo_leaves_a_plain_config(method: str, tmp_path: Path) -> None:
    model = PLANS[method][0]()
    cls, before = type(model.config), dict(vars(model.config))
    patch = patch_model(model, method, factor=4, trained_length=TRAINED)
    assert model.config.to_dict()["posext_plan"] == patch.plan.to_dict()
    patch.undo()
    assert type(model.config) is cls and vars(model.config) == before
    model.save_pretrained(tmp_path)
    assert "posext" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("method", PLANS)
def test_a_model_built_from_the_config_is_equal_or_stopped(method: str) -> None:
    model = patched(method)
    for config in (model.config, copy.deepcopy(model.config)):
        if PLANS[method][1]:
            for copied in (config, type(config).from_dict(config.to_dict())):
                rebuilt = type(model)(copied)
                rebuilt.load_state_dict(model.state_dict())
                assert torch.equal(logits(realigned(rebuilt.eval()), IDS), logits(realigned(model), IDS))
            continue
        plain = type(PLANS[method][0]().config)
        for build in (type(model), AutoModel.from_config):
            for copied in (config, type(config).from_dict(config.to_dict()), plain(**config.to_diff_dict())):
                with pytest.raises(ValueError, match=f"hf_posext plan .{method}: 64 -> 256 tokens.*unpatched config"):
                    build(copied)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(realigned(twin), IDS), logits(realigned(model), IDS))
    unpatch_model(model)
    type(model)(model.config)


def tiny_llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny_llama().config, image_token_index=3)
    torch.manual_seed(0)
    return sharpen(LlavaForConditionalGeneration(config))  # type: ignore[return-value]


@pytest.mark.parametrize("method", ["yarn", "rerope", "dynamic-ntk", "log-n", "cope"])
def test_a_language_model_that_is_saved_alone_keeps_the_positions(method: str, tmp_path: Path) -> None:
    model = tiny_llava()
    plain = type(model.config.text_config)
    patch = patch_model(model, method, factor=4, trained_length=TRAINED)
    with torch.no_grad():
        expected = model.model.language_model(IDS).last_hidden_state
    model.model.language_model.save_pretrained(tmp_path / "alone")
    opened = realigned(load_patched(tmp_path / "alone"))
    with torch.no_grad():
        torch.testing.assert_close(opened(IDS).last_hidden_state, expected, atol=1e-5, rtol=0)  # other addresses
    unpatch_model(opened)

    built = copy.deepcopy(model.config.text_config)
    if method == "yarn":
        torch.testing.assert_close(
            AutoModel.from_pretrained(tmp_path / "alone")(IDS).last_hidden_state, expected, atol=1e-5, rtol=0
        )
        AutoModel.from_config(built)
    else:
        with pytest.raises(ValueError, match="hf_posext plan"):
            AutoModel.from_pretrained(tmp_path / "alone")
        for each in (built, type(built).from_dict(built.to_dict())):
            with pytest.raises(ValueError, match="hf_posext plan"):
                AutoModel.from_config(each)

    model.save_pretrained(tmp_path / "whole")
    saved = json.loads((tmp_path / "whole/config.json").read_text())
    assert "posext_plan" in saved and not any("plan" in key or "implementation" in key for key in saved["text_config"])
    assert "posext_plan" not in vars(model.config.vision_config)
    whole = load_patched(tmp_path / "whole")
    torch.testing.assert_close(logits(whole, IDS), logits(model, IDS), atol=1e-5, rtol=0)
    unpatch_model(whole)
    whole.model.language_model.save_pretrained(tmp_path / "undone")
    assert "posext" not in (tmp_path / "undone/config.json").read_text()
    patch.undo()
    assert type(model.config.text_config) is plain and "posext" not in model.config.to_json_string(use_diff=False)


def test_a_stack_that_is_saved_alone_stops_its_reader(tmp_path: Path) -> None:
    model = patched("bucket-linear")
    for stack in (model.encoder, model.decoder):
        stack.save_pretrained(tmp_path / type(stack).__name__)
        with pytest.raises(ValueError, match="hf_posext plan"):
            AutoModel.from_pretrained(tmp_path / type(stack).__name__)


def test_undo_of_what_was_loaded(tmp_path: Path) -> None:
    model = patched("rerope")
    model.save_pretrained(tmp_path)
    opened = load_patched(tmp_path)
    unpatch_model(opened)
    expected = logits(realigned(tiny_llama()), IDS)
    assert torch.equal(logits(realigned(opened), IDS), expected)
    assert opened.config.max_position_embeddings == TRAINED
    with patch_model(opened, "rerope", factor=2) as again:
        assert (again.plan.trained_length, again.plan.target_length) == (TRAINED, 2 * TRAINED)


def test_a_reader_without_this_package_stops(tmp_path: Path) -> None:
    patched("rerope").save_pretrained(tmp_path / "model")
    shipped_tokenizer().save_pretrained(tmp_path / "model")
    script = (
        "import sys; sys.modules['hf_posext'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline\n"
        "path = sys.argv[1]\n"
        "AutoTokenizer.from_pretrained(path)\n"
        "for opener in (AutoModelForCausalLM.from_pretrained, lambda path: pipeline('text-generation', path)):\n"
        "    try:\n        opener(path)\n"
        "    except ValueError as error:\n        print(error)\n"
    )
    stdout = run_python("-c", script, tmp_path / "model").stdout
    assert stdout.count("hf_posext plan (rerope: 64 -> 256 tokens (x4)); open the directory by") >= 2


# Adapters


def adapted(base: Path, method: str, order: str = "patch first", **options: Any) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base)
    if order == "patch first":
        patch_model(model, method, factor=4)
    peft = with_adapter(model, **options)
    if order != "patch first":
        patch_model(peft, method, factor=4)
    return peft


@pytest.mark.parametrize("order", ["patch first", "adapter first"])
@pytest.mark.parametrize("writer", [by_trainer, by_save_model, by_itself])
@pytest.mark.parametrize("method", ["yarn", "rerope"])
def test_every_writer_of_adapters_keeps_the_plan(
    method: str, writer: Callable[[Any, Path], Path], order: str, base: Path, tmp_path: Path
) -> None:
    model = adapted(base, method, order)
    path = writer(model, tmp_path / "saved")
    opened = load_adapter(path)
    assert torch.equal(logits(realigned(opened), IDS), logits(realigned(model.eval()), IDS))
    plain = AutoModelForCausalLM.from_pretrained(base)
    for opener in (
        lambda: PeftModel.from_pretrained(plain, str(path)),
        lambda: AutoPeftModelForCausalLM.from_pretrained(path),
    ):
        with pytest.raises(
            (KeyError, ValueError), match=f"LORA under hf_posext plan .{method}: 64 -> 256.*load_adapter"
        ):
            opener()
    merged = opened.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(realigned(load_patched(tmp_path / "merged")), IDS), logits(realigned(merged), IDS))


def test_native_adapter_of_transformers(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers 5.24 asks for PEFT 0.22, and the newest release is 0.21.2, which does what is needed here
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")
    from peft import LoraConfig

    from hf_posext.adapters import save_adapter

    model = AutoModelForCausalLM.from_pretrained(base)
    patch = patch_model(model, "rerope", factor=4)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "mine")
    expected = logits(realigned(model.eval()), IDS)
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        assert torch.equal(logits(realigned(load_adapter(path)), IDS), expected)
    with pytest.raises(UnsupportedModelError, match=r"save_adapter\(model, path\)\. To merge.*load_adapter"):
        patch.save_pretrained(tmp_path / "new")


def test_prompt_learning_is_refused_or_told(base: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base)
    patch_model(model, "rerope", factor=4)
    peft = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(UnsupportedModelError, match="Save by save_adapter.*KeepsPlan"):
        peft.save_pretrained(tmp_path / "lost")
    trained = trainer(peft, tmp_path / "run", callbacks=[KeepsPlan()])
    trained.train()
    opened = load_adapter(tmp_path / "run" / "checkpoint-1")
    assert torch.equal(logits(realigned(opened), IDS), logits(realigned(peft.eval()), IDS))
    assert find_patch(opened) is not None


@pytest.mark.parametrize("method", ["yarn", "ntk", "linear", "rerope"])
def test_a_trainer_goes_on_from_its_checkpoint(method: str, tmp_path: Path) -> None:
    uninterrupted, halves = patched(method), patched(method)
    trainer(uninterrupted, tmp_path / "whole", max_steps=2).train()
    trainer(halves, tmp_path / "halves", max_steps=2).train()
    again = patched(method)
    trainer(again, tmp_path / "halves", max_steps=2).train(str(tmp_path / "halves" / "checkpoint-1"))
    assert torch.equal(logits(again.eval(), IDS), logits(uninterrupted.eval(), IDS))
    config = json.loads((tmp_path / "halves" / "checkpoint-1" / "config.json").read_text())
    # transformers 4 reads what Trainer does not go on from, too, or stops at the last: reader_4.py
    assert [key in config for key in ("rope_theta", "rope_scaling", "pruned_heads")] == {
        "yarn": [False, False, True],
        "ntk": [True, False, False],
        "linear": [True, True, False],
        "rerope": [True, True, True],
    }[method]
    assert not hasattr(load_patched(tmp_path / "halves" / "checkpoint-1").config, "pruned_heads")


def test_every_directory_but_a_checkpoint_speaks_to_transformers_4(tmp_path: Path) -> None:
    model = patched("yarn")
    paths = [by_save_model(model, tmp_path / "final"), by_itself(model, tmp_path / "new"), tmp_path / "none"]
    patch_model(tiny_llama(), "none", factor=4).save_pretrained(paths[-1])
    for path in paths:
        config = json.loads((path / "config.json").read_text())
        rope = config["rope_parameters"]
        assert config["rope_theta"] == rope.pop("rope_theta")
        assert config.get("rope_scaling", {"rope_type": "default"}) == rope


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("method", ["yarn", "rerope", "table-linear"])
def test_the_best_checkpoint_is_loaded_and_alone_kept(method: str, adapter: bool, tmp_path: Path) -> None:
    PLANS[method][0]().save_pretrained(tmp_path / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    patch_model(model, method, factor=4, trained_length=TRAINED)
    if adapter:
        model = with_adapter(model, target_modules="all-linear")
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    best = trainer(model, tmp_path / "run", max_steps=3, callbacks=[WorseAfter(2)], **options)
    best.train()
    checkpoints = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert best.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")
    assert checkpoints == ["checkpoint-2"]
    opened = (load_adapter if adapter else load_patched)(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(realigned(opened), IDS), logits(realigned(model.eval()), IDS))


class WorseAfter(TrainerCallback):
    """Evaluations that report a loss which falls up to a step, and rises from there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics["eval_loss"] = float(abs(state.global_step - self.step))


@pytest.mark.parametrize("method", ["yarn", "rerope", "table-linear", "alibi-linear"])
def test_a_directory_that_was_copied_in_part_opens_equal_or_names_the_file(method: str, tmp_path: Path) -> None:
    model = patched(method)
    patch = find_patch(model)
    assert patch is not None
    patch.save_pretrained(tmp_path / "whole")
    expected = logits(realigned(model), IDS)
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    for file, cut in itertools.product(files, (False, True)):
        shutil.copytree(tmp_path / "whole", tmp_path / "part")
        path = tmp_path / "part" / file
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) if cut else path.unlink()
        if not cut and file.name in ("generation_config.json", "posext_plan.json", "tables.safetensors"):
            # the config contains the plan, too; without the table, undo is refused
            assert torch.equal(logits(realigned(load_patched(tmp_path / "part")), IDS), expected)
        else:
            with pytest.raises((CheckpointError, PlanError), match=f"{file.name}|no weights|missing or incomplete"):
                load_patched(tmp_path / "part")
        shutil.rmtree(tmp_path / "part")
    (tmp_path / "whole").rename(tmp_path / "checkpoint-7")
    assert torch.equal(logits(realigned(load_patched(tmp_path / "checkpoint-7")), IDS), expected)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard = sorted(by_shards(patched("rerope"), tmp_path).glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"missing or incomplete: .*{shard.name}"):
        load_patched(tmp_path)


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    for method, other_method in (("yarn", "rerope"), ("rerope", "yarn"), ("rerope", "table-linear")):
        patched(method).save_pretrained(tmp_path / method)
        find_patch(patched(other_method)).plan.save(tmp_path / method)  # type: ignore[union-attr]
        with pytest.raises(PlanMismatchError, match="contains two plans|is for gpt2"):
            load_patched(tmp_path / method)
    find_patch(patched("rerope")).save_pretrained(tmp_path / "over")  # type: ignore[union-attr]
    tiny_llama().save_pretrained(tmp_path / "over")
    with pytest.raises(PlanMismatchError, match="model without a patch was saved there later. Remove the file"):
        load_patched(tmp_path / "over")


@pytest.mark.parametrize(("adapter", "callbacks"), [(False, ()), (True, ()), (False, (KeepsPlan,))])
def test_a_run_is_not_resumed_under_another_plan(adapter: bool, callbacks: tuple[Any, ...], tmp_path: Path) -> None:
    def model(method: str | None = None, factor: int = 4) -> Any:
        network: Any = tiny_llama()
        if method is not None:
            patch_model(network, method, factor=factor)
        return with_adapter(network) if adapter else network

    def run(network: Any, name: str, **options: Any) -> None:
        again = trainer(network, tmp_path / name, callbacks=[callback() for callback in callbacks], **options)
        again.train(resume_from_checkpoint="max_steps" in options)

    for name, first in (("yarn", model("yarn")), ("rerope", model("rerope")), ("plain", model())):
        run(first, name)
    refused = [
        ("yarn", model("yarn", 2), "the plan .yarn: 64 -> 256.*checkpoint-1 .*got yarn: 64 -> 128"),
        ("yarn", model("rerope"), "the plan .yarn: .*got rerope"),
        ("yarn", model("none"), "the plan .yarn: .*got a model without a patch"),
        ("rerope", model("yarn"), "the plan .rerope: .*got yarn"),
        ("plain", model("yarn"), "a model without a patch, .*got yarn"),
    ]
    if callbacks:  # nothing of this package is on such a model
        refused.append(("yarn", model(), "the plan .yarn: .*got a model without a patch"))
    for name, network, message in refused:
        with pytest.raises(TrainingError, match=f"Expected {message}.*Patch the model as before"):
            run(network, name, max_steps=2)
    for name, network in (("yarn", model("yarn")), ("rerope", model("rerope")), ("plain", model("none"))):
        run(network, name, max_steps=2)
    unpatched = model("yarn", 2)
    unpatch_model(unpatched)
    unpatched.load_state_dict(model("rerope").state_dict())  # by nobody who resumes


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_on_a_config_that_gives_the_positions_is_resumed(adapter: bool, tmp_path: Path) -> None:
    patched("yarn").save_pretrained(tmp_path / "native")
    results = []
    for steps in ((2,), (1, 2)):
        for max_steps in steps:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
            model = with_adapter(model) if adapter else model
            run = trainer(
                model, tmp_path / f"run-{len(steps)}", max_steps, [KeepsPlan()], lr_scheduler_type="constant"
            )
            run.train(resume_from_checkpoint=max_steps == 2 and len(steps) == 2)
        results.append(logits(model.eval(), IDS))
    assert torch.equal(*results)


@pytest.mark.parametrize("method", PLANS)
def test_pickles_and_weights_alone(method: str, tmp_path: Path) -> None:
    model = patched(method)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    expected = logits(realigned(model), IDS)
    torch.save(model, tmp_path / "model.pt")
    opened = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(realigned(opened), IDS), expected)
    unpatch_model(opened)
    save_model(model, str(tmp_path / "weights.safetensors"))
    opened_weights = patched(method)
    load_model(opened_weights, str(tmp_path / "weights.safetensors"))
    assert torch.equal(logits(realigned(opened_weights), IDS), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "auto"])
@pytest.mark.parametrize("method", ["yarn", "table-linear", "alibi-linear", "dynamic-ntk"])
def test_half_precision_is_kept(method: str, dtype: Any, tmp_path: Path) -> None:
    model = patched(method).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    opened = load_patched(tmp_path, dtype=dtype)
    assert opened.dtype == torch.bfloat16
    assert torch.equal(logits(realigned(opened), IDS), logits(realigned(model), IDS))


@pytest.mark.parametrize("method", ["yarn", "rerope", "table-linear", "alibi-linear"])
def test_adapters_that_are_mixed_and_switched(method: str, tmp_path: Path) -> None:
    PLANS[method][0]().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    patch_model(base, method, factor=4, trained_length=TRAINED)
    options: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = with_adapter(base, **options)
    model.add_adapter("second", LoraConfig(r=4, **options))
    model.add_weighted_adapter(["default", "second"], [0.5, 0.7], "mix", combination_type="linear")
    expected = {}
    for name in ("default", "second", "mix"):
        model.set_adapter(name)
        expected[name] = logits(realigned(model.eval()), IDS)
        assert torch.equal(logits(realigned(load_adapter(save_adapter(model, tmp_path / name))), IDS), expected[name])
    opened = load_adapter(tmp_path / "default")
    load_adapter(tmp_path / "second", opened, adapter_name="second")
    opened.add_weighted_adapter(["default", "second"], [0.5, 0.7], "mix", combination_type="linear")
    for name, trained in expected.items():
        opened.set_adapter(name)
        assert torch.equal(logits(realigned(opened), IDS), trained)
    merged = opened.merge_and_unload(adapter_names=["mix"])
    # one product of matrices instead of three, in float32
    torch.testing.assert_close(logits(merged, IDS), expected["mix"], atol=5e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(realigned(load_patched(tmp_path / "merged")), IDS), logits(realigned(merged), IDS))
