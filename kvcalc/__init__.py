"""kvcalc: how big is the KV cache of a language model, exactly, and what a cache strategy costs.

>>> import kvcalc
>>> kvcalc.size("meta-llama/Llama-3-8B", seq="128k").total_bytes
17179869184
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

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

if _TYPE_CHECKING:
    from kvcalc.api import fit, size
    from kvcalc.fitting import FitReport
    from kvcalc.sizing import SizeReport

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


_LATER = {"FitReport": "fitting", "SizeReport": "sizing", "fit": "api", "size": "api"}
"""Where the public names are that are loaded when they are asked for: the command line is then
loaded after the package, where Ctrl-C finds it ready.
"""


def __getattr__(name: str) -> object:
    """Load a name, once."""
    if name not in _LATER:
        msg = f"module 'kvcalc' has no attribute {name!r}"
        raise AttributeError(msg)
    from importlib import import_module

    found: object = getattr(import_module(f"kvcalc.{_LATER[name]}"), name)
    globals()[name] = found
    return found
