"""Log-probabilities of given tokens, entropy and correctness straight from hidden states; full logits never exist.

One pass over a chunk of logits gives all three: with z = logit - largest, e = exp(z) and Z = sum e, the log-probability
is z[target] - log Z, the entropy log Z - sum(e z) / Z, and the target is the likeliest token where z[target] = 0. So
entropy and accuracy cost one product and one sum a value, in cache, and no second exponential. See `chunked_head` for
memory and gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .chunked_head import blocks, upcast


class TokenScores(NamedTuple):
    """What a model says of one token each: [N] tensors, of which only `logps` carries a gradient."""

    logps: Tensor  # log-probability of the target, nats, at most 0; fp32, or float64 for float64 hidden states
    entropy: Tensor  # of the whole distribution, nats, at least 0; same dtype
    correct: Tensor  # bool: no token is likelier than the target (ties count as correct)


def linear_logprobs_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> TokenScores:
    """The definition, through full logits."""
    logits = upcast(hidden @ weight.T)
    all_logps = torch.log_softmax(logits, dim=1)
    entropy = torch.special.entr(all_logps.detach().exp()).sum(1)
    correct = logits.gather(1, targets[:, None]).squeeze(1) == logits.amax(1)
    return TokenScores(all_logps.gather(1, targets[:, None]).squeeze(1), entropy, correct)


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """ValueError unless all of `targets` are tokens of the vocabulary. Looks at tensors on a CPU only."""
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if targets.device.type != "cpu" or not len(targets):
        return
    least, most = (bound.item() for bound in targets.aminmax())
    if least < 0 or most >= vocabulary:
        wrong = least if least < 0 else most
        raise ValueError(
            f"targets must be in 0..{vocabulary - 1}, the head's vocabulary, got {wrong}; leave out the rows that are "
            "not trained, and check that tokenizer and model belong together"
        )


class TokenScorer:
    """The three figures of TokenScores for chunks of logits; targets int64 [N] in 0..V-1. ValueError as check_targets.

    On CUDA a target out of range ends the process by a device-side assertion, since looking would wait: `check_targets`
    before sending them there.
    """

    def __init__(self, targets: Tensor, vocabulary: int) -> None:
        check_targets(targets, vocabulary)
        self.targets = targets

    def __call__(self, logits: Tensor, rows: slice, gradient: bool) -> tuple[Tensor, ...]:
        target = self.targets[rows, None]
        above = logits.gather(1, target)
        top, total, weighted = logits.new_empty(3, len(logits), 1)
        for block in blocks(logits):
            _pass_over(logits[block], top[block], total[block], weighted[block], gradient)
        if gradient:
            logits.scatter_add_(1, target, logits.new_ones(()).expand(target.shape))
        above -= top
        log_total = total.log()
        figures = above - log_total, log_total - weighted / total, above == 0
        return tuple(figure.squeeze(1) for figure in figures)


def _pass_over(logits: Tensor, top: Tensor, total: Tensor, weighted: Tensor, gradient: bool) -> None:
    """Largest logit, sum of e = exp(z) and sum of e z of each row; with `gradient` the logits become -softmax."""
    torch.amax(logits, 1, keepdim=True, out=top)
    z = (logits - top).clamp_(min=torch.finfo(logits.dtype).min)  # of a token banned by -inf, 0 * z is 0 then, not NaN
    torch.exp(z, out=logits)
    torch.sum(logits, 1, keepdim=True, out=total)
    torch.sum(z.mul_(logits), 1, keepdim=True, out=weighted)
    if gradient:
        logits.div_(-total)
