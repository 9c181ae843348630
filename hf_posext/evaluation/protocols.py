"""Protocols by name, and the default for each kind of model."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidParameterError
from .decoders import LegacyLongLoRA, LegacyYaRN, Prefix, Rolling, Sliding, Tail
from .encoders import Pseudo, Seq2Seq
from .windows import PerplexityProtocol

PROTOCOLS: dict[str, Any] = {
    protocol.name: protocol
    for protocol in (Prefix, Sliding, Rolling, Tail, LegacyYaRN, LegacyLongLoRA, Pseudo, Seq2Seq)
}
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
    fitting, options = FITTING[kind], {"stride": stride, "tail": tail}
    name = name or fitting[0]
    if name not in PROTOCOLS:
        raise InvalidParameterError(f"protocol is {name!r}. Choose one of {', '.join(PROTOCOLS)}.")
    if name not in fitting:
        raise InvalidParameterError(
            f"protocol {name!r} does not fit {model}. Choose {' or '.join(map(repr, fitting))}."
        )
    required = PROTOCOLS[name].option
    for option, value in options.items():
        if value is not None and option != required:
            users = [other for other, protocol in PROTOCOLS.items() if protocol.option == option]
            raise InvalidParameterError(
                f"{option} is {value}, and protocol {name!r} has none. Leave it out, or choose {' or '.join(users)}."
            )
        if value is None and option == required:
            raise InvalidParameterError(f"protocol {name!r} requires {option}. Pass {option}=128, in tokens.")
    protocol: PerplexityProtocol = PROTOCOLS[name](*([options[required]] if required else []))
    protocol.check(lengths)
    return protocol
