"""The model's own windows, kept exactly: what falls out of a window is freed at once.

transformers' window layers keep min(tokens, window) rows after a decode step, and the whole prompt
between a prefill and the first one. Here window and chunked layers keep min(tokens, window - 1)
rows from the first step on, which is all that the next token can attend to besides itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

from kvcalc.errors import UnsupportedError
from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._rows import AttentionLayer, StoredRows, window_of

SUMMARY = "the model's own windows, freed at once; full layers as in dynamic"
SOURCE = "the windows of the model's config; its own storage"
WORKS_ON = "models with window or chunked layers"
PARAMETERS: Mapping[str, int] = {}
ABOUT = About(
    keeps="of a window all that the next token attends to besides itself; of other layers what "
    "dynamic keeps",
    formula="min(tokens, window - 1) tokens in each window layer",
    evicts="at every step, what has fallen out of the window",
    needs="a model that was trained with windows",
    limits="changes no answer, and saves little beyond dynamic, which has windows, too: rows of a "
    "long prompt before the first step, then one row a layer",
    headlines=(
        Headline(
            "8× less cache memory",
            "Mistral 7B, window 4,096, at 32k tokens (arXiv:2310.06825, section 2)",
            "",
            "against a cache without windows, and dynamic has them",
        ),
    ),
)

COPIES = 1
"""A step makes a layer's rows once more, in one piece."""

NO_WINDOW = (
    "sliding needs a model with windows of its own, and no layer here has one; use dynamic; "
    "deciding fields: sliding_window, layer_types, attention_chunk_size"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowLayer(StoredRows):
    """A window's rows in storage of their own."""

    kind: ClassVar[str] = "window"


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """A window in its own storage; all else as it is."""
    del parameters
    return WindowLayer(layer=layer) if _has_window(layer) else layer


def check(layers: Sequence[Layer], parameters: Mapping[str, int]) -> None:
    """Raise UnsupportedError for a model without any window."""
    del parameters
    if not any(_has_window(part) for layer in layers for part in layer.parts()):
        raise UnsupportedError(NO_WINDOW)


def _has_window(layer: Layer) -> TypeGuard[AttentionLayer]:
    return isinstance(layer, AttentionLayer) and window_of(layer) is not None
