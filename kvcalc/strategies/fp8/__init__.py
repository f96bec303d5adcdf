"""8-bit floating point (e4m3) keys and values with a float32 scale for each token and KV head.

The scale maps the largest magnitude of a row to 448, the largest e4m3 value, so that no later token
can saturate; every token is quantised once, after the step that brought it. vLLM calls the same
layout fp8_per_token_head (v1/attention/backends/triton_attn.py): K + V + 2 × 4 bytes a token and
head. A window layer keeps the last window - 1 tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvcalc.dtypes import FORMATS, StorageFormat
from kvcalc.layers import Layer
from kvcalc.strategies._about import About, Headline
from kvcalc.strategies._packed import WORKS_ON, check_compute_dtype, quantisable
from kvcalc.strategies._rows import StoredRows, refuse_own_classes

__all__ = ["ABOUT", "PARAMETERS", "SOURCE", "SUMMARY", "WORKS_ON", "apply", "check"]

SUMMARY = "e4m3 keys and values with a float32 scale for each token and KV head"
SOURCE = "vLLM's fp8_per_token_head (triton_attn.py); OCP 8-bit floating point, e4m3"
PARAMETERS: Mapping[str, int] = {}
ABOUT = About(
    keeps="every token, a byte for each value, and a float32 scale for each K and V row of a head",
    formula="tokens × KV heads × (K + V width + 8) bytes; 1.94× smaller than 16 bits at width 128",
    evicts="nothing; a row is rounded once, after the step that brought it",
    needs="nothing: rows are widened to the model's dtype before attention",
    limits="three bits of mantissa: a value is off by up to 6%; a step widens all it attends to",
    headlines=(
        Headline(
            "about twice the tokens in the same memory",
            "vLLM, one scale for a whole tensor (its documentation of 0.11)",
            "bytes",
            "here with a scale for each row",
        ),
    ),
)

STORES = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Layer(StoredRows):
    """Rows of one byte a value, each with a float32 scale."""

    kind: ClassVar[str] = "fp8_per_token_head"

    def row_bytes(self, dtype: StorageFormat) -> int:
        """Bytes of one token's rows and scales; the same whichever of the model's dtypes.

        Raises UnsupportedError for a `dtype` that no model computes in.
        """
        check_compute_dtype("fp8", dtype)
        heads, key_dim, value_dim = self.rows()
        scales = FORMATS["fp32"].row_bytes((key_dim > 0) + (value_dim > 0))
        return heads * (FORMATS["fp8"].row_bytes(key_dim + value_dim) + scales)

    def keeps(self) -> str:
        """Widths and scales."""
        return f"{self.layer.keeps()}, fp8 + scales"

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """Bytes of a token × tokens."""
        return f"{self.keeps()}: {self.row_bytes(dtype):,} B × {self.tokens_formula(tokens)}"


def apply(layer: Layer, parameters: Mapping[str, int]) -> Layer:
    """The layer with its rows in e4m3; what does not grow with the sequence stays as it is.

    Raises UnsupportedError for a layer that keeps tokens in a way of its own.
    """
    del parameters
    rows = quantisable("fp8", layer)
    return layer if rows is None else Fp8Layer(layer=rows)


def check(layers: Sequence[Layer], parameters: Mapping[str, int]) -> None:
    """Raise UnsupportedError for a model with layers that cannot be replaced."""
    del parameters
    refuse_own_classes(layers, "fp8")
