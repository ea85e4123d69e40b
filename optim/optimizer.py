"""AdamW and Lion as torch.optim.Optimizers whose state is flat: 32 or 8 bits, one launch for all of a group's.

A step on a GPU is a few launches (step_triton.py), and the host waits for nothing unless an lr is a tensor there.
Elsewhere, and where a parameter is fp64, plain PyTorch does it (update.py).

A step takes what it reads and writes of the state in slices (`_slices`): one for each group, dtype and width, or one
for each page (paging.py). What it does to a slice is queued before it asks for the next.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from inspect import unwrap
from numbers import Integral
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..kernels.dispatch import path_for
from ..kernels.page_device import make_device, peaks
from . import update
from .groups import check_group, is_number, refuse
from .paging import Budget, Pager, check_budget, check_room
from .state import Entry, FlatState, Kind, Slice, fields, largest_shard, local, whole
from .state_files import TORCHS, read_groups, read_states, refuse_torchs
from .update import ADAMW, LION, ROUNDINGS, Group, Rounding, Rule, rounding_key

SETTINGS = ("rule", "bits", "min_8bit_size", "rounding", "seed", "max_grad_norm", "budget", "found_inf")
Key = tuple[int, torch.dtype, int]  # of a flat state: group, dtype, bits
# torch's, without what it wraps them in: that imports its compiler, in a second and more and some 60 MB
_ADD_PARAM_GROUP, _STATE_DICT = unwrap(torch.optim.Optimizer.add_param_group), unwrap(torch.optim.Optimizer.state_dict)


class Options(TypedDict, total=False):
    """What AdamW and Lion take besides, as `FlatOptimizer` describes it; of torch's, what asks for nothing."""

    bits: int
    rounding: Rounding
    seed: int | None
    max_grad_norm: float | None
    min_8bit_size: int
    budget: Budget | None
    foreach: bool | None
    fused: bool | None
    amsgrad: bool
    maximize: bool
    capturable: bool
    differentiable: bool


