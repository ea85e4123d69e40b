"""bitsandbytes as the oracle of the 4-bit format, guards around buffers, the compiler for GPUs that are not there."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Oracle:
    """bitsandbytes' CPU quantiser, with what must be known to read its answers."""

    def __init__(self) -> None:
        import bitsandbytes.functional  # here, not above: it takes two seconds, and most kernels have other oracles

        self.functional: Any = bitsandbytes.functional

    def quantize(self, weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
        packed, state = self.functional.quantize_4bit(weight, quant_type=quant_type, blocksize=blocksize)
        return packed, state.absmax

    def dequantize(
        self, packed: Tensor, absmax: Tensor, n: int, quant_type: str, blocksize: int, dtype: torch.dtype
    ) -> Tensor:
        """Flat [n], decoded as one row of whole blocks.

        Its AVX-512 decoder takes wrong scales where rows do not end with a block (0.50.2: errors as large as the
        weights). For blocks from 2048 up it runs compiled PyTorch, which the stance keeps from starting a compiler.
        """
        padded = packed.new_zeros(absmax.numel() * blocksize // 2, 1)
        padded[: packed.numel()] = packed
        decode = torch.ops.bitsandbytes.dequantize_4bit.default
        with torch.compiler.set_stance("force_eager"):
            row: Tensor = decode(padded, absmax, blocksize, quant_type, (1, 2 * padded.numel()), dtype)
        return row.view(-1)[:n]


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="session")
def aot() -> ModuleType:
    """The module aot.py, which compiles for GPUs that are not there."""
    pytest.importorskip("triton")
    specification = importlib.util.spec_from_file_location("aot", Path(__file__).with_name("aot.py"))
    assert specification and specification.loader
    module = sys.modules["aot"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(params=["sm_90", pytest.param("every architecture", marks=pytest.mark.slow)])
def costs(aot: ModuleType, request: pytest.FixtureRequest) -> list[Any]:
    """What the SCENARIOS of the test's file cost, once compiled; in CI on one architecture, they take seconds each."""
    capabilities = (90,) if request.param == "sm_90" else aot.CAPABILITIES
    made: list[Any] = aot.costs_of(str(request.path), capabilities)
    return made


class Guards:
    """Memory beside buffers, which no kernel may touch."""

    def __init__(self) -> None:
        self.stretches: list[Tensor] = []

    def around(self, tensor: Tensor, shift: int = 0) -> Tensor:
        """The same values, `shift` elements off alignment, between stretches of NaN, or of 255 for integers."""
        margin = 256
        memory = torch.full((tensor.numel() + 2 * margin + shift,), 255, dtype=tensor.dtype, device=DEVICE)
        if tensor.is_floating_point():
            memory.fill_(float("nan"))
        first, last = margin + shift, margin + shift + tensor.numel()
        memory[first:last] = tensor.flatten()
        self.stretches += [memory[:first], memory[last:]]
        return memory[first:last].view(tensor.shape)

    def check(self) -> None:
        """Nothing was written outside; forgets the stretches."""
        for stretch in self.stretches:
            untouched = stretch.isnan() if stretch.is_floating_point() else stretch == 255
            assert bool(untouched.all()), "written outside"
        self.stretches.clear()


@pytest.fixture(scope="session")
def guards() -> Iterator[Guards]:
    """In the interpreter every load is looked at: none may touch the guards, even if its value is dropped later."""
    made = Guards()
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield made
        return
    from triton.runtime import interpreter

    load = interpreter.InterpreterBuilder.create_masked_load

    def guarded_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        for stretch in made.stretches:
            offsets = pointers.data.astype("int64") - stretch.data_ptr()
            assert not ((offsets >= 0) & (offsets < stretch.nbytes) & mask.data).any(), "read outside"
        return load(self, pointers, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", guarded_load)
        yield made


@contextmanager
def nan_around_fresh_memory() -> Iterator[list[Tensor]]:
    made: list[Tensor] = []

    def around(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.device.type != DEVICE or not tensor.numel():
            return tensor
        store = torch.full((tensor.numel() + 512,), float("nan"), dtype=tensor.dtype, device=DEVICE)
        made.append(store)
        return store[256:-256].view(tensor.shape)

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            original = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, original=original, **k: around(original(*a, **k)))
        yield made
    for store in made:
        assert store[:256].isnan().all() and store[-256:].isnan().all(), "something was written beside its buffer"


@pytest.fixture(scope="session")
def poisoned() -> Callable[[], AbstractContextManager[list[Tensor]]]:
    """A block in which fresh memory holds NaN and lies between NaN; after it the surroundings must still be NaN."""
    return nan_around_fresh_memory


@pytest.fixture(autouse=True, scope="session")
def interpreter_mended() -> Iterator[None]:
    """Three faults of Triton's interpreter (3.6 to 3.9).

    It cuts off where it makes bf16 of fp32, and misreads bf16's subnormals; it keeps bf16 as its bits, and its tl.dot
    multiplies those as if integers; and it makes a loop bound with int() of a one-element array, which NumPy 2.4
    refuses.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    convert, dot, patch_tensor = interpreter._convert_float, builder.create_dot, interpreter._patch_lang_tensor

    def by_torch(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            bits = torch.from_numpy(np.array(values).view(np.int16)).view(torch.bfloat16)
            return bits.float().numpy().view(np.uint32)
        return convert(values, source, target, mode)

    def number(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", by_torch)
        patch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, number(a), number(b), *rest))
        patch.setattr(interpreter, "_patch_lang_tensor", with_index)
        yield
