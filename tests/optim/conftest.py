"""Parameters with gradients, drawn from a seed; and what tests of kernels run under."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parent))  # for simulated_device

_file = Path(__file__).parents[1] / "kernels" / "conftest.py"
_specification = importlib.util.spec_from_file_location("kernels_conftest", _file)
assert _specification and _specification.loader
_kernels = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(_kernels)
aot, guards = _kernels.aot, _kernels.guards
bf16_converted_as_on_gpus = _kernels.bf16_converted_as_on_gpus
bounds_of_loops_as_integers = _kernels.bounds_of_loops_as_integers


def parameters(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    """Normal weights; equal for equal shapes and seed, whatever the dtype but for its rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def give_gradients(*lists: Sequence[nn.Parameter], seed: int, missing: Sequence[int] = ()) -> None:
    """Corresponding parameters get equal gradients, up to their dtype's rounding; those at `missing` none."""
    generator = torch.Generator().manual_seed(seed)
    for i, same in enumerate(zip(*lists, strict=True)):
        gradient = torch.randn(same[0].shape, generator=generator, dtype=torch.float64)
        for p in same:
            p.grad = None if i in missing else gradient.to(p.device, p.dtype)


def distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Norm of the difference over the norm of theirs, all tensors as one vector, in float64."""
    a, b = (torch.cat([t.detach().cpu().double().reshape(-1) for t in tensors]) for tensors in (ours, theirs))
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The functions above."""
    return SimpleNamespace(parameters=parameters, give_gradients=give_gradients, distance=distance)
