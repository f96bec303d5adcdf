"""Cache strategies: a promise (predicted bytes) and, in `cache.py` beside it, the running cache.

Each folder here is one strategy. `kvcalc.strategies.<name>` is pure: parameters and the layer that
each layer of a model becomes. `kvcalc.strategies.<name>.cache` builds the cache that runs; only it
imports torch.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast

from kvcalc.dtypes import StorageFormat
from kvcalc.errors import InputError, UnsupportedError
from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._parameters import Budget, Value, read_value

__all__ = [
    "ALL",
    "BASELINE",
    "About",
    "ChosenStrategy",
    "Headline",
    "Strategy",
    "load_strategies",
    "load_strategy",
    "strategy_names",
]

BASELINE = "dynamic"
"""The strategy that the others are compared with."""

ALL = "all"
"""What users type for every strategy."""


class Strategy(Protocol):
    """What a folder of this package offers.

    It may also offer

    - `check(layers, parameters)`, which is called once with all layers of a model, before `apply`,
      and raises UnsupportedError for a model that the strategy cannot take as a whole;
    - `apply_all(layers, parameters)` instead of `apply`, where what a layer keeps depends on its
      place: it returns what each layer becomes;
    - `figures(layers, parameters, *, tokens, batch, dtype)`: further byte counts by name (room
      without tokens in a paged cache, what an offloaded one has on the device); `traffic_bytes` is
      what a decode step reads of the whole model's cache, where that is not all of it;
    - `COPIES`: how often a decode step makes a layer's K and V anew, in the model's dtype, while it
      attends to them (two where they come from elsewhere and are joined with the newest);
    - `RECOMPUTES = True`, where nothing is cached and each step is run with the whole sequence;
    - `WHOLE_PROMPT = True`, where a prompt must come in one piece, since what is kept of it is
      chosen when its last token is there;
    - `LAYERS_SHARE = True`, where the prompt decides how the budget is spread over the layers, so
      that what all of them hold together is promised, and not what each does;
    - `COMPOSES = True`, where another strategy can store what this one keeps (`snapkv+int4`), and
      `STORES = True`, where it can be that other.
    """

    SUMMARY: str
    SOURCE: str
    WORKS_ON: str
    PARAMETERS: Mapping[str, Value]
    ABOUT: About

    @staticmethod
    def apply(layer: Layer, parameters: Mapping[str, Any]) -> Layer:
        """What a layer keeps under this strategy; UnsupportedError when it cannot take it.

        A combined layer comes part by part.
        """


class ChosenStrategy(NamedTuple):
    """A strategy with its parameters, as the user wrote it and as it was understood; `then` is the
    one that stores what it keeps.
    """

    own_name: str
    parameters: Mapping[str, Value]
    strategy: Strategy
    then: "ChosenStrategy | None" = None

    @property
    def name(self) -> str:
        """`snapkv`, or `snapkv+int4`."""
        return f"{self.own_name}+{self.then.name}" if self.then else self.own_name

    @property
    def module(self) -> str:
        """The package of the strategy; the running cache is its module `cache`."""
        return _package(self.own_name)

    @property
    def spec(self) -> str:
        """`int4:group=32,residual=128`: every parameter spelled out."""
        spec = self.own_name
        if self.parameters:
            spec += ":" + ",".join(f"{key}={value}" for key, value in self.parameters.items())
        return f"{spec}+{self.then.spec}" if self.then else spec

    @property
    def plain_parameters(self) -> dict[str, int | float | str]:
        """The parameters as JSON has them; those of `then` under its name."""
        plain = {
            key: str(value) if isinstance(value, Budget | str) else value
            for key, value in self.parameters.items()
        }
        if self.then:
            for key, value in self.then.plain_parameters.items():
                plain[f"{self.then.own_name}.{key}"] = value
        return plain

    @property
    def recomputes(self) -> bool:
        """Whether each step must be given the whole sequence, for want of a cache."""
        return bool(getattr(self.strategy, "RECOMPUTES", False))

    @property
    def whole_prompt(self) -> bool:
        """Whether a prompt must come in one piece."""
        return bool(getattr(self.strategy, "WHOLE_PROMPT", False))

    @property
    def layers_share(self) -> bool:
        """Whether the prompt decides how much each layer holds of what all of them do."""
        return bool(getattr(self.strategy, "LAYERS_SHARE", False))

    @property
    def compresses(self) -> bool:
        """Whether what is kept depends on where the prompt ends."""
        budgets = (isinstance(value, Budget) for value in self.parameters.values())
        return self.whole_prompt or any(budgets)

    @property
    def copies(self) -> int:
        """How often a decode step makes a layer's K and V anew."""
        return int(getattr(self.strategy, "COPIES", 2))

    def check(self, layers: Sequence[Layer]) -> None:
        """Raise UnsupportedError for a model that the strategy cannot take as a whole."""
        check = getattr(self.strategy, "check", None)
        if check is not None:
            check(layers, self.parameters)
        if self.then:
            self.then.check(layers)

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

    def apply_all(self, layers: Sequence[Layer]) -> list[Layer]:
        """What each layer of a model keeps; equal layers that become the same, as one object."""
        apply_all = getattr(self.strategy, "apply_all", None)
        if apply_all is None:
            done: dict[int, Layer] = {}
            for layer in layers:
                if id(layer) not in done:
                    done[id(layer)] = self._apply(layer)
            applied = [done[id(layer)] for layer in layers]
        else:
            applied = apply_all(layers, self.parameters)
        if self.then is None:
            return applied
        return [layer.each(_stored_by(self.then)) for layer in applied]

    def _apply(self, layer: Layer) -> Layer:
        return layer.each(lambda part: self.strategy.apply(part, self.parameters))

    def build(self, config: Any, *, capacity_tokens: int, prompt_tokens: int) -> Any:  # noqa: ANN401
        """An empty running cache for a model of this transformers configuration.

        `capacity_tokens` may come in all, and `prompt_tokens` of them in the prompt. Raises
        UnsupportedError for a model that the strategy cannot run on.
        """
        settings: dict[str, Any] = {}
        if self.then:
            settings["rows"] = self.then.running.storage(config, self.then.parameters)
        parameters = {
            key: value.of(prompt_tokens) if isinstance(value, Budget) else value
            for key, value in self.parameters.items()
        }
        return self.running.build(
            config, capacity_tokens=capacity_tokens, parameters=parameters, **settings
        )

    @property
    def running(self) -> Any:  # noqa: ANN401 - a module
        """The module of the running cache; it imports torch and transformers.

        Besides `build` it may have `attending(model)`, a context in which the model attends as the
        cache needs it (without it, that of `_plain_attention`), `prefill(model, cache, prompt)`,
        which feeds a prompt and returns the logits [batch, vocabulary] after it, and
        `observed(cache)`, figures of a run by name.
        """
        return importlib.import_module(f"{self.module}.cache")


