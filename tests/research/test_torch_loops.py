"""Our optimizers where torch's stand: under its schedulers, scalers, hooks and averages, and in others' files."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from torch.optim import lr_scheduler as torchs
from torch.optim import swa_utils

import fourbit
from fourbit.optim import AdamW, Lion

STEPS = 12


def qlora(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 33), nn.Tanh(), nn.Linear(33, 8))
    fourbit.quantize_(model)
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8), seed=1)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss(model: nn.Module, step: int = 0) -> Tensor:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
    return model(x).square().mean()


def assert_same(ours: nn.Module, theirs: nn.Module, bound: float = 0.0) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert float((a.detach().float() - b.detach().float()).abs().max()) <= bound, name


Make = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: torchs.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: torchs.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o: torchs.StepLR(o, 3),
    "MultiStepLR": lambda o: torchs.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: torchs.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: torchs.LinearLR(o, 0.1, total_iters=8),
    "ExponentialLR": lambda o: torchs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: torchs.PolynomialLR(o, STEPS),
    "CosineAnnealingLR": lambda o: torchs.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: torchs.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: torchs.CyclicLR(o, 1e-3, 1e-2, 3, cycle_momentum=True),  # betas too
    "OneCycleLR": lambda o: torchs.OneCycleLR(o, 1e-2, STEPS),  # betas too
    "ReduceLROnPlateau": lambda o: torchs.ReduceLROnPlateau(o, patience=1, threshold=0.5),
    "SequentialLR": lambda o: torchs.SequentialLR(
        o, [torchs.LinearLR(o, 0.1, total_iters=3), torchs.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: torchs.ChainedScheduler([torchs.ConstantLR(o), torchs.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: swa_utils.SWALR(o, 1e-3, anneal_epochs=5),
}


def test_no_scheduler_of_torch_is_left_out() -> None:
    assert {*torchs.__all__, "SWALR"} - {"LRScheduler"} == {*SCHEDULERS}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_torchs_schedulers_lead_our_optimizer_as_torchs(name: str) -> None:
    runs = []
    for kind in (AdamW, torch.optim.AdamW):
        model = qlora()
        optimizer = kind(trained(model), lr=1e-2)
        scheduler, course = SCHEDULERS[name](optimizer), []
        for step in range(STEPS):
            value = loss(model, step)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(*([value.detach()] if name == "ReduceLROnPlateau" else []))
            course.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        runs.append((model, course))
    (ours, course), (theirs, their_course) = runs
    assert course == their_course and len(set(course)) > 1
    assert_same(ours, theirs, 1e-6)


def test_averages_of_what_trains_are_torchs() -> None:
    """The mean (SWA) may be of the whole model, codes stay. A moving one may not: torch cuts products of integers."""
    model, dense = qlora(), nn.ParameterList()
    optimizer, parameters = AdamW(trained(model), lr=1e-2), nn.ParameterList(trained(model))
    dense.extend(nn.Parameter(p.detach().clone()) for p in parameters)
    mean = swa_utils.AveragedModel(model)
    moving = swa_utils.AveragedModel(parameters, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    for step in range(20):
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        mean.update_parameters(model)
        moving.update_parameters(parameters)
        for average, p in zip(dense, parameters, strict=True):
            average.data.lerp_(p.detach(), 1 - 0.9 if step else 1.0)
    now = dict(model.named_parameters())
    for name, p in mean.module.named_parameters():
        assert torch.equal(p, now[name]) == (not now[name].requires_grad), name
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(moving.module, dense, strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_loop_with_scaler_accumulation_and_kept_gradients_is_the_same_with_torchs_optimizer(
    dtype: torch.dtype | None,
) -> None:
    models = []
    for kind in (AdamW, torch.optim.AdamW):
        model = qlora()
        optimizer, scaler = kind(trained(model), lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for step in range(6):
            for part in range(2):
                with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    value = loss(model, 2 * step + part).float() / 2
                scaler.scale(value * (float("inf") if step == 3 else 1)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained(model), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=False)
        assert scaler.get_scale() == 2.0**7 and float(optimizer.state_dict()["state"][0]["step"]) == 5
        models.append(model)
    assert_same(*models, 1e-6)


def test_closures_hooks_and_groups_are_torchs() -> None:
    model, seen = qlora(), list[str]()
    *rest, last = trained(model)
    optimizer = AdamW([last], lr=1e-2)
    note = lambda name: lambda *_: seen.append(name)
    optimizer.register_step_pre_hook(note("before"))
    optimizer.register_step_post_hook(note("after"))
    optimizer.register_state_dict_pre_hook(note("saving"))
    optimizer.register_state_dict_post_hook(note("saved"))
    optimizer.register_load_state_dict_pre_hook(note("loading"))
    optimizer.register_load_state_dict_post_hook(note("loaded"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    values = [optimizer.step(closure).item()]
    optimizer.add_param_group({"params": rest, "lr": 1e-3})
    values += [optimizer.step(closure).item() for _ in range(2)]
    assert values[0] > values[1] > values[2]
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[:2] == ["before", "after"] and seen[-4:] == ["saving", "saved", "loading", "loaded"]


def test_an_optimizer_for_each_parameter_in_its_backward_is_one_for_all() -> None:
    one, each = qlora(), qlora()
    optimizer = AdamW(trained(one), lr=1e-2)
    own = {p: AdamW([p], lr=1e-2) for p in trained(each)}

    def update(p: Tensor) -> None:
        own[p].step()
        own[p].zero_grad()

    for p in own:
        p.register_post_accumulate_grad_hook(update)
    for step in range(3):
        loss(one, step).backward()
        loss(each, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(one, each)


@pytest.mark.parametrize("quantised", [True, False])
def test_code_that_reads_a_heads_weight_computes_what_the_head_does(quantised: bool) -> None:
    """As TRL's fused losses do: decoded, with the adapter, and its gradients."""
    model = nn.ModuleDict({"lm_head": nn.Linear(64, 96)})
    if quantised:
        fourbit.quantize_(model, skip=())
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8, target=["lm_head"]), seed=0)
    head, x = model["lm_head"], torch.randn(5, 64)
    nn.init.normal_(head.adapters["default"].lora_B)
    y = nn.functional.linear(x, head.weight, head.bias)
    assert torch.allclose(y, head(x), atol=1e-5)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_is_the_step() -> None:
    models = [qlora(), qlora()]
    optimizers = [AdamW(trained(model), lr=1e-2) for model in models]
    steps = [torch.compile(optimizers[0].step), optimizers[1].step]
    for number in range(3):
        for model, optimizer, step in zip(models, optimizers, steps, strict=True):
            loss(model, number).backward()
            step()
            optimizer.zero_grad()
    assert_same(*models)


