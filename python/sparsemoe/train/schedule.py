"""How the learning rate moves, and how many steps a time budget holds."""

from __future__ import annotations

import math
import time


def learning_rate_factor(step: int, total: int | None, warmup: int, final: float) -> float:
    """Linear warm-up, then a cosine from 1 to ``final`` at ``total`` steps.

    step counts from 0. While ``total`` is unknown (None), the rate stays at its height.
    """
    if step < warmup:
        return (step + 1) / warmup
    if total is None:
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


class TimeBudget:
    """Turns a deadline into a number of steps, from the time that steps have taken.

    The first steps, which are slower, are not measured. The estimate is renewed whenever it
    is asked for, so that the schedule ends at the deadline also where the machine's speed
    changes on the way.
    """

    def __init__(self, deadline: float, skip: int = 10, clock=time.monotonic) -> None:
        self.deadline, self.skip, self.clock = deadline, skip, clock
        self.first: tuple[int, float] | None = None

    def total_steps(self, step: int) -> int | None:
        """Steps until the deadline, ``step`` of which are done; None before it is known."""
        now = self.clock()
        if now >= self.deadline:
            return step
        if self.first is None:
            if step >= self.skip:
                self.first = (step, now)
            return None
        first_step, first_time = self.first
        if step == first_step:
            return None
        seconds = (now - first_time) / (step - first_step)
        return step + int((self.deadline - now) / seconds)
