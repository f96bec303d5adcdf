"""kvcalc: how big is the KV cache of a language model, exactly, and what a cache strategy costs.

>>> import kvcalc
>>> kvcalc.size("meta-llama/Llama-3-8B", seq="128k").total_bytes
17179869184
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from kvcalc.api import fit, size
from kvcalc.errors import (
    ConfigError,
    GatedModelError,
    HubUnavailableError,
    InputError,
    KvcalcError,
    MissingDependencyError,
    ModelNotFoundError,
    OutputError,
    PredictionBrokenError,
    UnsupportedError,
)
from kvcalc.sizing import SizeReport

if _TYPE_CHECKING:
    from kvcalc.fitting import FitReport

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "FitReport",
    "GatedModelError",
    "HubUnavailableError",
    "InputError",
    "KvcalcError",
    "MissingDependencyError",
    "ModelNotFoundError",
    "OutputError",
    "PredictionBrokenError",
    "SizeReport",
    "UnsupportedError",
    "fit",
    "size",
]


def __getattr__(name: str) -> object:
    """What sizing does not need is loaded when it is asked for."""
    if name == "FitReport":
        from kvcalc.fitting import FitReport

        return FitReport
    msg = f"module 'kvcalc' has no attribute {name!r}"
    raise AttributeError(msg)
