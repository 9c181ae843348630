"""What a run is asked for, checked before anything long begins."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidParameterError
from ..plan import ExtensionPlan

MULTIPLES = ("steps", "batch_size", "accumulation", "length")
"""Counts of which there is at least one."""


@dataclass(frozen=True)
class Settings:
    """
    The numbers of a run; each is described in [`finetune`].

    Args:
        length (`int`): tokens per row.
        steps, batch_size, accumulation, warmup, pack, pose, shifted, longce, bf16, gradient_checkpointing, patience,
            save_every, seed: see there.
    """

    length: int
    steps: int
    batch_size: int
    accumulation: int
    warmup: int
    pack: bool
    pose: int | None
    shifted: int | None
    longce: int | None
    bf16: bool
    gradient_checkpointing: bool
    patience: int | None
    save_every: int
    seed: int

    def check(self, plan: ExtensionPlan) -> None:
        """
        Raises:
            InvalidParameterError: a number that cannot be, or two that exclude each other.
        """
        for name in MULTIPLES:
            value = getattr(self, name)
            if value < 1:
                raise InvalidParameterError(f"{name} is {value}; give 1 or more")
        if not 0 <= self.warmup < self.steps:
            raise InvalidParameterError(
                f"warmup is {self.warmup} of {self.steps} steps; give fewer, or 0 to start at the full learning rate"
            )
        if self.length < 2 or self.length > plan.target_length:
            raise InvalidParameterError(
                f"length is {self.length}, and {plan.method} reads {plan.trained_length} -> {plan.target_length} "
                f"tokens; give 2 to {plan.target_length}, or a larger factor"
            )
        if self.pose is not None:
            self._check_pose(plan)
        if self.shifted is not None:
            self._check_shifted()
        if self.longce is not None:
            self._check_longce()
        if self.patience is not None and self.patience < 1:
            raise InvalidParameterError(f"patience is {self.patience}; give 1 or more evaluations, or leave it out")

    def _check_pose(self, plan: ExtensionPlan) -> None:
        if self.pose is not None and not 2 <= self.pose <= self.length:
            raise InvalidParameterError(f"pose is {self.pose}; give the number of chunks in a row (the paper: 2)")
        if self.length >= plan.target_length:
            raise InvalidParameterError(
                f"pose skips positions between {self.length} and {plan.target_length} tokens, of which there are "
                f"none; give a length below {plan.target_length}, such as {plan.trained_length}, or a larger factor"
            )
        if self.pack or self.longce:
            other = "pack" if self.pack else "longce"
            raise InvalidParameterError(f"pose and {other} both decide what a row's positions mean; leave one out")

    def _check_shifted(self) -> None:
        groups = self.shifted or 0
        if groups < 2 or self.length % (2 * groups):
            raise InvalidParameterError(
                f"shifted is {groups} and length {self.length}; give 2 or more groups (the paper: 4), twice whose "
                "number divides the length"
            )
        if self.pack:
            raise InvalidParameterError("shifted attention takes rows of one document; leave out pack or shifted")

    def _check_longce(self) -> None:
        short = self.longce or 0
        if not 1 <= short < self.length / 2:
            raise InvalidParameterError(
                f"longce is {short} and length {self.length}; give the tokens of the short context, such as "
                f"{self.length // 8}: twice as many are below the length"
            )
        if self.pack:
            raise InvalidParameterError("longce weighs by contexts of one document; leave out pack or longce")
