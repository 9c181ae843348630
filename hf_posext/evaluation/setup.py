"""Setup of a measurement, and the identity that binds a journal to it.

Settings and plans are checked first, and only then are documents read and tokenized.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from ..errors import InvalidParameterError, MethodNotApplicableError, NoEffectError, UnsupportedModelError
from ..methods import Method, as_method, list_methods
from ..methods.text import by_reason
from ..packages import machine, versions_of
from ..patching import patch_model
from ..patching.detect import model_kind
from ..patching.effect import refuse_idle_components
from ..patching.frequencies import forget_length
from ..plan import ExtensionPlan
from ..processes import everywhere, processes_of, shares_texts
from ..scheme import PositionalScheme
from .config import EvaluationConfig
from .documents import Document, Documents, as_documents
from .forwards import check_positions, prefill_obstacle
from .protocols import DECODER_PROTOCOLS, protocol_for
from .questions import Questions, check_questions
from .reading import portable
from .rows import Conditions
from .scorer import Memory, autocast_dtype, model_name
from .tokens import TokenizedDocuments, check_lengths, check_vocabulary, tokenize_documents
from .windows import PerplexityProtocol, is_legacy

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Requested measurement, checked against the model's config. Lengths are ascending."""

    config: EvaluationConfig
    scheme: PositionalScheme
    lengths: list[int]
    protocol: PerplexityProtocol
    memory: Memory
    questions: Questions
    accelerator: Accelerator | None = None


def check_request(
    config: EvaluationConfig, scheme: PositionalScheme, model: nn.Module | PreTrainedConfig,
    accelerator: Accelerator | None = None,
) -> Request:  # fmt: skip
    """Check all settings that require neither weights nor documents, and return the request."""
    lengths = check_lengths(config.lengths)
    kind, name = model_kind(model)
    protocol = protocol_for(config.protocol, kind, name, lengths, stride=config.stride, tail=config.tail)
    if config.bos != "auto" and protocol.name not in DECODER_PROTOCOLS:
        raise InvalidParameterError(
            f"Expected bos to be 'auto' for protocol {protocol.name!r}, which puts all special tokens of the "
            f"tokenizer around each text, got {config.bos!r}. Leave it out."
        )
    if config.offload_cache and config.prefill_chunk is None:
        raise InvalidParameterError(
            "Expected prefill_chunk with offload_cache, since there is no cache without chunks, got none. Pass "
            "prefill_chunk=2048, too."
        )
    memory = Memory(config.prefill_chunk, config.offload_cache, accelerator if shares_texts(accelerator) else None)
    for setting, count in (("passkey", config.passkey), ("retrieval", config.retrieval)):
        if count and protocol.name not in DECODER_PROTOCOLS:
            raise InvalidParameterError(
                f"Expected {setting} to be 0, as {name} does not continue a text as a decoder does, got {count}. Pass "
                f"{setting}=0."
            )
        if count and memory.accelerator is not None:
            raise InvalidParameterError(
                f"Expected {setting} to be 0, as a model spread over processes by cp_size does not generate, got "
                f"{count}. Pass {setting}=0, and ask in a run without cp_size."
            )
    for setting, values in (("tasks", config.tasks), ("depths", config.depths)):
        if values is not None and not config.retrieval:
            raise InvalidParameterError(
                f"Expected retrieval to be 1 or more with {setting}={list(values)}, got 0. Pass retrieval=4, too."
            )
    if config.chat and not (config.passkey or config.retrieval):
        raise InvalidParameterError(
            "Expected passkey or retrieval with chat, got neither. Pass passkey=4 or retrieval=4 too, or leave chat "
            "out."
        )
    rules: dict[str, Any] = {name: getattr(config, name) for name in ("passkey", "seed", "bos", "chat")}
    questions = Questions(**rules)
    if config.retrieval:
        questions = check_questions(config.retrieval, config.tasks, config.depths, **rules)
    return Request(
        config=config, scheme=scheme, lengths=lengths, protocol=protocol, memory=memory, questions=questions,
        accelerator=accelerator,
    )  # fmt: skip