class FlatOptimizer(torch.optim.Optimizer):
    """Base of AdamW and Lion.

    bits: 8 keeps moments as 8-bit codes with a scale for every 256 elements, for parameters of at least `min_8bit_size`
        elements (smaller ones, and fp64, keep full moments: they cost nothing and matter more).
    rounding: of updated bf16 and fp16 parameters. "stochastic" goes up or down at random so that the mean is exact and
        no update is lost, at no cost in memory; the draw depends on `seed`, parameter, step and element alone. None
        takes a seed from torch's generator; ranks with copies of one model need the same, so 0 is the default.
        "nearest" loses every update below half their spacing. Wider parameters are always rounded to nearest.
    max_grad_norm: gradients count scaled down to this norm over all groups (they are not changed themselves), and a
        step whose norm is not finite is skipped. math.inf only measures and skips. None: no norm is taken.
    budget: None keeps all state on the parameters' device. "auto" keeps there what fits beside the model, a number what
        fits in so many bytes; the rest is paged in and out of pinned host memory during a step (docs/paging.md).
    torchs: settings of torch.optim.AdamW; ValueError for one that is on, but for `foreach` and `fused`: speed alone.
    lr may be a 0-d tensor; keep it on the CPU, for every step reads it on the host, which waits for one on the GPU.
    Sparse or complex parameters and two devices are refused with ValueError.
    Of DTensors (FSDP2, tensor parallel) a rank steps its shard, and norms count all ranks. State dicts hold DTensors,
        on the mesh's device, for torch.distributed.checkpoint; 8-bit ones load on as many ranks as saved them.

    Beside torch.optim's own: `found_inf`, None or a 0-d tensor that the caller may set before a step, which then
    changes nothing where it is not zero (decided on the device, as in torch's fused AdamW). After a step `grad_norm` is
    the gradients' norm (0-d fp32; None without max_grad_norm) and `skipped` is 1 where the step changed nothing (0-d
    fp32; None without found_inf and max_grad_norm). `pager` is None without a budget.

    A parameter joins at the first step that it has a gradient for; until then it costs nothing, as in torch.optim.
    `state[p]` shows the step count and, unless the state is paged, the moments: views, which may be changed in place.
    Tensors put in their place are not taken (load_state_dict is the way in). A step and add_param_group raise
    ValueError if parameters were moved between param_groups or taken out, or if state was removed: make a new optimizer
    for that."""

    cap: int | None = None  # of the budget "auto": bytes that pages take at most, where that was foreseen

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        rule: Rule,
        *,
        bits: int = 32,
        rounding: Rounding = "stochastic",
        seed: int | None = 0,
        max_grad_norm: float | None = None,
        min_8bit_size: int = 4096,
        budget: Budget | None = None,
        **torchs: bool | None,
    ) -> None:
        if unknown := [name for name in torchs if name not in TORCHS]:
            raise TypeError(f"{type(self).__name__} takes no argument {unknown[0]!r}")
        refuse_torchs(torchs)
        refuse("bits", bits, bits in (8, 32), "8 or 32")
        clips = max_grad_norm is None or (is_number(max_grad_norm) and max_grad_norm > 0)
        refuse("max_grad_norm", max_grad_norm, clips, "positive, or None not to clip")
        refuse("rounding", rounding, rounding in ROUNDINGS, f"one of {', '.join(ROUNDINGS)}")
        refuse("seed", seed, seed is None or isinstance(seed, Integral), "a whole number, or None to draw one")
        refuse("min_8bit_size", min_8bit_size, is_number(min_8bit_size), "a number")
        self.rule, self.bits, self.min_8bit_size = rule, bits, min_8bit_size
        self.rounding, self.max_grad_norm = rounding, max_grad_norm
        self.seed = int(torch.randint(1 << 32, (), device="cpu")) if seed is None else int(seed)
        self.budget = None if budget is None else check_budget(budget)
        self.found_inf: Tensor | None = None
        self._older_peaks = peaks()
        self._begin_anew()
        super().__init__(params, defaults)

    def _begin_anew(self) -> None:
        self.grad_norm: Tensor | None = None
        self.skipped: Tensor | None = None
        self.pager: Pager | None = None
        self._states: dict[Key, FlatState] = {}
        self._entries: list[Entry] = []  # by row
        self._steps = torch.zeros(0, dtype=torch.float32, device="cpu")  # of each entry
        self._tables: Any = None  # of the kernels (step_triton.Tables), once they are needed
        self._waiting: list[Entry] = []  # those that have no state yet
        self._seen: list[list[int]] = []  # which parameters the groups had

    def add_param_group(self, param_group: Group) -> None:
        """As torch.optim's; ValueError for what no step could work with: settings, dtypes, a budget below one page of
        what is to be trained, and, as in a step, groups that were changed."""
        self._check_unchanged()
        _ADD_PARAM_GROUP(self, param_group)
        try:
            check_group(self.param_groups[-1], self, SETTINGS)
            joining = [entry for entry in self._new_entries() if entry.group == len(self.param_groups) - 1]
            self._by_key([entry for entry in joining if entry.parameter.requires_grad])
        except BaseException:
            self.param_groups.pop()
            raise
        self._seen = self._members()
        self._waiting += joining

    def _members(self) -> list[list[int]]:
        return [list(map(id, group["params"])) for group in self.param_groups]

    def _new_entries(self) -> list[Entry]:
        every = [(p, group) for group, settings in enumerate(self.param_groups) for p in settings["params"]]
        return [Entry(p, number, group, rounding_key(self.seed, number)) for number, (p, group) in enumerate(every)]

    def _bits(self, parameter: Tensor) -> int:
        large = parameter.numel() >= self.min_8bit_size and parameter.dtype != torch.float64
        return 8 if self.bits == 8 and large else 32

    def _by_key(self, joining: Iterable[Entry]) -> dict[Key, list[Entry]]:
        """What is to join by flat state; InputError if the budget has no room for a page of it."""
        keys: dict[Key, list[Entry]] = {}
        for entry in joining:
            p = entry.parameter
            keys.setdefault((entry.group, p.dtype, self._bits(p)), []).append(entry)
        if self.budget is not None:
            sizes = {key: sum(whole(entry.parameter.numel()) for entry in some) for key, some in keys.items()}
            check_room(self.budget, [(fields(self.rule.moments, bits, d), n) for (_, d, bits), n in sizes.items()])
        return keys

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads
        """One update of every parameter that has a gradient; the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_unchanged()
        joining = [entry for entry in self._waiting if entry.parameter.grad is not None]
        entries = [*self._entries, *joining]
        try:
            for entry in entries:
                _take_gradient(entry)
            if joining:
                self._join(joining)
            self._update()
        finally:
            for entry in entries:
                if entry.weights is not None and entry.weights is not (own := local(entry.parameter)):
                    own.copy_(entry.weights)
                entry.weights = entry.gradient = None
        return loss

    def _check_unchanged(self) -> None:
        if self._members() != self._seen and not self._entries:  # no state yet: accelerate puts shards in their place
            self._seen, self._waiting = self._members(), self._new_entries()
        if self._members() != self._seen:
            raise ValueError(
                "parameters were moved between param_groups or taken out, and their state cannot follow: make a new "
                "optimizer (add_param_group adds to this one)"
            )
        if not all(self.state.get(entry.parameter) for entry in self._entries):
            raise ValueError("the state of a parameter was removed from optimizer.state: make a new optimizer")

    def _join(self, joining: list[Entry]) -> None:
        """Give entries zero state, and no steps taken. Memory that runs out leaves all as it was."""
        keys = self._by_key(joining)
        devices = {e.parameter.device for e in joining} | {self._steps.device for _ in self._entries[:1]}
        if len(devices) > 1:
            raise ValueError(f"an optimizer works on one device, but has parameters on {sorted(map(str, devices))}")
        (device,) = devices
        states = {key: self._states.get(key) or FlatState(*key, self.rule.moments) for key in keys}
        if self.budget is None:
            grown = {k: s.grown([largest_shard(e.parameter) for e in keys[k]], device) for k, s in states.items()}
        elif self.pager is None:
            self.pager = Pager(make_device(device, self._older_peaks.get(device, 0)), self.budget, self.cap)
        before = self._steps.to(device)
        self._steps = torch.cat([before, before.new_zeros(len(joining))])
        for key, state in states.items():
            start = state.join(keys[key], len(self._entries))
            if self.pager is None:
                state.tensors = grown[key]
            else:
                self.pager.add(state, start)
            self._entries += keys[key]
        self._states |= states
        self._tables = None
        self._waiting = [entry for entry in self._waiting if entry.kind is None]
        for entry in self._entries:
            self.state[entry.parameter] = entry.state.views(entry, self._steps)

    def _update(self) -> None:
        settings = self.param_groups, self.max_grad_norm, self.found_inf, self.rounding == "stochastic"
        narrow = all(state.dtype != torch.float64 for state in self._states.values())
        if self._entries and narrow and path_for(self._steps) == "triton":
            from . import step_triton  # only here: Triton exists for Linux only and is slow to import

            if self._tables is None:
                self._tables = step_triton.Tables(self.rule, self._entries, self._states.values(), self._steps)
            control = step_triton.step(self._tables, self._slices(), *settings)
        else:
            control = update.step(self.rule, self._entries, self._steps, self._slices(), *settings)
        self.grad_norm, self.skipped = control.norm, control.skip

    def _slices(self) -> Iterator[Slice]:
        """Slices of what has a gradient."""
        if self.pager is not None:
            yield from self.pager.visit()
            return
        for state in self._states.values():
            if any(entry.gradient is not None and entry.size for entry in state.entries):
                yield state.unpaged()

    def evict_all(self) -> int:
        """Bring all paged state to the host; returns the bytes of the device given back, 0 without a budget."""
        return 0 if self.pager is None else self.pager.evict_all()

    def state_bytes(self) -> tuple[int, int]:
        """Bytes that the state takes now: on the parameters' device, and in host memory (of what is paged)."""
        tensors = [t for state in self._states.values() for t in (state.tensors or {}).values()]
        device = sum(tensor.nbytes for tensor in [*tensors, self._steps])
        return (device, 0) if self.pager is None else (device + self.pager.held, self.pager.host_bytes())

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's: with bits=32 it is what torch.optim.AdamW writes and reads.

        8-bit moments are uint8 codes shaped like the parameter, and NAME_absmax has a scale for every 256 of them.
        Tensors are the live state, each with a storage of its own, or new ones in host memory if it is paged."""
        paged = {} if self.pager is None else {entry: entry.state.empty(entry) for entry in self._entries}
        for part in () if self.pager is None else self.pager.read():
            part.copy(paged)
        shown, self.state = self.state, defaultdict(dict)
        for entry in self._entries:
            self.state[entry.parameter] = {**entry.state.views(entry, self._steps), **paged.get(entry, {})}
        try:
            return _STATE_DICT(self)
        finally:
            self.state = shown

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an optimizer of this kind or torch.optim.AdamW wrote.

        ValueError if it does not fit: other parameters, or other bits. Nothing is changed then. `grad_norm` and
        `skipped` are None until the next step."""
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups = read_groups(state_dict["param_groups"], self.param_groups)
        for group in groups:
            check_group(group, self, SETTINGS)
        parameters = [p for group in groups for p in group["params"]]
        self._take(groups, read_states(state_dict, parameters, self._bits, self.rule))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _take(self, groups: list[Group], states: dict[int, dict[str, Any]]) -> None:
        """Make all state anew, with the states of parameters given by number. Nothing is changed if that fails."""
        before, pager = dict(self.__dict__), self.pager
        try:
            self._begin_anew()
            self.param_groups, self.state = groups, defaultdict(dict)
            self._seen, self._waiting = self._members(), self._new_entries()
            if states:
                self._join([entry for entry in self._waiting if entry.number in states])
            found = {entry: states[entry.number] for entry in self._entries}
            parts = self.pager.fill() if self.pager is not None else [s.unpaged() for s in self._states.values()]
            for part in parts:
                part.copy(found, back=True)
            for entry in self._entries:
                self._steps[entry.row] = states[entry.number]["step"]
        except BaseException:
            self.__dict__.update(before)
            raise
        if pager is not None:
            pager.close()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: torch.optim's, the settings, and the state by number, from which a copy builds its own."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        return {**super().__getstate__(), "state": self.state_dict()["state"], **settings}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._older_peaks = peaks()
        self._begin_anew()
        self._take(self.param_groups, state["state"])


