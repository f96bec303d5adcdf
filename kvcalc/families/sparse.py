"""Index keys in other designs than DeepSeek-V3.2's: dots 3 Note, GLM-5.3-Flash, Mistral Large 4,
MiniMax-M3 and Qwen4.

Which layers are indexed, and what stands beside them, follows the configuration and modeling files
of transformers 5.23.0. Index keys are counted in the model's dtype unless a modeling file says
otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from kvcalc.config import ConfigFields
from kvcalc.errors import UnsupportedError
from kvcalc.families._heads import full_attention, num_layers
from kvcalc.families._kinds import FULL, INDEXED, LINEAR, SLIDING, build_layers, every, layer_kinds
from kvcalc.families._latent import latent
from kvcalc.families._states import delta_attention, delta_rule, linear_attention_fields
from kvcalc.families.indexed import owners
from kvcalc.layers import Layer
from kvcalc.layers.mixed import Combined, IndexKeys, NoCache, SlidingLatent
from kvcalc.layers.states import State, state_layer

SOURCE = "K and V or a latent, and an index key where a layer has an indexer (transformers 5.23.0)"

UNDERSTANDS = frozenset(
    """
    layer_types sliding_window kv_lora_rank index_head_dim indexer_types linear_attn_config
    kv_source_layers swa_num_key_value_heads per_layer_config sparse_attention_config
    linear_num_value_heads full_attention_interval
    """.split()
)

MINIMAX_SPARSE = "minimax_m3_sparse"


def _dots(config: ConfigFields, extra: int, *, exact: bool) -> tuple[Layer, ...]:
    """Window layers have latents of other widths; index keys are float32 in transformers."""
    del extra
    if config.given("use_dsa") is False:
        msg = (
            f"model_type {config.model_type!r} with its indexers switched off is not covered; "
            "deciding field: use_dsa"
        )
        raise UnsupportedError(msg)
    keys = IndexKeys(dim=config.count("index_head_dim"), storage="" if exact else "fp32")
    plain = latent(config)

    def sliding() -> Layer:
        saved = config.layer(kinds.index(SLIDING))
        own, prefix = (saved, "") if saved else (config, "swa_")

        def width(key: str, default: int) -> int:
            return own.optional_count(prefix + key) or default

        nope = width("qk_nope_head_dim", 192)
        return SlidingLatent(
            latent_dim=width("kv_lora_rank", 1024),
            rope_dim=width("qk_rope_head_dim", width("head_dim", 256) - nope),
            num_heads=width("num_attention_heads", 64),
            nope_dim=nope,
            head_value_dim=width("v_head_dim", 128),
            window=config.count("sliding_window"),
        )

    def rule(config: ConfigFields, count: int) -> Sequence[str]:
        del config
        return [INDEXED if index < 2 or index % 4 == 1 else SLIDING for index in range(count)]

    def indexed() -> Layer:
        return Combined(kind=INDEXED, members=(plain, keys))

    # Released configs call indexed layers full_attention.
    kinds = layer_kinds(config, rule)
    return build_layers(config, kinds, {INDEXED: indexed, FULL: indexed, SLIDING: sliding})


def _glm_flash(config: ConfigFields, extra: int, *, exact: bool) -> tuple[Layer, ...]:
    """KDA layers, and latents whose index keys carry two poolings and a count."""
    del exact
    heads, head_dim, kernel = linear_attention_fields(config)
    linear = delta_attention(heads=heads, head_dim=head_dim, columns=kernel + extra)
    plain = latent(config, rope=config.number("qk_rope_head_dim") > 0)
    keys = IndexKeys(dim=2 * config.count("index_head_dim") + 1)
    indexed = Combined(kind=INDEXED, members=(plain, keys))
    kinds = layer_kinds(config, every(4, one=INDEXED, others=LINEAR))
    return tuple(
        linear if kind == LINEAR else indexed if owns else plain
        for kind, owns in zip(kinds, owners(config), strict=True)
    )


def _mistral(config: ConfigFields, extra: int, *, exact: bool) -> tuple[Layer, ...]:
    """Every fourth layer has no rotary key; layers with another `kv_source_layers` share."""
    del extra, exact
    count = num_layers(config)
    with_rope = config.numbers("no_rope_layers")
    if with_rope is None:
        period = config.optional_count("no_rope_layer_interval") or 4
        with_rope = tuple(int((index + 1) % period != 0) for index in range(count))
    sources = config.numbers("kv_source_layers") or tuple(range(count))
    if len(with_rope) != count or len(sources) != count:
        raise config.wrong("no_rope_layers", with_rope, f"a list of {count} numbers")
    plain = latent(config)
    keys = IndexKeys(dim=config.count("index_head_dim"))
    layers: list[Layer] = []
    for index, owns in enumerate(owners(config)):
        members: list[Layer] = []
        if sources[index] == index:
            members.append(plain if with_rope[index] else replace(plain, rope_dim=0))
        if owns:
            members.append(keys)
        if members:
            layers.append(Combined(kind=INDEXED, members=tuple(members)))
        else:
            layers.append(NoCache(reason="shares an earlier layer's latent"))
    return tuple(layers)


def _minimax(config: ConfigFields, extra: int, *, exact: bool) -> tuple[Layer, ...]:
    """Sparse layers keep an index key beside K and V."""
    del extra, exact
    given = config.nested("sparse_attention_config")
    full = full_attention(config)

    def rule(config: ConfigFields, count: int) -> Sequence[str]:
        sparse = given.numbers("sparse_attention_freq") if given else None
        if sparse is None:
            return (FULL,) * count
        if len(sparse) != count:
            raise config.wrong("sparse_attention_freq", sparse, f"a list of {count} numbers")
        return [MINIMAX_SPARSE if one else FULL for one in sparse]

    def sparse() -> Layer:
        dim = given.optional_count("sparse_index_dim") if given else None
        keys = IndexKeys(dim=dim or config.count("index_head_dim"))
        return Combined(kind=MINIMAX_SPARSE, members=(full, keys))

    return build_layers(
        config, layer_kinds(config, rule), {FULL: lambda: full, MINIMAX_SPARSE: sparse}
    )


def _qwen4(config: ConfigFields, extra: int, *, exact: bool) -> tuple[Layer, ...]:
    """DeltaNet layers, and K and V with index keys; transformers keeps three positions a token in
    the first layer that has an indexer.
    """
    full = full_attention(config)
    keys = IndexKeys(dim=config.count("indexer_head_dim"))
    indexed = Combined(kind=INDEXED, members=(full, keys))
    positions = 0 if exact else 3 * 8
    first = Combined(kind=INDEXED, members=(full, replace(keys, position_bytes=positions)))
    states = delta_rule(
        key_heads=config.count("linear_num_key_heads"),
        value_heads=config.count("linear_num_value_heads"),
        key_dim=config.count("linear_key_head_dim"),
        value_dim=config.count("linear_value_head_dim"),
        columns=config.count("linear_conv_kernel_dim") + extra,
    )
    linear = state_layer(states)
    with_embedding = config.numbers("ple_layer_ids") or ()
    kinds = layer_kinds(
        config, every(4, one=INDEXED, others=LINEAR, field="full_attention_interval")
    )
    if with_embedding:
        ngram = config.count("ngram_size")
        columns = (config.count("ple_conv_kernel_size") - 1) * ngram
        rows = config.count("hc_count") * config.count("hidden_size")
        linear_with = state_layer(
            (
                *states,
                State("conv embedding", (rows, columns)),
                State("ids", (ngram - 1, 8), "int8"),
            )
        )
    layers: list[Layer] = []
    for index, kind in enumerate(kinds):
        if kind == LINEAR:  # the ids count layers from 1
            layers.append(linear_with if index + 1 in with_embedding else linear)
        else:
            layers.append(indexed if INDEXED in kinds[:index] else first)
    return tuple(layers)


Build = Callable[..., tuple[Layer, ...]]

BUILD: Mapping[str, Build] = MappingProxyType(
    {
        "dots3_note_text": _dots,
        "glm5_next_text": _glm_flash,
        "minimax_m3": _minimax,
        "minimax_m3_vl_text": _minimax,
        "mistral_large4_text": _mistral,
        "qwen4_exp_text": _qwen4,
    }
)

MODEL_TYPES = frozenset(BUILD)


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What must be kept: kernel - 1 columns of convolutions, keys without positions."""
    return BUILD[config.model_type](config, -1, exact=True)


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """What transformers keeps."""
    return BUILD[config.model_type](config, 0, exact=False)
