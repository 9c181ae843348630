"""Attention sinks: the first tokens and a window."""

from dataclasses import dataclass

from ..errors import InvalidParameterError
from ..plan import Band, ExtensionPlan, PositionMap
from .rotary import SAME, RemapMethod


@dataclass(frozen=True)
class Sinks(RemapMethod):
    """Attend to the first few tokens and the latest ones. Streams without end, and does not extend the context.

    Pairs at distance `window` or more are masked, except for the first `sinks` keys. These have the positions of a
    cache that contains nothing else: query i has `min(i, sinks + window - 1)` to them. Xiao et al., *Efficient
    Streaming Language Models with Attention Sinks*, 2023. The authors: "the context window remains unchanged".

    Args:
        sinks (`int`, *optional*, defaults to 4): first tokens that are kept.
        window (`int`, *optional*): latest tokens that are kept. By default the rest of the trained length.
    """

    name = "sinks"
    title = "attention sinks (StreamingLLM)"
    url = "https://arxiv.org/abs/2309.17453"
    code = "https://github.com/mit-han-lab/streaming-llm"
    needs_factor = False

    sinks: int = 4
    window: int | None = None

    def bands(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        window = plan.trained_length - self.sinks if self.window is None else self.window
        if self.sinks < 1 or window < 1 or self.sinks + window > plan.trained_length:
            raise InvalidParameterError(
                f"Expected sinks and a window of 1 or more, together at most {plan.trained_length} (the trained "
                f"length), got {self.sinks} and {window}."
            )
        reach = PositionMap(limit=self.sinks + window - 1)
        return Band(SAME, SAME, high=window), Band(reach, SAME, low=window, keys_below=self.sinks)
