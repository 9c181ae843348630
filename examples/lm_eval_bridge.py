"""Tasks of lm-evaluation-harness on a model, as it is and patched; `pip install 'hf_posext[lm-eval]'` first.

python examples/lm_eval_bridge.py --limit 1
python examples/lm_eval_bridge.py --tasks niah_single_1 ruler_vt --ruler-lengths 1024 --max-length 1024 --limit 5
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import patch_model

HERE = Path(__file__).resolve().parent


def evaluate(model: Any, tokenizer: Any, tasks: list[str], manager: TaskManager, options: Any) -> dict[str, Any]:
    """Return the results of lm-eval by task, for the model in its present state."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=options.max_length, batch_size=1)
    output = simple_evaluate(model=lm, tasks=tasks, task_manager=manager, limit=options.limit, bootstrap_iters=0)
    results: dict[str, Any] = output["results"]
    return results


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Evaluate without and with the patch, and print both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(HERE / "tiny" / "tiny-rope"), help="Hub id or folder")
    parser.add_argument("--method", default="yarn")
    parser.add_argument("--factor", type=float, default=8)
    parser.add_argument("--max-length", type=int, default=4096, help="tokens of a window, with and without the patch")
    parser.add_argument("--tasks", nargs="+", default=["heldout_novels"])
    parser.add_argument("--include-path", default=HERE / "lm_eval_tasks", type=Path, help="folder of task YAML files")
    parser.add_argument("--ruler-lengths", type=int, nargs="+", help="tokens of RULER's prompts; with its tasks only")
    parser.add_argument("--limit", type=int, help="documents of each task; all by default")
    options = parser.parse_args(arguments)
    if Path(options.model).exists():
        options.model = str(Path(options.model).resolve())

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # RULER writes its prompts to the token, with the tokenizer of the model
    ruler = {"max_seq_lengths": options.ruler_lengths, "tokenizer": options.model} if options.ruler_lengths else None
    folder = str(options.include_path.resolve())
    with chdir(HERE.parent):  # the shipped task names its data file relative to the root of the repository
        manager = TaskManager(include_path=folder, include_defaults=ruler is not None, metadata=ruler)
        run = (tokenizer, options.tasks, manager, options)
        results = {"none": evaluate(model, *run)}
        with patch_model(model, options.method, factor=options.factor, tokenizer=tokenizer):
            results[options.method] = evaluate(model, *run)
    print(json.dumps(results, indent=1, default=str))
    return results


if __name__ == "__main__":
    main()
