"""Gated DeltaNet beside full attention (arXiv:2412.06464): Qwen3-Next, Qwen3.5, OLMo Hybrid.

Three of four layers keep a convolution over q, k and v and a recurrent state for each value head;
the fourth keeps K and V (modeling_qwen3_next.py, transformers 5.23.0).
"""

from collections.abc import Callable, Sequence

from kvcalc.config import ConfigFields
from kvcalc.families._heads import full_attention
from kvcalc.families._kinds import FULL, LINEAR, build_layers, every, layer_kinds
from kvcalc.families._states import delta_rule
from kvcalc.layers import Layer
from kvcalc.layers.states import state_layer

SOURCE = "K and V in full layers, a constant state in DeltaNet layers (arXiv:2412.06464)"

MODEL_TYPES = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"})

UNDERSTANDS = frozenset({"layer_types", "full_attention_interval", "linear_num_value_heads"})


def _kinds(config: ConfigFields, count: int) -> Sequence[str]:
    if config.model_type != "olmo_hybrid":
        return every(4, others=LINEAR, field="full_attention_interval")(config, count)
    kinds = list(every(4, others=LINEAR)(config, count))
    if FULL not in kinds:  # OlmoHybridConfig wants one
        kinds[-1] = FULL
    return kinds


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What must be kept: kernel - 1 columns of each convolution."""
    return _layers(config, extra_columns=-1)


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What transformers keeps: all columns."""
    return _layers(config, extra_columns=0)


def _layers(config: ConfigFields, *, extra_columns: int) -> tuple[Layer, ...]:
    def width(key: str, by_rule: Callable[[], int]) -> int:
        """A width of the states; OlmoHybridConfig derives those that a config leaves out."""
        if config.model_type == "olmo_hybrid":
            return config.optional_count(key) or by_rule()
        return config.count(key)

    def heads() -> int:
        return config.count("num_attention_heads")

    def linear() -> Layer:
        key_dim = width(
            "linear_key_head_dim", lambda: 3 * (config.count("hidden_size") // heads()) // 4
        )
        return state_layer(
            delta_rule(
                key_heads=width("linear_num_key_heads", heads),
                value_heads=width("linear_num_value_heads", heads),
                key_dim=key_dim,
                value_dim=width("linear_value_head_dim", lambda: 2 * key_dim),
                columns=config.count("linear_conv_kernel_dim") + extra_columns,
            )
        )

    return build_layers(
        config,
        layer_kinds(config, _kinds),
        {FULL: lambda: full_attention(config), LINEAR: linear},
    )
