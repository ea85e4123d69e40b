"""AdamW and Lion as torch.optim.Optimizers whose state is flat: 32 or 8 bits, one launch for all parameters of a group.

A step on a GPU is at most three launches for a group of one dtype: squares of all gradients (once a step, if the norm
is wanted), step counts and factors, and the update. The host waits for nothing and reads nothing back, so a step can be
captured in a CUDA graph; keep the learning rate in a tensor then. Elsewhere the same runs in plain PyTorch (`plain`).

The seam to paging. What a step reads and writes of the state it takes from a `states.Storage`, one for each group,
dtype and width, made by `self.make_storage(fields, device)`: `Resident`, or a pager's. A step calls
`storage.slices(wanted)` once and works on each `Slice` (elements [start, end) of the flat state and tensors that hold
just those, cut at multiples of layout.CHUNK) before it asks for the next; what it does to them is queued on the current
stream when it asks. State dicts go through `read` and `write`, new parameters through `grow`. Steps go through banks in
the order in which they were made, and a resident storage's tensors only move when it grows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.dispatch import path_for
from . import plain
from .bank import Group, Member, Pool
from .pager import Budget, Pager, check_budget, make_device
from .rules import Rule
from .saved import load_state, read_groups
from .states import Field, Resident, Storage

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FlatOptimizer(torch.optim.Optimizer):
    """Base of AdamW and Lion; see there for the arguments.

    Beside torch.optim's own: `found_inf`, None or a 0-d tensor that the caller may set before a step, which then
    changes nothing where it is not zero (decided on the device, as in torch's fused AdamW). After a step `grad_norm` is
    the gradients' norm (0-d fp32; None without max_grad_norm) and `skipped` is 1 where the step changed nothing (0-d
    fp32; None without found_inf and max_grad_norm). `state[p]` holds views of the flat state, unless that is paged.
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
        self._pools: dict[torch.device, Pool] = {}
        self._members: dict[nn.Parameter, Member] = {}
        super().__init__(params, defaults)

    def make_storage(self, fields: dict[str, Field], device: torch.device) -> Storage:
        if self.budget is None:
            return Resident(fields, device)
        if device not in self.pagers:
            self.pagers[device] = Pager(make_device(device), self.budget)
        return self.pagers[device].state(fields)

    def evict_all(self) -> int:
        """Bring all paged state to the host; returns the bytes of the device given back, 0 without a budget."""
        for pool in self._pools.values() if self.pagers else ():
            for bank in pool.banks.values():
                bank.plans.clear()  # they may hold views of pages
        return sum(pager.evict_all() for pager in self.pagers.values())

    def state_bytes(self) -> tuple[int, int]:
        """Bytes that the state takes now: on the parameters' devices, and in host memory (of what is paged)."""
        banks = [bank for pool in self._pools.values() for bank in pool.banks.values()]
        resident = [t for bank in banks if isinstance(bank.storage, Resident) for t in bank.storage.tensors.values()]
        device = sum(tensor.nbytes for tensor in [*resident, *(pool.steps for pool in self._pools.values())])
        hosts = [page.host for pager in self.pagers.values() for page in pager.pages if page.host is not None]
        return device + sum(pager.held for pager in self.pagers.values()), sum(host.nbytes for host in hosts)

    def add_param_group(self, param_group: Group) -> None:
        """As torch.optim's; ValueError for a setting or a dtype that no step could work with."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
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
        self._check_gradients()
        self._join()
        if len(self._pools) > 1 and self.max_grad_norm is not None:
            raise ValueError(f"max_grad_norm needs all parameters on one device, got {sorted(map(str, self._pools))}")
        for pool in self._pools.values():
            self._step(pool)
        return loss

    def _step(self, pool: Pool) -> None:
        rounded = self.stochastic_rounding
        if pool.device.type == "cuda" and self.pagers and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step with a budget cannot be captured in a CUDA graph: pages move differently each time"
            )
        if path_for(pool.steps) == "triton":
            from . import step_triton  # only here: Triton exists for Linux only and is slow to import

            found = step_triton.step(pool, self.param_groups, self.max_grad_norm, self.found_inf, rounded)
        else:
            found = plain.step(pool, self.param_groups, self.max_grad_norm, self.found_inf, rounded)
        self.grad_norm, self.skipped = found.norm, found.skip

    def _check_gradients(self) -> None:
        """Kernels read gradients by their address, so these must be what the parameter is."""
        for group in self.param_groups:
            for p in group["params"]:
                if (g := p.grad) is not None and (g.dtype != p.dtype or g.layout != torch.strided):
                    raise ValueError(
                        f"gradients must be dense and of their parameter's dtype, got {g.dtype} ({g.layout})"
                    )

    def _join(self) -> None:
        """Parameters that have a gradient for the first time become members."""
        if all(p in self._members for group in self.param_groups for p in group["params"] if p.grad is not None):
            return
        number, joining = 0, []
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None and p not in self._members:
                    joining.append((p, number, index, self._bits(p)))
                number += 1
        self._add(joining)

    def _bits(self, parameter: Tensor) -> int:
        """8 only where asked for, for large parameters, and never for fp64."""
        large = parameter.numel() >= self.min_8bit_size and parameter.dtype != torch.float64
        return 8 if self.bits == 8 and large else 32

    def _add(self, parameters: list[tuple[nn.Parameter, int, int, int]]) -> None:
        for device in {p.device: None for p, *_ in parameters}:
            if device not in self._pools:
                self._pools[device] = Pool(device, self.rule, self.make_storage)
            added = self._pools[device].add([entry for entry in parameters if entry[0].device == device])
            self._members.update({member.parameter: member for _, member in added})
            self._show(self._pools[device])

    def _show(self, pool: Pool) -> None:
        """Put a pool's state where torch.optim has it."""
        for bank in pool.banks.values():
            for member in bank.members:
                state = {"step": pool.steps[member.row]}
                self.state[member.parameter] = state | (bank.state(member) if bank.storage.resident else {})

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's: with bits=32 it is what torch.optim.AdamW writes and reads.

        8-bit moments are uint8 codes shaped like the parameter, and NAME_absmax has a scale for every 256 of them.
        """
        paged = [bank for pool in self._pools.values() for bank in pool.banks.values() if not bank.storage.resident]
        for bank in paged:
            for member in bank.members:
                self.state[member.parameter] |= bank.state(member)
        try:
            return super().state_dict()
        finally:
            for bank in paged:
                for member in bank.members:
                    self.state[member.parameter] = {"step": self.state[member.parameter]["step"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an optimizer of this kind, torch.optim.AdamW or bitsandbytes wrote.

        ValueError if it does not fit: other parameters, or other bits. Nothing is changed then.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups = read_groups(state_dict["param_groups"], self.param_groups)
        parameters = [p for group in groups for p in group["params"]]
        states = load_state(state_dict, parameters, self._bits, self.rule)
        self.param_groups = groups
        self._take(states)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _take(self, states: dict[int, dict[str, Any]]) -> None:
        """Start anew with the states of parameters, given by their numbers."""
        parameters = [(p, index) for index, group in enumerate(self.param_groups) for p in group["params"]]
        self._pools, self._members, self.pagers, self.state = {}, {}, {}, defaultdict(dict)
        self._add([(parameters[n][0], n, parameters[n][1], self._bits(parameters[n][0])) for n in sorted(states)])
        for pool in self._pools.values():
            for bank in pool.banks.values():
                for member in bank.members:
                    pool.steps[member.row] = states[member.number]["step"]
                    bank.load(member, states[member.number])

    def __getstate__(self) -> dict[str, Any]:
        """For copies: torch.optim's, the settings, and the state by number, from which a copy builds its own."""
        kept = ("rule", "bits", "min_8bit_size", "stochastic_rounding", "max_grad_norm", "budget", "found_inf")
        settings = {name: getattr(self, name) for name in kept}
        return {**super().__getstate__(), "state": self.state_dict()["state"], **settings}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.grad_norm = self.skipped = None
        super().__setstate__(state)
        self._take(state["state"])


def _check_group(group: Group) -> None:
    rules: Iterable[tuple[str, bool, str]] = [
        ("lr", not bool(group["lr"] < 0) if not isinstance(group["lr"], Tensor) else group["lr"].numel() == 1, ">= 0"),
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
