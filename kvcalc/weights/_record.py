"""The record that all ways to count weights return."""

from typing import NamedTuple


class Weights(NamedTuple):
    """A model's weights: parameters as transformers counts them, and their bytes.

    `num_parameters` is 0 where files pack values in a way that leaves their number open.
    `num_bytes` has the scales and zero points of a quantised format in it. `format` is what most
    values are stored in (`bf16`, `fp8`, `awq-int4`, …), `origin` one line: rule and fields.
    `whole` says that they are all that files hold, encoders and prediction layers too;
    `least_bytes` is not None where something was assumed, and they may be that little.
    """

    num_parameters: int
    num_bytes: int
    format: str
    origin: str
    notes: tuple[str, ...] = ()
    whole: bool = False
    least_bytes: int | None = None
