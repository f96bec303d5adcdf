"""Hugging Face transformers: the storages its own caches keep alive in steady state.

Checked against `cache_utils.py` of transformers 5.23.0 by running it (the tests do), counting the
unique storages of a cache's tensors after at least one decode step:

- a full layer holds exactly its tokens (`DynamicLayer` concatenates);
- a window layer shows window - 1 tokens, but they are a view of the window-long tensor of the last
  step, so min(tokens, window) tokens stay alive. Right after a prefill longer than the window the
  view is one of the whole prompt, which stays alive until the first decode step: `after_prefill`;
- MLA is stored as latent and rotary key since 5.15.0, with an indexer since 5.18.0; older versions
  store K and V of every head (`kvcalc.releases`).

Zero-dimensional constants (the window length that `DynamicSlidingWindowLayer` keeps as an 8-byte
tensor) are settings, not cache, and are not counted.
"""

from collections.abc import Mapping, Sequence

from kvcalc.config import FieldUse, class_defaults
from kvcalc.dtypes import COMPUTE_DTYPES, StorageFormat
from kvcalc.engines import Option, Plan
from kvcalc.errors import ConfigError, UnsupportedError
from kvcalc.families import Architecture
from kvcalc.layers import FullAttention, LatentAttention, Layer, SlidingAttention
from kvcalc.releases import CHECKED, keeps_otherwise, latents_are_kept, transformers_version

OPTIONS: Mapping[str, Option] = {}


def source() -> str:
    """The file and version the rules were checked against, and the installed one if it differs."""
    checked = f"transformers cache_utils.py {CHECKED}: unique storages alive after a decode step"
    installed = transformers_version()
    return checked if installed == CHECKED else f"{checked} (installed: {installed})"


def refuse(architecture: Architecture, *, tp: int, pp: int) -> None:
    """One device only, and only model types that transformers itself can run."""
    if (tp, pp) != (1, 1):
        msg = "engine transformers is sized on one device; use --engine model for --tp and --pp"
        raise UnsupportedError(msg)
    known = class_defaults(architecture.model_type)
    if known is None or not known.in_transformers:
        msg = (
            f"transformers {CHECKED} has no model_type {architecture.model_type!r}, and "
            "kvcalc never runs a repository's own code; use --engine model"
        )
        raise UnsupportedError(msg)
    since = keeps_otherwise(architecture.model_type)
    if since is not None:
        msg = (
            f"model_type {architecture.model_type!r} keeps other states in transformers "
            f"{transformers_version()}; run: pip install 'transformers>={since}'"
        )
        raise UnsupportedError(msg)
    parts = [part for layer in _layers(architecture) for part in layer.parts()]
    if any(isinstance(part, SlidingAttention) and part.window == 1 for part in parts):
        msg = (
            "transformers never drops tokens of a window of 1 (it slices [-0:]); "
            "deciding field: sliding_window"
        )
        raise UnsupportedError(msg)


def auto_dtype(architecture: Architecture) -> FieldUse | ConfigError:
    """The model's dtype: transformers ignores a declared KV quantisation."""
    return architecture.model_dtype


def check_dtype(dtype: StorageFormat) -> None:
    """DynamicCache stores what the model computes."""
    if dtype.name not in COMPUTE_DTYPES:
        msg = (
            f"transformers' DynamicCache stores {', '.join(COMPUTE_DTYPES)}, not {dtype.name}; "
            "quantised caches are strategies (kvcalc strategies)"
        )
        raise UnsupportedError(msg)


def lay_out(architecture: Architecture, plan: Plan | None = None) -> tuple[Layer, ...]:
    """What transformers' models keep; older versions expand latents."""
    del plan
    layers = _layers(architecture)
    if latents_are_kept(architecture.model_type):
        return layers
    return tuple(layer.each(_expanded) for layer in layers)


def _layers(architecture: Architecture) -> tuple[Layer, ...]:
    layers = architecture.transformers_layers
    if isinstance(layers, UnsupportedError):
        raise layers
    return layers


def _expanded(layer: Layer) -> Layer:
    return layer.expanded() if isinstance(layer, LatentAttention) else layer


def transients(
    layers: Sequence[Layer], *, tokens: int, batch: int, dtype: StorageFormat
) -> Mapping[str, int]:
    """`after_prefill_bytes`: what stays alive when all `tokens` came in one prefill."""
    parts = [part for layer in layers for part in layer.parts()]
    if not any(isinstance(part, SlidingAttention) for part in parts):
        return {}
    return {
        "after_prefill_bytes": sum(
            _pinned(part).num_bytes(tokens=tokens, batch=batch, dtype=dtype) for part in parts
        )
    }


def _pinned(layer: Layer) -> Layer:
    if not isinstance(layer, SlidingAttention):
        return layer
    return FullAttention(kv_heads=layer.kv_heads, key_dim=layer.key_dim, value_dim=layer.value_dim)
