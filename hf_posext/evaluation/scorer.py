"""Exact negative log-likelihood of every token, in memory that does not grow with the vocabulary.

A naive loop holds several copies of logits of shape `(length, vocabulary)`: 168 GB at 128k tokens of Llama-3. Here the
trunk (everything below the head) runs once, in chunks if requested. The head runs on slices of its hidden states.

Several processes can share each text by ring attention: PyTorch's `context_parallel`, which `accelerate` sets up with
FSDP2 (`ParallelismConfig(cp_size=...)`). It permutes tokens: the index that travels with a token identifies it, not
its position on the process.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from ..errors import InvalidParameterError, NonFiniteError, UnsupportedModelError
from ..patching import find_patch, unwrap
from ..patching.frequencies import forget_length
from .forwards import PROBE_LENGTH, Head, Prefill, Room, deviation, find_head
from .reading import portable

if TYPE_CHECKING:
    from accelerate import Accelerator

LISTENER: ContextVar[Callable[[int], object] | None] = ContextVar("tokens", default=None)
"""Function of this thread that is called with the token count of each finished forward."""


def tokens_read(count: int) -> None:
    """Call the listener of this thread, if any, with the number of tokens a model has read."""
    listener = LISTENER.get()
    if listener is not None:
        listener(count)


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""Numeric component of a module path."""

COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of the weights checked for non-finite values. Quantized weights cannot be checked, or are always finite."""

DAMAGED = "weights that are not finite themselves"
"""Prefix of a culprit that neither another dtype nor another factor would fix."""


class Scorer:
    """Base class of scorers. `model` is the model without wrappers.

    After a non-finite value, `culprit` returns the layers that produced the latest one.
    """

    model: Any
    culprit: Callable[[], str] | None = None

    def look_at(self, nll: torch.Tensor, run: Callable[[int], object]) -> None:
        """Set `culprit` if values `(rows, ...)` are not all finite. `run` runs the model again on one row."""
        bad = (~torch.isfinite(nll)).flatten(1).any(1).nonzero()
        if len(bad):
            self.culprit = functools.partial(first_not_finite, self.model, functools.partial(run, int(bad[0])))


@torch.no_grad()
def first_not_finite(model: nn.Module, run: Callable[[], object]) -> str:
    """Return the name of the first module with a non-finite output when the model runs again.

    Non-finite weights are reported before any module. Layers of a stack share one name, as in
    `model.layers.*.mlp.down_proj (first in layer 3)`.
    """
    weights = ((name, weight) for name, weight in model.named_parameters() if weight.dtype in COMPUTED)
    damaged = next((name for name, weight in weights if not bool(torch.isfinite(weight).all())), None)
    if damaged is not None:
        return f"{DAMAGED}: {family(damaged)}"
    culprits: list[str] = []

    def look(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = (part for part in tree_leaves(output) if isinstance(part, torch.Tensor))
            if not culprits and not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                culprits.append(path)

        return hook

    handles = [module.register_forward_hook(look(path)) for path, module in model.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return family(culprits[0]) if culprits else "no module when it was run again"


def family(path: str) -> str:
    """Return a module path with its layer number replaced by `*`, followed by that number."""
    numbers = _NUMBER.findall(path)
    if not numbers:
        return path or "what the model does after its head"
    return f"{_NUMBER.sub('*', path)} (first in layer {'.'.join(numbers)})"


LOGITS_ROWS = 512
"""Most rows of logits in memory at once. With fewer, reading the head's weights dominates. More are no faster."""

LOGITS_BYTES = 192 * 2**20
"""Most bytes of these rows in float32. It limits a vocabulary of 128,256 to 392 rows, which are as fast as 512."""

CACHED_BYTES = 2**20
"""Bytes of float32 logits whose softmax stays in a CPU's cache."""

BATCH_TOKENS = 16_384
"""Most tokens per forward when windows of equal shape are batched."""


class Memory(NamedTuple):
    """Options that save memory on long texts.

    Args:
        prefill_chunk (`int`, *optional*): tokens per forward, with all earlier tokens in a KV cache. By default a text
            is read in one forward.
        offload_cache (`bool`, *optional*, defaults to `False`): keep the cache in main memory, except for the current
            layer and the next. Requires a CUDA device.
        accelerator (`Accelerator`, *optional*): accelerator whose processes share each text by context parallelism.
    """

    prefill_chunk: int | None = None
    offload_cache: bool = False
    accelerator: Accelerator | None = None


