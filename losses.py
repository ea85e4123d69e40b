"""Losses as pure functions: tensors and plain numbers in, tensors out; each names its paper.

Tensors have the shapes and dtypes that the signatures say: `Pair` is float [2, P], a row of chosen answers above one of
rejected ones, `Tokens` int64 [2, P], `Rows` float [P], `Judged` bool [P], `Hidden` float [N, D], `Targets` int64 [N],
`Number` a float without dimensions, and one letter is one size. Others raise ValueError: nothing is broadcast.
Gradients flow to the policy's log-probabilities, to hidden states, and to what is trained in a head.
"""

from .kernels.chunked_head import TokenScores
from .trainer.losses.divergence import token_divergence
from .trainer.losses.judged import apo_zero_unpaired, bco_unpaired, kto, mismatch_kl
from .trainer.losses.pairs import (
    apo_down,
    apo_zero,
    bco,
    cpo,
    discopop,
    divergence_of,
    exo,
    hinge,
    ipo,
    nca,
    orpo,
    reward_shift,
    rewards_seen,
    robust,
    sft,
    sigmoid,
    sigmoid_norm,
    simpo,
    sppo_hard,
)
from .trainer.losses.reward import reward_loss
from .trainer.losses.tokens import token_kl, token_scores

__all__ = [
    "TokenScores", "token_divergence", "token_kl", "token_scores",  # of tokens, from hidden states and any head
    "apo_down", "apo_zero", "bco", "cpo", "discopop", "exo", "hinge", "ipo", "nca", "orpo", "robust", "sft", "sigmoid",
    "sigmoid_norm", "simpo", "sppo_hard", "divergence_of", "reward_shift", "rewards_seen",  # of pairs of answers
    "apo_zero_unpaired", "bco_unpaired", "kto", "mismatch_kl",  # of answers judged one by one
    "reward_loss",
]  # fmt: skip
