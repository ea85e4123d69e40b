"""Where kernels start: nowhere but on the kernels' path, with tensors of one device, and none that no test compiles.

Fake tensors stand for a GPU's: each launch is heard and nothing runs (kernels/launch.py).
"""

import importlib.util
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fourbit
from fourbit.kernels import lora_linears4bit
from fourbit.kernels.chunked_head import TokenScorer
from fourbit.kernels.dispatch import force_path
from fourbit.kernels.launch import launch
from fourbit.kernels.rms_norm import rms_norm
from fourbit.kernels.rope import rope
from fourbit.kernels.swiglu import geglu, swiglu
from fourbit.kernels.weight4bit import Weight4bit
from fourbit.nf4 import dequantize
from fourbit.optim import AdamW, Lion

pytest.importorskip("triton")
PACKAGE, TESTS = Path(fourbit.__file__).resolve().parent, Path(__file__).resolve().parents[1]
KERNELS = {
    name
    for file in PACKAGE.glob("*/*_triton.py")
    for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
}


class Heard(TorchDispatchMode):
    """The names of the kernels that would have been launched."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "fourbit::launched":
            self.kernels.add(args[0])
        return func(*args, **kwargs or {})


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def every_op(path: str) -> None:
    """All that may launch a kernel, forward and backward, few rows and many."""
    x, angles = empty(40, 64, grad=True), empty(1, 10, 1, 8)
    outputs = [rms_norm(x, empty(64), 1e-5), swiglu(x, x), geglu(x, x), rope(x.view(1, 10, 16, 16), angles, angles)]
    codes, blocks = empty(1024, dtype=torch.uint8), empty(32, dtype=torch.uint8)
    weight = Weight4bit(codes, blocks, empty(1, dtype=torch.float32), empty(1, dtype=torch.float32), (32, 64))
    outputs.append(dequantize(weight, torch.bfloat16))
    A, B = empty(4, 64, dtype=torch.float32, grad=True), empty(32, 4, dtype=torch.float32, grad=True)
    for rows in (3, 40):
        seed = empty(dtype=torch.int64)
        outputs += lora_linears4bit(x[:rows], [weight], [None], [A], [B], [1.0], 0.1, seed)
    TokenScorer(empty(40, dtype=torch.int64), 64)(empty(40, 64), slice(0, 40), True)
    torch.autograd.backward([y.sum() for y in outputs if y.requires_grad])
    for make in (AdamW, Lion):
        for bits in (8, 32):
            parameter = nn.Parameter(empty(64, 64))
            parameter.grad = torch.empty_like(parameter)
            optimizer = make([parameter], bits=bits, min_8bit_size=0, max_grad_norm=1.0)
            with nullcontext() if path == "triton" else pytest.raises(DataDependentOutputException):  # the host looks
                optimizer.step()


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_no_kernel_starts_on_another_path(path: str) -> None:
    """GPUs below compute capability 8.0 are on "reference" (test_matmul4bit_triton.py), whatever the op."""
    with force_path(path), FakeTensorMode(), Heard() as heard:
        every_op(path)
    assert heard.kernels == (KERNELS if path == "triton" else set())


def test_every_kernel_is_compiled_for_its_registers_and_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the scenarios of some test file, for each architecture: see aot.py."""
    monkeypatch.setattr("fourbit.kernels.launch.is_fake", lambda x: x.is_meta)
    with force_path("triton"), Heard() as heard:
        for file in TESTS.glob("*/test_*.py"):
            if "\nSCENARIOS = {" in file.read_text():
                specification = importlib.util.spec_from_file_location(f"of_{file.stem}", file)
                assert specification and specification.loader
                module = importlib.util.module_from_spec(specification)
                specification.loader.exec_module(module)
                for run in module.SCENARIOS.values():
                    run()
    assert heard.kernels == KERNELS


def test_tensors_of_two_devices_are_refused_before_a_kernel_reads_an_address() -> None:
    class Never:
        __name__ = "some_kernel"

        def __getitem__(self, grid: Any) -> Any:
            raise AssertionError("launched")

    here = torch.ones(2)
    with pytest.raises(ValueError, match=r"some_kernel takes tensors of one device, got cpu and meta"):
        launch(Never(), (1,))(here, 3, (here, None, empty(2)), BLOCK=2)
    with force_path("triton"):
        for call in (lambda: swiglu(here, here.to("meta")), lambda: rms_norm(here, here.to("meta"), 1e-5)):
            with pytest.raises(ValueError, match=r"takes tensors of one device, got cpu and meta"):
                call()
