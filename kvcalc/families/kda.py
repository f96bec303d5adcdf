"""Kimi Delta Attention beside latent attention (Kimi Linear, arXiv:2510.26692) and its kin.

KDA layers keep convolutions over q, k and v and a recurrent state of head_dim × head_dim for each
head; the others keep a latent (modeling_kimi_linear.py, transformers 5.23.0).
"""

from collections.abc import Sequence

from kvcalc.config import ConfigFields
from kvcalc.families._kinds import FULL, LINEAR, build_layers, every, layer_kinds
from kvcalc.families._latent import latent
from kvcalc.families._states import delta_attention, linear_attention_fields
from kvcalc.layers import Layer

SOURCE = "a latent in full layers, a constant state in KDA layers (arXiv:2510.26692)"

MODEL_TYPES = frozenset({"kimi_linear", "bailing_hybrid"})

UNDERSTANDS = frozenset({"layer_types", "kv_lora_rank", "linear_attn_config"})


def _kinds(config: ConfigFields, count: int) -> Sequence[str]:
    """`linear_attn_config` counts layers from 1; without its lists every fifth layer is full."""
    if config.model_type == "bailing_hybrid":
        return every(6, others=LINEAR, field="layer_group_size")(config, count)
    given = config.nested("linear_attn_config")
    full = given.numbers("full_attn_layers") if given else None
    linear = given.numbers("kda_layers") if given else None
    if full is None or linear is None:
        return [FULL if index and index % 4 == 0 else LINEAR for index in range(count)]
    if sorted(full + linear) != list(range(1, count + 1)):
        raise config.wrong(
            "linear_attn_config", {"full": full, "kda": linear}, f"layers 1 to {count}, once each"
        )
    return [FULL if index + 1 in full else LINEAR for index in range(count)]


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What must be kept: kernel - 1 columns of each convolution."""
    return _layers(config, extra_columns=-1)


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What transformers keeps: all columns."""
    return _layers(config, extra_columns=0)


def _layers(config: ConfigFields, *, extra_columns: int) -> tuple[Layer, ...]:
    def linear() -> Layer:
        if config.model_type == "bailing_hybrid":
            # Saved configs have the linear_… names, and another meaning of head_dim.
            heads = config.count("num_attention_heads")
            head_dim = config.optional_count("linear_head_dim") or config.count("head_dim")
            kernel = config.count("short_conv_kernel_size")
        else:
            heads, head_dim, kernel = linear_attention_fields(config)
        return delta_attention(heads=heads, head_dim=head_dim, columns=kernel + extra_columns)

    return build_layers(
        config, layer_kinds(config, _kinds), {FULL: lambda: latent(config), LINEAR: linear}
    )
