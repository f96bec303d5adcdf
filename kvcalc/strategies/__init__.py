"""Cache strategies: a promise (predicted bytes) and, in `cache.py` beside it, the running cache.

Each folder here is one strategy. `kvcalc.strategies.<name>` is pure: parameters and the layer that
each layer of a model becomes. `kvcalc.strategies.<name>.cache` builds the cache that runs; only it
imports torch.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import NamedTuple, Protocol, cast

from kvcalc.dtypes import StorageFormat
from kvcalc.errors import InputError
from kvcalc.layers import Layer

BASELINE = "dynamic"
"""The strategy that the others are compared with."""


ALL = "all"
"""What users type for every strategy."""


class Strategy(Protocol):
    """What a folder of this package offers.

    It may also offer

    - `check(layers, parameters)`, which is called once with all layers of a model, before `apply`,
      and raises UnsupportedError for a model that the strategy cannot take as a whole;
    - `figures(layers, parameters, *, tokens, batch, dtype)`: further byte counts by name (room
      without tokens in a paged cache, what an offloaded one has on the device);
    - `COPIES`: how often a decode step makes a layer's K and V anew, in the model's dtype, while it
      attends to them (two where they come from elsewhere and are joined with the newest);
    - `RECOMPUTES = True`, where nothing is cached and each step is run with the whole sequence.
    """

    SUMMARY: str
    SOURCE: str
    WORKS_ON: str
    PARAMETERS: Mapping[str, int]

    @staticmethod
    def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
        """What a layer keeps under this strategy; UnsupportedError when it cannot take it.

        A combined layer comes part by part.
        """


class ChosenStrategy(NamedTuple):
    """A strategy with its parameters, as the user wrote it and as it was understood."""

    name: str
    parameters: Mapping[str, int]
    strategy: Strategy

    @property
    def module(self) -> str:
        """The package of the strategy; the running cache is its module `cache`."""
        return _package(self.name)

    @property
    def spec(self) -> str:
        """`int4:group=32,residual=128`: every parameter spelled out."""
        if not self.parameters:
            return self.name
        return f"{self.name}:" + ",".join(f"{key}={val}" for key, val in self.parameters.items())

    @property
    def recomputes(self) -> bool:
        """Whether each step must be given the whole sequence, for want of a cache."""
        return bool(getattr(self.strategy, "RECOMPUTES", False))

    @property
    def copies(self) -> int:
        """How often a decode step makes a layer's K and V anew."""
        return int(getattr(self.strategy, "COPIES", 2))

    def check(self, layers: Sequence[Layer]) -> None:
        """Raise UnsupportedError for a model that the strategy cannot take as a whole."""
        check = getattr(self.strategy, "check", None)
        if check is not None:
            check(layers, self.parameters)

    def figures(
        self, layers: Sequence[Layer], *, tokens: int, batch: int, dtype: StorageFormat
    ) -> dict[str, int]:
        """Further byte counts of a model under this strategy, by name."""
        figures = getattr(self.strategy, "figures", None)
        if figures is None:
            return {}
        counts: dict[str, int] = figures(
            layers, self.parameters, tokens=tokens, batch=batch, dtype=dtype
        )
        return counts

    def apply(self, layer: Layer) -> Layer:
        """What a layer keeps under this strategy, part by part."""
        return layer.each(lambda part: self.strategy.apply(part, self.parameters))


@cache
def strategy_names() -> tuple[str, ...]:
    """The strategies there are, by the names users type."""
    return tuple(
        module.name.replace("_", "-")
        for module in pkgutil.iter_modules(__path__)
        if not module.name.startswith("_")
    )


def _package(name: str) -> str:
    return f"{__name__}.{name.replace('-', '_')}"


def load_strategies(values: Iterable[str]) -> list[ChosenStrategy]:
    """Read comma lists of strategies, the baseline first so that the others can be compared.

    `int4:group=32,residual=64,dynamic` is two: a part with `=` but no `:` continues the one before.
    `all` is every strategy there is.
    """
    specs: list[str] = []
    for item in ",".join(values).split(","):
        if specs and ":" in specs[-1] and "=" in item and ":" not in item:
            specs[-1] += f",{item}"
        elif item.strip() == ALL:
            specs += strategy_names()
        else:
            specs.append(item)
    return sorted(map(load_strategy, specs), key=lambda chosen: chosen.name != BASELINE)


@cache
def load_strategy(spec: str) -> ChosenStrategy:
    """Read `name` or `name:key=value,…`; InputError for an unknown name, key or value."""
    name, _, rest = spec.strip().partition(":")
    if name not in strategy_names():
        msg = f"unknown strategy {name[:40]!r}; choose {', '.join(strategy_names())}"
        raise InputError(msg)
    strategy = cast("Strategy", importlib.import_module(_package(name)))
    parameters = dict(strategy.PARAMETERS)
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            msg = f"strategy {name} has no parameter {key[:40]!r}; its parameters: {known}"
            raise InputError(msg)
        if not re.fullmatch(r"[0-9]{1,9}", value):
            msg = f"strategy {name}: {key} must be a whole number, not {value[:40]!r}"
            raise InputError(msg)
        parameters[key] = int(value)
    return ChosenStrategy(name, MappingProxyType(parameters), strategy)
