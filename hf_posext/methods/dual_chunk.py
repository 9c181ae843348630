"""Dual chunk attention (DCA)."""

from dataclasses import dataclass

from ..errors import InvalidParameterError
from ..plan import Band, ExtensionPlan, PositionMap, QueryScale
from .rotary import RemapMethod, window_of


@dataclass(frozen=True)
class DualChunk(RemapMethod):
    """Count positions within chunks: exact inside a chunk and the one before, constant for older chunks.

    Chunks have `c = C - local` tokens. Key j has position `j mod c`; query i has `i mod c` to its own chunk,
    `min(i mod c + c, C)` to the chunk before, and `min(2 c - 1, C)` to older ones. An et al., *Training-Free
    Long-Context Scaling of Large Language Models*, 2024. The published code multiplies attention by a temperature that
    depends on the longest input so far; here, as an option, it depends on the query's own position.

    Args:
        chunk (`int`, *optional*): `C`, the farthest position used. By default three quarters of the trained
            length.
        local (`int`, *optional*): Tokens across a chunk's edge that keep exact distances. By default a quarter of the
            trained length.
        temperature (`float`, *optional*, defaults to 0): queries grow by `(1 + t ln((p + 1) / L)) ** 2` past the
            trained length; ChunkLlama uses 0.05 and Qwen2.5-1M 0.1.
    """

    name = "dual-chunk"
    title = "dual chunk attention (DCA)"
    url = "https://arxiv.org/abs/2402.17463"
    code = "https://github.com/HKUNLP/ChunkLlama"

    chunk: int | None = None
    local: int | None = None
    temperature: float = 0.0

    def bands(self, plan: ExtensionPlan) -> tuple[Band, ...]:
        chunk, local = window_of(self, plan, 3 / 4, "chunk"), window_of(self, plan, 1 / 4, "local")
        if local >= chunk:
            raise InvalidParameterError(f"Expected a dual-chunk local of 1 to {chunk - 1}, got {local}.")
        step = chunk - local
        key = PositionMap(modulo=step)
        return (
            Band(key, key, high=1, chunk=step),
            Band(PositionMap(modulo=step, offset=step, limit=chunk), key, low=1, high=2, chunk=step),
            Band(PositionMap(rate=0, offset=min(2 * step - 1, chunk)), key, low=2, chunk=step),
        )

    def query_scale(self, plan: ExtensionPlan) -> QueryScale | None:
        if self.temperature == 0:
            return None
        return QueryScale(length=plan.trained_length, temperature=self.temperature)
