"""AdamW and Lion as torch.optim.Optimizers whose state is flat: 32 or 8 bits, one launch for all parameters of a group.

A step on a GPU is three launches for a group of one dtype: squares of all gradients (once a step, if the norm is
wanted), step counts and factors, and the update. There are more where state is paged (an update for each page), for
each tensor of fp64 or that does not lie in memory as its state does, and for a found_inf that is not fp32 on that
device. The host waits for nothing and reads nothing back, so a step can be captured in a CUDA graph, after one that
was not; keep the learning rate in a tensor then. Elsewhere the same runs in plain PyTorch (`plain`).

The seam to paging. What a step reads and writes of the state it takes from a `states.Storage`, one for each group,
dtype and width, made by `self.make_storage(fields, device)`: `Resident`, or a pager's. A step calls
`storage.slices(wanted)` once and works on each `Slice` (elements [start, end) of the flat state and tensors that hold
just those, cut at multiples of layout.CHUNK) before it asks for the next; what it does to them is queued on the current
stream when it asks. State dicts go through `read` and `write`, new parameters through `grow`. Steps go through banks in
the order in which they were made, and a resident storage's tensors only move when it grows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.dispatch import path_for
from . import plain
from .addresses import is_capturing
from .bank import Bank, Group, Joining, Member, Pool, check_gradient
from .layout import blocks
from .page_device import peaks
from .pager import Pager, make_device
from .pages import Budget, check_budget, check_room
from .rules import Rule
from .saved import load_state, read_groups
from .states import Field, Resident, Storage, fields

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FlatOptimizer(torch.optim.Optimizer):
    """Base of AdamW and Lion; see there for the arguments.

    Beside torch.optim's own: `found_inf`, None or a 0-d tensor that the caller may set before a step, which then
    changes nothing where it is not zero (decided on the device, as in torch's fused AdamW). After a step `grad_norm` is
    the gradients' norm (0-d fp32; None without max_grad_norm) and `skipped` is 1 where the step changed nothing (0-d
    fp32; None without found_inf and max_grad_norm).

    `state[p]` shows the step count and, unless the state is paged, the moments: views, which may be changed in place.
    Tensors put in their place are not taken (load_state_dict is the way in), but entries that are removed or emptied
    are: such a parameter starts anew. Parameters may be moved between param_groups and taken out of them, as in
    torch.optim; the state of one that a step finds in no group is given up.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        rule: Rule,
        *,
        bits: int,
        stochastic_rounding: bool,
        max_grad_norm: float | None,
        min_8bit_size: int,
        budget: Budget | None,
    ) -> None:
        if bits not in (8, 32):
            raise ValueError(f"bits must be 8 or 32, got {bits!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or None not to clip, got {max_grad_norm!r}")
        self.rule, self.bits, self.min_8bit_size = rule, bits, min_8bit_size
        self.stochastic_rounding, self.max_grad_norm = stochastic_rounding, max_grad_norm
        self.budget = None if budget is None else check_budget(budget)
        self.pagers: dict[torch.device, Pager] = {}  # empty without a budget, and before the first step
        self.found_inf: Tensor | None = None
        self.grad_norm: Tensor | None = None
        self.skipped: Tensor | None = None
        self._begin_anew()
        super().__init__(params, defaults)

    def _begin_anew(self) -> None:
        self._pools: dict[torch.device, Pool] = {}
        self._seen: tuple[list[list[int]], list[int]] = [], []  # ids in param_groups and in state, at the last look
        self._parameters: list[tuple[nn.Parameter, int]] = []  # of param_groups at the last look, with their group
        self._waiting: list[
            tuple[nn.Parameter, int, int]
        ] = []  # those of them that are no members, by number and group
        self._older_peaks = peaks() if self.budget == "auto" else {}

    def make_storage(self, fields: dict[str, Field], device: torch.device) -> Storage:
        if self.budget is None:
            return Resident(fields, device)
        if device not in self.pagers:
            self.pagers[device] = Pager(make_device(device, self._older_peaks.get(device, 0)), self.budget)
        return self.pagers[device].state(fields)

    def evict_all(self) -> int:
        """Bring all paged state to the host; returns the bytes of the device given back, 0 without a budget."""
        for bank in self._banks() if self.pagers else ():
            bank.plans.clear()  # they may hold views of pages
        return sum(pager.evict_all() for pager in self.pagers.values())

    def state_bytes(self) -> tuple[int, int]:
        """Bytes that the state takes now: on the parameters' devices, and in host memory (of what is paged)."""
        banks = self._banks()
        resident = [t for bank in banks if isinstance(bank.storage, Resident) for t in bank.storage.tensors.values()]
        device = sum(tensor.nbytes for tensor in [*resident, *(pool.steps for pool in self._pools.values())])
        hosts = [page.host for pager in self.pagers.values() for page in pager.pages if page.host is not None]
        return device + sum(pager.held for pager in self.pagers.values()), sum(host.nbytes for host in hosts)

    def add_param_group(self, param_group: Group) -> None:
        """As torch.optim's; ValueError for what no step could work with: settings, dtypes, a budget below one page."""
        super().add_param_group(param_group)
        try:
            _check_group(group := self.param_groups[-1])
            self._check_room([(p, 0, 0, self._bits(p)) for p in group["params"] if p.requires_grad], [])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._look()
        try:
            self._begin()
            for pool in self._pools.values():
                self._step(pool)
        finally:
            for pool in self._pools.values():
                pool.end()
        return loss

    def _begin(self) -> None:
        """Everything that can be wrong shows here, before anything is changed."""
        for pool in self._pools.values():
            pool.begin()
        joining = [(p, n, index, self._bits(p)) for p, n, index in self._waiting if p.grad is not None]
        for parameter, *_ in joining:
            check_gradient(parameter)
        devices = {*self._pools, *(parameter.device for parameter, *_ in joining)}
        if len(devices) > 1 and self.max_grad_norm is not None:
            raise ValueError(f"max_grad_norm needs all parameters on one device, got {sorted(map(str, devices))}")
        if joining:
            self._check_room(joining, self._banks())
            self._check_captured("parameters join", joining)
            self._add(joining)
            for pool in self._pools.values():
                pool.begin()

    def _step(self, pool: Pool) -> None:
        rounded = self.stochastic_rounding
        if is_capturing(pool.device):
            if self.pagers:
                raise RuntimeError(
                    "a step with a budget cannot be captured in a CUDA graph: pages move differently each time"
                )
            pool.captured = True
        if path_for(pool.steps) == "triton":
            from . import step_triton  # only here: Triton exists for Linux only and is slow to import

            found = step_triton.step(pool, self.param_groups, self.max_grad_norm, self.found_inf, rounded)
        else:
            found = plain.step(pool, self.param_groups, self.max_grad_norm, self.found_inf, rounded)
        self.grad_norm, self.skipped = found.norm, found.skip

    def _look(self) -> None:
        """Follow what users did to param_groups and state since the last look: moved, took out, or cleared."""
        seen = [list(map(id, group["params"])) for group in self.param_groups], list(map(id, self.state))
        if seen == self._seen and all(self.state.values()):
            return
        for p in [p for p, shown in self.state.items() if not shown]:
            del self.state[p]
        self._note()
        places = {id(p): (number, group) for number, (p, group) in enumerate(self._parameters)}
        members = [member for bank in self._banks() for member in bank.members]
        if any(m.parameter not in self.state or places.get(id(m.parameter)) != (m.number, m.group) for m in members):
            states = ((m, state) for m, state in self._states() if m.parameter in self.state)
            try:
                self._take({places[id(m.parameter)][0]: s for m, s in states if id(m.parameter) in places}, anew=False)
            except BaseException:
                self._seen = [], []  # the next look is to see it again
                raise

    def _note(self) -> None:
        """Remember what param_groups and state are like."""
        groups = enumerate(self.param_groups)
        self._parameters = [(p, index) for index, group in groups for p in group["params"]]
        self._seen = [list(map(id, group["params"])) for group in self.param_groups], list(map(id, self.state))
        members = {id(member.parameter) for bank in self._banks() for member in bank.members}
        numbered = enumerate(self._parameters)
        self._waiting = [(p, n, index) for n, (p, index) in numbered if id(p) not in members]

    def _banks(self) -> list[Bank]:
        return [bank for pool in self._pools.values() for bank in pool.banks.values()]

    def _states(self) -> Iterator[tuple[Member, dict[str, Any]]]:
        """All members with their whole state: views of what is resident."""
        for pool in self._pools.values():
            for bank in pool.banks.values():
                for member, state in zip(bank.members, bank.states(), strict=True):
                    yield member, {"step": pool.steps[member.row], **state}

    def _bits(self, parameter: Tensor) -> int:
        """8 only where asked for, for large parameters, and never for fp64."""
        large = parameter.numel() >= self.min_8bit_size and parameter.dtype != torch.float64
        return 8 if self.bits == 8 and large else 32

    def _check_room(self, joining: list[Joining], banks: list[Bank]) -> None:
        """InputError if the budget has no room for one page of the state that these banks will have."""
        totals = {(bank.group, bank.dtype, bank.bits): bank.layout.total for bank in banks}
        for p, _, group, bits in joining:
            key = (group, p.dtype, bits)
            totals[key] = totals.get(key, 0) + blocks(p.numel())
        if self.budget is not None:
            sizes = [(fields(self.rule.moments, bits, dtype), n) for (_, dtype, bits), n in totals.items()]
            check_room(self.budget, sizes)

    def _check_captured(self, what: str, joining: list[Joining]) -> None:
        captured = any(pool.captured for pool in self._pools.values())
        if captured or any(is_capturing(p.device) for p, *_ in joining):
            raise RuntimeError(
                f"{what} while a CUDA graph captures a step or after it did: the state that it updates must not move. "
                "Take a step before capturing; to change more later, load state_dict() into a new optimizer"
            )

    def _add(self, joining: list[Joining]) -> None:
        for device in {p.device: None for p, *_ in joining}:
            if device not in self._pools:
                self._pools[device] = Pool(device, self.rule, self.make_storage)
            self._pools[device].add([entry for entry in joining if entry[0].device == device])
            self._show(self._pools[device])
        self._note()

    def _show(self, pool: Pool) -> None:
        """Put a pool's state where torch.optim has it."""
        for bank in pool.banks.values():
            states = bank.states() if bank.storage.resident else [{} for _ in bank.members]
            for member, state in zip(bank.members, states, strict=True):
                self.state[member.parameter] = {"step": pool.steps[member.row], **state}

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's: with bits=32 it is what torch.optim.AdamW writes and reads.

        8-bit moments are uint8 codes shaped like the parameter, and NAME_absmax has a scale for every 256 of them.
        Tensors are views of the flat state, unless it is paged: to save one of them alone, clone it.
        """
        self._look()
        shown = self.state
        self.state = defaultdict(dict, {member.parameter: state for member, state in self._states()})
        try:
            return super().state_dict()
        finally:
            self.state = shown

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an optimizer of this kind, torch.optim.AdamW or bitsandbytes wrote.

        ValueError if it does not fit: other parameters, or other bits. Nothing is changed then.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups = read_groups(state_dict["param_groups"], self.param_groups)
        for group in groups:
            _check_group(group)
        parameters = [p for group in groups for p in group["params"]]
        states = load_state(state_dict, parameters, self._bits, self.rule)
        before, self.param_groups = self.param_groups, groups
        try:
            self._take(states)
        except BaseException:
            self.param_groups = before
            raise
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _take(self, states: dict[int, dict[str, Any]], anew: bool = True) -> None:
        """Make all state anew, with the states of parameters given by their numbers. Nothing is changed if that fails.

        anew: pagers count from the beginning, as those of a new optimizer.
        """
        parameters = [(p, index) for index, group in enumerate(self.param_groups) for p in group["params"]]
        joining = [(parameters[n][0], n, parameters[n][1], self._bits(parameters[n][0])) for n in sorted(states)]
        self._check_captured("state is loaded, cleared or moved between groups", joining)
        self._check_room(joining, [])
        before = self._pools, self.pagers, self.state
        self._pools, self.state = {}, defaultdict(dict)
        self.pagers = {} if anew else {device: pager.renewed() for device, pager in self.pagers.items()}
        try:
            self._add(joining)
            for pool in self._pools.values():
                for bank in pool.banks.values():
                    for member in bank.members:
                        pool.steps[member.row] = states[member.number]["step"]
                        bank.load(member, states[member.number])
        except BaseException:
            self._pools, self.pagers, self.state = before
            self._note()
            raise
        for pager in before[1].values():
            pager.close()
        self._note()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: torch.optim's, the settings, and the state by number, from which a copy builds its own."""
        kept = ("rule", "bits", "min_8bit_size", "stochastic_rounding", "max_grad_norm", "budget", "found_inf")
        settings = {name: getattr(self, name) for name in kept}
        return {**super().__getstate__(), "state": self.state_dict()["state"], **settings}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.grad_norm = self.skipped = None
        self.pagers = {}
        self._begin_anew()
        self._take(state["state"])


def _check_group(group: Group) -> None:
    lr = group["lr"]
    rules: Iterable[tuple[str, bool, str]] = [
        ("lr", (not isinstance(lr, Tensor) or lr.numel() == 1) and float(lr) >= 0, ">= 0"),
        ("betas", len(group["betas"]) == 2 and all(0 <= b < 1 for b in group["betas"]), "two numbers in [0, 1)"),
        ("eps", group.get("eps", 0.0) >= 0, ">= 0"),
        ("weight_decay", group["weight_decay"] >= 0, ">= 0"),
    ]
    for name, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name} must be {rule}, got {group[name]!r}")
    for p in group["params"]:
        if p.dtype not in DTYPES or p.layout != torch.strided:
            raise ValueError(f"parameters must be dense fp32, bf16, fp16 or fp64, got {p.dtype} ({p.layout})")
