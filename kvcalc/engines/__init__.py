"""Engines: what a runtime allocates for the layers of a model.

Each module here is one engine: its docstring names the upstream file and version it was checked
against. An engine turns each layer into the layer it stores.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Protocol, cast

from kvcalc.config import FieldUse
from kvcalc.dtypes import StorageFormat
from kvcalc.errors import ConfigError, InputError
from kvcalc.families import Architecture
from kvcalc.layers import Layer


class Engine(Protocol):
    """What a module of this package offers."""

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
    def lay_out(architecture: Architecture) -> tuple[Layer, ...]:
        """The layers as this engine stores them."""

    @staticmethod
    def transients(
        layers: Sequence[Layer], *, tokens: int, batch: int, dtype: StorageFormat
    ) -> Mapping[str, int]:
        """Byte counts of states that pass, by name; empty when there are none."""


@cache
def engine_names() -> tuple[str, ...]:
    """The engines there are, by the names users type."""
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


@cache
def load_engine(name: str) -> Engine:
    """The engine of that name; InputError if there is none."""
    if name not in engine_names():
        msg = f"unknown engine {name[:40]!r}; choose {', '.join(engine_names())}"
        raise InputError(msg)
    return cast("Engine", importlib.import_module(f"{__name__}.{name}"))
