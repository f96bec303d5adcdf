"""Models whose code lies in their own repository, but whose attention is plain: ChatGLM, Baichuan,
InternLM, Qwen 1, MiniCPM, OpenELM, Nemotron-NAS, Phi-3-small, Hunyuan and others.

Their code is never run. `profiles/repository_classes.jsonl` says what its configuration class is
called, which of its fields have other names than the standard ones, and what it fills in; each
entry names the file of the repository. Every token keeps K and V of each KV head (in Phi-3-small,
too, whose block-sparse attention reads fewer of them).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from kvcalc.config import ConfigFields
from kvcalc.families._heads import full_attention, num_layers, repeat, width_of_a_head
from kvcalc.layers import FullAttention, Layer
from kvcalc.layers.mixed import NoCache

SOURCE = "K and V of every token and KV head, in the fields of the repository's own class"

MODEL_TYPES = frozenset(
    """
    baichuan bailing_moe chatglm deepseek exaone hunyuan internlm internlm2 minicpm molmo
    nemotron-nas openelm orion phi-msft phi3small qwen xverse
    """.split()
)

UNDERSTANDS = frozenset({"multi_query_attention", "block_configs", "use_cla"})


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """The same layer everywhere, unless the type has a rule of its own."""
    rule = RULES.get(config.model_type)
    return rule(config) if rule else repeat(config, full_attention(config))


def _multi_query(config: ConfigFields) -> tuple[Layer, ...]:
    """ChatGLM's KV heads are as many as its query heads unless a flag says otherwise."""
    layer = full_attention(config)
    if not config.flag("multi_query_attention"):
        layer = replace(layer, kv_heads=config.count("num_attention_heads"))
    return repeat(config, layer)


def _cross_layer(config: ConfigFields) -> tuple[Layer, ...]:
    """Cross-layer attention (arXiv:2405.12981): of each `cla_share_factor` layers the first keeps
    K and V for all (vLLM hunyuan_v1.py).
    """
    layer = full_attention(config)
    if not config.flag("use_cla"):
        return repeat(config, layer)
    factor = config.count("cla_share_factor")
    shared = NoCache(reason="shares an earlier layer's K and V")
    return tuple(shared if index % factor else layer for index in range(num_layers(config)))


def _openelm(config: ConfigFields) -> tuple[Layer, ...]:
    """OpenELM (arXiv:2404.14619, section 2.1) scales its heads from layer to layer."""
    heads = config.numbers("num_kv_heads")
    width = config.count("head_dim")
    stated = config.optional_count("num_hidden_layers")
    if not heads or not all(heads) or (stated or len(heads)) != len(heads):
        raise config.wrong("num_kv_heads", heads, "a list of KV heads, one for each layer")
    return tuple(FullAttention(kv_heads=one, key_dim=width, value_dim=width) for one in heads)


def _searched(config: ConfigFields) -> tuple[Layer, ...]:
    """Puzzle (arXiv:2411.19146, section 2): each block has its own group size, or no attention."""
    blocks = config.get("block_configs")
    count, heads = num_layers(config), config.count("num_attention_heads")
    if not isinstance(blocks, list) or len(blocks) != count:
        raise config.wrong("block_configs", blocks, f"a list of {count} blocks")
    width = config.optional_count("head_dim") or width_of_a_head(config, heads)
    built: list[Layer] = []
    for block in blocks:
        attention = block.get("attention") if isinstance(block, dict) else None
        if not isinstance(attention, dict):
            raise config.wrong("block_configs", block, "a block with attention")
        if attention.get("no_op") is True or attention.get("replace_with_linear") is True:
            built.append(NoCache(reason="no attention in this block"))
            continue
        size = attention.get("n_heads_in_group")
        if type(size) is not int or size < 1 or heads % size:
            raise config.wrong("n_heads_in_group", size, f"a divisor of {heads} heads")
        built.append(FullAttention(kv_heads=heads // size, key_dim=width, value_dim=width))
    return tuple(built)


RULES: Mapping[str, Callable[[ConfigFields], tuple[Layer, ...]]] = MappingProxyType(
    {
        "chatglm": _multi_query,
        "hunyuan": _cross_layer,
        "nemotron-nas": _searched,
        "openelm": _openelm,
    }
)
"""Types whose layers are not all plain and alike."""
