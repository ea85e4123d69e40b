"""Distillation on tiny models: the loss is its definition, all teachers that are one teach alike, none is touched."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fourbit
from fourbit.data.batch import pack
from fourbit.errors import InputError
from fourbit.lora.active import copy_adapter
from fourbit.lora.attach import install
from fourbit.lora.layer import adapter_layers, adapters_of
from fourbit.models.decoder import Decoder
from fourbit.trainer.config import DistillConfig
from fourbit.trainer.distill import DistillTrainer, check_same_tokens
from fourbit.trainer.metrics import read_metrics

KINDS = ("forward-kl", "reverse-kl", "jsd")


def start_as_teacher(model):
    """What the student is now teaches it."""
    copy_adapter(model, "default", "teacher")
    return "teacher"


@pytest.fixture
def other_teacher(adapted):
    def make(folder):
        """Puts another adapter on the student's base, to teach it."""

        def put(model):
            install(model, adapters_of(adapted(folder, b_seed=2)[0]), "teacher", trainable=False)
            return "teacher"

        return put

    return make


def loaded_teacher(folder):
    def put(model):
        fourbit.load_adapter(model, folder, name="teacher", trainable=False)
        return "teacher"

    return put


@pytest.fixture
def trainer_for(adapted):
    def make(folder, rows, out, teacher, *, val=None, config=None, **options):
        keys = ("quant_type", "dtype", "b_seed", "dropout", "target", "rank")
        model, tokenizer = adapted(folder, **{key: options.pop(key) for key in keys if key in options})
        return distiller(model, tokenizer, teacher, rows, out, val=val, **options)

    return make


def distiller(model, tokenizer, teacher, rows, out, *, val=None, **options):
    config = DistillConfig(out=str(out), **({"batch_size": 4, "lr": 1e-2, "epochs": 2} | options))
    teacher = teacher(model) if callable(teacher) and not isinstance(teacher, nn.Module) else teacher
    return DistillTrainer(model, tokenizer, teacher=teacher, train=rows, val=val, config=config)


def total(trainer, numbers=range(8), micro_batch="auto"):
    """Loss and gradients of these examples."""
    trainer.model.zero_grad()
    batches = trainer.micro_batches(trainer.train_set, numbers, micro_batch)
    parts = [trainer.sums(batch) for batch in batches]
    loss = sum(part.loss for part in parts)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.parameters.items()}, parts


def plain(student, teacher, examples, config):
    """The definition through full logits of each example alone, summed over trained tokens."""
    loss = 0.0
    for (example,) in (e.parts for e in examples):
        places = [i - 1 for i in range(1, len(example.ids)) if example.trained[i]]
        ids = torch.tensor([example.ids])
        ours = student(ids)[0, places]
        with torch.no_grad():
            theirs = teacher(ids)[0, places]
        targets = torch.tensor([example.ids[i + 1] for i in places])
        ce = nn.functional.cross_entropy(ours, targets, reduction="sum")
        if config.top_k:
            theirs, kept = theirs.topk(config.top_k, dim=-1)
            ours = ours.gather(-1, kept)
        p, q = ((x / config.temperature).softmax(-1) for x in (theirs, ours))
        if config.divergence == "forward-kl":
            values = p * (p.log() - q.log())
        elif config.divergence == "reverse-kl":
            values = q * (q.log() - p.log())
        else:
            beta = config.jsd_beta or 0.5
            m = beta * p + (1 - beta) * q
            values = beta * p * (p.log() - m.log()) + (1 - beta) * q * (q.log() - m.log())
        loss = loss + values.sum() + config.sft_weight * ce
    return loss


