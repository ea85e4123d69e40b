"""Several LoRAs of one base as one: their sum by concatenation, its nearest of a lower rank, TIES, DARE."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from .adapter import Adapter
from .attach import install
from .init import leading
from .inspect import factored
from .layer import adapter_layers, carried
from .lora import LoRA, LoRAEmbedding


@torch.no_grad()
def combine(
    model: nn.Module, names: Sequence[str], weights: Sequence[float], *, name: str = "combined", density: float = 0.5,
    how: Literal["cat", "svd", "ties", "dare", "dare-ties"] = "cat", rank: int | None = None, seed: int = 0,
) -> list[str]:  # fmt: skip
    """Add the LoRA `name`, frozen and not active, that changes each weight by what `names` change it, each times its
    weight; return the paths of its layers.

    cat: their weighted sum, exact; its rank is the sum of theirs. svd: what is nearest to that of `rank` (by default
    the largest of theirs), from the factors alone. ties (Yadav et al. 2023, arXiv 2306.01708): of each change its
    largest values, a share of `density`; at each place the sign of their total; the mean of those that have it. dare
    (Yu et al. 2023, arXiv 2311.03099): of each change values drawn with `seed`, divided by their share `density`, and
    summed; dare-ties: combined as by ties. These make a dense change at a time, and then what is nearest of `rank`.
    As PEFT's cat, svd, ties_svd, dare_linear_svd, dare_ties_svd.
    Raises InputError for adapters that are not there or hold anything but LoRA of linear layers and embeddings.
    """
    if len(weights) != len(names) or not names or not 0 < density <= 1:
        raise InputError(f"combine takes a weight for each name and a density above 0, up to 1; got {names}, {weights}")
    carriers, generator = [carried(model, each) for each in names], torch.Generator().manual_seed(seed)
    parts, ranks = dict[str, Adapter](), [p.rank for each in carriers for p in each.values() if isinstance(p, LoRA)]
    for path in [path for path in adapter_layers(model) if any(path in each for each in carriers)]:
        mine = [(each[path], share) for each, share in zip(carriers, weights, strict=True) if path in each]
        if wrong := [part for part, _ in mine if type(part) not in (LoRA, LoRAEmbedding) or part.copies is not None]:
            raise InputError(f"'{path}' has a {type(wrong[0]).__name__}: such adapters can be used together, or merged")
        loras = [(cast(LoRA, part).plain(), share) for part, share in mine]
        A = torch.cat([part.lora_A for part, _ in loras])
        B = torch.cat([share * part.scale * part.lora_B for part, share in loras], 1)
        if how != "cat":
            keep = rank or max(ranks)
            U, S, V = factored(A, B) if how == "svd" else leading(_mixed(loras, how, density, generator), keep)
            A, B = S[:keep].sqrt()[:, None] * V[:keep], U[:, :keep] * S[:keep].sqrt()
        parts[path] = part = loras[0][0].of_factors(A, B / loras[0][0].scale)
        part.start = ""  # the change alone, also where one began around the codes
    install(model, parts, name, trainable=False)
    return list(parts)


def _mixed(loras: Sequence[tuple[LoRA, float]], how: str, density: float, generator: torch.Generator) -> Tensor:
    """The change [out, in] that several make, as `combine` says of ties and dare."""
    stack = torch.stack([part.scale * part.lora_B @ part.lora_A for part, _ in loras])
    shares = stack.new_tensor([share for _, share in loras])[:, None, None]
    if how == "ties":
        flat, count = stack.flatten(1), max(1, int(density * stack[0].numel()))
        largest = flat.abs().topk(count).indices
        stack = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest)).view_as(stack)
    else:
        chances = torch.full(stack.shape, density, dtype=torch.float32, device="cpu")
        stack = stack * torch.bernoulli(chances, generator=generator).to(stack) / density
    if how == "dare":
        return (shares * stack).sum(0)
    elected = stack.sign() == torch.where(stack.sum(0) >= 0, 1, -1)
    return (shares * stack * elected).sum(0) / elected.sum(0).clamp(min=1)
