"""One of two processes that test_distributed.py starts: runs every check on gloo, rank 0 writes what was found.

python distributed_worker.py RANK FOLDER
"""

import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fourbit
from fourbit.optim import AdamW, Lion

Found = dict[str, Any]
STEPS, CLIPPED = 4, {"lr": 1e-2, "max_grad_norm": 0.05}
SMALL_8BIT = {**CLIPPED, "bits": 8, "min_8bit_size": 64}


def dense() -> nn.Sequential:
    """Of uneven shards, some of them empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 65), nn.Tanh(), nn.Linear(65, 33), nn.Tanh(), nn.Linear(33, 1))


def qlora() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 8))
    fourbit.quantize_(model)
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8), seed=1)
    return model


def cut(model: nn.Sequential, mesh: DeviceMesh, **options: Any) -> nn.Sequential:
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def rows(rank: int | None = None) -> Tensor:
    """A batch, or one rank's half of it."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    return x if rank is None else x.chunk(2)[rank]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = STEPS) -> float:
    for _ in range(steps):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def whole(tensors: Any) -> list[Tensor]:
    return [t.detach().full_tensor() if hasattr(t, "full_tensor") else t.detach().clone() for t in tensors]


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(whole(a.parameters()), whole(b.parameters()), strict=True)
    return max(float((x.float() - y.float()).abs().max()) for x, y in pairs)


def alone(make: Callable[[], nn.Sequential], kind: Any = AdamW, **options: Any) -> tuple[nn.Sequential, Any]:
    model = make()
    optimizer = kind(trained(model), **(options or CLIPPED))
    train(model, optimizer, rows())
    return model, optimizer


def ddp(rank: int, mesh: DeviceMesh, folder: Path) -> Found:
    found = {}
    for make in (dense, qlora):
        model = nn.parallel.DistributedDataParallel(make())
        train(model, AdamW(trained(model), **CLIPPED), rows(rank))
        found[make.__name__] = distance(model, alone(make)[0])
    return found


def fsdp(rank: int, mesh: DeviceMesh, folder: Path) -> Found:
    found = {}
    for make in (dense, qlora):
        for kind in (AdamW, Lion):
            model, (one, its) = cut(make(), mesh), alone(make, kind)
            optimizer = kind(trained(model), **CLIPPED)
            train(model, optimizer, rows(rank))
            found[f"{make.__name__} {kind.__name__}"] = distance(model, one)
            norms = float(optimizer.grad_norm), float(its.grad_norm)
            found[f"{make.__name__} {kind.__name__} norm"] = abs(norms[0] / norms[1] - 1)
    return found


def precision(rank: int, mesh: DeviceMesh, folder: Path) -> Found:
    """Scales of 4-bit layers stay fp32 under a policy that casts: they are left out of the cutting."""
    model = qlora()
    layers = [layer for layer in model.modules() if isinstance(layer, fourbit.NF4Linear)]
    scales = {p for layer in layers for p in layer.stored_parameters().values() if p.is_floating_point()}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    cut(model, mesh, mp_policy=policy, ignored_params=scales)
    optimizer = AdamW(trained(model), **CLIPPED)
    first = train(model, optimizer, rows(rank).bfloat16(), 1)
    return {"first": first, "last": train(model, optimizer, rows(rank).bfloat16(), 20)}


def tensor_parallel(rank: int, mesh: DeviceMesh, folder: Path) -> Found:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.Linear(16, 1)).double()

    found = {}
    for kind in (AdamW, Lion):
        model, one = make(), make()
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for each in (model, one):
            train(each, kind(trained(each), **CLIPPED), rows().double())
        found[kind.__name__] = distance(model, one)
    return found


def checkpoint(rank: int, mesh: DeviceMesh, folder: Path) -> Found:
    """Going on from torch.distributed.checkpoint's files, and from a state dict, is going on."""
    found = {}
    for make, options in ((dense, CLIPPED), (dense, SMALL_8BIT), (qlora, CLIPPED)):
        name = f"{make.__name__} {options.get('bits', 32)}"
        model, again = cut(make(), mesh), cut(make(), mesh)
        optimizer, other = (AdamW(trained(each), **options) for each in (model, again))
        train(model, optimizer, rows(rank), 2)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / name)
        plain = copy.deepcopy((whole(model.parameters()), optimizer.state_dict()))
        train(model, optimizer, rows(rank), 2)
        weights, state = get_state_dict(again, other)
        read = {"model": weights, "optimizer": state}
        dcp.load(read, checkpoint_id=folder / name)
        set_state_dict(again, other, model_state_dict=read["model"], optim_state_dict=read["optimizer"])
        train(again, other, rows(rank), 2)
        found[name] = distance(model, again)
        other.load_state_dict(plain[1])
        saved = other.state_dict()["state"]
        found[f"{name} state"] = all(
            torch.equal(a, b)
            for i, entry in plain[1]["state"].items()
            for a, b in zip(whole(entry.values()), whole(saved[i].values()), strict=True)
        )
        if options is CLIPPED:  # from one process to two
            one, its = alone(make)
            weights, state = get_state_dict(one, its)
            everything = StateDictOptions(full_state_dict=True)
            set_state_dict(again, other, model_state_dict=weights, optim_state_dict=state, options=everything)
            train(again, other, rows(rank))
            train(one, its, rows())
            found[f"{name} from one process"] = distance(again, one)
        _, full = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        found[f"{name} whole"] = rank > 0 or not any(
            hasattr(t, "full_tensor") for entry in full["state"].values() for t in entry.values()
        )
    return found