@pytest.mark.parametrize(
    "options",
    [
        *({"divergence": kind} for kind in KINDS),
        {"divergence": "jsd", "jsd_beta": 0.2, "temperature": 1.7},
        {"divergence": "reverse-kl", "top_k": 9, "temperature": 0.6},
        {"top_k": 5, "sft_weight": 0.3},
        {"sft_weight": 1.0, "loss_on": "all"},
    ],
)
def test_loss_and_gradients_are_those_of_full_logits(trainer_for, tiny_folder, wide_folder, rows, tmp_path, options):
    """A wider teacher, float64; each example alone on the plain side, packed on ours."""
    teacher, _ = fourbit.load(wide_folder, dtype=torch.float64)
    trainer = trainer_for(
        tiny_folder, rows, tmp_path, teacher, quant_type=None, dtype=torch.float64, b_seed=1, **options
    )
    want = plain(trainer.model, teacher, trainer.train_set.examples[:8], trainer.config)
    wanted = torch.autograd.grad(want, list(trainer.parameters.values()))
    loss, got, parts = total(trainer)
    assert loss == pytest.approx(want.item(), rel=1e-11) and loss > 1
    for (name, gradient), expected in zip(got.items(), wanted, strict=True):
        assert expected.norm() > 0
        assert (gradient - expected).norm() <= 1e-10 * expected.norm(), name
    if trainer.config.sft_weight:
        both = {name: sum(part.metrics[name] for part in parts) for name in ("divergence", "cross_entropy")}
        weighted = both["divergence"][0] + trainer.config.sft_weight * both["cross_entropy"][0]
        assert weighted.item() == pytest.approx(loss, rel=1e-12)
        assert both["divergence"][1] == sum(
            batch.trained for batch in trainer.micro_batches(trainer.train_set, range(8), "auto")
        )
    else:
        assert all(not part.metrics for part in parts)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"rank": 7, "alpha": 3, "rslora": True},
        {"target": ["q_proj", "down_proj"], "rank": 2},
        {"target": ["q_proj", "lm_head"], "rank": 3, "rslora": True},
    ],
)
@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_a_teacher_on_the_same_base_is_the_one_loaded_beside_it(
    trainer_for, adapted, tiny_folder, rows, tmp_path, lora, quant_type
):
    """Another rank, scale and layers, read from its folder; the student's adapter sits on the output head too."""
    other, _ = adapted(tiny_folder, quant_type=quant_type, b_seed=2, **lora)
    fourbit.save_adapter(other, tmp_path / "teacher")
    beside, _ = fourbit.load(tiny_folder, quant_type=quant_type)
    fourbit.load_adapter(beside, tmp_path / "teacher")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    options = {"b_seed": 1, "quant_type": quant_type, "target": targets, "temperature": 1.3}
    shared = trainer_for(tiny_folder, rows, tmp_path, loaded_teacher(tmp_path / "teacher"), **options)
    apart = trainer_for(tiny_folder, rows, tmp_path, beside, **options)
    loss, gradients, _ = total(shared)
    other_loss, other_gradients, _ = total(apart)
    assert loss == pytest.approx(other_loss, rel=1e-6) and loss > 1
    for name, gradient in gradients.items():
        assert (gradient - other_gradients[name]).norm() <= 1e-6 * gradient.norm(), name


def test_a_teachers_head_counts_as_it_is_switched(trainer_for, adapted, tiny_folder, rows, tmp_path):
    lora = {"target": ["q_proj", "lm_head"], "rslora": True, "rank": 3}
    teacher, _ = adapted(tiny_folder, quant_type=None, dtype=torch.float64, b_seed=2, **lora)
    losses = []
    for active in ({"default": 1.0}, {"default": 0.2}, {}):
        teacher.lm_head.active = active
        trainer = trainer_for(tiny_folder, rows, tmp_path, teacher, quant_type=None, dtype=torch.float64, b_seed=1)
        want = plain(trainer.model, teacher, trainer.train_set.examples[:8], trainer.config).item()
        losses.append(total(trainer)[0])
        assert losses[-1] == pytest.approx(want, rel=1e-11)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3) != pytest.approx(losses[2], rel=1e-3)


