"""The loss of a reward model on pairs of answers, and what keeps losses from broadcasting."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def reward_loss(chosen: Tensor, rejected: Tensor, *, center: float = 0.0) -> Tensor:
    """-log σ(r+ - r-) + center (r+ + r-)², for rewards [P] of preferred and other answers. Returns [P], not reduced.
    The first term is the negative log-likelihood of Bradley and Terry's model (1952) as Ouyang et al. 2022 (arXiv
    2203.02155, equation 1) use it. It sees differences only; the second (Eisenstein et al. 2023, arXiv 2312.09244,
    equation 2) holds rewards around zero, so that those of different prompts compare better. ValueError unless both are
    floating-point and of one shape."""
    alike("reward_loss", chosen=chosen, rejected=rejected)
    losses = -logsigmoid(chosen - rejected)
    return losses + center * (chosen + rejected).square() if center else losses


def alike(what: str, **tensors: Tensor) -> None:
    """ValueError unless the tensors are floating-point and of one shape: [1] beside [8] is a slip, no wish."""
    if len({x.shape for x in tensors.values()}) > 1 or not all(x.is_floating_point() for x in tensors.values()):
        got = ", ".join(f"{name} {x.dtype} {list(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"{what} takes floating-point tensors of one shape, got {got}")
