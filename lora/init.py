"""Starts of LoRA that look at weights or data: PiSSA, OLoRA, LoftQ, EVA.

The first three train a part s B0 A0 of the weight W. Elsewhere the base becomes the rest, W - s B0 A0, and no other
adapter fits it. Here it goes on being W: a dense one is not touched, 4 bits become Q(W - s B0 A0) + s B0 A0
(`NF4LowRank`), nearer to W than Q(W). The change is s (B A - B0 A0), in files a plain LoRA of rank 2r with [B, -B0] and
[A; A0], exact on the dense base. In 4 bits it belongs to those codes, which are made again when it is loaded.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.dequantize4bit import dequantize
from ..kernels.quantize4bit import quantize
from ..kernels.weight4bit import Weight4bit
from .active import evaluating
from .adapter import Adapter, wide
from .config import LoRAConfig
from .layer import adapter_layers
from .linear4bit import NF4Linear, NF4LowRank
from .lora import LoRA, scale_of
from .targets import base_modules

MORE = 8  # vectors that a randomised SVD takes beyond the rank
RHO = 2  # EVA: how many times its rank a layer may get
Weights = Iterable[tuple[str, Tensor]]  # names and dense weights, as the model's files have them
Tell = Callable[[str, float, float], object]


def leading(matrix: Tensor, count: int, steps: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, count], S [count], V [count, n]: the leading singular part of a matrix, exact, or by so many steps of a
    randomised subspace iteration (Halko et al. 2011, algorithm 4.4), which draws from a seed of its own."""
    if steps is None or count + MORE >= min(matrix.shape):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :count], S[:count], Vh[:count]
    with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix, count + MORE, steps)
    return U[:, :count], S[:count], V.mT[:count]


def begin(W: Tensor, part: LoRA, start: str, base: nn.Module) -> tuple[Tensor, Tensor, Weight4bit | None]:
    """A [r, in] and B [out, r] for an fp32 weight W [out, in], in the part's dtype, and codes for a base in 4 bits.
    "pissa": the leading singular part (Meng et al. 2024, equations 2 to 4), "pissa-N" by N randomised steps; "olora":
    of W = Q R (Buyukakyuz 2024, algorithm 1); codes Q(W - s B A). "loftq-T": T times codes of W - s B A, from B A = 0,
    then B A from what they leave of W (Li et al. 2023, algorithm 1).
    """
    how, _, number = start.partition("-")
    (A, B), stored = (torch.zeros_like(each) for each in (part.lora_A, part.lora_B)), None
    for _ in range(int(number or 1) if how == "loftq" else 1):
        stored = codes(W, A, B, part.scale, base) if how == "loftq" else None
        rest = W if stored is None else W - dequantize(stored)
        if how == "olora":
            Q, R = torch.linalg.qr(rest)
            pair = R[: part.rank], Q[:, : part.rank]
        else:
            U, S, V = leading(rest / part.scale, part.rank, int(number) if number and how == "pissa" else None)
            pair = S.sqrt()[:, None] * V, U * S.sqrt()
        A, B = (each.to(part.lora_A.dtype) for each in pair)
    return A, B, stored or codes(W, A, B, part.scale, base)


def codes(W: Tensor, A: Tensor, B: Tensor, scale: float, base: nn.Module) -> Weight4bit | None:
    """Q(W - scale B A) in the form of the base, if that is in 4 bits."""
    rest = W - scale * (B.float().contiguous() @ A.float().contiguous())
    return quantize(rest, base.quant_type, base.blocksize, base.double_quant) if isinstance(base, NF4Linear) else None