class AdamW(FlatOptimizer):
    """Adam with decoupled weight decay: torch.optim.AdamW's update, in fp32 whatever the parameters' dtype (or fp64).

    options: `bits`, `rounding`, `seed`, `max_grad_norm`, `min_8bit_size` and `budget`, as FlatOptimizer has them."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, ADAMW, **options)


class Lion(FlatOptimizer):
    """Steps of one size in the direction of an interpolated momentum's sign (Chen et al., arXiv 2302.06675).

    One moment, so half of AdamW's state; a good learning rate is 3 to 10 times smaller than AdamW's, and weight decay
    as many times larger. `options` are AdamW's."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, LION, **options)


def _take_gradient(entry: Entry) -> None:
    """Note what a step goes by. ValueError for a gradient that no step can read, and for a parameter that is not as it
    was when it joined: kernels read and write by address alone, as much as there was then."""
    p, g = entry.parameter, entry.parameter.grad
    if g is None:
        return
    if getattr(g, "placements", None) != getattr(p, "placements", None):
        g = g.redistribute(placements=p.placements)
    p, g = local(p), local(g)
    if g.shape != p.shape or g.dtype is not p.dtype or g.layout is not torch.strided:
        raise ValueError(
            f"gradients must be dense and of their parameter's dtype and shape, {p.dtype} {list(p.shape)}, "
            f"got {g.dtype} {list(g.shape)} ({g.layout})"
        )
    kind = Kind(p.shape, p.dtype, p.device)
    if entry.kind not in (None, kind):
        raise ValueError(
            f"parameter {entry.number} was {entry.kind} when its state was made, and now is {kind}; for another dtype "
            "or device call optimizer.load_state_dict(optimizer.state_dict()), for another shape make a new optimizer"
        )
    entry.weights = p if p.is_contiguous() else p.contiguous()
    entry.gradient = g if g.is_contiguous() else g.contiguous()
