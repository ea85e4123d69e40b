"""Adapters through their files, without a base: norms, ranks, energy; distances; smaller ones, those of two models.

A change s B A [out, in] is never made dense: with the thin QRs B = Q R and A^T = P T its singular values are those of
s R T^T [r, r], all in float64.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import COUNTS, float_tensors, misfits, read_json, tensor_metadata, write_tensors, write_text
from .identity import KEY
from .init import Weights, leading
from .linear4bit import is_conv1d
from .lora import LoRA, LoRAEmbedding, scale_of
from .peft_config import read_config, write_config
from .peft_files import CONFIG, LARGEST_CONFIG, PREFIX, WEIGHTS, adapter_file
from .targets import linear_layers

DEAD = 1e-4  # of the largest layer's norm: a layer below it changes nothing to speak of
SMALL = 1e-3  # of a weight's norm: how far what is no linear layer may differ between two models, and be left out
Changes = dict[str, tuple[Tensor, Tensor, tuple[str, str]]]  # path -> A [r, in] and s B [out, r], float64; their keys
Table = dict[str, dict[str, float]]  # of each layer


def read_files(folder: str | Path, plain: bool = True) -> tuple[dict[str, Any], Changes, dict[str, Tensor]]:
    """The config of an adapter's folder, its changes, all its tensors. InputError for what is broken, and, if it must
    be `plain`, for what is not LoRA of matrices alone."""
    config, weights = (adapter_file(Path(folder), name) for name in (CONFIG, WEIGHTS))
    raw, tensors, changes = read_json(config, LARGEST_CONFIG), float_tensors(weights, COUNTS), Changes()
    lora = read_config(raw, f"'{config}'").lora
    for a, b in (LoRA.keys, LoRAEmbedding.keys):
        for key in sorted(key for key in tensors if key.endswith(f".{a}")):
            path, keys = key.removeprefix(PREFIX).removesuffix(f".{a}"), (key, key.removesuffix(a) + b)
            A, B, rank = tensors[key], tensors.get(keys[1], torch.empty(0)), lora.rank_at(path)
            experts = bool(lora.target_parameters) and A.ndim == 2 and len(A) > rank and not len(A) % rank
            if (A.ndim > 2 and not plain) or experts:  # a matrix for each of these
                continue
            fits = A.ndim == B.ndim == 2 and len(A) == B.shape[1] == rank
            if not fits or not (A.isfinite().all() and B.isfinite().all()):
                raise InputError(f"'{weights}': {key} and its B must be finite matrices of rank {rank}")
            changes[path] = A.double(), scale_of(lora.alpha_at(path), rank, lora.rslora) * B.double(), keys
    if plain and (not changes or sum(".lora_" in key for key in tensors) > 2 * len(changes)):
        raise InputError(f"'{weights}': only plain LoRA is compared and resized by its file, and this is {lora.kind}")
    return raw, changes, tensors


def show(folder: str | Path) -> tuple[str, str | None, Table]:
    """The kind of the adapter in a folder, its base's name and its layers, as `report`; the norm of each tensor that is
    no matrix of LoRA stands beside, under its own name."""
    raw, changes, tensors = read_files(folder, plain=False)
    config, layers = read_config(raw, f"'{folder}'").lora, report(changes) if changes else Table()
    for key in tensors.keys() - {key for *_, keys in changes.values() for key in keys}:
        path, _, name = key.removeprefix(PREFIX).rpartition(".")
        layers.setdefault(path, {})[f"|{name}|"] = tensors[key].norm(dtype=torch.float64).item()
    kind = "rslora" if config.rslora and config.kind == "lora" else config.kind
    return kind, raw.get("base_model_name_or_path"), dict(sorted(layers.items()))


def factored(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, r], the singular values [r] and V [r, in] of B A."""
    (Q, R), (P, T) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, V = torch.linalg.svd(R @ T.T, full_matrices=False)
    return Q @ U, S, V @ P.T


def report(changes: Changes) -> Table:
    """Of each layer: rank, Frobenius norm, share of all squared norms, effective rank (Roy and Vetterli 2007: exp of
    the entropy of the singular values over their sum), how many hold 99% of its energy, whether it is dead (1)."""
    spectra, found = {path: factored(A, B)[1] for path, (A, B, _) in changes.items()}, Table()
    norms = {path: S.norm().item() for path, S in spectra.items()}
    total, most = sum(norm**2 for norm in norms.values()) or 1.0, max(norms.values())
    for path, S in spectra.items():
        p, energy, norm = S / S.sum().clamp(min=1e-300), S.square().cumsum(0), norms[path]
        effective = torch.special.entr(p).sum().exp().item() if norm else 0.0
        found[path] = {"rank": len(S), "norm": norm, "energy": norm**2 / total, "effective_rank": effective}
        found[path] |= {
            "rank_99": int((energy < 0.99 * energy[-1]).sum()) + bool(norm),
            "dead": int(norm <= DEAD * most),
        }
    return found


