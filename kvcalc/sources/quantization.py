"""How a model is quantised where its config.json does not say it: in `hf_quant_config.json`, which
NVIDIA's ModelOpt wrote before 0.31, or in no file that is known here but its name.

As vLLM does (transformers_utils/config.py, `get_config`), the file is read only where config.json
has no quantisation of its own.
"""

import os.path
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from kvcalc.errors import ConfigError, KvcalcError
from kvcalc.families import decoder_level
from kvcalc.origin import Origin
from kvcalc.units import shown

FILE: Final = "hf_quant_config.json"
NOTE: Final = f"quantization_config is that of {FILE} beside config.json"

_OWN: Final = ("quantization_config", "compression_config", "quantization")
"""Fields that say it: transformers', compressed-tensors' before 0.6, MLX's."""

_QUANTISED: Final = (
    r"(?i)(?<![a-z0-9])"
    r"(?:(?:nv|mx)?fp[468]|nf4|int[2348]|awq|gptq|bnb|exl[23]|[2348]-?bits?|w[2348](?=a))"
    r"(?:a(?:4|8|16|fp8))?"
    r"(?![a-z0-9])"
)
"""`FP8`, `NVFP4`, `MXFP4`, `int4`, `w4a16`, `AWQ`, `bnb-4bit`, each a word of its own."""

_PLAIN: Final = r"(?i)(?<![a-z0-9])(?:bf16|fp16|fp32|un-?quant|de-?quant)"
"""What contradicts it: `qat-int4-unquantized`, `FP8-to-BF16`."""


def is_declared(config: Mapping[str, Any]) -> bool:
    """Whether a config says itself that the model is quantised."""
    levels = [config]
    with suppress(KvcalcError):  # told when the model is described
        levels.append(decoder_level(config).config)
    return any(level.get(key) is not None for level in levels for key in _OWN)


def merged(config: Mapping[str, Any], said: Mapping[str, Any], *, name: str) -> Mapping[str, Any]:
    """A config with what its `hf_quant_config.json` says, unless it has a quantisation of its own.

    ConfigError naming `name` where the file says something else than a quantisation.
    """
    if is_declared(config):
        return config
    inner = _object(said, "quantization", name) if "quantization" in said else said
    producer = _object(said, "producer", name) if said.get("producer") is not None else {}
    method = producer.get("name", "modelopt")
    if not isinstance(method, str):
        raise _wrong(name, "producer.name", method, "a name")
    if "quant_algo" not in inner:
        msg = f"{name} has no quant_algo, which ModelOpt writes there; correct it or remove it"
        raise ConfigError(msg)
    for key in ("quant_algo", "kv_cache_quant_algo"):
        if not isinstance(inner.get(key, ""), str | None):
            raise _wrong(name, key, inner[key], "a name")
    return {**config, "quantization_config": {"quant_method": method, **inner}}


def named(origin: Origin) -> str:
    """What the last part of a model's name says of a quantised format (`NVFP4`); else empty."""
    name = name_of(origin)
    found = None if re.search(_PLAIN, name) else re.search(_QUANTISED, name)
    return found[0] if found else ""


def contradicted(config: Mapping[str, Any], origin: Origin) -> str:
    """What a model's name says of a quantised format where its config says nothing of one."""
    word = named(origin)
    return word if word and not is_declared(config) else ""


def name_of(origin: Origin) -> str:
    """The name of a model on the Hub, of the folder of a config.json, or of another JSON file; ""
    for what has none.
    """
    if origin.kind == "mapping":
        return ""
    if origin.kind != "file":
        return origin.resolved.rpartition("/")[2]
    path = Path(os.path.abspath(origin.detail))  # noqa: PTH100 - a link's own name counts
    if path.name != "config.json":
        return path.stem if path.suffix == ".json" else ""
    if path.parent.parent.name == "snapshots":  # models--org--name/snapshots/<commit>/config.json
        return path.parent.parent.parent.name.rpartition("--")[2]
    return path.parent.name


def _object(data: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    value = data[key]
    if not isinstance(value, Mapping):
        raise _wrong(name, key, value, "an object")
    return value


def _wrong(name: str, key: str, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"{name} has {key} = {shown(value)}, not {wanted}; correct it or remove it")
