"""The reference model of preference training: the base, the adapter as it was at the start, or numbers in a file.

There is never a second model. The base is the model with its adapter off; the start is a frozen copy of the adapter
under another name, active for a forward pass; and either's log-probabilities can be computed once and kept in a file,
which is bound to everything they depend on, so that a stale one is an error and not a silent other training.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..data.batch import AnswerBatch, sent
from ..errors import InputError
from ..files import write_tensors
from ..lora.adapter import adapter_layers, adapters_of, using
from ..lora.peft_files import adapter_state, load_adapter_state
from ..models.protocol import CausalLM
from .evaluate import evaluating
from .losses.tokens import answer_scores

FORMAT = "fourbit reference log-probabilities 1"


class Reference(Protocol):
    """Something that knows what the reference model thinks of answers."""

    def logps(self, batch: AnswerBatch) -> Tensor:
        """Log-probability of each answer's tokens, [A, P, L] on the model's device, without gradient."""


class LiveReference:
    """The model itself with its adapter off (`start` None), or with its frozen adapter of the name `start`."""

    def __init__(self, model: CausalLM, start: str | None) -> None:
        self.model, self.start = model, start

    def logps(self, batch: AnswerBatch) -> Tensor:
        """As Reference: dropout off, no graph, and the model afterwards as it was before."""
        with evaluating(self.model), using(self.model, *self._names):
            return answer_scores(self.model, batch).logps

    @property
    def _names(self) -> list[str]:
        return [] if self.start is None else [self.start]

    def state(self) -> dict[str, Tensor]:
        """The frozen adapter's live tensors by name, for a checkpoint; nothing when the base is the reference."""
        return {} if self.start is None else adapter_state(self.model, self.start)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        if self.start is not None:
            load_adapter_state(self.model, state, self.start)


class CachedReference:
    """Log-probabilities computed before, for every example of a run.

    flat: [all answers' tokens] fp32 on the CPU, answers of example 0 first. lengths: tokens of each answer, example
    by example.
    """

    def __init__(self, flat: Tensor, lengths: Sequence[Sequence[int]], device: torch.device) -> None:
        self.flat, self.device = flat, device
        counts = torch.tensor([list(row) for row in lengths])  # [examples, A]
        ends = counts.flatten().cumsum(0).view(counts.shape)
        self.starts = ends - counts

    def logps(self, batch: AnswerBatch) -> Tensor:
        """As Reference."""
        here = self.starts[list(batch.numbers)].T.unsqueeze(-1)  # [A, P, 1]
        place = torch.arange(batch.slots.shape[-1])
        there = place < batch.lengths.unsqueeze(-1)  # [A, P, L]
        found = self.flat[torch.where(there, here + place, 0)]
        return sent(torch.where(there, found, 0.0), self.device)


def starts_at_base(model: nn.Module) -> bool:
    """Whether the adapter changes nothing yet."""
    return all(part.is_idle() for part in adapters_of(model).values())


def fill_cache(reference: LiveReference, batches: Sequence[AnswerBatch], lengths: Sequence[Sequence[int]]) -> Tensor:
    """The reference's log-probabilities for all examples, flat as CachedReference takes them."""
    flat = torch.empty(sum(map(sum, lengths)))
    cache = CachedReference(flat, lengths, torch.device("cpu"))
    for batch in batches:
        logps = reference.logps(batch).to("cpu", torch.float32)
        for p, number in enumerate(batch.numbers):
            for a, start in enumerate(cache.starts[number].tolist()):
                length = lengths[number][a]
                flat[start : start + length] = logps[a, p, :length]
    return flat


def read_cache(path: Path, parts: dict[str, str], size: int) -> Tensor:
    """The `size` numbers in the file. Raises InputError for a file that is none, is broken, or was made from anything
    else than `parts`, naming what."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"reference_cache {path} is no file of reference log-probabilities: give another name")
            made_from = json.loads(metadata["parts"])
            stale = [name for name, value in parts.items() if made_from.get(name) != value]
            if stale:
                raise InputError(
                    f"reference_cache {path} is stale: it was computed with another {', another '.join(stale)}. "
                    "Delete it to compute it anew, or give another name"
                )
            flat: Tensor = file.get_tensor("logps")
    except (SafetensorError, OSError, KeyError, AttributeError, json.JSONDecodeError) as problem:
        raise InputError(f"reference_cache {path} is no valid file of log-probabilities: {problem}") from None
    if flat.shape != (size,) or flat.dtype != torch.float32 or not bool(torch.isfinite(flat).all()):
        raise InputError(
            f"reference_cache {path} must hold {size} finite fp32 numbers, and holds {tuple(flat.shape)} {flat.dtype}: "
            "it is damaged; delete it to compute it anew"
        )
    return flat


def write_cache(path: Path, flat: Tensor, parts: dict[str, str]) -> None:
    """Write the file, whole or not at all. Raises DiskError when the disk refuses."""
    metadata = {"format": FORMAT, "parts": json.dumps(parts, sort_keys=True)}
    write_tensors(path, {"logps": flat}, f"reference_cache {path.name}", metadata)


def cache_parts(model: CausalLM, start: str | None, data: str) -> dict[str, str]:
    """What reference log-probabilities depend on, each as a hash: data (tokens and masks, so template and lengths
    too), base (weights and configuration), adapter, and the dtype that is computed in."""
    adapter = {id(p) for layer in adapter_layers(model).values() for p in layer.adapters.parameters()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    # A layer's weights are the same ones whether an adapter sits on it or not.
    base = {name.replace(".base.", "."): tensor for name, tensor in tensors if id(tensor) not in adapter}
    parts = {} if start is None else adapters_of(model, start)
    frozen = {} if start is None else adapter_state(model, start)
    scales = json.dumps([[path, part.peft_fields()] for path, part in sorted(parts.items())])
    dtype = next(p.dtype for p in model.parameters() if id(p) not in adapter)
    return {
        "data": data,
        "base": hashlib.sha256((_hash(base) + json.dumps(model.settings())).encode()).hexdigest(),
        "adapter": hashlib.sha256((_hash(frozen) + scales).encode()).hexdigest(),
        "dtype": str(dtype),
    }


def _hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cached(
    live: LiveReference, path: Path, data: str, batches: Sequence[AnswerBatch], lengths: Sequence[Sequence[int]]
) -> CachedReference:
    """The reference's log-probabilities from the file, which is made first where it is not there.

    data: a hash of the examples; batches: all of them; lengths: tokens of each example's answers.
    """
    parts = cache_parts(live.model, live.start, data)
    if path.exists():
        flat = read_cache(path, parts, sum(map(sum, lengths)))
    else:
        flat = fill_cache(live, batches, lengths)
        write_cache(path, flat, parts)
    return CachedReference(flat, lengths, next(live.model.parameters()).device)
