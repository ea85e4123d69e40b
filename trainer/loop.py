"""The primitives of a training loop: gradients, an update, samples, saved state. The trainers' own loop stands on them.

    run = Run(model, tokenizer)
    while run.steps < total:
        run.forward_backward(*batches_of(run.steps))
        run.optim_step(lr=1e-4)
    run.save_state(folder)

Nothing here waits for the device, but for an optimizer that is not of `fourbit.optim`. Whether a step may be applied is
decided on the device by a flag that the optimizer's kernel reads (the mechanism of loss scaling); the host looks at the
flag of the step before while this one runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..data.batch import Batch, Encoded, Example, micro_batches, pad
from ..data.protocol import AnyTokenizer
from ..errors import InputError
from ..files import misfits
from ..kernels.chunked_head import TokenScores
from ..lora.attach import courses
from ..lora.layer import adapter_layers, adapter_parameters, plain_name, unwrapped
from ..models.foreign import as_causal_lm
from ..models.generate import generate
from ..models.protocol import CausalLM, evaluating
from ..optim import AdamW
from ..optim.optimizer import FlatOptimizer
from ..optim.unmoved import checksum, unmoved
from ..settings import checked
from ..text.tokenizer_folder import as_tokenizer
from . import step
from .checkpoint import Groups, load_checkpoint, newest_checkpoint, packed, resuming, save_checkpoint, unpacked
from .losses.tokens import batch_token_scores, summed
from .step import StepResult, Sums

Loss = Callable[..., Tensor | Sums]  # (model, batch) -> the value of each token, row or pair, [N]; or their `Sums`
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


class Completion(NamedTuple):
    """An answer: its tokens without the one that ended it, the log-probability of each (nats, at temperature 1, as a
    training step computes it), and its text ("" without a tokenizer)."""

    ids: list[int]
    logprobs: list[float]
    text: str


class Run:
    """A model, what of it is trained, and its optimizer.

    model: any module; one of transformers without a `loss` is run as `CausalLM`. tokenizer: for `sample` with texts.
    loss: (model, batch) -> the value of each token, row or pair that counts, [N] with gradient, or `Sums`. No mean: it
        is divided by all that a step counts. Default: `cross_entropy`.
    optimizer: one of torch.optim's kind on the trained parameters, or a function that makes one of their list. Default:
        `fourbit.optim.AdamW` without weight decay. scheduler: makes torch's scheduler for it, which is stepped after
        each update that was applied.
    parameters: what is trained, by name; default: all that need a gradient. max_grad_norm: the norm that gradients are
        scaled down to (0: never), where the optimizer does not say its own. total: steps in all, which AdaLoRA goes by.
    `steps` counts the updates. A step whose loss or gradient is not finite moves nothing. Raises InputError for what
    cannot be trained, or not saved."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: AnyTokenizer | None = None,
        *,
        loss: Loss | None = None,
        optimizer: Optimizer | MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
        max_grad_norm: float = 1.0,
        total: int | None = None,
    ) -> None:
        self.model, self.loss = model if loss else as_causal_lm(model), loss or cross_entropy
        self.tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
        self.parameters = dict(trainable(model) if parameters is None else parameters)
        if not self.parameters:
            raise InputError("nothing of the model is trained: attach an adapter, or call model.requires_grad_()")
        if not (max_grad_norm or 0.0) >= 0:
            raise InputError(f"max_grad_norm must be 0, which never clips, or more, got {max_grad_norm}")
        self.device, self.max_grad_norm = next(iter(self.parameters.values())).device, max_grad_norm or math.inf
        made = optimizer or partial(AdamW, lr=2e-4, weight_decay=0.0)
        self.optimizer = made if isinstance(made, Optimizer) else made([*self.parameters.values()])
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise InputError("LBFGS calls the loss itself, as often as it likes, which a run cannot let it do")
        if isinstance(self.optimizer, FlatOptimizer) and self.optimizer.max_grad_norm is None:
            self.optimizer.max_grad_norm = self.max_grad_norm
        if isinstance(scheduler, LRScheduler):
            raise InputError("scheduler makes torch's scheduler for an optimizer: give a function of it, or a class")
        self.scheduler = scheduler and scheduler(self.optimizer)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            raise InputError("ReduceLROnPlateau goes by a metric: step it yourself, after an evaluation")
        self.courses, self.steps = courses(model, self.parameters.values(), total), 0
        self.stopped = False  # a loop that finds it set ends after the step; the trainers' do
        self.retries = 0  # micro-batches that ran out of memory and were run again
        self.updates, self.watched = 0, 0  # made by this object; after how many `unmoved` is known (0: never)
        self.unmoved: list[str] = []  # parameters that are as they were before the first update
        self._checksums: dict[str, Tensor] = {}
        self._paged: dict[str, int | float] = {}
        self.gathered: list[tuple[Tensor, list[Sums]]] = []  # of the step that is begun: a loss, and what it is made of
        self.state()  # what cannot be saved is said now

    def forward_backward(
        self, *batches: object, loss: Loss | None = None, weight: float | None = None, scale: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add to the step the gradient of `scale` times the loss' mean over these batches, of one forward pass each.
        Returns that number, and the metrics' means, 0-d and still on the device.

        The mean is over all that the batches count together, however these are split. Calls before one step add up: of
        several losses, or of one with `weight`, what all its batches of the step count. Whatever is raised leaves the
        gradients as they were."""
        parameters = [*self.parameters.values()]
        with step.gradients_apart(parameters) as own:
            found = [sums for batch in batches for sums in self._backward(loss or self.loss, batch)]
        counted: Any = sum(0 if s.weight is None else s.weight for s in found) if weight is None else weight
        if not found or (not isinstance(counted, Tensor) and not counted > 0):
            raise InputError(
                f"batches must have something to learn from; together these {len(batches)} weigh {counted}"
            )
        if present := [gradient for gradient in own if gradient is not None]:
            torch._foreach_div_(present, counted)
            torch._foreach_mul_(present, scale)
        step.add_gradients(parameters, own)
        mean = torch.stack([sums.loss.double() for sums in found]).sum() / counted * scale
        self.gathered.append((mean, found))
        return mean, step.means([sums.metrics for sums in found])

    def forget(self) -> None:
        """Leave a step that is begun: no parameter has a gradient."""
        self.gathered = []
        for parameter in self.parameters.values():  # those too that no group has
            parameter.grad = None

    def _backward(self, loss: Loss, batch: object) -> list[Sums]:
        """Add a micro-batch's gradients; where memory runs out and pages can make room, on the second attempt."""

        def backward() -> list[Sums]:
            return step.parts_of(step.as_sums(loss(self.model, batch), batch), backward=True)

        if not isinstance(self.optimizer, FlatOptimizer) or self.optimizer.budget is None:
            return backward()

        return step.backward_or_retry([*self.parameters.values()], backward, self.make_room)

    def make_room(self) -> int:
        """Memory ran out: bring what can wait to the host; returns the bytes given back."""
        self.retries += 1
        return self.optimizer.evict_all() if isinstance(self.optimizer, FlatOptimizer) else 0

    def optim_step(self, lr: float | None = None) -> StepResult:
        """One update from the gradients so far, which are gone then. lr: the rate of every group, times its "lr_scale"
        where it has one; None: as the optimizer, or its scheduler, has it."""
        if not self.gathered:
            raise InputError("a step needs gradients: call forward_backward before optim_step")
        if lr is not None and not 0 <= lr < math.inf:
            raise InputError(f"lr must be 0 or more and finite, got {lr}")
        if self.updates == 0 < self.watched:
            self._checksums = {name: checksum(p) for name, p in self.parameters.items()}
        for course in self.courses:  # once a step, whatever its batches and what they count
            course.penalty().backward()
        gathered, self.gathered = self.gathered, []
        loss = torch.stack([mean for mean, _ in gathered]).sum()
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr * group.get("lr_scale", 1.0)
        norm, skipped = self._update(loss)
        self.steps, self.updates = self.steps + 1, self.updates + 1
        if self.updates == 1 and not isinstance(self.optimizer, FlatOptimizer):
            self.state()  # much of which an optimizer makes in its first step: what cannot be saved is said now
        if self.updates == self.watched:  # here the host waits for the device, once
            self.unmoved = unmoved(self.parameters, self._checksums, self.optimizer)
        for course in self.courses:
            course.after_step(self.steps, skipped)
        self.forget()
        every = [sums for _, found in gathered for sums in found]
        metrics, carried = step.means([s.metrics for s in every]), step.totals([s.carried for s in every])
        return StepResult(loss, metrics, carried, norm, skipped, self._state_metrics())

    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients' norm, and 1 where nothing moved since it or the loss is not finite."""
        optimizer = self.optimizer
        if isinstance(optimizer, FlatOptimizer):
            # Where it is 1, or the norm is not finite, weights, moments and step counts stay as they are.
            optimizer.found_inf = (~torch.isfinite(loss)).float()
            optimizer.step()
            assert optimizer.grad_norm is not None and optimizer.skipped is not None
            norm, skipped = optimizer.grad_norm, optimizer.skipped
        else:
            moved = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in moved if p.grad is not None])
            skipped = (~torch.isfinite(loss + norm)).float()
            if not skipped:
                nn.utils.clip_grads_with_norm_(moved, self.max_grad_norm, norm)
                optimizer.step()
        if self.scheduler is not None and not skipped:
            self.scheduler.step()
        return norm, skipped

    def _state_metrics(self) -> dict[str, int | float]:
        if not isinstance(self.optimizer, FlatOptimizer):
            every = self.optimizer.state.values()
            kept = [value for fields in every if isinstance(fields, dict) for value in fields.values()]
            return {"optimizer_bytes": sum(value.nbytes for value in kept if isinstance(value, Tensor))}
        device, host = self.optimizer.state_bytes()
        if self.optimizer.pager is None:
            return {"optimizer_bytes": device}
        paged = {f"page_{name}": n for name, n in vars(self.optimizer.pager.counters).items() if name != "peak_bytes"}
        before, self._paged = self._paged, {**paged, "page_retries": self.retries}
        moved = {name: round(value - before.get(name, 0), 6) for name, value in self._paged.items()}
        return {"optimizer_bytes": device, "optimizer_host_bytes": host, **moved}

    def sample(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[Completion]:
        """An answer to each prompt, a text as the model reads it or token ids, drawn as `fourbit.generate` does: equal
        prompts get other answers. seed: one for all; None draws it from torch's generator where temperature is not 0.
        Raises InputError for texts without a tokenizer, and a model that is no `CausalLM`."""
        model, tokenizer = as_causal_lm(unwrapped(self.model)), self.tokenizer
        if not isinstance(model, CausalLM) or (tokenizer is None and any(isinstance(p, str) for p in prompts)):
            raise InputError("sample needs a causal language model, and for texts its tokenizer: Run(model, tokenizer)")
        asked = [tokenizer.encode(p) if tokenizer and isinstance(p, str) else [*map(int, p)] for p in prompts]
        how: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        how |= {"max_length": model.max_positions, "stop_ids": tokenizer.stop_ids if tokenizer else ()}
        answers = generate(model, asked, max_new_tokens=max_new_tokens, **how)
        both = enumerate(zip(asked, answers, strict=True))
        rows = [(i, Encoded(a + b, [False] * len(a) + [True] * len(b))) for i, (a, b) in both if b]
        made, logprobs = [(i, Example((row,))) for i, row in rows], list[list[float]]([] for _ in asked)
        with evaluating(model):
            for batch in micro_batches(made, forks_up_to=model.forks_up_to) if made else ():
                own = batch_token_scores(model, batch).logps.split([len(answers[i]) for i in batch.numbers])
                for number, values in zip(batch.numbers, own, strict=True):
                    logprobs[number] = values.tolist()
        texts = [tokenizer.decode(answer) if tokenizer else "" for answer in answers]
        return [Completion(*each) for each in zip(answers, logprobs, texts, strict=True)]

    def weights(self) -> dict[str, Tensor]:
        """What training changes, by name: what is trained, and lasting buffers, but of adapters that others train.
        An adapter's are named as its parameters are, in a trainer's checkpoints without its own name."""
        model, own = unwrapped(self.model), {id(p): name for name, p in self.parameters.items()}
        lasting, names = model.state_dict().keys(), dict[int, str]()
        for part in [part for layer in adapter_layers(model).values() for part in layer.adapters.values()]:
            begins = [own[id(p)].removesuffix(name) for name, p in part.named_parameters() if id(p) in own]
            names |= {id(b): begins[0] + name if begins else "" for name, b in part.named_buffers()}
        buffers = {plain_name(n): b for n, b in model.named_buffers() if n in lasting}
        found = {names.get(id(b), n): b for n, b in buffers.items() if names.get(id(b), n)}
        return {name: tensor.detach() for name, tensor in {**found, **self.parameters}.items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put back what `weights` gave."""
        for name, tensor in self.weights().items():
            tensor.copy_(weights[name])

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
        """All that a run goes on from: tensors in groups (`weights`, the state of optimizer and scheduler, torch's
        generators), and the rest as JSON. InputError for state that is neither."""
        tensors, (kinds, names) = dict[str, Tensor](), self._form()
        kept = [self.optimizer.state_dict(), self.scheduler and self.scheduler.state_dict()]
        plain = {"steps": self.steps, "kinds": kinds, "names": names, "kept": packed(kept, "kept", tensors)}
        return {"weights": self.weights(), "optimizer": tensors, "rng": step.rng_states(self.device)}, plain

    def _form(self) -> tuple[str, list[list[str]]]:
        """What keeps the state, in words, and the names of the parameters in the optimizer's groups."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        moved = [[id(parameter) for parameter in group["params"]] for group in self.optimizer.param_groups]
        if strangers := sum(one not in names for one in chain(*moved)):
            raise InputError(
                f"{strangers} of the optimizer's {sum(map(len, moved))} parameters are not trained here: make it after "
                "the adapter is attached, from those that need a gradient, or give a function of their list"
            )
        kinds = [name_of(type(each)) for each in (self.optimizer, self.scheduler) if each is not None]
        return " and ".join([*kinds, *map(str, self.courses)]), [[names[one] for one in group] for group in moved]

    def restore(self, tensors: Groups, plain: Mapping[str, object]) -> None:
        """Take over what `state` gave. Raises InputError for what is of another model, optimizer or scheduler, and
        then changes nothing."""
        shapes, given = ({n: t.shape for n, t in some.items()} for some in (self.weights(), tensors["weights"]))
        if problem := misfits(shapes, given):
            raise InputError(f"the saved weights are of another model. {problem}")
        scheduler = self._load_optimizer(tensors["optimizer"], plain)
        self.load_weights(tensors["weights"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(scheduler)
        step.set_rng_states(tensors["rng"], self.device)
        self.forget()
        self.steps = checked("steps", plain["steps"], int, {"least": 0})
        self._paged, self.retries = {}, 0  # the pager starts anew

    def _load_optimizer(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> Any:
        """Returns the state of the scheduler."""
        (kinds, names), then = self._form(), [len(group) for group in plain["names"]]
        if plain["kinds"] != kinds or plain["names"] != names:
            raise InputError(
                f"the saved state is of {plain['kinds']} on groups of {then} parameters, and this {kinds} on "
                f"{[*map(len, names)]} has others, or another order: make both as for the run that saved the state"
            )
        saved, scheduler = unpacked(plain["kept"], tensors)
        try:
            self.optimizer.load_state_dict(saved)
        except ValueError as error:
            raise InputError(f"the optimizer's state does not fit this run: {error}") from None
        numbered = dict(enumerate(chain(*names))) if not isinstance(self.optimizer, FlatOptimizer) else {}
        for number in numbered.keys() & saved["state"].keys():
            own = self.optimizer.state[self.parameters[numbered[number]]]
            for field, value in saved["state"][number].items():
                # torch casts state to its parameter's dtype; fp32 moments stay so
                own[field] = value.to(own[field].device) if isinstance(value, Tensor) else value
        return scheduler

    def save_state(self, folder: str | Path, *, keep: int = 2) -> Path:
        """Write `folder/step-<steps>`, whole or not at all, and return it; the newest `keep` stay. It has no gradients
        of a step that is begun, no place in your data, and not Python's or numpy's generators. Raises as
        `save_checkpoint`."""
        groups, plain = self.state()
        return save_checkpoint(folder, self.steps, groups, {"loop": plain}, keep=keep)

    def load_state(self, path: str | Path) -> None:
        """Go on, bit for bit, from what `save_state` wrote, or from a trainer's checkpoint: such a folder, or the
        newest whole one in it. Raises InputError where there is none, or it is of another model or optimizer."""
        found, problems = newest_checkpoint(path)
        with resuming(found or Path(path), problems):
            tensors, state = load_checkpoint(found or path)
            self.restore(tensors, state["loop"])


def cross_entropy(model: CausalLM, batch: Batch | Mapping[str, Tensor]) -> Sums:
    """The loss of fine-tuning: -log p of each trained token, with token_accuracy and entropy (nats).
    batch: of our own, or `input_ids` and `labels`, as `ready` takes them. InputError for a model that is none of ours.
    """
    if not isinstance(unwrapped(model := as_causal_lm(model)), CausalLM):
        raise InputError(f"the loss of fine-tuning needs a causal language model, got {name_of(model)}: give a loss")
    return token_sums(batch_token_scores(model, batch if isinstance(batch, Batch) else ready(batch)))


def token_sums(scores: TokenScores) -> Sums:
    """The loss and the metrics of fine-tuning, of these predictions."""
    metrics = {"token_accuracy": summed(scores.correct), "entropy": summed(scores.entropy)}
    return Sums(-scores.logps.sum(dtype=torch.float64), metrics, weight=len(scores.logps))


def ready(batch: Mapping[str, Tensor]) -> Batch:
    """A batch of `input_ids` and `labels`, [B, T] int64 each, as transformers has them: a label is its own token where
    that is trained, else -100; the shift to what predicts it is made here. Rows are padded on the right. Raises
    InputError for other shapes or labels."""
    given: Any = [batch.get(name) for name in ("input_ids", "labels", "attention_mask")]
    ids, labels, mask = given
    fits = ids is not None and labels is not None and ids.ndim == 2 and ids.shape == labels.shape
    if not fits or ((labels != ids) & (labels != -100)).any() or (mask is not None and (mask.long().diff() > 0).any()):
        raise InputError("a batch is input_ids and labels, [B, T] each and alike but for -100, padded on the right")
    rows = [Encoded(a, b) for a, b in zip(ids.tolist(), (labels != -100).tolist(), strict=True) if any(b[1:])]
    if not rows:
        raise InputError("a batch must have something to learn from, and all its labels past the first place are -100")
    return pad([(number, Example((row,))) for number, row in enumerate(rows)], 0)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that need a gradient, in module order, by name; an adapter's as `path.parameter`."""
    adapter = {id(parameter): name for name, parameter in adapter_parameters(model).items()}
    every = unwrapped(model).named_parameters()
    return {adapter.get(id(p), plain_name(name)): p for name, p in every if p.requires_grad}


def name_of(function: object) -> str:
    """What a function, a class or a partial one is called, for messages and comparisons."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))
