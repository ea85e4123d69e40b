"""4-bit weights are parameters: `fully_shard` cuts them on rows across two processes, and the results stay equal."""

import copy
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fourbit.lora.layer import AdapterLayer, adapter_parameters
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.lora import LoRA

WIDTH = 192  # rows of three blocks of 64, so that packed and absmax are matrices


def model(double_quant: bool) -> nn.Sequential:
    """A 4-bit linear, one with LoRA, and one whose rows are no whole blocks, so that its tensors are flat."""
    torch.manual_seed(0)
    first, second, third = (
        NF4Linear.from_weight(torch.randn(size), torch.randn(size[0]), double_quant=double_quant)
        for size in ((258, WIDTH), (129, 258), (5, 129))
    )
    lora = LoRA(second, 4, 8)
    nn.init.normal_(lora.lora_B)
    return nn.Sequential(first, nn.Tanh(), AdapterLayer(second, default=lora), nn.Tanh(), third).double()


def step(network: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.randn(7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = network(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def worker(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for double_quant, parts in product((True, False), (["0", "2"], ["0", "2.base", "2.adapters.default"])):
        whole = model(double_quant)
        cut = copy.deepcopy(whole)
        for layer in (*map(cut.get_submodule, parts), cut):
            fully_shard(layer)
        local = {name: tuple(parameter.to_local().shape) for name, parameter in cut.named_parameters()}
        assert local["0.packed"] == (129, WIDTH // 2) and local["0.absmax"] == (129, WIDTH // 64), local
        names = {name for name, parameter in cut.named_parameters() if parameter.requires_grad}
        assert names == {"2.adapters.default.lora_A", "2.adapters.default.lora_B"}
        assert adapter_parameters(cut).keys() == adapter_parameters(whole).keys()
        wanted, got = step(whole), step(cut)
        for mine, reference in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-6)
        for name, parameter in cut.named_parameters():
            if name in names:
                torch.testing.assert_close(parameter.grad.full_tensor(), whole.get_parameter(name).grad)
            else:
                assert parameter.grad is None
                assert torch.equal(parameter.full_tensor(), whole.get_parameter(name)), name
        cast = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"scales must not be cast \(FSDP2: param_dtype=None\)"):
            step(fully_shard(copy.deepcopy(whole), mp_policy=cast))
    dist.destroy_process_group()


def test_a_4bit_model_is_cut_on_rows_with_equal_results(tmp_path: Path) -> None:
    command = [sys.executable, "-P", __file__]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in workers]
    assert [process.returncode for process in workers] == [0, 0], "\n".join(errors)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(int(sys.argv[1]), sys.argv[2])
