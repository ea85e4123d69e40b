"""The learning rate as a plain function of the step: nothing to save, so nothing to restore wrongly."""

import math
from typing import Literal


def learning_rate(
    step: int, *, total: int, peak: float, warmup: int, schedule: Literal["cosine", "linear", "constant"]
) -> float:
    """Learning rate of step `step`, counted from 0, in a run of `total` steps.

    Warm-up is linear and never yields zero: step i of it has peak * (i + 1) / (warmup + 1). After it the rate stays,
    or falls to zero at step `total`, along a line or half a cosine (Loshchilov and Hutter, arXiv 1608.03983, eq. 5,
    without restarts).
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (1 - progress) if schedule == "linear" else peak * (1 + math.cos(math.pi * progress)) / 2