def other_ranks(rank: int, mesh: DeviceMesh, folder: Path) -> Found:
    """State that was not cut as the parameters are is refused before anything changes."""
    found = {}
    for name, options in (("32", CLIPPED), ("8", SMALL_8BIT)):
        _, its = alone(dense, **options)
        model = cut(dense(), mesh)
        optimizer = AdamW(trained(model), **options)
        try:
            optimizer.load_state_dict(its.state_dict())
            found[name] = "taken"
        except ValueError as problem:
            found[name] = str(problem)
    return found


def eight_bits(rank: int, mesh: DeviceMesh, folder: Path) -> Found:
    model, one = cut(dense(), mesh), dense()
    optimizer, its = AdamW(trained(model), **SMALL_8BIT), AdamW(trained(one), **SMALL_8BIT)
    losses = [train(model, optimizer, rows(rank), 10) for _ in range(4)]
    theirs = [train(one, its, rows(), 10) for _ in range(4)]
    total = torch.tensor(losses)
    dist.all_reduce(total)
    shapes = {name: list(t.shape) for name, t in optimizer.state_dict()["state"][0].items()}
    return {"losses": (total / 2).tolist(), "theirs": theirs, "shapes": shapes}


def paged(rank: int, mesh: DeviceMesh, folder: Path) -> Found:
    runs = []
    for budget in (None, 70_000):
        model = cut(dense(), mesh)
        optimizer = AdamW(trained(model), **CLIPPED, budget=budget)
        train(model, optimizer, rows(rank))
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, rows(rank))
        runs.append(model)
    moments = [t for entry in optimizer.state_dict()["state"].values() for name, t in entry.items() if name != "step"]
    return {"distance": distance(*runs), "shards": all(hasattr(t, "placements") for t in moments)}


def not_finite(rank: int, mesh: DeviceMesh, folder: Path) -> Found:
    """A gradient that is not finite on one rank alone skips the step on both."""
    model = cut(dense(), mesh)
    optimizer = AdamW(trained(model), **CLIPPED)
    train(model, optimizer, rows(rank), 1)
    before = whole(model.parameters())
    model(rows(rank)).square().mean().backward()
    if rank == 1:
        trained(model)[0].grad.to_local()[0] = float("nan")
    optimizer.step()
    same = all(torch.equal(a, b) for a, b in zip(before, whole(model.parameters()), strict=True))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(rows(rank) * (float("inf") if rank else 1)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    same_scaled = all(torch.equal(a, b) for a, b in zip(before, whole(model.parameters()), strict=True))
    return {"skipped": float(optimizer.skipped), "same": same and same_scaled, "scale": scaler.get_scale()}


def replicas(rank: int, mesh: DeviceMesh, folder: Path) -> Found:
    """A mesh of two dimensions (HSDP), one of which holds copies: they count once in the norm."""
    planes = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts"))
    model, (one, its) = cut(dense(), planes), alone(dense)
    optimizer = AdamW(trained(model), **CLIPPED)
    train(model, optimizer, rows(rank))
    return {"distance": distance(model, one), "norm": abs(float(optimizer.grad_norm) / float(its.grad_norm) - 1)}


def save(rank: int, mesh: DeviceMesh, folder: Path) -> Found:
    """What every rank saves is what one process saves."""
    one, model = qlora(), cut(qlora(), mesh)
    for name, each in (("one", one), ("cut", model)):
        fourbit.save_adapter(each, folder / name)
    dist.barrier()
    files = ["adapter_model.safetensors", "adapter_config.json"]
    return {file: (folder / "one" / file).read_bytes() == (folder / "cut" / file).read_bytes() for file in files}


CHECKS = (ddp, fsdp, precision, tensor_parallel, checkpoint, other_ranks, eight_bits, paged, not_finite, replicas, save)


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module=r"torch\.distributed")  # torch's own, about its own
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {check.__name__: check(rank, mesh, folder) for check in CHECKS}
    (folder / f"found{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
