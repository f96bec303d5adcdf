"""From a GGUF file's keys to the config fields that kvcalc's families read.

Which key means what, and what holds where one is missing, follows `load_hparams` and
`load_arch_hparams` of each architecture in `src/llama-model.cpp` and `src/models` of the llama.cpp
that llama-cpp-python 0.3.36 ships. An architecture that does not stand here is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from kvcalc.config import MAX_FIELD, MAX_LAYERS
from kvcalc.errors import ConfigError, UnsupportedError
from kvcalc.sources.gguf import Value, read_metadata
from kvcalc.units import shown

Config = dict[str, Any]

PLAIN: Mapping[str, str] = MappingProxyType(
    {
        "apertus": "apertus",
        "arcee": "arcee",
        "bailingmoe": "bailing_moe",
        "bloom": "bloom",
        "command-r": "cohere",
        "deepseek": "deepseek",
        "dots1": "dots1",
        "ernie4_5": "ernie4_5",
        "ernie4_5-moe": "ernie4_5_moe",
        "exaone": "exaone",
        "gemma": "gemma",
        "glm4": "glm4",
        "glm4moe": "glm4_moe",
        "gpt2": "gpt2",
        "gptneox": "gpt_neox",
        "granite": "granite",
        "granitemoe": "granitemoe",
        "hunyuan-dense": "hunyuan_v1_dense",
        "hunyuan-moe": "hunyuan_v1_moe",
        "internlm2": "internlm2",
        "minicpm": "minicpm",
        "minimax-m2": "minimax_m2",
        "mistral3": "ministral3",
        "nemotron": "nemotron",
        "olmo": "olmo",
        "olmoe": "olmoe",
        "orion": "orion",
        "phi2": "phi",
        "phi3": "phi3",
        "phimoe": "phimoe",
        "qwen2": "qwen2",
        "qwen2moe": "qwen2_moe",
        "qwen2vl": "qwen2_vl_text",
        "qwen3": "qwen3",
        "qwen3moe": "qwen3_moe",
        "qwen3vl": "qwen3_vl_text",
        "qwen3vlmoe": "qwen3_vl_moe_text",
        "seed_oss": "seed_oss",
        "smollm3": "smollm3",
        "stablelm": "stablelm",
        "starcoder2": "starcoder2",
        "xverse": "xverse",
    }
)
"""Architectures whose layers all keep every token, with the model type of the same attention."""


class Windows(NamedTuple):
    """An architecture of window layers: its model type, the stretch of layers of which one is full
    (0 where files must list which slide), whether that is the first of them, and the window of
    files that name none (0: then nothing slides).
    """

    model_type: str
    period: int
    full_first: bool = False
    window: int = 0


WINDOWS: Mapping[str, Windows] = MappingProxyType(
    {
        "afmoe": Windows("afmoe", 4),
        "cohere2": Windows("cohere2", 4),
        "exaone-moe": Windows("exaone_moe", 4, window=128),
        "exaone4": Windows("exaone4", 4, window=4096),
        "gemma2": Windows("gemma2", 2, window=4096),
        "gemma3": Windows("gemma3_text", 6),
        "gpt-oss": Windows("gpt_oss", 2),
        "granite_swa": Windows("granite_swa", 0),
        "laguna": Windows("laguna", 4, full_first=True),
        "mellum": Windows("mellum", 4),
    }
)

EXAONE4_WITH_WINDOWS = 64
LLAMA4_CHUNK = 8192
GEMMA3N_OWNERS = 20
"""Layers of Gemma 3n that keep K and V of their own."""


class Keys:
    """A file's values, by key without the architecture's name."""

    def __init__(self, values: Mapping[str, Value], architecture: str, name: str) -> None:
        self.values = values
        self.architecture = architecture
        self.name = name

    def get(self, key: str) -> Value:
        """A value as it stands; None when there is none."""
        return self.values.get(f"{self.architecture}.{key}")

    def number(self, key: str, *, default: int | None = None, least: int = 0) -> int:
        """A whole number from `least` on; ConfigError without one, unless there is a default."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        return self._checked(key, value, least)

    def count(self, key: str, *, default: int | None = None) -> int:
        """A whole number from 1 on."""
        return self.number(key, default=default, least=1)

    def each_layer(self, key: str, *, default: Sequence[int] = ()) -> tuple[int, ...]:
        """A number for each layer: an array of them, or one for all."""
        count = self.blocks
        value = self.get(key)
        if value is None and default:
            return tuple(default)
        if not isinstance(value, tuple):
            return (self._checked(key, value, 0),) * count
        if len(value) != count:
            self.fail(key, value, f"an array of {count} numbers, one for each layer")
        return tuple(self._checked(key, item, 0) for item in value)

    @property
    def blocks(self) -> int:
        """All blocks, those for multi-token prediction among them."""
        blocks = self.count("block_count")
        if blocks > MAX_LAYERS:
            self.fail("block_count", blocks, f"at most {MAX_LAYERS:,}")
        return blocks

    @property
    def layers(self) -> int:
        """Decoder layers."""
        predicting = self.number("nextn_predict_layers", default=0)
        if predicting >= self.blocks:
            self.fail("nextn_predict_layers", predicting, "fewer than all blocks")
        return self.blocks - predicting

    def _checked(self, key: str, value: Value, least: int) -> int:
        whole = isinstance(value, int) and least <= value <= MAX_FIELD
        if not whole or (isinstance(value, bool) and least):
            self.fail(key, value, f"a whole number from {least} on")
        return int(value)  # type: ignore[arg-type] # it is one

    def fail(self, key: str, value: object, wanted: str) -> NoReturn:
        """Raise the error for a value that cannot be."""
        full = f"{self.architecture}.{key}"
        found = f"has no {full}" if value is None else f"has {full} = {shown(value)}"
        msg = f"{self.name} {found}; kvcalc needs {wanted}"
        raise ConfigError(msg)


