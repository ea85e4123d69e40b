"""The loss of a reward model on pairs of answers."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from .shapes import Rows, checked


@checked
def reward_loss(chosen: Rows, rejected: Rows, *, center: float = 0.0) -> Tensor:
    """-log σ(r+ - r-) + center (r+ + r-)², for rewards [P] of preferred and other answers. Returns [P], not reduced.
    ValueError unless both are floating-point and of one length.
    The first term is the negative log-likelihood of Bradley and Terry's model (1952) as Ouyang et al. 2022 (arXiv
    2203.02155, equation 1) use it. It sees differences only; the second (Eisenstein et al. 2023, arXiv 2312.09244,
    equation 2) holds rewards around zero, so that those of different prompts compare better."""
    losses = -logsigmoid(chosen - rejected)
    return losses + center * (chosen + rejected).square() if center else losses
