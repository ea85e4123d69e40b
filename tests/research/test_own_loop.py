"""A training loop one writes oneself, on `fourbit.Run`: the trainer's, bit for bit, and what a trainer does not do."""

import pytest
import torch
from torch import nn

import fourbit
from fourbit.data.batch import micro_batches
from fourbit.data.encode import load
from fourbit.data.order import step_indices
from fourbit.errors import InputError
from fourbit.optim.schedule import rate_factor
from fourbit.trainer.checkpoint import load_checkpoint
from fourbit.trainer.loop import Run, cross_entropy
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.preference import DPOTrainer
from fourbit.trainer.step import Sums

STEPS, RATE = 6, 1e-2


@pytest.fixture
def adapted(tiny_folder):
    def make(quant_type="nf4", dropout=0.2):
        model, tokenizer = fourbit.load(tiny_folder, quant_type=quant_type, dtype=torch.float32)
        fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8, dropout=dropout), seed=0)
        return model.train(), tokenizer

    return make


def own_loop(run, rows, steps, calls=1):
    """A whole training loop in 10 lines; a step's batches in one call, or one by one."""
    losses = []
    while run.steps < steps:
        numbers = step_indices(len(rows), 4, run.steps, seed=0)
        examples = [(i, rows.examples[i]) for i in numbers]
        batches = micro_batches(examples, packing=True, micro_batch=2, token_budget=512, pad_id=0)
        weight = sum(batch.weight for batch in batches)
        for some in [batches] if calls == 1 else [[batch] for batch in batches]:
            run.forward_backward(*some, weight=weight)
        losses.append(run.optim_step(RATE * rate_factor(run.steps, total=STEPS, warmup=0)).loss.item())
    return losses


def test_it_is_the_trainers_bit_for_bit(adapted, rows, tmp_path):
    """Weights, losses, the optimizer's state and the generators, with dropout; stopped and gone on in between."""
    model, tokenizer = adapted()
    config = fourbit.SFTConfig(out=str(tmp_path), batch_size=4, micro_batch=2, steps=STEPS, lr=RATE, warmup=0)
    fourbit.SFTTrainer(model, tokenizer, train=rows, config=config).train(display=None)
    ended, state = load_checkpoint(tmp_path / "checkpoints" / f"step-{STEPS:06d}")
    wanted = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    data = load(rows, tokenizer)

    torch.manual_seed(0)
    run = Run(*adapted())
    losses = own_loop(run, data, 3)
    saved = run.save_state(tmp_path / "own")
    torch.manual_seed(7)  # a new process knows nothing of the old one's generators
    again = Run(*adapted())
    again.load_state(tmp_path / "own")
    assert again.steps == 3 and saved.name == "step-000003"
    losses += own_loop(again, data, STEPS)
    assert losses == wanted
    groups, plain = again.state()
    assert groups.keys() == ended.keys() and plain["names"] == state["loop"]["names"]
    for group, tensors in ended.items():
        assert tensors.keys() == groups[group].keys() and len(tensors) > 0
        assert all(torch.equal(tensor, groups[group][name]) for name, tensor in tensors.items()), group

    third = Run(*adapted())
    third.load_state(tmp_path / "checkpoints")  # and the trainer's own checkpoint is a run's
    assert third.steps == STEPS and all(torch.equal(t, ended["weights"][n]) for n, t in third.weights().items())


def test_a_step_may_be_gathered_in_several_calls(adapted, rows):
    """With `weight`, one by one or together: the same step."""
    ends = []
    for calls in (1, 2):
        model, tokenizer = adapted(dropout=0.0)
        run = Run(model, tokenizer)
        ends.append((own_loop(run, load(rows, tokenizer), 3, calls), run.weights()))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    for name, weight in ends[0][1].items():
        torch.testing.assert_close(weight, ends[1][1][name], rtol=2e-3, atol=1e-4)


