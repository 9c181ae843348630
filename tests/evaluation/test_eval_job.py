"""The examples of jobs: accelerate reads the configurations, and the job finds the same on one and two processes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from hf_posext import Results

from ..conftest import EXAMPLES
from ..helpers import TWO_PROCESSES, run_python

CONFIGS = {
    "one_gpu": {"distributed_type": "NO", "num_processes": 1},
    "multi_gpu": {"distributed_type": "MULTI_GPU", "num_processes": 4},
    "two_nodes": {"distributed_type": "MULTI_GPU", "num_processes": 16, "num_machines": 2},
    "fsdp2_cp": {"distributed_type": "FSDP", "num_processes": 4},
}
FOLDER = EXAMPLES / "accelerate_configs"


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_configurations(name: str) -> None:
    file = str(FOLDER / f"{name}.yaml")
    results = load_config_from_file(file).to_dict()
    assert {key: results[key] for key in CONFIGS[name]} == CONFIGS[name]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", file, "job.py"]))
    assert arguments.mixed_precision == "no", "the weights' type is what --dtype says"
    assert arguments.multi_gpu is (results["distributed_type"] == "MULTI_GPU")
    assert arguments.num_processes == results["num_processes"]


def test_context_parallelism_takes_all_processes() -> None:
    file = str(FOLDER / "fsdp2_cp.yaml")
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", file, "job.py"]))
    assert arguments.use_fsdp and arguments.use_parallelism_config and str(arguments.fsdp_version) == "2"
    assert arguments.parallelism_config_cp_size == arguments.num_processes


def run(*words: object) -> str:
    return run_python(*words, ACCELERATE_USE_CPU="true").stdout


def test_the_job_finds_the_same_on_one_and_two_processes(tmp_path: Path) -> None:
    job = [EXAMPLES / "eval_job.py", "--documents", 3, "--methods", "none", "linear", "--lengths", 64, 128, "--output"]
    results: list[Results] = []
    launches: list[tuple[str, list[Any]]] = [("1", []), ("2", TWO_PROCESSES)]
    for count, launcher in launches:
        output = run(*launcher, *job, tmp_path / count)
        assert output.splitlines()[-1] == f"{count} processes; report: {tmp_path / count / 'README.md'}"
        results.append(Results.load_json(tmp_path / count / "results.json"))
    assert (tmp_path / "2" / "journal-1.jsonl").exists() and not (tmp_path / "1" / "journal-1.jsonl").exists()
    assert results[0].rows == results[1].rows and results[0].per_document == results[1].per_document


def test_the_slurm_script_is_a_shell_script() -> None:
    script = EXAMPLES / "slurm_eval.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "examples/accelerate_configs/two_nodes.yaml" in text and "--resume" in text