def _stored_by(then: ChosenStrategy) -> "Callable[[Layer], Layer]":
    """A change of layers: their rows, and those of layers that nothing was dropped from, are kept
    as `then` keeps them.
    """

    def change(part: Layer) -> Layer:
        if hasattr(part, "stored"):
            return replace(part, stored=then.strategy.apply(part.stored, then.parameters))  # type: ignore[type-var]
        return then.strategy.apply(part, then.parameters)

    return change


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

    `int4:group=32,residual=64,dynamic` is two: a part with `=` before any `:` continues the one
    before. `all` is every strategy there is.
    """
    specs: list[str] = []
    for item in ",".join(values).split(","):
        if specs and ":" in specs[-1] and "=" in item.partition(":")[0]:
            specs[-1] += f",{item}"
        elif item.strip() == ALL:
            specs += strategy_names()
        else:
            specs.append(item)
    return sorted(map(load_strategy, specs), key=lambda chosen: chosen.name != BASELINE)


@cache
def load_strategy(spec: str) -> ChosenStrategy:
    """Read `name` or `name:key=value,…`, and `one+other` where the other stores what the one keeps.

    Raises InputError for an unknown name, key or value and UnsupportedError for a pair that does
    not go together.
    """
    first, plus, rest = spec.strip().partition("+")
    chosen = _load_one(first)
    if not plus:
        return chosen
    then = _load_one(rest)
    for one, ability, what in (
        (chosen, "COMPOSES", "cannot hand what it keeps to another strategy"),
        (then, "STORES", "cannot store what another strategy keeps"),
    ):
        if not getattr(one.strategy, ability, False):
            able = ", ".join(
                name for name in strategy_names() if hasattr(_load_one(name).strategy, ability)
            )
            msg = f"{spec[:60]!r}: {one.name} {what}; {able} can"
            raise UnsupportedError(msg)
    return chosen._replace(then=then)


def _load_one(spec: str) -> ChosenStrategy:
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
        parameters[key] = read_value(name, key, strategy.PARAMETERS[key], value)
    return ChosenStrategy(name, MappingProxyType(parameters), strategy)