def test_losses_of_several_kinds_in_one_step(adapted, rows, tmp_path):
    """Fine-tuning and half a preference loss: the gradient is the sum of both means, each over what it counts."""
    lines = [f'{{"prompt": "say {w}", "chosen": "{w * 3}", "rejected": "x{w}"}}' for w in "abcd"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    model, tokenizer = adapted(dropout=0.0)
    config = fourbit.DPOConfig(out=str(tmp_path / "o"), batch_size=4)
    dpo = DPOTrainer(model, tokenizer, train=tmp_path / "pairs.jsonl", config=config)
    pairs, texts = dpo.step_data(0)[0], load(rows, tokenizer)
    batches = micro_batches([*enumerate(texts.examples)][:5], packing=True, micro_batch=2, token_budget=1, pad_id=0)
    run = Run(model, tokenizer)
    plain, _ = run.forward_backward(*batches)
    preferred, metrics = run.forward_backward(*pairs, loss=lambda model, batch: dpo.sums(batch), scale=0.5)
    found = {name: parameter.grad.clone() for name, parameter in run.parameters.items()}
    result = run.optim_step(0.0)
    assert result.loss == plain + preferred and preferred.item() == pytest.approx(0.5 * 0.693147, rel=1e-5)
    assert {"token_accuracy", "reward_margin"} <= result.metrics.keys() and "reward_margin" in metrics
    loss = sum(cross_entropy(model, batch).loss for batch in batches) / sum(batch.trained for batch in batches)
    (loss + 0.5 * sum(dpo.sums(batch).loss for batch in pairs) / 4).backward()
    for name, parameter in run.parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_batches_of_ones_own(adapted):
    """`input_ids` and `labels` as a collator of transformers makes them, padded on the right, any iterable of them."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 9], [9, 8, 7, 6, 0, 0]])
    labels = torch.tensor([[-100, -100, 7, 8, 9, 9], [-100, 8, 7, -100, -100, -100]])
    loader = torch.utils.data.DataLoader(
        [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)], batch_size=2
    )
    model, _ = adapted(None, dropout=0.0)
    run = Run(model)
    for batch in loader:
        loss, metrics = run.forward_backward(batch)
        run.optim_step(RATE)
    fresh = adapted(None, dropout=0.0)[0]
    logits = fresh(ids).float()
    wanted = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) and 0 <= metrics["token_accuracy"] <= 1
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]] * 2)
    for wrong in ({"labels": ids + 1}, {"labels": ids[:, 1:]}, {"attention_mask": mask}):
        with pytest.raises(InputError, match="alike but for -100, padded on the right"):
            run.forward_backward({"input_ids": ids, "labels": labels} | wrong)


def test_any_module_and_any_batch(tmp_path):
    """A classifier on plain tensors, its batch norm's running statistics saved and taken up."""

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def new():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        return Run(net, loss=loss, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))

    batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(4)]
    run, again = new(), new()
    for batch in batches[:2]:
        run.forward_backward(batch)
        run.optim_step()
    again.load_state(run.save_state(tmp_path))
    for each in (run, again):
        for batch in batches[2:]:
            each.forward_backward(batch)
            each.optim_step()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_samples_come_with_the_log_probabilities_that_training_sees(adapted):
    model, tokenizer = adapted()
    run, state = Run(model, tokenizer), torch.get_rng_state()
    first, second, short = run.sample(["ab", "ab", [5, 6]], max_new_tokens=5, temperature=1.0, seed=3)
    assert first.ids != second.ids and torch.equal(state, torch.get_rng_state()) and model.training
    assert first.text == tokenizer.decode(first.ids) and len(short.logprobs) == len(short.ids) > 0
    ids = torch.tensor([tokenizer.encode("ab") + first.ids])
    with torch.no_grad():
        logps = model.eval()(ids).float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[-len(first.ids) :, 0]
    assert first.logprobs == pytest.approx(logps.tolist(), rel=1e-4)
    greedy = run.sample([[5, 6]], max_new_tokens=4, temperature=0)
    assert greedy[0].ids == fourbit.generate(model, [[5, 6]], max_new_tokens=4, stop_ids=tokenizer.stop_ids)[0]
    with pytest.raises(InputError, match="for texts its tokenizer"):
        Run(model).sample(["ab"])


def layer_run(loss=lambda model, rows: model(rows).pow(2).sum(1), **how):
    torch.manual_seed(0)
    return Run(nn.Linear(4, 3), loss=loss, **how)


