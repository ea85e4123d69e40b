"""Losses as pure functions: tensors and plain numbers in, tensors out; each names its paper.

Those on answers take `scores(policy, reference, tokens)`, which checks the tensors' shapes and dtypes: nothing is
broadcast. They return [P], not reduced. An own loss of `DPOTrainer` may call them.
"""

# isort: off
# fmt: off
from .kernels.chunked_head import TokenScores
from .trainer.losses.judged import apo_zero_unpaired, bco_unpaired, kto, mismatch_kl
from .trainer.losses.pairs import (
    Scores, apo_down, apo_zero, bco, cpo, discopop, divergence_of, exo, hinge, ipo, nca, orpo, reward_loss,
    reward_shift, rewards_seen, robust, scores, sft, sigmoid, sigmoid_norm, simpo, sppo_hard,
)
from .trainer.losses.tokens import token_divergence, token_kl, token_scores

__all__ = [
    "TokenScores", "token_divergence", "token_kl", "token_scores",  # of tokens, from hidden states and any head
    "Scores", "apo_down", "apo_zero", "bco", "cpo", "discopop", "exo", "hinge", "ipo", "nca", "orpo", "robust",
    "scores", "sft", "sigmoid", "sigmoid_norm", "simpo", "sppo_hard",  # of pairs of answers
    "apo_zero_unpaired", "bco_unpaired", "kto", "mismatch_kl",  # of answers judged one by one
    "divergence_of", "reward_loss", "reward_shift", "rewards_seen",
]
