"""Different adapters for different rows of one batch, or for tokens of packed rows; in training too.

A layer computes its base once for all rows; then each adapter, of any kind, is computed on its own rows and no others.
Rows of one adapter that stand together are a view, others are gathered. The assignment stands in the place of the
layers' active adapters.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError, shown
from ..kernels.derivatives import transformed
from ..kernels.dispatch import autocast_input, bucketed
from ..kernels.lora_rows import Place, lora_rows
from .active import switched
from .adapter import Adapter, is_hooked
from .layer import AdapterLayer, ByRows, adapter_layers, carried, plain_modules
from .lora import conv_kind


@contextmanager
def rows(
    model: nn.Module, names: Sequence[str | None], numbers: Tensor | Sequence[Sequence[int]] | None = None
) -> Iterator[None]:
    """A block in which row i of each batch that the model is given has the adapter names[i], or, for None, none.

    numbers: int [N, T], for packed rows: which of `names` each token takes. Each row, or token, then has the outputs
    and gradients that it has alone; gradients flow to every adapter that trains (`train_only`). Dropout's masks are
    drawn for each adapter's rows apart, so they are not those of runs alone. Backward may follow after the block.

    A layer with one of the adapters must be given the batch as it is: [N, T, features], ids [N, T], a convolution's
    [N, channels, ...]. InputError, in the block, for any other input, as tokens sent to an expert are, and where a
    module reads the layer's weight, as that of fused experts; at once for a name that the model does not carry, for
    numbers that are no index into names, and for adapters on a part that reads images or sound.
    """
    layers = adapter_layers(model)
    for name in {*names} - {None} - {name for layer in layers.values() for name in layer.adapters}:
        carried(model, cast(str, name))  # says what there is
    index = torch.arange(len(names)) if numbers is None else torch.as_tensor(numbers).cpu()
    fits = index.dim() == (1 if numbers is None else 2) and index.numel() and not index.is_floating_point()
    if not fits or not 0 <= int(index.min()) <= int(index.max()) < len(names):
        raise InputError(
            "rows needs a name or None for each row of a batch, or with numbers (int [rows, tokens]) for each of them; "
            f"got names={shown(names)}, numbers={shown(numbers)}"
        )
    kinds = list(dict.fromkeys(name or "" for name in names))
    to_kind = torch.tensor([kinds.index(name or "") for name in names])
    by_rows = Rows(to_kind[index.long()].to(next(model.parameters()).device), kinds)
    _refuse_images(model, [path for path, layer in layers.items() if by_rows.keys() & layer.adapters.keys()])
    with switched([(layer, by_rows) for layer in layers.values()]):
        yield


class Rows(ByRows):
    """Which adapter each row [N] takes, or each token [N, T]: `numbers` into `names`, of which "" is the base alone."""

    def __init__(self, numbers: Tensor, names: list[str]) -> None:
        super().__init__({names[i]: 1.0 for i in numbers.unique().tolist() if names[i]})
        self.numbers, self.places = numbers, dict[str, Place]()  # and where each adapter's rows lie
        self.names, self.longer = names, dict[int, Rows]()  # by length: the same for rows that are padded behind
        indices = [(numbers.flatten() == i).nonzero().flatten() for i in range(len(names))]
        for name, index in zip(names, indices, strict=True):
            if len(index):
                first, last = int(index[0]), int(index[-1]) + 1
                self.places[name] = slice(first, last) if last - first == len(index) else index
        order = torch.cat(indices)  # that rows have when they are sorted by adapter, and the way back
        self.back = None if bool((order.diff() > 0).all()) else order.argsort()

    def output(self, layer: AdapterLayer, *args: Any, **kwargs: Any) -> Tensor:
        parts = {name: cast(Adapter, layer.adapters[name]) for name in self if name in layer.adapters}
        if not parts:
            return cast(Tensor, layer.base(*args, **kwargs))
        x: Any = (*args, *kwargs.values())[0] if len(args) + len(kwargs) == 1 else None
        shape, (n, *t), conv = list(getattr(x, "shape", ())), self.numbers.shape, conv_kind(layer.base)
        if t and len(shape) == 3 and n == 1 and t[0] != shape[1] == bucketed(t[0], x):
            more = self.numbers[:, -1:].expand(-1, shape[1] - t[0])
            longer = self.longer.setdefault(shape[1], Rows(torch.cat([self.numbers, more], 1), self.names))
            return longer.output(layer, *args, **kwargs)
        dims = cast(Tensor, layer.base.weight).dim() if conv else 3 if shape and x.is_floating_point() else 2
        if len(shape) < dims or shape[0] != n or (t and (conv or shape[1] != t[0])):
            raise InputError(
                f"rows() of a batch {[n, *t]}: a layer got {shape or 'not one tensor'}, so whose rows those are is not "
                f"known. Give it [{n}, tokens, ...], or attach adapters without it (exclude=): {layer.base}"
            )
        return self._mixed(layer, parts, x.flatten(0, 1)).unflatten(0, shape[:2]) if t else self._mixed(layer, parts, x)

    def _mixed(self, layer: AdapterLayer, parts: dict[str, Adapter], x: Tensor) -> Tensor:
        """The output [M, ...] of x [M, ...], rows or tokens."""
        apart = any(part.copies is not None or part.of_base for part in parts.values())  # or the base is made at once
        y, made = None if apart else layer.base(x), []
        y = y.clone() if y is not None and is_hooked(layer.base) else y  # hooks may keep what they are shown
        updates = {name: None if is_hooked(part) else part.low_rank() for name, part in parts.items()}
        quick = [(self.places[n], up.A, up.B, up.scale) for n, up in updates.items() if up and not up.dropout]
        if y is not None and len(quick) == len(parts) and not (torch.compiler.is_compiling() or transformed()):
            return lora_rows(y, autocast_input(x), quick)
        for name, place in self.places.items():
            if y is None:
                with switched([(layer, {name: 1.0} if name in parts else {})]):
                    made.append(layer.forward(x[place]))
            else:
                made.append(parts[name](x[place], y[place]) if name in parts else y[place])
        return torch.cat(made) if self.back is None else torch.cat(made)[self.back]


def _refuse_images(model: nn.Module, paths: list[str]) -> None:
    """InputError for layers of these paths whose rows are not the text's, as transformers marks its parts."""
    senses = {path: getattr(module, "input_modalities", "") for path, module in plain_modules(model).items()}
    for path in paths:
        above = [sense for part, sense in senses.items() if sense and (not part or path.startswith(f"{part}."))]
        if above and not isinstance(above[0], str) and len(above[0]) > 1 and "".join(above[-1]) != "text":
            raise InputError(f"rows() cannot tell whose images or sound '{path}' computes: attach adapters without it")
