"""The learning rate's course as a plain function of the step: nothing to save, so nothing to restore wrongly."""

import math
from functools import partial
from typing import Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["cosine", "linear", "constant", "inverse-sqrt", "wsd"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def rate_factor(
    step: int, *, total: int, warmup: int, schedule: Schedule = "cosine", decay: int | None = None
) -> float:
    """What the peak learning rate is multiplied by in step `step`, counted from 0, of a run of `total` steps: 0 to 1.

    ValueError for another schedule. Warm-up is linear, never zero: step i has (i + 1) / (warmup + 1). Then the factor

    - "constant": stays;
    - "linear", "cosine": falls to zero at step `total`, along a line or half a cosine (Loshchilov and Hutter, arXiv
      1608.03983, eq. 5, without restarts);
    - "inverse-sqrt": falls as 1 / sqrt(step) (Vaswani et al., arXiv 1706.03762, section 5.3) from 1 at the end of
      warm-up, whatever `total` is; without warm-up step i has 1 / sqrt(i + 1);
    - "wsd" (warm-up, stable, decay; Hu et al., arXiv 2404.06395, section 4): stays, and falls to zero along a line
      over the last `decay` steps: a tenth of all unless given, and never more than there are after warm-up.
    Raises ValueError for another schedule, and for a warm-up or decay that is no whole number of steps."""
    if schedule not in SCHEDULES or any(count < 0 or count % 1 for count in (warmup, decay or 0)):
        rule = f"schedule is one of {', '.join(SCHEDULES)}, warmup and decay are whole numbers of steps"
        raise ValueError(f"{rule}, got {schedule!r}, {warmup} and {decay}")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "inverse-sqrt":
        scale = max(warmup, 1)
        return math.sqrt(scale / (scale + step - warmup))
    falling = total - warmup
    if schedule == "wsd":
        falling = min(falling, round(total / 10) if decay is None else decay)
    left = min(1.0, max(0.0, (total - step) / max(1, falling)))
    return (1 - math.cos(math.pi * left)) / 2 if schedule == "cosine" else left


def scheduler(
    optimizer: Optimizer, *, total: int, warmup: int, schedule: Schedule = "cosine", decay: int | None = None
) -> LambdaLR:
    """The same as a torch scheduler, for loops of one's own: every group's `lr` is its peak; step() after each step.
    Raises ValueError as `rate_factor` does."""
    return LambdaLR(optimizer, partial(rate_factor, total=total, warmup=warmup, schedule=schedule, decay=decay))