def test_the_base_alone_can_teach(trainer_for, tiny_folder, rows, tmp_path):
    base, _ = fourbit.load(tiny_folder, quant_type="nf4")
    losses = [total(trainer_for(tiny_folder, rows, tmp_path, teacher, b_seed=1))[0] for teacher in (None, base)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "lm_head"]])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(trainer_for, tiny_folder, rows, tmp_path, kind, target):
    trainer = trainer_for(
        tiny_folder, rows, tmp_path, start_as_teacher, b_seed=1, dtype=torch.float64, divergence=kind, target=target
    )
    loss, gradients, _ = total(trainer)
    assert abs(loss) < 1e-12 and all(gradient.abs().max() < 1e-12 for gradient in gradients.values())
    for module in adapters_of(trainer.model).values():
        module.lora_B.data.mul_(1.5)
    assert total(trainer)[0] > 1e-3, "the copy does not follow the student"


def flags(model):
    state = {name: (m.training, list(getattr(m, "active", []))) for name, m in model.named_modules()}
    return state, {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("training", [False, True])
def test_a_teacher_is_left_as_it_was(trainer_for, adapted, tiny_folder, rows, tmp_path, training):
    """Values, modes, flags; also of one in training mode, with dropout on its head too and a layer switched off."""
    teacher, _ = adapted(tiny_folder, b_seed=2, dropout=0.5, target=["q_proj", "up_proj", "lm_head"])
    teacher.train(training)
    next(iter(adapter_layers(teacher).values())).active = {}
    tensors = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
    before, kept = flags(teacher), {name: tensor.clone() for name, tensor in tensors.items()}
    trainer = trainer_for(tiny_folder, rows, tmp_path, teacher, target=["v_proj", "lm_head"], steps=3)
    (batch,) = trainer.micro_batches(trainer.train_set, [0, 1], 2)
    assert trainer.sums(batch).loss.item() == trainer.sums(batch).loss.item(), "no dropout in the teacher"
    trainer.train(display=None)
    assert flags(teacher) == before and all(p.grad is None for p in teacher.parameters())
    for name, tensor in tensors.items():
        assert torch.equal(tensor, kept[name]), name


def test_a_teacher_on_the_same_base_draws_no_random_number(trainer_for, other_teacher, tiny_folder, rows, tmp_path):
    trainer = trainer_for(tiny_folder, rows, tmp_path, other_teacher(tiny_folder), dropout=0.5)
    model = trainer.model.train()
    before, kept = flags(model), {name: p.clone() for name, p in model.named_parameters()}
    (batch,) = trainer.micro_batches(trainer.train_set, [0, 1], 2)
    state = torch.get_rng_state()
    first, second = (trainer.teacher_hidden(batch, torch.arange(batch.tokens)) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad and torch.equal(state, torch.get_rng_state())
    assert flags(model) == before and all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    assert not any(p.requires_grad for n, p in trainer.teacher_head.named_parameters() if "lora" in n)


def test_learns_what_the_teacher_says(trainer_for, tiny_folder, wide_folder, rows, val_rows, tmp_path):
    """A 4-bit teacher of another size. Its random weights follow no rule, so 22 rows tell only some of it."""
    teacher, _ = fourbit.load(wide_folder, quant_type="nf4")
    trainer = trainer_for(tiny_folder, rows, tmp_path, teacher, val=val_rows, epochs=12, b_seed=1, lr=2e-2)
    start = trainer.evaluate(False)["loss"]
    result = trainer.train(display=None)
    assert result.val_loss < 0.8 * start and result.val == {"loss": result.val_loss}
    numbers = range(len(trainer.val_set.examples))
    batches = trainer.micro_batches(trainer.val_set, numbers, "auto")
    with torch.no_grad():
        loss = sum(trainer.sums(b).loss.item() for b in batches) / sum(b.trained for b in batches)
    assert loss == pytest.approx(result.val_loss, rel=1e-5)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_cross_entropy_is_reported_where_it_is_trained(trainer_for, tiny_folder, rows, tmp_path):
    trainer_for(tiny_folder, rows, tmp_path, None, b_seed=1, sft_weight=0.25, steps=3).train(display=None)
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        assert record["loss"] == pytest.approx(record["divergence"] + 0.25 * record["cross_entropy"], rel=1e-6)
        assert 0 <= record["token_accuracy"] <= 1 and record["entropy"] > 0


def test_trains_all_weights_too(tiny_folder, wide_folder, rows, tmp_path):
    teacher, _ = fourbit.load(wide_folder)
    student, tokenizer = fourbit.load(tiny_folder)
    trainer = distiller(student, tokenizer, teacher, rows, tmp_path, full=True, lr=5e-3, epochs=6)
    trainer.train(display=None)
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < losses[0] / 2
    again, _ = fourbit.load(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids), student(ids))


def test_teachers_that_cannot_teach_are_refused(adapted, tiny_folder, rows, tmp_path):
    model, tokenizer = adapted(tiny_folder)
    with pytest.raises(InputError, match="the teacher is the student itself"):
        distiller(model, tokenizer, model, rows, tmp_path)
    with pytest.raises(InputError, match="'default' is trained, so it cannot be the teacher"):
        distiller(model, tokenizer, "default", rows, tmp_path)
    large = Decoder(replace(model.spec, vocab_size=300))
    with pytest.raises(InputError, match="the teacher predicts 300 tokens, the student 259"):
        distiller(model, tokenizer, large, rows, tmp_path)
    dense, _ = fourbit.load(tiny_folder)
    with pytest.raises(InputError, match="full training changes the student's base"):
        distiller(dense, tokenizer, None, rows, tmp_path, full=True)
    with pytest.raises(InputError, match="carries no adapter 'teacher'; it carries default"):
        distiller(model, tokenizer, "teacher", rows, tmp_path)
    with pytest.raises(InputError, match="top_k must be at most 259, the vocabulary, got 260"):
        distiller(model, tokenizer, None, rows, tmp_path, top_k=260)
    elsewhere = Decoder(model.spec).to("meta")
    with pytest.raises(InputError, match="the teacher is on meta, the student on cpu"):
        distiller(model, tokenizer, elsewhere, rows, tmp_path)


def test_other_tokens_are_refused(tiny_folder):
    _, ours = fourbit.load(tiny_folder)
    _, theirs = fourbit.load(tiny_folder)
    check_same_tokens(ours, theirs)
    theirs.backend.add_tokens(["new"])
    with pytest.raises(InputError, match=r"260 and 259 tokens; 'new' is 259 in the teacher's and missing in the"):
        check_same_tokens(ours, theirs)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"divergence": "kl"}, "divergence must be one of forward-kl, reverse-kl or jsd, got 'kl'"),
        ({"jsd_beta": 0.5}, "jsd_beta would do nothing, as divergence is forward-kl: leave out"),
        ({"jsd_beta": 1.0, "divergence": "jsd"}, r"jsd_beta must lie between 0 and 1, got 1\.0; its ends are"),
        ({"temperature": 0.0}, r"temperature must be above 0 and finite, got 0\.0"),
        ({"temperature": float("inf")}, "temperature must be above 0 and finite, got inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"sft_weight": -1.0}, r"sft_weight must be at least 0, got -1\.0"),
        ({"full": True, "lora_plus": 2.0}, "full training has no adapter"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, error):
    with pytest.raises(InputError, match=error):
        DistillConfig(out="o", **options)


def test_packed_rows_do_not_see_each_other_in_the_teacher(trainer_for, tiny_folder, rows, tmp_path):
    trainer = trainer_for(tiny_folder, rows, tmp_path, None, dtype=torch.float64)
    examples = trainer.train_set.examples[:3]

    def states(*examples):
        batch = pack(list(enumerate(examples)))
        return trainer.teacher_hidden(batch, batch.rows)

    together = states(*examples).split([sum(e.parts[0].trained[1:]) for e in examples])
    for example, found in zip(examples, together, strict=True):
        torch.testing.assert_close(states(example), found, rtol=1e-10, atol=1e-12)
