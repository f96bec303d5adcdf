"""RWKV: for each layer the last inputs of both mixers in the model's dtype, and a state of its
attention in float32.

RWKV-4 (arXiv:2305.13048) keeps numerator, denominator and maximum (modeling_rwkv.py, transformers
5.23.0), RWKV-5 (arXiv:2404.05892) a matrix for each head (modeling_rwkv5.py of its repository).
"""

from kvcalc.config import ConfigFields
from kvcalc.families._heads import repeat
from kvcalc.families._states import FLOAT32
from kvcalc.layers import Layer
from kvcalc.layers.states import State, state_layer

SOURCE = "two inputs and an attention state for each layer (arXiv:2305.13048, 2404.05892)"

MODEL_TYPES = frozenset({"rwkv", "rwkv5"})

UNDERSTANDS: frozenset[str] = frozenset()


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """The same state in each layer."""
    hidden = config.count("hidden_size")
    width = config.optional_count("attention_hidden_size") or hidden
    attention = State("attention", (width, 3), FLOAT32)
    if config.model_type == "rwkv5":
        head_size = config.count("head_size")
        heads, rest = divmod(width, head_size)
        if rest:
            raise config.wrong("head_size", head_size, f"a divisor of the width {width}")
        attention = State("attention", (heads, head_size, head_size), FLOAT32, splits="heads")
    return repeat(config, state_layer((State("last inputs", (hidden, 2)), attention)))