Refusals = dict[str, str]
"""Reasons why methods are left out, by label."""


def plan_comparison(request: Request, methods: Sequence[str | Method]) -> tuple[list[ExtensionPlan], Refusals]:
    """Return the plans of the applicable methods, `none` first, and the reasons why the rest do not apply.

    Every plan is checked against the lengths.

    Raises:
        UnknownMethodError: an unknown method.
        InvalidParameterError: no methods, a method twice at the same factor, or invalid parameters or lengths.
        MethodNotApplicableError: some methods do not apply, and no method other than `none` does.
    """
    if not methods:
        raise InvalidParameterError("Expected methods, got none. Pass a list, as in methods=['none', 'yarn'].")
    config, scheme = request.config, request.scheme
    lengths = {name: getattr(config, name) for name in ("factor", "target_length", "trained_length")}
    plans: list[ExtensionPlan] = []
    refusals: Refusals = {}
    for method in map(as_method, methods):
        reason = method.applies_to(scheme)
        if reason is None:
            # the factor of a comparison is meant for the methods that contain none
            plans.append(method.plan(scheme, **lengths | ({} if method.factor is None else {"factor": None})))
        else:
            refusals[method.label] = reason
    labels = [(plan.method, f"{plan.factor:g}") for plan in plans]  # as in tables and pictures
    for label, times in labels:
        if labels.count((label, times)) > 1:
            raise InvalidParameterError(
                f"Expected each method once, as label and factor tell rows apart, got {label!r} at factor {times} "
                "more than once. Pass it once."
            )
    _require_one(scheme, plans, refusals)
    for plan in plans:
        check_reads(request, plan)
    return sorted(plans, key=lambda plan: not plan.changes_nothing), refusals


def check_reads(request: Request, plan: ExtensionPlan | None) -> None:
    """Check that the model under a plan can read the requested lengths, in chunks if requested."""
    longest, chunk = request.lengths[-1], request.config.prefill_chunk
    check_positions(request.scheme, plan, longest)
    obstacle = prefill_obstacle(request.scheme, plan)
    if chunk is not None and chunk < longest and obstacle is not None:
        raise InvalidParameterError(
            f"Expected prefill_chunk to be left out, since {obstacle} and chunks would give other values, got {chunk} "
            f"for texts of {longest} tokens. Drop it, or that method."
        )


def try_plans(model: nn.Module, plans: Sequence[ExtensionPlan], refusals: Refusals) -> list[ExtensionPlan]:
    """Return the plans that the model accepts, after applying and undoing each once so that failures come early.

    The reasons for the remaining plans are added to `refusals`. One other than `none` must be left.
    """
    accepted = []
    for plan in plans:
        try:
            with patch_model(model, plan):
                refuse_idle_components(model, plan)
        except (UnsupportedModelError, NoEffectError) as error:
            refusals[plan.method] = f"cannot be patched: {error}"
        else:
            accepted.append(plan)
    if plans:
        _require_one(plans[0].scheme, accepted, refusals)
    for reason, names in by_reason(refusals).items():
        logger.warning("left out: %s (%s)", ", ".join(names), reason)
    return accepted


def _require_one(scheme: PositionalScheme, plans: Sequence[ExtensionPlan], refusals: Refusals) -> None:
    if not refusals or any(not plan.changes_nothing for plan in plans):
        return
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason(refusals).items())
    usable = [info.name for info in list_methods(scheme.kind)]
    rest = f"only {plans[0].method}" if plans else "none"
    advice = "another model" if scheme.obstacle else f"methods for {scheme.kind} positions: {', '.join(usable)}"
    raise MethodNotApplicableError(f"Expected methods that apply, got {rest}: {reasons}. Pass {advice}.")