@torch.no_grad()
def started(
    model: nn.Module, parts: Mapping[str, Adapter], start: str, dense: Weights | None, tell: Tell, saved: bool = False
) -> tuple[dict[str, Adapter], dict[nn.Module, nn.Module]]:
    """The parts with that start, and what has to take the place of each 4-bit base: one that is nearer to its weight.
    saved: the parts are a file's, of rank 2r, and become what was trained. Errors, and `tell`, as `attach`."""
    modules, taken, new = base_modules(model), adapter_layers(model), dict(parts)
    bases = dict[nn.Module, nn.Module]()  # not one by one: a later layer's weight may be missing
    mine = {path: part for path, part in parts.items() if isinstance(part, LoRA)}
    packed = {f"{path}.weight": path for path in mine if isinstance(modules[path], NF4Linear)}
    for path, part in mine.items():
        if part.rank > (most := min(cast(Tensor, modules[path].weight).shape) * (1 + saved)):
            raise InputError(f"start={start!r} takes a rank of at most {most} on '{path}', as its sizes are: lower it")
        if f"{path}.weight" not in packed and start.startswith("loftq"):
            raise InputError(f"start={start!r} makes up for 4 bits, and '{path}' is dense: take start='pissa'")
        if f"{path}.weight" in packed and (path in taken or isinstance(modules[path], NF4LowRank)):
            raise InputError(f"start={start!r} makes codes of '{path}' anew, where an adapter is: load the model again")
    if packed and dense is None:
        raise InputError(f"start={start!r} needs the dense weights of 4-bit layers: dense=fourbit.read_weights(FOLDER)")
    plain = [] if saved else [path for path in mine if path not in packed.values()]
    own = ((path, wide(cast(Tensor, modules[path].weight), modules[path])) for path in plain)
    given = ((packed.pop(name), tensor) for name, tensor in dense or () if name in packed) if packed else ()
    for path, tensor in chain(own, given):
        base, part = modules[path], mine[path]
        W = tensor.t() if isinstance(base, NF4Linear) and base.conv1d else tensor  # of a file
        W = W.to(part.lora_A.device, torch.float32).contiguous()
        if (len(part.lora_B), part.lora_A.shape[1]) != W.shape or not W.isfinite().all():
            raise InputError(f"the dense weight of '{path}' must be finite and of its shape, got {list(W.shape)}")
        if saved:
            (A, A0), (B, B0) = part.lora_A.detach().chunk(2), part.lora_B.detach().chunk(2, 1)
            part = part.of_factors(A, B, (A0, -B0))
            stored = begin(W, part, start, base)[2] if "loftq" in start else codes(W, A0, -B0, part.scale, base)
        else:
            A, B, stored = begin(W, part, start, base)
            part = part.of_factors(A, B, (A, B))
        new[path] = part
        if stored is not None and isinstance(base, NF4Linear):
            part.start, A0, B0 = start, cast(Tensor, part.lora_A0).float(), cast(Tensor, part.lora_B0).float()
            better = NF4LowRank.beside(base, stored, A0, part.scale * B0)
            tell(path, *((W - layer.dequantize()).norm().item() / W.norm().item() for layer in (better, base)))
            bases[base] = better
    if packed:
        raise InputError(f"dense lacks {', '.join([*packed][:4])} ({len(packed)}): give this model's own dense weights")
    return new, bases


class Directions:
    """The leading directions of rows that come batch by batch, around their mean (Ross et al. 2008, section 2.1)."""

    def __init__(self, most: int) -> None:
        self.most, self.count, self.total, self.mean = most, 0, 0.0, torch.zeros(())  # mean: [in]
        self.rows = torch.zeros(0)  # [most, in]: a direction times its singular value

    def add(self, x: Tensor) -> None:  # [..., in]
        x = x.detach().reshape(-1, x.shape[-1]).float()
        away, old = x.mean(0) - self.mean.to(x.device), self.rows if self.count else x[:0]
        new = torch.cat([x - x.mean(0), math.sqrt(self.count * len(x) / (self.count + len(x))) * away[None]])
        self.total += new.square().sum().item()
        _, S, V = leading(torch.cat([old, new]), self.most, 4)
        self.rows, self.count = S[:, None] * V, self.count + len(x)
        self.mean = x.mean(0) - away * (1 - len(x) / self.count)


@torch.no_grad()
def eva(
    model: nn.Module, config: LoRAConfig, paths: list[str], data: Iterable[Any] | None
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """`config` with ranks that go where they explain most of the inputs' variance, at most RHO times its own to each,
    and so many directions [rank, in] for A (Paischer et al. 2024, "EVA", algorithm 1). Their sum and scales stay."""
    modules, ranks = base_modules(model), {path: config.rank_at(path) for path in paths}
    seen = {path: Directions(RHO * rank) for path, rank in ranks.items()}
    hooks = [modules[p].register_forward_pre_hook(lambda _, args, own=seen[p]: own.add(args[0])) for p in paths]
    try:
        with evaluating(model):
            for batch in data or ():
                model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if lost := [path for path in paths if not seen[path].count]:
        raise InputError(f"start='eva' needs data, batches that the model is called with; none reached '{lost[0]}'")
    sizes = {path: own.rows.norm(dim=1) for path, own in seen.items()}
    offers = [(-(s * s).item() / seen[path].total, path) for path in paths for s in sizes[path] if s > 0]
    kept = [path for _, path in sorted(offers, key=lambda offer: offer[0])[: sum(ranks.values())]]
    chosen, alphas = {path: kept.count(path) for path in paths if path in kept}, dict[str, float]()
    for path, rank in chosen.items():
        scale = scale_of(config.alpha_at(path), ranks[path], config.rslora)
        alphas[f"^{re.escape(path)}"] = scale / scale_of(1.0, rank, config.rslora)
    config = replace(config, rank_pattern=dict(zip(alphas, chosen.values(), strict=True)), alpha_pattern=alphas)
    return config, {path: seen[path].rows[:rank] / sizes[path][:rank, None] for path, rank in chosen.items()}
