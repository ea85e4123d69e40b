"""A file of the reference's log-probabilities, computed once and bound to everything they depend on.

A stale one is an error and not a silent other training.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.batch import Batch, sent
from ..errors import InputError, shown
from ..files import write_tensors
from ..lora.identity import hashed
from ..models.protocol import CausalLM
from ..settings import checked
from .resume import adapters_hash, base_hash

FORMAT = "fourbit reference log-probabilities 2"


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
    metadata = {"format": FORMAT, "parts": json.dumps(dict(parts), sort_keys=True), "sha256": hashed({"": found.flat})}
    write_tensors(path, {"logps": found.flat}, f"reference_cache {path.name}", metadata)
    return found


def read_cache(path: Path, parts: Mapping[str, str], size: int) -> Tensor:
    """The `size` numbers in the file. Raises InputError for a file that is none, is broken, or was made from anything
    else than `parts`, naming what."""
    if not path.is_file():
        raise InputError(f"reference_cache {path} is no valid file of log-probabilities, but a folder, pipe or device")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if (form := metadata.get("format")) != FORMAT:
                raise InputError(
                    f"reference_cache {path} is no file of reference log-probabilities as this fourbit writes them "
                    f"(format {FORMAT!r}, got {shown(form)}): give another name"
                )
            made_from = checked(f"reference_cache {path}: parts", json.loads(metadata["parts"]), dict[str, str])
            stale = [name for name, value in parts.items() if made_from.get(name) != value]
            if stale:
                raise InputError(
                    f"reference_cache {path} is stale: it was computed with another {', another '.join(stale)}. "
                    "Delete it to compute it anew, or give another name"
                )
            flat: Tensor = file.get_tensor("logps")
    except InputError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as problem:
        raise InputError(f"reference_cache {path} is no valid file of log-probabilities: {problem}") from None
    fits = flat.shape == (size,) and flat.dtype == torch.float32 and bool(torch.isfinite(flat).all())
    if not fits or hashed({"": flat}) != metadata.get("sha256"):
        raise InputError(
            f"reference_cache {path} must hold {size} finite fp32 numbers of the SHA-256 that it names, and holds "
            f"{tuple(flat.shape)} {flat.dtype}: it is damaged; delete it to compute it anew"
        )
    return flat


def cache_parts(model: CausalLM, adapters: Sequence[str], data: str) -> dict[str, str]:
    """What reference log-probabilities depend on, each as a hash: data (tokens and masks, so template and lengths
    too), base (weights and configuration), the adapters of these names, and the dtype that is computed in."""
    adapter, dtype = adapters_hash(model, adapters), str(model.dtype)
    return {"data": data, "base": base_hash(model), "adapter": adapter, "dtype": dtype}