@dataclass(frozen=True, kw_only=True)
class Setup(Request):
    """Checked request with its model and documents, ready to be measured.

    `scorer` is the model's scorer for the protocol. `documents` are rows of the first `max(lengths)` tokens of
    `texts`, arranged by the protocol. Every row of the results contains the `conditions`.
    """

    scorer: Any
    tokenizer: Any
    texts: Sequence[Document]
    documents: TokenizedDocuments
    conditions: Conditions
    provenance: dict[str, Any]

    def scorer_of(self, model: nn.Module) -> Any:
        """Return a scorer of the same tokens for another model, whose vocabulary must contain them."""
        scorer = self.protocol.scorer(model, self.tokenizer, self.memory)
        check_vocabulary(scorer.model, self.documents.tokens)
        return scorer


def prepare(request: Request, model: nn.Module, tokenizer: Any, documents: Any) -> Setup:
    """Return the setup of a checked request, after loading and tokenizing its documents."""
    config, lengths, protocol = request.config, request.lengths, request.protocol
    request.questions.check(tokenizer, lengths)
    scorer = protocol.scorer(model, tokenizer, request.memory)
    texts = as_documents(documents)
    tokenized = tokenize_documents(texts, tokenizer, lengths[-1], config.start, config.bos)
    if request.protocol.name in DECODER_PROTOCOLS and lengths[0] <= tokenized.bos:
        raise InvalidParameterError(
            f"Expected lengths to be above {tokenized.bos}, the special tokens before each text, got {lengths[0]}. "
            "Pass longer ones."
        )
    check_vocabulary(scorer.model, tokenized.tokens)
    arranged = protocol.arrange(tokenized)
    dtypes = filter(None, (scorer.model.dtype, autocast_dtype(scorer.model)))
    dtype = ", autocast to ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    conditions = Conditions.of(protocol, tokenized, dtype)
    source = texts.source if isinstance(texts, Documents) else {"dataset": None, "split": None, "revision": None}
    scheme, device = request.scheme, str(scorer.model.device)
    provenance = {
        "versions": {**versions_of("hf_posext", "transformers", "torch"), "python": platform.python_version()},
        "machine": machine(),
        "model": model_name(scorer.model),
        "model_type": scheme.model_type,
        "kind": scheme.kind,
        "generalization": scheme.generalization,
        "trust_remote_code": any(map(is_remote, (scorer.model, tokenizer))),
        "dtype": conditions.dtype,
        "device": device,
        "processes": processes_of(request.accelerator),
        "devices": everywhere(lambda: device, request.accelerator),
        **source,
        "dataset": source["dataset"] and portable(source["dataset"]),
        **config.settings(),
        **request.questions.facts,
        "protocol": protocol.name,
        "legacy": is_legacy(protocol.name),
        "lengths": lengths,
        "bos": conditions.bos,
        "trained_length": scheme.trained_length,
        "shipped_length": scheme.shipped_length,
        "documents": [
            {"document": id, "tokens": count} for id, count in zip(tokenized.ids, tokenized.counts, strict=True)
        ],
        "left_out": tokenized.left_out,
        "command": shlex.join([Path(sys.argv[0]).name, *map(portable, sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return Setup(
        **vars(request), scorer=scorer, tokenizer=tokenizer, texts=texts, documents=arranged, conditions=conditions,
        provenance=provenance,
    )  # fmt: skip


def is_remote(instance: Any) -> bool:
    """Return `True` if the class of a model or tokenizer is code of a checkpoint, not of a package."""
    return type(instance).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)


SAMPLES = 32
"""Number of values of each tensor in a fingerprint, in addition to the sum, which does not depend on their order."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype with as many bits as a value, by the value's size in bytes."""


def run_identity(
    setup: Setup, models: Sequence[Any], plans: Sequence[ExtensionPlan | None], **dependencies: Any
) -> dict[str, Any]:
    """Return everything that the measurements of a run depend on.

    Options that save memory are not included. They change only the rounding, and a run that was killed for lack of
    memory can then continue with smaller chunks.
    """
    config, versions = setup.config, dict(setup.provenance["versions"])
    return {
        "versions": {name: versions[name] for name in ("hf_posext", "torch", "transformers")},
        "models": [
            {
                "model": model_name(model),
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": model.device.type,
                "autocast": (dtype := autocast_dtype(model)) and str(dtype).removeprefix("torch."),
                "matmul": torch.get_float32_matmul_precision(),
                "attention": getattr(model.config, "_attn_implementation", None),
                "config": _config(model),
                "weights": weights_fingerprint(model),
            }
            for model in models
        ],
        "plans": [None if plan is None else plan.to_dict() for plan in plans],
        "lengths": setup.lengths,
        "protocol": setup.protocol.name,
        "stride": config.stride,
        "tail": config.tail,
        "start": config.start,
        "seed": config.seed,
        "tokens": tokens_fingerprint(setup.documents),
        **dependencies,
    }


def tokens_fingerprint(documents: TokenizedDocuments) -> str:
    """Return a fingerprint of the ids, tokens, and bytes of all documents, in order."""
    digest = hashlib.sha256(repr((documents.ids, documents.bos, tuple(documents.tokens.shape))).encode())
    for table in (documents.tokens, documents.byte_ends):
        digest.update(b"" if table is None else table.numpy().tobytes())
    return digest.hexdigest()


def _config(model: Any) -> dict[str, Any]:
    """Return a model's config, including quantisation, without its path and the version of transformers."""
    config = json.loads(json.dumps(model.config.to_dict(), default=str))
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """Return a fingerprint of a model's numbers: each tensor by name, shape, dtype, and values, and plain floats.

    Tensors are parameters, buffers (even if they are not saved), and everything else that quantised layers save. Plain
    floats are the attributes of modules, such as epsilons or the scaling of an adapter. The active adapters count too.
    If weights are sharded, every process has to call this function.
    """
    forget_length(model)  # the buffers of a dynamic rotary module depend on what was read
    tensors = dict(model.named_parameters()) | dict(model.named_buffers(remove_duplicate=False)) | model.state_dict()
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, torch.Tensor):
            _add(digest, name, tensor)
    for name, module in model.named_modules():
        numbers = sorted((key, value) for key, value in vars(module).items() if _is_numeric(value))
        digest.update(repr((name, numbers, _adapters_of(module))).encode())
    return digest.hexdigest()


def _is_numeric(value: Any) -> bool:
    """Return `True` for a float or a dictionary of floats. Integers are excluded, because some of them count calls."""
    values = value.values() if isinstance(value, dict) else [value]
    return bool(values) and all(isinstance(item, float) for item in values)


def _adapters_of(module: nn.Module) -> list[Any]:
    """Return the active adapters of a layer, and whether all are disabled; empty for a layer without adapters."""
    states = [getattr(module, name, None) for name in ("active_adapters", "disable_adapters")]
    return [state for state in states if state is not None and not callable(state)]  # a whole model has methods


def _add(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    elif is_traceable_wrapper_subclass(tensor):  # quantised by torchao: the numbers are in the inner tensors
        for part in tensor.__tensor_flatten__()[0]:
            _add(digest, f"{name}.{part}", getattr(tensor, part))
        return
    if tensor.numel() and not tensor.is_meta:  # offloaded weights have no values to read
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        # Integer sums do not depend on the order of summation. The sampled values record the order of the tensor.
        bits = values.view(BITS[values.element_size()]).reshape(-1)
        places = torch.arange(SAMPLES, device=bits.device) * (bits.numel() - 1) // (SAMPLES - 1)
        digest.update(torch.cat([bits[places].long(), bits.sum(dtype=torch.int64)[None]]).cpu().numpy().tobytes())
