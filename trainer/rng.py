"""States of the random number generators that training draws from."""

from collections.abc import Mapping

import torch
from torch import Tensor


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """Of the CPU and, where training runs on one, of that CUDA device; does not wait for it."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on drawing where `rng_states` was taken."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