WHOLE = Memory()
"""Default options: each text is read in one forward."""


class TokenScorer(Scorer):
    """Scorer of tokens for a causal language model, for the duration of a measurement.

    On first use it checks on a prefix of 16 tokens that the model is causal, and that slices reproduce the logits of a
    full forward. If slices do not, it logs a warning and keeps full logits from then on. Chunks are checked in the
    same way for each patch. A model with other logits in chunks is refused.

    If memory runs out, it retries with half as many rows of logits, windows per batch, or tokens per chunk, logs that,
    and keeps the smaller amount. Values are the same up to rounding. Models without a causal language-model loss are
    refused.
    """

    def __init__(self, model: nn.Module, memory: Memory = WHOLE) -> None:
        self.model = scored_model(model)
        name = type(self.model).__name__
        if getattr(self.model.config, "is_encoder_decoder", False) or not self.model.can_generate():
            raise UnsupportedModelError(
                f"Expected a causal language model, got {name}, which has no perplexity. Load a decoder with "
                "AutoModelForCausalLM.from_pretrained(...)."
            )
        self._prefill = Prefill(self.model, memory.prefill_chunk, memory.offload_cache)
        self._windows = Room("windows in a batch", sys.maxsize)
        self._head: Head | None = None

    @torch.no_grad()
    def token_nll(self, input_ids: torch.Tensor, first: int = 1, last_read: bool = True) -> torch.Tensor:
        """Return the NLL of each token given all earlier tokens of its row, independent of earlier calls.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): rows without padding.
            first (`int`, *optional*, defaults to 1): index of the first token to score.
            last_read (`bool`, *optional*, defaults to `True`): whether the model reads the last token, although
                no token after it is scored. It matters if positions depend on the input length, or if a position
                table ends.

        Returns:
            `torch.FloatTensor` of shape `(batch, length - first)`, float32 on the CPU, in nats. A non-finite value
            means non-finite logits.

        Raises:
            OutOfMemoryError: not even the shortest chunk of one row fits.
            UnsupportedModelError: the model is not causal, or returns other logits in chunks.
        """
        input_ids = input_ids.to(self.model.device)
        if self._head is None:
            self._find_head(input_ids[:1, :PROBE_LENGTH])
        nll = torch.empty(len(input_ids), input_ids.shape[1] - first, dtype=torch.float32, device="cpu")

        # If memory runs out, batches get fewer rows. If a single row does not fit, chunks get shorter.
        def shorten(reason: str) -> None:
            self._prefill.shorten(input_ids[:1], reason)

        for part in self._windows.parts(range(len(input_ids)), cost=input_ids.shape[1], otherwise=shorten):
            with part:
                nll[part.items] = self._nll(input_ids[part.items], first, last_read)
        self.look_at(nll, lambda row: self._nll(input_ids[row : row + 1], first, last_read))
        return nll

    def _nll(self, input_ids: torch.Tensor, first: int, last_read: bool) -> torch.Tensor:
        """Return the NLL of a batch of rows, read chunk by chunk."""
        assert self._head is not None
        targets = input_ids[:, 1:]
        forget_length(self.model)
        # Not a list of pieces: pieces would be allocated between the large temporary tensors and fragment memory.
        shape = targets.shape[0], targets.shape[1] - first + 1
        nll = torch.empty(shape, dtype=torch.float32, device=targets.device)
        for chunk in self._prefill.chunks(self._head, input_ids if last_read else input_ids[:, :-1]):
            rows = range(max(chunk.begin, first - 1), min(chunk.end, targets.shape[1]))
            for part in self._logits.parts(rows, cost=len(input_ids)):
                with part:
                    logits = self._head.logits(chunk.read, part.begin - chunk.begin, part.end - chunk.begin)
                    expected = targets[:, part.items].to(logits.device)
                    nll[:, part.begin - first + 1 : part.end - first + 1] = logits_nll(logits, expected)
            tokens_read(len(input_ids) * (chunk.end - chunk.begin))
        return nll.cpu()

    def _find_head(self, input_ids: torch.Tensor) -> None:
        """Check that the model is causal, and set its head and the splitter for slices of logits."""
        full = self.model(input_ids=input_ids, use_cache=False).logits
        changed = input_ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % full.shape[-1]
        other = self.model(input_ids=changed, use_cache=False).logits
        if deviation(other[:, :-1], full[:, :-1]) is not None:
            raise UnsupportedModelError(
                f"Expected a causal model, got {type(self.model).__name__}, whose last token changes the logits of "
                "earlier ones, so that it has no perplexity. Load a decoder with "
                "AutoModelForCausalLM.from_pretrained(...)."
            )
        self._head = find_head(self.model, input_ids, full)
        self._logits = Room("rows of logits", max(1, min(LOGITS_ROWS, LOGITS_BYTES // (4 * full.shape[-1]))))


PROBE_TOKENS = 32
"""Tokens per process of the prefix on which shared and unshared reading are compared."""


def shard_weights(model: nn.Module, accelerator: Accelerator) -> Any:
    """Shard a model's weights by FSDP2, which context parallelism requires."""
    # accelerate prepares a model for FSDP2 only together with an optimizer, which here never takes a step
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))[0]


def token_scorer(model: nn.Module, memory: Memory) -> TokenScorer:
    """Return a token scorer of a causal language model, on this process or across all processes."""
    if memory.accelerator is None:
        return TokenScorer(model, memory)
    return ContextParallelScorer(model, memory)


class ContextParallelScorer(TokenScorer):
    """Scorer like [`TokenScorer`], with each text split across all processes.

    Every process must make the same calls, and receives all values. For each patch, a prefix is read both shared and
    unshared, and the values are compared. This refuses models and patches whose attention is not PyTorch's. The run
    ends if memory runs out, because one process cannot shrink its share alone.
    """

    def __init__(self, model: nn.Module, memory: Memory) -> None:
        if memory.prefill_chunk is not None:
            raise InvalidParameterError(
                "Expected prefill_chunk to be left out with context parallelism, as both divide a text, got "
                f"{memory.prefill_chunk}. Drop it."
            )
        super().__init__(model, memory)
        self._windows.gives_way = False
        self._accelerator: Any = memory.accelerator
        self._checked: Any = self  # patch of the latest comparison; `self` equals no patch, not even `None`

    def _nll(self, input_ids: torch.Tensor, first: int, last_read: bool) -> torch.Tensor:
        patch = find_patch(self.model)
        if self._checked is not patch:
            self._compare(input_ids[:1, : PROBE_TOKENS * self._accelerator.num_processes])
            self._checked = patch
        return self._shared_nll(input_ids, first, last_read)

    def _shared_nll(self, input_ids: torch.Tensor, first: int, last_read: bool) -> torch.Tensor:
        assert self._head is not None
        head, (rows, length) = self._head, input_ids.shape
        shares = 2 * self._accelerator.num_processes  # each process gets an early and a late share
        ids = F.pad(input_ids, (0, -length % shares))  # causal: padding at the end changes no earlier token
        targets = ids.roll(-1, dims=1)
        places = torch.arange(ids.shape[1], device=ids.device).repeat(rows, 1)
        positions = places.clamp(max=length - (1 if last_read else 2))
        buffers = [ids, targets, places, positions]
        with self._accelerator.maybe_context_parallel(
            buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)
        ):
            read = head.read(ids, position_ids=positions, use_cache=False)

            losses = torch.empty(rows, ids.shape[1], dtype=torch.float32, device=ids.device)
            for part in self._logits.parts(range(ids.shape[1]), cost=rows):
                with part:
                    logits = head.logits(read, part.begin, part.end)
                    losses[:, part.items] = logits_nll(logits, targets[:, part.items])
        tokens_read(rows * length)
        nll, order = (_side_by_side(self._accelerator.gather(part), rows) for part in (losses, places))
        return nll.gather(1, order.argsort(dim=1))[:, first - 1 : length - 1].cpu()

    def _compare(self, input_ids: torch.Tensor) -> None:
        whole = super()._nll(input_ids, 1, last_read=True)
        shared = self._shared_nll(input_ids, 1, last_read=True)
        by = deviation(shared.to(self.model.dtype), whole.to(self.model.dtype))
        if by is not None:
            raise UnsupportedModelError(
                f"Expected equal values when processes share a text, got those of {type(self.model).__name__} off by "
                f"{by:.2g} nats. Leave cp_size out, or choose a method that changes frequencies only, such as yarn."
            )


