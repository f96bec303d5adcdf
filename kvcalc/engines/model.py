"""No runtime at all: what the architecture must keep, nothing rounded up.

A window layer keeps min(tokens, window) tokens and MLA the latent plus the rotary key. Every real
engine allocates at least this much.
"""

from collections.abc import Mapping, Sequence

from kvcalc.config import FieldUse
from kvcalc.dtypes import StorageFormat
from kvcalc.engines import Option, Plan
from kvcalc.errors import ConfigError
from kvcalc.families import Architecture
from kvcalc.layers import Layer

OPTIONS: Mapping[str, Option] = {}


def source() -> str:
    """The architecture itself."""
    return "what the architecture must keep"


def refuse(architecture: Architecture, *, tp: int, pp: int) -> None:
    """Never: whatever has layers has a size."""


def auto_dtype(architecture: Architecture) -> FieldUse | ConfigError:
    """The KV quantisation that the checkpoint declares, else the model's dtype."""
    return architecture.cache_dtype


def check_dtype(dtype: StorageFormat) -> None:
    """Any format is a size."""


def lay_out(architecture: Architecture, plan: Plan | None = None) -> tuple[Layer, ...]:
    """As they are."""
    del plan
    return architecture.layers


def transients(
    layers: Sequence[Layer], *, tokens: int, batch: int, dtype: StorageFormat
) -> Mapping[str, int]:
    """None."""
    del layers, tokens, batch, dtype
    return {}