def test_what_raises_leaves_the_gradients_of_before():
    """Of the step, and of one's own that stand in .grad; these are added as they are."""

    def loss(model, rows):
        if len(rows) == 3:
            raise KeyboardInterrupt
        return model(rows).pow(2).sum(1)

    run = layer_run(loss)
    run.model.weight.grad = torch.ones(3, 4)
    run.forward_backward(torch.ones(2, 4))
    before = [p.grad.clone() for p in run.parameters.values()]
    with pytest.raises(KeyboardInterrupt):
        run.forward_backward(torch.ones(2, 4), torch.ones(3, 4))
    assert all(torch.equal(p.grad, old) for p, old in zip(run.parameters.values(), before, strict=True))
    alone = layer_run(loss)
    alone.forward_backward(torch.ones(2, 4))
    assert torch.equal(run.model.weight.grad, alone.model.weight.grad + 1)
    run.optim_step()
    assert run.model.weight.grad is None
    with pytest.raises(InputError, match="call forward_backward before optim_step"):
        run.optim_step()


def test_a_mean_is_no_loss():
    """Means of micro-batches do not add up to the step's mean, so one number is refused; sums say what they count."""
    rows = torch.randn(6, 4)
    with pytest.raises(
        InputError, match=r"the value of each token, row or pair that counts \(\[N\]\).* got one number"
    ):
        layer_run(lambda model, rows: model(rows).pow(2).mean()).forward_backward(rows)
    with pytest.raises(InputError, match="something to learn from; together these 1 weigh 0"):
        layer_run().forward_backward(rows[:0])
    weighted = lambda model, rows: Sums(model(rows).pow(2).sum(), weight=rows.abs().sum())  # of a device's number
    runs = [layer_run(weighted), layer_run(weighted)]
    runs[0].forward_backward(rows)
    runs[1].forward_backward(rows[:1], rows[1:])
    torch.testing.assert_close(runs[0].model.weight.grad, runs[1].model.weight.grad)


def test_a_state_of_another_model_changes_nothing(tmp_path):
    run, other = layer_run(), Run(nn.Linear(4, 2), loss=lambda model, rows: model(rows).pow(2).sum(1))
    run.forward_backward(torch.ones(2, 4))
    run.optim_step()
    run.save_state(tmp_path)
    before = other.model.weight.clone()
    with pytest.raises(InputError, match=r"another model. 2 of another shape: bias must be \[2\], got \[3\]"):
        other.load_state(tmp_path)
    with pytest.raises(InputError, match="nowhere"):
        other.load_state(tmp_path / "nowhere")
    assert torch.equal(other.model.weight, before) and other.steps == 0
    with pytest.raises(InputError, match="nothing of the model is trained"):
        Run(nn.Linear(2, 2).requires_grad_(False))


def batch_of(step):
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(step))


def stepped(run, steps):
    while run.steps < steps:
        run.forward_backward(batch_of(run.steps))
        run.optim_step()


ODD = {"LBFGS", "SparseAdam", "Muon"}  # its own closure; sparse gradients; matrices alone
OPTIMIZERS = sorted({n for n, each in vars(torch.optim).items() if isinstance(each, type)} - {"Optimizer", *ODD})
SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2, cycle_momentum=False),
    "WarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "Chained": lambda o: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.LinearLR(o, 0.3), torch.optim.lr_scheduler.StepLR(o, 2)]
    ),
    "fourbit": lambda o: fourbit.optim.scheduler(o, total=9, warmup=2),
}


@pytest.mark.parametrize("name", [*OPTIMIZERS, *SCHEDULERS])
def test_each_optimizer_and_scheduler_of_torch_goes_on_bit_for_bit(tmp_path, name):
    """From safetensors and JSON, into objects that know nothing."""
    how = {"optimizer": getattr(torch.optim, name, torch.optim.SGD), "scheduler": SCHEDULERS.get(name)}
    if name in SCHEDULERS:
        how["optimizer"] = lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    whole, cut, again = (layer_run(**how) for _ in range(3))
    stepped(whole, 7)
    stepped(cut, 4)
    again.load_state(cut.save_state(tmp_path))
    stepped(again, 7)
    assert all(torch.equal(weight, again.weights()[n]) for n, weight in whole.weights().items())
    assert whole.state()[1] == again.state()[1]


def test_a_scheduler_by_a_metric_is_refused():
    with pytest.raises(InputError, match="ReduceLROnPlateau goes by a metric"):
        layer_run(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
