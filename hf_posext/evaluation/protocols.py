"""Protocols by name, and the default for each kind of model."""

from __future__ import annotations

from ..errors import InvalidParameterError
from .decoders import LegacyLongLoRA, LegacyYaRN, Prefix, Rolling, Sliding, Tail, check_tail
from .encoders import Pseudo, Seq2Seq
from .windows import PerplexityProtocol, check_stride

STRIDED = {protocol.name: protocol for protocol in (Sliding, LegacyYaRN, LegacyLongLoRA)}
DECODER_PROTOCOLS = ("prefix", "sliding", "rolling", "tail", "legacy-yarn", "legacy-longlora")

FITTING = {"causal": DECODER_PROTOCOLS, "masked": ("pseudo",), "seq2seq": ("seq2seq",)}
"""Protocols for each kind of language model. The first is the default."""


def protocol_for(
    name: str | None, kind: str, model: str, lengths: list[int], *, stride: int | None = None, tail: int | None = None
) -> PerplexityProtocol:
    """Return the requested protocol, or the default for the kind of model (see [`model_kind`]).

    Raises:
        InvalidParameterError: an unknown protocol, one that does not fit the model, an option that the protocol does
            not have, or a required option that is missing or out of range.
    """
    fitting = FITTING[kind]
    name = name or fitting[0]
    known = [protocol for protocols in FITTING.values() for protocol in protocols]
    if name not in known:
        raise InvalidParameterError(f"protocol is {name!r}. Choose one of {', '.join(known)}.")
    if name not in fitting:
        raise InvalidParameterError(
            f"protocol {name!r} does not fit {model}. Choose {' or '.join(map(repr, fitting))}."
        )
    if stride is not None and name not in STRIDED:
        raise InvalidParameterError(
            f"stride is {stride}, and protocol {name!r} has none. Leave it out, or choose {' or '.join(STRIDED)}."
        )
    if tail is not None and name != Tail.name:
        raise InvalidParameterError(f"tail is {tail}, and protocol {name!r} has none. Leave it out, or choose 'tail'.")
    if name in STRIDED:
        if stride is None:
            raise InvalidParameterError(f"protocol {name!r} needs a stride, as in stride=256")
        for length in lengths:
            check_stride(length, stride)
        return STRIDED[name](stride)
    if name == Tail.name:
        if tail is None:
            raise InvalidParameterError("protocol 'tail' needs the tokens that count, as in tail=128")
        check_tail(tail, lengths)
        return Tail(tail)
    return {protocol.name: protocol for protocol in (Prefix, Rolling, Pseudo, Seq2Seq)}[name]()
