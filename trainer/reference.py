"""A file of the reference's log-probabilities, computed once and bound to everything they depend on.

A stale one is an error and not a silent other training.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.batch import Batch, sent
from ..errors import InputError
from ..files import write_tensors
from ..lora.adapter import adapter_layers, adapters_of
from ..lora.peft_files import adapter_state
from ..models.protocol import CausalLM

FORMAT = "fourbit reference log-probabilities 1"


class CachedReference:
    """Log-probabilities computed before, for every example of a run.
    flat: [all answers' tokens] fp32 on the CPU, answers of example 0 first. lengths: tokens of each answer, example by
    example."""

    def __init__(self, flat: Tensor, lengths: Sequence[Sequence[int]]) -> None:
        self.flat = flat
        counts = torch.tensor(lengths)  # [examples, A]
        self.starts = counts.flatten().cumsum(0).view(counts.shape) - counts

    def _own(self, batch: Batch) -> list[Tensor]:
        """Of each answer of a batch its part of `flat`: those of the first answers, then those of the others."""
        assert batch.lengths is not None  # its answers are rated
        starts = self.starts[list(batch.numbers)].T.flatten().tolist()
        return [self.flat[at : at + n] for at, n in zip(starts, batch.lengths.flatten().tolist(), strict=True)]

    def logps(self, batch: Batch, device: torch.device) -> Tensor:
        """Log-probability of each answer's tokens, [A, P, L] on this device, zero past an answer's end."""
        return sent(pad_sequence(self._own(batch), batch_first=True).unflatten(0, (-1, batch.examples)), device)

    def fill(self, batch: Batch, logps: Tensor) -> None:
        """Take over log-probabilities [A, P, L] of a batch."""
        for own, found in zip(self._own(batch), logps.cpu().flatten(0, 1), strict=True):
            own.copy_(found[: len(own)])


def cached(
    path: Path,
    parts: Mapping[str, str],
    batches: Sequence[Batch],
    lengths: Sequence[Sequence[int]],
    compute: Callable[[Batch], Tensor],
) -> CachedReference:
    """The log-probabilities in the file, which is made first, by `compute`, where it is not there.
    parts: what they depend on; batches: all examples; lengths: tokens of each example's answers."""
    size = sum(map(sum, lengths))
    if path.exists():
        return CachedReference(read_cache(path, parts, size), lengths)
    found = CachedReference(torch.full((size,), math.nan), lengths)  # no hole is read as a number
    for batch in batches:
        found.fill(batch, compute(batch))
    metadata = {"format": FORMAT, "parts": json.dumps(dict(parts), sort_keys=True)}
    write_tensors(path, {"logps": found.flat}, f"reference_cache {path.name}", metadata)
    return found


def read_cache(path: Path, parts: Mapping[str, str], size: int) -> Tensor:
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


def cache_parts(model: CausalLM, adapters: Sequence[str], data: str) -> dict[str, str]:
    """What reference log-probabilities depend on, each as a hash: data (tokens and masks, so template and lengths
    too), base (weights and configuration), the adapters of these names, and the dtype that is computed in."""
    adapter = {id(p) for layer in adapter_layers(model).values() for p in layer.adapters.parameters()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    # A layer's weights are the same ones whether an adapter sits on it or not.
    base = {name.replace(".base.", "."): tensor for name, tensor in tensors if id(tensor) not in adapter}
    frozen, fields = dict[str, Tensor](), []
    for name in adapters:
        frozen |= adapter_state(model, name)
        fields += [[path, part.peft_fields()] for path, part in sorted(adapters_of(model, name).items())]
    return {
        "data": data,
        "base": hashlib.sha256((_hash(base) + json.dumps(model.settings())).encode()).hexdigest(),
        "adapter": hashlib.sha256((_hash(frozen) + json.dumps(fields)).encode()).hexdigest(),
        "dtype": str(model.dtype),
    }


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
