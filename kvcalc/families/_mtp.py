"""Multi-token-prediction layers: decoder layers behind the last, each with a cache of its own
(DeepSeek-V3, arXiv:2412.19437, section 2.2). They are counted only when asked for.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kvcalc.config import ConfigFields
from kvcalc.errors import UnsupportedError
from kvcalc.layers import Layer

FIELDS = (
    "num_nextn_predict_layers",
    "mtp_num_hidden_layers",
    "num_mtp_modules",
    "num_mtp_layers",
    "_num_mtp_layers",
)

_OF_THEIR_OWN = frozenset({"mimo_v2_flash", "mellum", "deepseek_v4"})
"""Types whose prediction layers are of another kind than the decoder's full layers."""


class Prediction(NamedTuple):
    """How many prediction layers a config declares, in which field, and what each keeps."""

    field: str
    declared: int
    layer: Layer | None

    def layers(self, count: int, model_type: str) -> tuple[Layer, ...]:
        """`count` of them; UnsupportedError for more than there are, or of an unknown kind."""
        if count == 0:
            return ()
        if count > self.declared:
            msg = (
                f"--mtp {count} is more prediction layers than model_type {model_type!r} declares "
                f"({self.declared}); deciding field: {self.field or FIELDS[0]}"
            )
            raise UnsupportedError(msg)
        if self.layer is None:
            msg = (
                f"what the prediction layers of model_type {model_type!r} keep is not known; leave "
                f"--mtp out; deciding field: {self.field}"
            )
            raise UnsupportedError(msg)
        return (self.layer,) * count


def prediction(fields: ConfigFields, layers: Sequence[Layer]) -> Prediction:
    """What a config declares. A prediction layer is one of the decoder's attention layers that
    keep every token, where these are all alike.
    """
    for key in FIELDS:
        declared = fields.given(key)
        if isinstance(declared, int) and 0 < declared < 1000:
            full = {layer for layer in layers if layer.kind in _KEEP_EVERY_TOKEN}
            alike = len(full) == 1 and fields.model_type not in _OF_THEIR_OWN
            return Prediction(key, int(declared), full.pop() if alike else None)
    return Prediction("", 0, None)


_KEEP_EVERY_TOKEN = frozenset({"full_attention", "latent_attention", "indexed_attention"})