def _side_by_side(gathered: torch.Tensor, rows: int) -> torch.Tensor:
    """Reshape `(processes * rows, share)` to `(rows, processes * share)`."""
    return gathered.view(-1, rows, gathered.shape[1]).transpose(0, 1).flatten(1)


def logits_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the NLL of tokens `(batch, length)` under logits `(batch, length, vocabulary)`.

    It is computed in float32 for every model dtype: in bfloat16, rounding in the softmax sums alone is an error of 1
    %.
    """
    flat, columns = logits.flatten(0, 1), targets.reshape(-1, 1)
    rows = max(1, CACHED_BYTES // (4 * flat.shape[1])) if flat.device.type == "cpu" else max(1, len(flat))
    losses = torch.empty_like(columns, dtype=torch.float32)
    memory = flat.new_empty(min(rows, len(flat)), flat.shape[1], dtype=torch.float32)  # new pages double the time
    for begin in range(0, len(flat), rows):
        batch = slice(begin, begin + rows)
        piece = torch.log_softmax(flat[batch], -1, dtype=torch.float32, out=memory[: len(flat[batch])])
        losses[batch] = -piece.gather(1, columns[batch])
    return losses.view(targets.shape)


def scored_model(model: nn.Module) -> Any:
    """Return the transformers model inside its wrappers, after checking that it can be scored per token.

    Prompt tuning is refused, because it adds virtual tokens before the text, and so are models on the meta device.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedModelError(
            "Expected a model without virtual tokens, which would be scored, got one with a PEFT adapter of the "
            "prompt-learning kind. Pass a model with LoRA or merged weights, or without the adapter."
        )
    bare = unwrap(model)
    if all(weight.is_meta for weight in bare.parameters()):
        raise UnsupportedModelError(
            f"Expected a model with weights, got {type(bare).__name__} on the meta device. Load its weights."
        )
    if not getattr(bare.config, "return_dict", True):
        raise UnsupportedModelError(
            f"Expected a model that returns named outputs, got {type(bare).__name__} with return_dict=False in its "
            "config. Set model.config.return_dict = True."
        )
    return bare


