"""Engines: what a runtime allocates for the layers of a model.

Each module here is one engine: its docstring names the upstream file and version it was checked
against. An engine turns each layer into the layer it stores.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol, cast

from kvcalc.config import FieldUse
from kvcalc.dtypes import StorageFormat
from kvcalc.engines._options import Option, read_options
from kvcalc.engines._same import Same
from kvcalc.errors import ConfigError, InputError
from kvcalc.families import Architecture
from kvcalc.layers import Layer

__all__ = ["Engine", "Option", "Plan", "Same", "engine_names", "load_engine", "read_options"]


class Plan(NamedTuple):
    """What an engine is to make room for: `batch` sequences of `tokens` tokens each, on each of
    `tp` × `pp` ranks its part; `options` are the engine's own, all of them.
    """

    tokens: int
    batch: int
    dtype: StorageFormat
    tp: int
    pp: int
    options: Mapping[str, Any]

    @property
    def kept_in(self) -> str:
        """The format of K and V, or of each where an engine's options tell them apart."""
        key, value = (self.options.get(name) or self.dtype.name for name in ("type_k", "type_v"))
        return str(key) if key == value else f"{key} K, {value} V"


class Engine(Protocol):
    """What a module of this package offers.

    A serving engine also has `room(architecture, plan, available_bytes)`: what one rank with so
    much memory for its cache holds, by the names that the engine prints. One that gives its memory
    to pools before requests come has `holds(architecture, plan, needed_bytes, available_bytes)`:
    whether these hold the plan's requests, which need so many bytes. An engine whose options
    bound what there is room for has `check_point(architecture, plan)`, which raises InputError for
    tokens or a batch beyond that. One whose rows may have scales has `counts_scales(architecture,
    plan)`: whether those of this plan do.
    """

    OPTIONS: Mapping[str, Option]

    @staticmethod
    def source() -> str:
        """What is counted and on whose authority, in one line."""

    @staticmethod
    def refuse(architecture: Architecture, *, tp: int, pp: int) -> None:
        """Raise UnsupportedError when this engine's size is not exactly known."""

    @staticmethod
    def auto_dtype(architecture: Architecture) -> FieldUse | ConfigError:
        """The format this engine stores in when the user names none, or why there is none."""

    @staticmethod
    def check_dtype(dtype: StorageFormat) -> None:
        """Raise UnsupportedError for a format that this engine cannot store."""

    @staticmethod
    def lay_out(architecture: Architecture, plan: Plan | None = None) -> tuple[Layer, ...]:
        """The layers as this engine stores them, further ones (padding) after the decoder's.

        They are the same for all tokens and batches of a plan, and remembered. An engine that
        allocates the same whatever is asked of it needs no plan.
        """

    @staticmethod
    def transients(
        layers: Sequence[Layer], *, tokens: int, batch: int, dtype: StorageFormat
    ) -> Mapping[str, int]:
        """Byte counts of states that pass, by name; empty when there are none."""


_NAMES = {"llama_cpp": "llama.cpp"}


@cache
def engine_names() -> tuple[str, ...]:
    """The engines there are, by the names users type."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(
        _NAMES.get(name, name.replace("_", "-")) for name in modules if not name.startswith("_")
    )


@cache
def load_engine(name: str) -> Engine:
    """The engine of that name; InputError if there is none."""
    if name not in engine_names():
        msg = f"unknown engine {name[:40]!r}; choose {', '.join(engine_names())}"
        raise InputError(msg)
    modules = {shown: module for module, shown in _NAMES.items()}
    module = modules.get(name, name.replace("-", "_"))
    return cast("Engine", importlib.import_module(f"{__name__}.{module}"))
