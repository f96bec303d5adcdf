"""Models that do not generate: encoders of text or images.

Types of which transformers 5.23.0 has masked-language or image models and none that generates keep
no cache; `profiles/class_defaults.jsonl` marks them.
"""

from kvcalc.config import ConfigFields
from kvcalc.layers import Layer
from kvcalc.layers.mixed import NoCache

SOURCE = "a model that does not generate keeps no cache (model mappings of transformers 5.23.0)"

MODEL_TYPES: frozenset[str] = frozenset()

UNDERSTANDS: frozenset[str] = frozenset()


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """One entry that keeps nothing: depth does not matter."""
    del config
    return (NoCache(reason="an encoder keeps no cache"),)
