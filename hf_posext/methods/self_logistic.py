"""SELF: groups of tokens that grow with distance, by a logistic curve."""

import math
from dataclasses import dataclass
from typing import Annotated, Self

from ..decode import Bound, Positive
from ..errors import InvalidParameterError
from ..plan import Band, ExtensionPlan, PositionMap
from ..scheme import PositionalScheme
from .rotary import SAME, RemapMethod, window_of


@dataclass(frozen=True)
class SelfLogistic(RemapMethod):
    """Keep distances within a window, and count farther ones in groups that grow from 1 token to `capacity - 1`.

    Group g beyond the window has `floor(C / (1 + (C - 1) exp(-r g)))` tokens, at least 1 and at most C - 1, and
    distance `d >= w` becomes w plus the number of groups in `d - w` tokens. Here that curve is linear between the
    distances at which the size of groups doubles, so that a few bands suffice. The published code counts groups from
    the beginning of the text in prefill and from the query in decoding; the paper describes the latter. Dang et al.,
    *SELF: Self-Extend the Context Length With Logistic Growth Function*, 2025.

    Args:
        window (`int`, *optional*): `w` in tokens; a quarter of the trained length by default.
        capacity (`int`, *optional*, defaults to 33): `C`, above 1.
        rate (`float`, *optional*, defaults to 0.02): `r`, how fast groups grow.
    """

    name = "self-logistic"
    title = "SELF"
    url = "https://arxiv.org/abs/2505.17296"
    code = "https://github.com/alexeipc/SELF-LLM"

    window: int | None = None
    capacity: Annotated[int, Bound("of at least 2", lambda tokens: tokens >= 2)] = 33
    rate: Positive = 0.02

    @classmethod
    def example(cls, scheme: PositionalScheme) -> Self:
        return cls(rate=0.5)

    def sizes(self, tokens: int, limit: int | None = None) -> list[int]:
        """Return the sizes of the groups that cover a number of tokens, nearest first.

        Args:
            tokens (`int`): tokens to cover.
            limit (`int`, *optional*): number of groups after which the list ends, even if tokens are left.
        """
        sizes: list[int] = []
        covered = 0
        while covered < tokens and len(sizes) != limit:
            logistic = self.capacity / (1 + (self.capacity - 1) * math.exp(-self.rate * len(sizes)))
            # the first is C / C, which may round to below 1
            sizes.append(min(max(math.floor(logistic + 1e-9), 1), self.capacity - 1))
            covered += sizes[-1]
        return sizes

    def bands(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        window = window_of(self, plan, 1 / 4)
        # A position is needed for each group. The list ends with the first position too many, because the target may
        # be any number of tokens.
        room = plan.trained_length - window
        sizes = self.sizes(max(plan.target_length - window, 1), limit=room + 1)
        if len(sizes) > room:
            raise InvalidParameterError(
                f"Expected groups that cover {plan.target_length} tokens within {plan.trained_length} positions (the "
                "trained length), got more. Pass a smaller window, or a greater rate or capacity."
            )
        bands = [Band(SAME, SAME, high=window)]
        start, group = window, 0
        while group < len(sizes):
            # all groups until their size has doubled
            last = next((g for g in range(group, len(sizes)) if sizes[g] >= 2 * sizes[group]), len(sizes))
            stop = start + sum(sizes[group:last])
            slope = (last - group) / (stop - start)
            far = PositionMap(rate=slope)
            query = PositionMap(rate=slope, offset=window + group - slope * start)
            bands.append(Band(query, far, low=start, high=stop if last < len(sizes) else None))
            start, group = stop, last
        return tuple(bands)
