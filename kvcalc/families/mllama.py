"""Cross attention to an image in some layers: Llama 3.2 Vision (arXiv:2407.21783, section 7).

The layers of `cross_attention_layers` keep K and V of the vision tokens, and nothing of the text;
without an image they are empty. `--encoder-seq` is the number of vision tokens (1601 for each tile
of the published models).
"""

from kvcalc.config import ConfigFields
from kvcalc.families._heads import full_attention, num_layers
from kvcalc.layers import Layer
from kvcalc.layers.mixed import CrossAttention

SOURCE = "K and V of text in most layers, of vision tokens in the others (arXiv:2407.21783)"

MODEL_TYPES = frozenset({"mllama_text_model"})

UNDERSTANDS = frozenset({"cross_attention_layers"})

CROSS_LAYERS = (3, 8, 13, 18, 23, 28, 33, 38)
"""What MllamaTextConfig takes when a config lists none."""


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """Text and vision layers with the same heads."""
    crossed = config.numbers("cross_attention_layers")
    if crossed is None:
        crossed = CROSS_LAYERS
        config.by_rule("cross_attention_layers", list(crossed))
    text = full_attention(config)
    cross = CrossAttention(
        kv_heads=text.kv_heads, key_dim=text.key_dim, value_dim=text.value_dim, default_tokens=0
    )
    return tuple(cross if index in crossed else text for index in range(num_layers(config)))