def test_settings_of_torch_that_ask_for_nothing_are_taken_and_others_refused() -> None:
    p = nn.Parameter(torch.zeros(3))
    off = dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable"), False)
    for kind in (AdamW, Lion):
        kind([p], foreach=True, fused=True, **off)
        kind([p], foreach=None, fused=False)
        for name in off:
            with pytest.raises(ValueError, match=f"{name}=True is not done here: leave it out, or use torch.optim"):
                kind([p], **{name: True})
            with pytest.raises(ValueError, match=f"{name}=True is not done here"):
                kind([{"params": [p], name: True}])
            torch.optim.AdamW([p], **{name: True})  # so the advice works
        with pytest.raises(TypeError, match=f"{kind.__name__} takes no argument 'ams_grad'"):
            kind([p], ams_grad=False)


def test_parameters_may_come_with_names_or_from_generators() -> None:
    model = qlora()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    named = AdamW(((name, p) for name, p in model.named_parameters() if p.requires_grad), lr=1e-2)
    plain = AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    loss(model).backward()
    named.step()
    saved = named.state_dict()
    assert saved["param_groups"][0]["param_names"] == names
    plain.load_state_dict(saved)
    assert plain.state_dict()["param_groups"][0]["param_names"] == names
    torch.optim.AdamW(trained(model)).load_state_dict(saved)
    grouped = AdamW([{"params": [(name, p) for name, p in model.named_parameters() if p.requires_grad], "lr": 1.0}])
    assert grouped.param_groups[0]["param_names"] == names


