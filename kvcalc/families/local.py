"""Plain decoders with one rule of their own: ModernBERT's decoder (arXiv:2412.13663), whose window
is half of `local_attention`; CPM-Ant, which puts `prompt_length` virtual tokens before each
sequence; GPT-1, whose transformers model keeps no cache at all.
"""

from kvcalc.config import ConfigFields
from kvcalc.families._heads import multi_head, repeat, windowed
from kvcalc.families._kinds import FULL, SLIDING, build_layers, every, layer_kinds
from kvcalc.layers import FullAttention, Layer
from kvcalc.layers.mixed import Combined, NoCache
from kvcalc.layers.states import State, state_layer

SOURCE = "K and V of every token and head, with the type's own rule"

MODEL_TYPES = frozenset({"modernbert-decoder", "cpmant", "openai-gpt"})

UNDERSTANDS = frozenset({"layer_types", "sliding_window"})


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What must be kept."""
    if config.model_type == "cpmant":
        heads, width = config.count("num_attention_heads"), config.count("dim_head")
        tokens = FullAttention(kv_heads=heads, key_dim=width, value_dim=width)
        prompt = State(
            "virtual tokens", (heads, 2 * width, config.count("prompt_length")), splits="heads"
        )
        return repeat(config, Combined(kind=FULL, members=(tokens, state_layer([prompt]))))
    full = multi_head(config)
    if config.model_type == "openai-gpt":
        return repeat(config, full)
    rule = every(3, at=0, field="global_attn_every_n_layers")
    return build_layers(
        config,
        layer_kinds(config, rule),
        {FULL: lambda: full, SLIDING: lambda: windowed(full, config.count("local_attention") // 2)},
    )


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """GPT-1 recomputes everything for each token."""
    if config.model_type == "openai-gpt":
        return repeat(config, NoCache(reason="transformers keeps no cache for it"))
    return layers(config)
