"""Help of the command line: commands in the order of use, options in groups, and three commands to begin with."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

COMMANDS = {
    "inspect": "Show how a model encodes position, and which methods apply.",
    "methods": "List the methods, with the paper of each.",
    "explain": "Draw what a model does past its trained length, and why.",
    "compare": "Measure a model under several methods, and write a report.",
    "evaluate": "Measure one model as it is, and write a report.",
    "recommend": "Find the method that reads a length best.",
    "search": "Search a factor for every rotary pair, as LongRoPE does.",
    "finetune": "Train a patched model on long texts.",
    "export": "Write a patched model for transformers or a server.",
    "gguf": "Give a GGUF file the positions of a plan.",
    "report": "Merge the results of several runs into one report.",
    "card": "Write the model card of an extended model.",
    "app": "Open a page to play with, on this machine alone.",
    "env": "Print versions, devices, and the plan of a model.",
}
"""Summary of each command, in the order of use."""

GROUPS = {
    "Input and output": "model dataset output text_column split revision documents start control label plot "
    "as_json log_with report_to resume config trust_remote_code",
    "Positions": "methods method factor target_length trained_length original_length",
    "Training": "preset learning_rate rank lora_ratio targets length steps batch_size accumulation warmup pack pose "
    "shifted longce finetune.alpha gradient_checkpointing load_in_4bit save_every",
    "Measuring": "lengths protocol stride tail bos passkey retrieval tasks depths chat longppl alpha beta "
    "short_length budget short_limit objective population generations evaluate evaluate_split every patience",
    "Machine and memory": "dtype bf16 device prefill_chunk offload_cache seed",
}
"""Parameters under each heading. One that means something else in another command carries its name, with a dot."""

_HEADINGS = {name: heading for heading, names in GROUPS.items() for name in names.split()}

GREETING = """\
hf-posext changes how a transformers model encodes position, and measures what that did.

Three commands to begin with; a model is a folder or a Hub id:

  hf-posext inspect HuggingFaceTB/SmolLM2-135M
  hf-posext explain HuggingFaceTB/SmolLM2-135M
  hf-posext compare --model HuggingFaceTB/SmolLM2-135M --dataset FOLDER_OF_TXT \\
      --methods none,yarn --factor 4 --lengths 2048,8192 --output report

All commands: hf-posext --help"""


def heading_of(command: str, parameter: str) -> str:
    """Return the heading under which the help of a command lists a parameter."""
    return _HEADINGS.get(f"{command}.{parameter}", _HEADINGS.get(parameter, "Options"))


class Command(TyperCommand):
    """A command whose help lists its options under headings, where there are more than a screen can hold."""

    ENOUGH = 12
    """Options; fewer stand under one heading."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        options = [param for param in self.get_params(ctx) if param.param_type_name == "option"]
        if len(options) < self.ENOUGH:
            super().format_options(ctx, formatter)
            return
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{heading: [] for heading in GROUPS}}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                is_option = param.param_type_name == "option"
                heading = heading_of(str(self.name), str(param.name)) if is_option else "Arguments"
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class Commands(TyperGroup):
    """The commands, in the order of use."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        return [*(name for name in COMMANDS if name in names), *(name for name in names if name not in COMMANDS)]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS.get(name, "")) for name in self.list_commands(ctx)])
