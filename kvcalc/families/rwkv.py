"""RWKV-4 (arXiv:2305.13048): for each layer the last inputs of both mixers in the model's dtype,
and numerator, denominator and maximum of its attention in float32 (modeling_rwkv.py, transformers
5.23.0).
"""

from kvcalc.config import ConfigFields
from kvcalc.families._heads import repeat
from kvcalc.families._states import FLOAT32
from kvcalc.layers import Layer
from kvcalc.layers.states import State, state_layer

SOURCE = "five vectors for each layer and sequence (arXiv:2305.13048, modeling_rwkv.py)"

MODEL_TYPES = frozenset({"rwkv"})

UNDERSTANDS: frozenset[str] = frozenset()


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """The same state in each layer."""
    hidden = config.count("hidden_size")
    width = config.optional_count("attention_hidden_size") or hidden
    states = (State("last inputs", (hidden, 2)), State("attention", (width, 3), FLOAT32))
    return repeat(config, state_layer(states))