def read(path: Path) -> tuple[Config, tuple[str, ...]]:
    """The config that a GGUF file stands for, and what to know about it.

    Raises ConfigError for a file that is damaged or says too little, UnsupportedError for an
    architecture that is not known.
    """
    return translate(read_metadata(path), name=str(path))


def translate(values: Mapping[str, Value], *, name: str) -> tuple[Config, tuple[str, ...]]:
    """Likewise, from the file's keys and values."""
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        part = values.get("split.no")
        msg = f"{name} names no general.architecture"
        if isinstance(part, int) and part > 0:
            msg = f"{name} is part {part + 1} of a split model; give the first part"
        raise ConfigError(msg)
    keys = Keys(values, architecture, name)
    build = BUILDERS.get(architecture)
    if architecture in PLAIN:
        config = _plain(keys)
    elif architecture in WINDOWS:
        config = _windows(keys, WINDOWS[architecture])
    elif build is not None:
        config = build(keys)
    else:
        known = ", ".join(sorted([*PLAIN, *WINDOWS, *BUILDERS]))
        msg = f"GGUF architecture {shown(architecture)} is not covered; covered are {known}"
        raise UnsupportedError(msg)
    notes = [f"fields are translated from the metadata of a GGUF file ({architecture})"]
    if "kv_lora_rank" in config and keys.get("attention.key_length_mla") is None:
        notes.append(
            "converted before April 2025: llama.cpp keeps K and V of every head, --option mla=false"
        )
    return config, tuple(notes)


def _trunk(keys: Keys) -> Config:
    """What every architecture has."""
    config: Config = {"num_hidden_layers": keys.layers}
    config["hidden_size"] = keys.count("embedding_length")
    if keys.get("context_length") is not None:
        config["max_position_embeddings"] = keys.count("context_length")
    if predicting := keys.blocks - keys.layers:
        config["num_nextn_predict_layers"] = predicting
    return config


