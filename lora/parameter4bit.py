"""Parameters that a module reads by name and that are kept as modules in their place: in 4 bits, or to carry adapters.

For parameters that are no layer's weight: the experts of a mixture, which transformers 5 keeps as one tensor
[E, out, in] or [E, in, out].
"""

from functools import cache

from torch import Tensor, nn

from .linear4bit import Module4bit


class StandIn(nn.Module):
    """A module in the place of a parameter: `weight` is what its holder reads there."""

    place: int = 0  # among the parameters of its holder, in the order in which that made them
    transposed: bool = False  # whether the holder says that matrices are [in, out]


class NF4Parameter(Module4bit, StandIn):
    """A frozen parameter of any shape in 4 bits."""


class DenseParameter(StandIn):
    """A dense parameter, to be wrapped as a layer is."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def stand_in(module: nn.Module, name: str, weight: StandIn) -> None:
    """Put `weight` in the place of the parameter `name`: whoever reads `module.name` gets what `weight.weight` is then.

    The way of torch's parametrisations: the module becomes one of a subclass of its class, with a property."""
    order = getattr(type(module), "_parameter_order", tuple(module._parameters))
    weight.place, weight.transposed = order.index(name), getattr(module, "is_transposed", False)
    del module._parameters[name]
    module.register_module(name, weight)
    module.__class__ = _reading(type(module), name, order)  # type: ignore[arg-type]  # a class can be hashed


@cache
def _reading(kind: type[nn.Module], name: str, order: tuple[str, ...]) -> type[nn.Module]:
    def read(self: nn.Module) -> Tensor:
        found: Tensor = self._modules[name].weight  # type: ignore[union-attr, assignment]  # stand_in put it
        return found

    fields = {name: property(read), "_parameter_order": order, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), fields)