@pytest.mark.parametrize("bits", [32, 8])
def test_every_tensor_of_the_state_owns_its_storage(bits: int, tmp_path: Any) -> None:
    """So safetensors and accelerate take them, and torch.save writes no more than each; memory is not doubled."""
    parameters = [nn.Parameter(torch.randn(n, 77)) for n in (3, 70, 1)]
    optimizer = AdamW(parameters, bits=bits, min_8bit_size=100)
    sum(p.square().sum() for p in parameters).backward()
    optimizer.step()
    shown, saved = optimizer.state, optimizer.state_dict()["state"]
    flat = {f"{i}.{name}": tensor for i, state in saved.items() for name, tensor in state.items()}
    for name, tensor in flat.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        file, alone = io.BytesIO(), io.BytesIO()
        torch.save(tensor, file)
        torch.save(tensor.clone(), alone)
        assert len(file.getvalue()) == len(alone.getvalue())
    save_file(flat, tmp_path / "state.safetensors")
    read = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in flat.items())
    for i, p in enumerate(parameters):  # the state itself, not a copy
        assert all(tensor.data_ptr() == saved[i][name].data_ptr() for name, tensor in shown[p].items())
    before = copy.deepcopy(flat)
    optimizer.step()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in flat.items() if name.endswith("step"))


@pytest.mark.parametrize("double_quant", [True, False])
def test_every_tensor_of_a_4bit_layer_owns_its_storage(double_quant: bool, tmp_path: Any) -> None:
    for i, shape in enumerate([(64, 96), (33, 50), (9, 7), (128, 128)]):
        layer = fourbit.quantize_(nn.Linear(*shape), double_quant=double_quant)
        for name, p in layer.named_parameters():
            assert p.untyped_storage().nbytes() == p.nbytes, name
        save_model(layer, str(tmp_path / f"{i}.safetensors"))


def test_accelerate_prepares_saves_and_resumes(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = qlora()
    optimizer = AdamW(trained(model), lr=1e-2)
    scheduler = torchs.OneCycleLR(optimizer, 1e-2, 20)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    def run(steps: range) -> None:
        for step in steps:
            with accelerator.accumulate(model):
                accelerator.backward(loss(model, step))
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    run(range(6))
    accelerator.save_state(str(tmp_path))
    run(range(6, 10))
    end = copy.deepcopy(model)
    accelerator.load_state(str(tmp_path))
    run(range(6, 10))
    assert_same(model, end)


def test_parameters_put_in_place_before_the_first_step_are_the_ones_trained() -> None:
    """As accelerate does under FSDP2; afterwards state would be lost, and that is refused."""
    old, new = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = AdamW([old], lr=0.1)
    optimizer.param_groups[0]["params"] = [new]
    new.square().sum().backward()
    optimizer.step()
    assert (new < 1).all() and (old == 1).all()
    optimizer.param_groups[0]["params"] = [old]
    with pytest.raises(ValueError, match="their state cannot follow"):
        optimizer.step()


def test_a_seed_of_none_follows_torchs_generator() -> None:
    def end(seed: int | None, torch_seed: int) -> Tensor:
        p = nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
        torch.manual_seed(torch_seed)
        optimizer = AdamW([p], lr=1e-4, seed=seed)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(copy.deepcopy(optimizer).param_groups[0]["params"][0], p)
        return p.detach()

    assert torch.equal(end(None, 1), end(None, 1)) and not torch.equal(end(None, 1), end(None, 2))
    assert torch.equal(end(0, 1), end(0, 2))