def require_finite(
    nll: Any, document: str, tokens: Sequence[int] | None = None, culprit: Callable[[], str] | None = None
) -> None:
    """Check that NLL `(scored tokens,)` is finite. The error names document, first token, and layers that are not."""
    bad = (~torch.isfinite(torch.as_tensor(nll))).nonzero()
    if len(bad):
        first = tokens[int(bad[0])] if tokens else int(bad[0]) + 1
        source = "" if culprit is None else f", from {culprit()}"
        remedy = (
            "Load another checkpoint, since this one is damaged."
            if source.startswith(f", from {DAMAGED}")
            else "Load the model with dtype=torch.float32 or bfloat16, or choose a smaller factor."
        )
        raise NonFiniteError(
            f"Expected finite logits in document {document!r}, got others, first at token {first}{source}. {remedy}"
        )


def model_name(model: Any) -> str:
    """Return the name or path of a model, or the name of its class if it has none."""
    return portable(model.config.name_or_path) or type(model).__name__


def autocast_dtype(model: Any) -> torch.dtype | None:
    """Return the dtype of `torch.autocast` in a model's forward, or `None` if autocast is disabled.

    It may be on around the call, or inside: a model that accelerate has prepared for mixed precision turns it on. The
    hook of a short forward then sees it.
    """
    kind, dtypes = model.device.type, []

    def look(*_: Any) -> None:
        dtypes.append(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)

    if "_original_forward" not in vars(model):
        look()
        return dtypes[0]
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    handle = model.get_input_embeddings().register_forward_pre_hook(look)
    try:
        with torch.no_grad():
            model(input_ids=ids, **decoder)
    finally:
        handle.remove()
    return dtypes[0]
