"""STRING: shifted positions inside the trained length."""

from dataclasses import dataclass

from ..decode import Positive
from ..errors import InvalidParameterError
from ..plan import Band, ExtensionPlan, PositionMap, QueryScale
from .rotary import SAME, RemapMethod, near_and_far, window_of


@dataclass(frozen=True)
class StringShift(RemapMethod):
    """Replace far, seldom trained distances by nearer ones. Works inside the trained length and does not extend it.

    Distance `d < shift` gives `d`, else `d - shift + local`. A pair at distance `shift` is counted once (the published
    prefill counts it twice). An et al., *Why Does the Effective Context Length of LLMs Fall Short?*, 2024.

    Args:
        shift (`int`, *optional*): in tokens. By default a third of the trained length.
        local (`int`, *optional*): in tokens. By default an eighth of the shift.
        attention_factor (`float`, *optional*, defaults to 1): queries grow by its square; the published code uses
            `0.1 ln 2 + 1`.
    """

    name = "string-shift"
    title = "STRING"
    url = "https://arxiv.org/abs/2410.18745"
    code = "https://github.com/HKUNLP/STRING"
    needs_factor = False

    shift: int | None = None
    local: int | None = None
    attention_factor: Positive = 1.0

    def bands(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        shift = window_of(self, plan, 1 / 3, "shift")
        local = max(1, shift // 8) if self.local is None else self.local
        if not 1 <= local <= shift:
            raise InvalidParameterError(f"Expected a string-shift local of 1 to {shift} (the shift), got {local}.")
        return near_and_far(shift, PositionMap(offset=local - shift), SAME)

    def query_scale(self, plan: ExtensionPlan) -> QueryScale | None:
        if self.attention_factor == 1:
            return None
        return QueryScale(length=plan.trained_length, constant=self.attention_factor**2)
