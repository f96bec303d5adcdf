"""kvcalc: how big is the KV cache of a language model, exactly, and what a cache strategy costs.

>>> import kvcalc
>>> kvcalc.size("meta-llama/Llama-3-8B", seq="128k").total_bytes
17179869184
"""

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
