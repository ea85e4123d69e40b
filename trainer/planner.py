"""What training takes before a weight is read: bytes by part at the worst moment, and what a step multiplies.

The real model makes a real step that computes nothing, while a dispatch mode hears which storages are made and let go:
one mechanism for every family, adapter, dtype and word of checkpointing. Of a decoder of ours two layers and three are
enough: what the third adds, each adds. For a CPU the tensors are the CPU's own, of memory that nobody touches, which
the system then never gives; for a GPU they are on "meta", and take CUDA's paths (launch.py).
"""

import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..kernels.dispatch import force_path, proc_bytes, trim_heap
from ..lora.linear4bit import Module4bit
from ..models.decoder import Decoder
from ..models.protocol import CausalLM
from ..models.recompute import AGAIN, Keep, leanness
from ..optim.paging import PAGE_BYTES
from .config import PAGED, TrainingConfig, size_in_bytes
from .heard import MAPPED, PARTS, Bytes, Flash, Storages, fake_model, parts_of
from .loop import Run, cross_entropy
from .step import Sums, make_optimizer

# Bytes beside all tensors. CPU: MKL's buffers, and what Python and autograd hold. Fitted; docs/log.md of 2026-11-30
# says on which cases of benchmarks.plan_check. CUDA: context and workspaces, never measured.
FRAMEWORK = {"cpu": 95 << 20, "cuda": 640 << 20}
FEW = (2, 3)
DYNAMO = "torch._dynamo"
ANSWERING = "answering"