def difference(a: Changes, b: Changes) -> Table:
    """Of each layer that either has: both norms, that of A - B, their cosine. InputError for sizes of two bases."""
    found = Table()
    for path in sorted(a.keys() | b.keys()):
        (A, B, _), (C, D, _) = a.get(path) or b[path], b.get(path) or a[path]
        if (A.shape[1], len(B)) != (C.shape[1], len(D)):
            raise InputError(f"'{path}' has other sizes in the two adapters: compare adapters of one base")
        B, D = B * (path in a), D * (path in b)
        pairs = {"a": (A, B), "b": (C, D), "difference": (torch.cat([A, C]), torch.cat([B, -D], 1))}
        found[path] = sizes = {name: factored(*pair)[1].norm().item() for name, pair in pairs.items()}
        sizes["cosine"] = ((B.T @ D) * (A @ C.T)).sum().item() / (sizes["a"] * sizes["b"] or 1.0)
    return found


def resize(folder: str | Path, rank: int, out: Path) -> Table:
    """Write the adapter in `folder` with layers of at most that rank, the nearest (Eckart and Young 1936), but no
    start, else as it is; of each layer its new rank and |change - kept| / |change|. InputError if none is larger."""
    raw, changes, tensors = read_files(folder)
    if (largest := max(len(A) for A, _, _ in changes.values())) <= rank:
        raise InputError(f"rank must be below {largest}, the largest of this adapter's layers, got {rank}")
    found = Table()
    for path, (A, B, (a, b)) in changes.items():
        (U, S, V), r = factored(A, B), min(rank, len(A))
        tensors[a] = (S[:r].sqrt()[:, None] * V[:r]).to(tensors[a].dtype)
        tensors[b] = (U[:, :r] * S[:r].sqrt()).to(tensors[b].dtype)
        found[path] = {"rank": r, "error": (S[r:].norm() / S.norm().clamp(min=1e-300)).item()}
    own = {f"^{re.escape(path)}": layer["rank"] for path, layer in found.items() if layer["rank"] != rank}
    raw |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": own, "alpha_pattern": own}
    write_tensors(out / WEIGHTS, tensors, "the adapter", tensor_metadata(Path(folder) / WEIGHTS) | {f"{KEY}start": ""})
    write_text(out / CONFIG, json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    return found


@torch.no_grad()
def extract(model: nn.Module, base: Mapping[str, Tensor], tuned: Weights, rank: int, out: Path, name: str) -> Table:
    """Write the adapter of at most that rank nearest to what `tuned` changed of `base`, weights of `model` by name;
    `name`: what its files call the base. Of each linear layer that differs rank and |change - kept| / |change|; of all
    else |change| / |weight|, at most SMALL, which is left out. InputError for more, two kinds of model, no difference.
    Memory is that of a few dense weights; the model may be on meta."""
    layers, found, parts, rest = linear_layers(model), Table(), dict[str, LoRA](), {*base}
    for key, new in tuned:
        old = base.get(key, torch.empty(0))
        if wrong := misfits({key: old.shape}, {key: new.shape}):
            raise InputError(f"the two are not one dense model, tuned. {wrong}")
        rest.remove(key)
        if torch.equal(old, new):
            continue
        path, change = key.removesuffix(".weight"), new.float() - old.float()
        size, layer = change.norm(dtype=torch.float64).item(), layers.get(path)
        if layer is None:
            found[key] = {"left_out": (share := size / max(old.norm(dtype=torch.float64).item(), 1e-300))}
            if share > SMALL:
                what = f"{key!r}, no linear layer's, differs by {share:.1%}"
                raise InputError(f"{what}, which LoRA cannot change: keep the tuned model whole")
            continue
        change = change.T if is_conv1d(layer) else change
        U, S, V = leading(change, min(rank, *change.shape), 8)
        parts[path] = LoRA(layer, 1, 1.0).of_factors(S.sqrt()[:, None] * V, U * S.sqrt())
        found[path] = {"rank": len(S), "error": (change - (U * S) @ V).norm(dtype=torch.float64).item() / size}
    if rest or not parts:
        what = f"lacks {min(rest)}" if rest else "differs in no linear layer"
        raise InputError(f"the tuned model {what}: there is nothing to extract")
    state = {f"{PREFIX}{path}.{key}": tensor for path, part in parts.items() for key, tensor in part.state().items()}
    write_tensors(out / WEIGHTS, state, "the adapter")
    write_text(out / CONFIG, write_config(model, parts, name))
    return found
