"""Whether an op computed what it should: nothing that fails here is reported.

The truth is a float64 product of the decoded weight, and an error may be as large as rounding can make it, element by
element (the project's rule for 4-bit products). With u the unit roundoff of the activations' dtype:

    product over K values         2 K 2^-24 |x| |W|^T    fp32 sums in any order; the 2 because tensor cores may truncate
    each rounding of a result     u |result|
    a path that keeps codes in half precision and scales partial sums: 2 u |x| |W|^T more, against the exact weight

Several products in a row (LoRA) pass their errors on through the absolute values of what they meet. Every function
returns the largest error over its bound: 1 or less passes, NaN counts as infinite.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FP32 = 2.0**-24
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: FP32, torch.float64: 2.0**-53}


@dataclass(frozen=True)
class Bounded:
    """What an output should be, and by how much each element may be off; both float64."""

    exact: Tensor
    bound: Tensor

    def worst(self, given: Tensor) -> float:
        """The largest error over its bound."""
        if given.shape != self.exact.shape:
            return float("inf")
        error = (given.detach().double() - self.exact).abs()
        share = torch.where(error <= 0, torch.zeros_like(error), error / self.bound)  # 0 / 0 is no error
        worst = float(share.max()) if share.numel() else 0.0
        return worst if worst == worst else float("inf")


def product(x: Tensor, weight: Tensor, unit: float, *, scaled_late: bool = False) -> Bounded:
    """x [M, K] times W^T for float64 W [N, K], rounded once with roundoff `unit`."""
    wide = x.double()
    exact, size = wide @ weight.T, wide.abs() @ weight.abs().T
    bound = 2 * x.shape[-1] * FP32 * size + unit * exact.abs()
    return Bounded(exact, bound + 2 * unit * size if scaled_late else bound)


@dataclass(frozen=True)
class LoRATruth:
    """Forward and backward of y = x W^T + scale (mask x) A^T B^T in float64, with bounds.

    x [M, K], grad [M, N]; A [r, K] and B [N, r] as rounded to the compute dtype; W [N, K] float64; `mask` [M, K] is
    what dropout multiplied with (None: 1). s = x A^T is rounded to the compute dtype, and so may be the base product,
    the update and their sum. A `scale` that is a power of two costs nothing, whatever it is multiplied into.
    """

    x: Tensor
    grad: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    scale: float
    mask: Tensor | None = None
    scaled_late: bool = False

    def outputs(self) -> dict[str, Bounded]:
        """y, dx, dA and dB."""
        x, g, W, A, B = (tensor.double() for tensor in (self.x, self.grad, self.weight, self.A, self.B))
        u, scale, (M, K), (N, r) = UNIT[self.x.dtype], self.scale, x.shape, B.shape
        late = 2 * u if self.scaled_late else 0.0
        dropped = x if self.mask is None else x * self.mask.double()
        unsure = u if self.mask is None else 2 * u  # the dropped x is rounded too
        s, s_size = dropped @ A.T, dropped.abs() @ A.abs().T
        s_error = (2 * K * FP32 + (unsure - u)) * s_size + u * s.abs()
        base, base_size, update = x @ W.T, x.abs() @ W.abs().T, scale * s @ B.T
        y = base + update
        y_bound = (2 * (K + r) * FP32) * (base_size + scale * s.abs() @ B.abs().T) + late * base_size
        y_bound += scale * s_error @ B.abs().T + u * (base.abs() + update.abs() + y.abs())
        t, t_size = scale * g @ B, scale * g.abs() @ B.abs()
        t_error = 2 * N * FP32 * t_size + 2 * u * t.abs()
        back, back_size, through = g @ W, g.abs() @ W.abs(), t @ A
        through_size, through_error = t.abs() @ A.abs(), t_error @ A.abs()
        if self.mask is not None:
            m = self.mask.double()
            through, through_size, through_error = through * m, through_size * m, through_error * m
        dx = back + through
        dx_bound = 2 * (N + r) * FP32 * (back_size + through_size) + through_error + late * back_size
        dx_bound += u * (back.abs() + 2 * through.abs() + dx.abs())
        dA, dB = t.T @ dropped, scale * g.T @ s
        dA_bound = 2 * M * FP32 * (t.abs().T @ dropped.abs()) + u * dA.abs()
        dA_bound += (t_error + (unsure - u) * t.abs()).T @ dropped.abs()
        dB_bound = 2 * M * FP32 * scale * (g.abs().T @ s.abs()) + scale * g.abs().T @ s_error + 2 * u * dB.abs()
        return {
            "y": Bounded(y, y_bound),
            "dx": Bounded(dx, dx_bound),
            "dA": Bounded(dA, dA_bound),
            "dB": Bounded(dB, dB_bound),
        }

    def worst(self, given: dict[str, Tensor]) -> float:
        """The largest error over its bound among y, dx, dA and dB, of which `given` holds all."""
        return max(bounded.worst(given[name]) for name, bounded in self.outputs().items())


def equal(given: Any, exact: Any) -> float:
    """0 where every tensor is the same to the bit, infinity otherwise."""
    same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(given, exact, strict=True))
    return 0.0 if same else float("inf")