@dataclass(frozen=True)
class Forecast:
    """Bytes by part at the highest moment of each phase of a step, and what the step multiplies."""

    phases: Mapping[str, Bytes]
    layer: int  # bytes that one layer keeps for backward; of a model of others' all layers together, and the head
    flops: float  # of the products of a forward and a backward pass

    @property
    def parts(self) -> Bytes:
        """Bytes by part at the highest moment."""
        return max(self.phases.values(), key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> int:
        """All of these."""
        return sum(self.parts.values())

    @property
    def beside(self) -> int:
        """What comes to what is there before the first step."""
        return self.peak - sum(self.parts[part] for part in ("base", "scales", "adapter", "framework"))


@dataclass(frozen=True)
class Case:
    """What is foreseen: a pass over a batch (on the CPU) by a model of any tensors, also on meta. sums: the loss, as a
    trainer's. device: "cpu" or "cuda". passes: of a step, whose gradients add up; sizes: tokens of its examples.
    answering: bytes beside weights, adapter and state while the model answers, between steps."""

    model: CausalLM
    batch: Batch
    config: TrainingConfig
    sums: Callable[[CausalLM, Batch], Tensor | Sums] = cross_entropy
    device: str = "cpu"
    passes: int = 1
    sizes: Sequence[int] = ()
    answering: int = 0
    _found: dict[Keep, Forecast] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many layers the model tells apart."""
        return self.model.spec.num_hidden_layers if isinstance(self.model, Decoder) else 1

    def forecast(self, keep: Keep = "products") -> Forecast:
        """What it takes where all layers have this word."""
        if keep in self._found:
            return self._found[keep]
        far = self.layers - FEW[0] if self.layers > FEW[1] else 0
        (one, kept), (two, more) = (self._step(keep, n) for n in FEW) if far else [self._step(keep, None)] * 2
        phases, layer = dict[str, Bytes](), more - kept
        for phase, few in one.most.items():
            each = {part: two.most[phase].get(part, 0) - few.get(part, 0) for part in PARTS}
            phases[phase] = {part: max(0, few.get(part, 0) + far * each[part]) for part in PARTS}
            phases[phase]["framework"] += FRAMEWORK[self.device]
            if self.config.optimizer.startswith(PAGED) and self.device == "cuda":  # what it cannot do without is here
                most = size_in_bytes(self.config.optimizer_budget) or 2 * PAGE_BYTES
                phases[phase]["optimizer"] = min(phases[phase]["optimizer"], most)
        if self.answering:
            phases[ANSWERING] = phases["update"] | {"gradients": 0, "activations": self.answering, "logits": 0}
        dense = max((prod(m.shape) for m in self.model.modules() if isinstance(m, Module4bit)), default=0)
        there = phases["forward"]["base"] + 2 * dense * self.model.dtype.itemsize, phases["forward"]["scales"]
        phases["loading"] = dict.fromkeys(PARTS, 0) | dict(zip(PARTS, there, strict=False))  # a layer's, and the next's
        phases["loading"]["framework"] = FRAMEWORK[self.device]
        flops = one.flops + far * (two.flops - one.flops)
        return self._found.setdefault(keep, Forecast(phases, layer, flops))

    def _step(self, keep: Keep, layers: int | None) -> tuple[Storages, int]:
        """A step on fake tensors: what was heard, and the bytes that stay between forward and backward."""
        there = DYNAMO in sys.modules
        found = self._traced(keep, layers)
        return found if there or DYNAMO not in sys.modules else self._traced(keep, layers)  # the import was heard too

    def _traced(self, keep: Keep, layers: int | None) -> tuple[Storages, int]:
        _ = self.model.logit_softcap, self.model.packs  # of a model of others tried now, before any mode: copies cannot
        kept, gpu = list[int](), self.device == "cuda"
        where, seen = "meta" if gpu else "cpu", Storages(self.model.vocab_size, gpu, MAPPED[keep in AGAIN])
        # Checkpoints import the one, attention on meta the other: in a trace it would be part of the step.
        import_module(DYNAMO if keep in AGAIN else "torch.fx.experimental.symbolic_shapes")
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            if gc.isenabled():  # it would free what lies in cycles now in this pass, now in that
                gc.disable()
                stack.callback(gc.enable)
            for mode in (Flash(), force_path("triton")) if gpu else ():
                stack.enter_context(mode)
            fake = fake_model(self.model, where, layers).train()
            fake.checkpointing = keep
            like: Any = {n: x.to(where) for n, x in vars(self.batch).items() if isinstance(x, Tensor)}
            trained = {name: p for name, p in fake.named_parameters() if p.requires_grad}
            parts = parts_of(fake)
            for tensor in [*fake.parameters(), *fake.buffers()]:
                seen.add(tensor, parts[id(tensor)])

            def heard(given: Callable[[], Tensor | Sums]) -> Any:
                begun, seen.part, seen.again = seen.now.total(), "", " again" * bool(kept)
                seen.phase = f"forward{seen.again}"
                found = given()
                kept.append(seen.now.total() - begun)
                seen.phase, seen.left = f"backward{seen.again}", len(trained) // 2
                if not isinstance(found, Sums) or found.rest is None:
                    return found
                return found._replace(rest=partial(heard, found.rest))

            def loss(model: CausalLM, batch: Batch) -> Any:
                return heard(partial(self.sums, model, batch))

            for p in trained.values():
                p.register_post_accumulate_grad_hook(seen.gradient)
            held: Any = self.config.optimizer.removeprefix(PAGED)  # all is here; no reward head is
            alike = replace(self.config, optimizer=held, optimizer_budget="auto", lr_scale={})
            optimizer = make_optimizer(trained, alike)
            run = Run(fake, loss=loss, parameters=trained, optimizer=optimizer, total=1 << 20)  # whatever that is
            with seen:
                seen.part, seen.phase = "gradients", "update"
                for p in trained.values():
                    p.grad = torch.empty_like(p)
                seen.part = "optimizer"
                with force_path("reference"):
                    run.optimizer.step()
                seen.part, seen.phase = "gradients", "forward"
                for p in trained.values():
                    p.grad = torch.empty_like(p) if self.passes > 1 else None
                run.forward_backward(replace(self.batch, **like))
        return seen, max(kept)

    def mixed(self, words: Sequence[Keep]) -> Forecast:
        """What it takes where each layer has its word, of at most two."""
        one, two, share = self.forecast(words[0]), self.forecast(words[-1]), words.count(words[0]) / len(words)
        mix = {
            p: [round(share * a + (1 - share) * two.phases[p][k]) for k, a in x.items()] for p, x in one.phases.items()
        }
        return replace(two, phases={phase: dict(zip(PARTS, values, strict=True)) for phase, values in mix.items()})

    def words(self, room: int) -> list[Keep]:
        """The word of each layer, so that all beside the weights fits in so many bytes: as few as needed run again, and
        on CUDA as few as needed of these wait in the host's memory. The leanest where nothing fits."""
        words: tuple[Keep, ...] = ("products", "input", "host") if self.device == "cuda" else ("products", "input")
        of, layers = pairwise(words), range(self.layers + 1)  # the first ones run again: their backward is the last
        every = ([lean] * n + [rich] * (self.layers - n) for rich, lean in of for n in layers)
        return next((found for found in every if self.mixed(found).beside <= room), [words[-1]] * self.layers)

    def ways(self, words: Sequence[Keep]) -> dict[str, int]:
        """Peak with these words as it is (""), and with changes that make room, least slow first: 8-bit state costs
        next to nothing, small passes little, a second forward pass a third, copies to the host most."""
        own, share = self.config.optimizer, max(self.sizes) / max(1, self.batch.tokens)
        lean: dict[str, Keep] = {"on": "input", "offload": "host"} if self.device == "cuda" else {"on": "input"}
        keeps: dict[str, Sequence[Keep]] = {"": words}
        keeps |= {f"checkpointing={f}": [w] * self.layers for f, w in lean.items() if leanness(w) > leanness(words)}
        passes: dict[str, dict[str, float]] = {"": {}}
        passes |= {"micro_batch=1": {"activations": share, "logits": share}} if share < 1 else {}
        states: dict[str, dict[str, float]] = {"": {}}
        states |= {} if "8bit" in own else {f"optimizer={own}8bit": {"optimizer": 0.26}}  # and scales of 256 values
        found = dict[str, int]()
        for (k, ws), (m, less), (o, fewer) in product(keeps.items(), passes.items(), states.items()):
            peak = max(
                sum(
                    size * (fewer if phase == ANSWERING else less | fewer).get(part, 1.0)
                    for part, size in parts.items()
                )
                for phase, parts in self.mixed(ws).phases.items()
            )
            found[" ".join(filter(None, (k, m, o)))] = round(peak)
        return found

    def levers(self, words: Sequence[Keep]) -> dict[str, int]:
        """Single changes, and bytes that each would save by itself, about; most first."""
        ways, parts = self.ways(words), self.mixed(words).parts
        found = {change: ways[""] - peak for change, peak in ways.items() if change and " " not in change}
        if not parts["scales"] and not getattr(self.config, "full", False):
            found["quant=nf4"] = parts["base"] * 3 // 5
        return dict(sorted(((c, size) for c, size in found.items() if size > 0), key=lambda both: -both[1]))


def bound(model: nn.Module, tokens: int, longest: int) -> int:
    """More bytes than training takes beside the weights, from sizes alone, at once: where it fits nothing is asked. 0
    for tensors of a class of their own (distributed ones), for which fake ones cannot stand."""
    plain = all(type(t) in (Tensor, nn.Parameter) for t in [*model.parameters(), *model.buffers()])
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    wide = sum(sum(p.shape) for p in model.parameters() if p.ndim > 1) * (1 + longest // 256)  # with pairs of tokens
    return plain * (6 * trained + 32 * tokens * wide + (1 << 30))  # of logits, and decoding


def memory_used(device: torch.device) -> tuple[str, int]:
    """(what it is, bytes): the allocator's peak on CUDA, else this process' anonymous resident memory."""
    if device.type == "cuda":
        return "max_memory_allocated", torch.cuda.max_memory_allocated(device)
    return "rss_anon", proc_bytes("/proc/self/status", "RssAnon")


def peak_from_now(device: torch.device) -> Callable[[], int]:
    """What says the most bytes taken from now on, beside those that are there now; 0: the system does not say."""
    if device.type == "cuda":
        there = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - there
    trim_heap()  # memory that the heap holds free would hide what is taken
    of, before = partial(proc_bytes, "/proc/self/status"), memory_used(device)[1]
    with suppress(OSError):  # the kernel forgets this process' peak, that of loading
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return lambda: max(0, of("VmHWM") - of("RssFile") - of("RssShmem") - before)


def state_bytes(config: TrainingConfig, parameters: Iterable[Tensor]) -> int:
    """Bytes of the optimizer's state for these, about: scales of 8-bit state and padding are left out."""
    moments = (1 if "lion" in config.optimizer else 2) * (1 if "8bit" in config.optimizer else 4)
    return moments * sum(parameter.numel() for parameter in parameters)