def _heads(keys: Keys, *, kv_heads: int | None = None) -> Config:
    """Heads that are alike in every layer that has any, or those given."""
    heads = keys.each_layer("attention.head_count")
    if kv_heads is None:
        each = keys.each_layer("attention.head_count_kv", default=heads)
        if len(set(each)) > 1:
            msg = (
                f"GGUF architecture {keys.architecture!r} with another number of KV heads in each "
                "layer is not covered; deciding key: attention.head_count_kv"
            )
            raise UnsupportedError(msg)
        kv_heads = each[0]
    width = (
        keys.count("attention.key_length", default=keys.count("embedding_length") // heads[0])
        if heads[0]
        else 0
    )
    if heads[0] and keys.number("attention.value_length", default=width) != width:
        msg = (
            f"GGUF architecture {keys.architecture!r} with keys of another width than values is "
            "not covered; deciding keys: attention.key_length, attention.value_length"
        )
        raise UnsupportedError(msg)
    if not (heads[0] and kv_heads and width):
        keys.fail("attention.head_count", heads[0], "heads, and KV heads")
    return {
        "num_attention_heads": heads[0],
        "num_key_value_heads": kv_heads,
        "head_dim": width,
    }


def _plain(keys: Keys) -> Config:
    config = _trunk(keys) | _heads(keys)
    if keys.architecture == "phi3":
        config["sliding_window"] = keys.number("attention.sliding_window", default=0) or None
    return config | {"model_type": PLAIN[keys.architecture]}


def _llama(keys: Keys) -> Config:
    """Llama, and what is converted as such: Mixtral, Mistral (known by a window that is named)."""
    config = _trunk(keys) | _heads(keys) | {"model_type": "llama"}
    if window := keys.number("attention.sliding_window", default=0):
        config |= {"model_type": "mistral", "sliding_window": window}
    return config


def _olmo2(keys: Keys) -> Config:
    """OLMo 2, and OLMo 3, which has a window."""
    if keys.number("attention.sliding_window", default=0):
        return _windows(keys, Windows("olmo3", 4))
    return _trunk(keys) | _heads(keys) | {"model_type": "olmo2"}


def _slides(keys: Keys, period: int, *, full_first: bool = False) -> list[bool]:
    """Which layers slide: as the file lists them, or by the period that it or its architecture has.

    A period of 1 is all full, as in llama.cpp; of 0 all slide.
    """
    key = "attention.sliding_window_pattern"
    listed = keys.get(key)
    if isinstance(listed, tuple):
        return [bool(slides) for slides in keys.each_layer(key)][: keys.layers]
    if not period and listed is None:
        keys.fail(key, listed, "which layers slide")
    period = keys.number(key, default=period)
    place = 0 if full_first else period - 1
    return [not period or index % period != place for index in range(keys.layers)]


def _kinds(slides: Sequence[bool], kind: str = "sliding_attention") -> list[str]:
    return [kind if one else "full_attention" for one in slides]


def _windows(keys: Keys, about: Windows) -> Config:
    window = keys.number("attention.sliding_window", default=about.window)
    if about.model_type == "exaone4" and keys.layers != EXAONE4_WITH_WINDOWS:
        window = 0
    slides = _slides(keys, about.period, full_first=about.full_first) if window else []
    return (
        _trunk(keys)
        | _heads(keys)
        | {
            "model_type": about.model_type,
            "sliding_window": window or None,
            "layer_types": _kinds(slides or [False] * keys.layers),
        }
    )


def _llama4(keys: Keys) -> Config:
    """Chunks of a length that llama.cpp fixes, unless the file says 0."""
    config = _trunk(keys) | _heads(keys) | {"model_type": "llama4_text"}
    if keys.get("attention.sliding_window") == 0:
        kinds = _kinds([False] * keys.layers)
    else:
        kinds = _kinds(_slides(keys, 4), "chunked_attention")
    return config | {"attention_chunk_size": LLAMA4_CHUNK, "layer_types": kinds}


def _gemma3n(keys: Keys) -> Config:
    """The first 20 layers keep K and V, whatever the file says."""
    return _windows(keys, Windows("gemma3n_text", 5)) | {
        "num_kv_shared_layers": max(keys.layers - GEMMA3N_OWNERS, 0)
    }


def _gemma4(keys: Keys) -> Config:
    """Full and window layers have heads of their own."""
    slides = _slides(keys, 0)
    if not slides or slides[-1] or not any(slides):
        keys.fail("attention.sliding_window_pattern", slides, "window layers, a full one last")
    each = keys.each_layer("attention.head_count_kv")
    window_heads = {heads for heads, one in zip(each, slides, strict=False) if one}
    full_heads = {heads for heads, one in zip(each, slides, strict=False) if not one}
    if len(window_heads) > 1 or len(full_heads) > 1:
        keys.fail("attention.head_count_kv", each, "one number for layers of one kind")
    full = keys.count("attention.key_length")
    window = keys.count("attention.key_length_swa")
    for name, width in (("value_length", full), ("value_length_swa", window)):
        if keys.number(f"attention.{name}", default=width) != width:
            keys.fail(f"attention.{name}", keys.get(f"attention.{name}"), f"{width}, as K's")
    return _trunk(keys) | {
        "model_type": "gemma4_text",
        "num_attention_heads": keys.each_layer("attention.head_count")[0],
        "num_key_value_heads": window_heads.pop(),
        "head_dim": window,
        "num_global_key_value_heads": full_heads.pop(),
        "global_head_dim": full,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": keys.number("attention.shared_kv_layers", default=0),
        "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": _kinds(slides),
    }


def _deepseek2(keys: Keys) -> Config:
    """Latents. Widths of the heads stand under other keys in files from before April 2025."""
    mla = "_mla" if keys.get("attention.key_length_mla") is not None else ""
    rope = keys.count("rope.dimension_count")
    width = keys.count(f"attention.key_length{mla}")
    if width <= rope:
        keys.fail(f"attention.key_length{mla}", width, f"more than the {rope} rotary ones")
    return _trunk(keys) | {
        "model_type": "deepseek_v2",
        "num_attention_heads": keys.count("attention.head_count"),
        "kv_lora_rank": keys.count("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": width - rope,
        "v_head_dim": keys.count(f"attention.value_length{mla}"),
    }


def _deepseek32(keys: Keys) -> Config:
    return _deepseek2(keys) | {
        "model_type": "deepseek_v32",
        "index_head_dim": keys.count("attention.indexer.key_length"),
    }


def _mamba(keys: Keys) -> Config:
    config = _trunk(keys) | {
        "conv_kernel": keys.count("ssm.conv_kernel"),
        "state_size": keys.count("ssm.state_size"),
    }
    inner = keys.count("ssm.inner_size")
    if keys.architecture == "mamba":
        return config | {"model_type": "mamba", "intermediate_size": inner}
    expand, rest = divmod(inner, config["hidden_size"])
    heads = keys.count("ssm.time_step_rank")
    if rest or inner % heads:
        keys.fail("ssm.inner_size", inner, "a multiple of embedding_length and of its heads")
    return config | {
        "model_type": "mamba2",
        "expand": expand,
        "num_heads": heads,
        "head_dim": inner // heads,
        "n_groups": keys.count("ssm.group_count"),
    }


def _mamba_fields(keys: Keys) -> Config:
    """Of layers beside attention, as Bamba and its like name them."""
    return {
        "mamba_d_ssm": keys.count("ssm.inner_size"),
        "mamba_n_heads": keys.count("ssm.time_step_rank"),
        "mamba_n_groups": keys.count("ssm.group_count"),
        "mamba_d_state": keys.count("ssm.state_size"),
        "mamba_d_conv": keys.count("ssm.conv_kernel"),
    }


def _falcon_h1(keys: Keys) -> Config:
    return _trunk(keys) | _heads(keys) | _mamba_fields(keys) | {"model_type": "falcon_h1"}


def _attending(keys: Keys) -> tuple[Config, tuple[int, ...]]:
    """Heads of the layers that have any, and the KV heads of each layer."""
    each = keys.each_layer("attention.head_count_kv")[: keys.layers]
    kv_heads = {heads for heads in each if heads}
    if len(kv_heads) != 1:
        keys.fail("attention.head_count_kv", each, "one number of KV heads, or 0, each")
    return _heads(keys, kv_heads=kv_heads.pop()), each


def _granite_hybrid(keys: Keys) -> Config:
    heads, each = _attending(keys)
    kinds = ["attention" if kv_heads else "mamba" for kv_heads in each]
    fields = {"model_type": "granitemoehybrid", "layer_types": kinds}
    return _trunk(keys) | heads | _mamba_fields(keys) | fields


def _jamba(keys: Keys) -> Config:
    heads, each = _attending(keys)
    config = _trunk(keys) | heads
    expand, rest = divmod(keys.count("ssm.inner_size"), config["hidden_size"])
    if rest:
        keys.fail("ssm.inner_size", keys.get("ssm.inner_size"), "a multiple of the width")
    return config | {
        "model_type": "jamba",
        "layer_types": ["attention" if kv_heads else "mamba" for kv_heads in each],
        "mamba_expand": expand,
        "mamba_d_state": keys.count("ssm.state_size"),
        "mamba_d_conv": keys.count("ssm.conv_kernel"),
    }


def _nemotron_h(keys: Keys) -> Config:
    """Layers with a feed-forward width are that, those with KV heads attend, others are Mamba."""
    heads, each = _attending(keys)
    widths = keys.each_layer("feed_forward_length")
    kinds = [
        "mlp" if width else "attention" if kv_heads else "mamba"
        for width, kv_heads in zip(widths, each, strict=False)
    ]
    inner, mamba_heads = keys.count("ssm.inner_size"), keys.count("ssm.time_step_rank")
    if inner % mamba_heads:
        keys.fail("ssm.inner_size", inner, f"a multiple of its {mamba_heads} heads")
    return (
        _trunk(keys)
        | heads
        | {
            "model_type": "nemotron_h",
            "layers_block_type": kinds,
            "mamba_num_heads": mamba_heads,
            "mamba_head_dim": inner // mamba_heads,
            "n_groups": keys.count("ssm.group_count"),
            "ssm_state_size": keys.count("ssm.state_size"),
            "conv_kernel": keys.count("ssm.conv_kernel"),
        }
    )


def _lfm2(keys: Keys) -> Config:
    heads, each = _attending(keys)
    window = keys.number("attention.sliding_window", default=0)
    attends = "sliding_attention" if window else "full_attention"
    return (
        _trunk(keys)
        | heads
        | {
            "model_type": "lfm2" if keys.architecture == "lfm2" else "lfm2_moe",
            "conv_L_cache": keys.count("shortconv.l_cache"),
            "layer_types": [attends if kv_heads else "conv" for kv_heads in each],
            "sliding_window": window or None,
        }
    )


def _delta(keys: Keys) -> Config:
    """Gated DeltaNet: a file lists its recurrent layers, or one layer of each stretch attends."""
    model_type = {"qwen3next": "qwen3_next", "qwen35": "qwen3_5_text"}.get(
        keys.architecture, "qwen3_5_moe_text"
    )
    period = keys.count("full_attention_interval", default=4)
    by_period = [(index + 1) % period != 0 for index in range(keys.blocks)]
    recurrent = keys.each_layer("attention.recurrent_layers", default=by_period)[: keys.layers]
    inner, value_heads = keys.count("ssm.inner_size"), keys.count("ssm.time_step_rank")
    if inner % value_heads:
        keys.fail("ssm.inner_size", inner, f"a multiple of its {value_heads} heads")
    kv_heads = max(keys.each_layer("attention.head_count_kv"))
    return (
        _trunk(keys)
        | _heads(keys, kv_heads=kv_heads)
        | {
            "model_type": model_type,
            "layer_types": ["linear_attention" if one else "full_attention" for one in recurrent],
            "linear_conv_kernel_dim": keys.count("ssm.conv_kernel"),
            "linear_key_head_dim": keys.count("ssm.state_size"),
            "linear_num_key_heads": keys.count("ssm.group_count"),
            "linear_value_head_dim": inner // value_heads,
            "linear_num_value_heads": value_heads,
        }
    )


BUILDERS: Mapping[str, Callable[[Keys], Config]] = MappingProxyType(
    {
        "llama": _llama,
        "olmo2": _olmo2,
        "llama4": _llama4,
        "gemma3n": _gemma3n,
        "gemma4": _gemma4,
        "deepseek2": _deepseek2,
        "deepseek32": _deepseek32,
        "mamba": _mamba,
        "mamba2": _mamba,
        "falcon-h1": _falcon_h1,
        "granitehybrid": _granite_hybrid,
        "jamba": _jamba,
        "nemotron_h": _nemotron_h,
        "nemotron_h_moe": _nemotron_h,
        "lfm2": _lfm2,
        "lfm2moe": _lfm2,
        "qwen3next": _delta,
        "qwen35": _delta,
        "qwen35moe": _delta,
    }
)
"""Architectures with a rule of their own."""
