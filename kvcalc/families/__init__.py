"""Architecture families: from a config to the tuple of layers that a model keeps.

Each module here is one family: its docstring names the paper or model file, `MODEL_TYPES` what it
claims, `layers(config)` builds the layers. A family is found by the file being here.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol, cast

from kvcalc.config import ConfigFields, FieldUse, class_defaults
from kvcalc.dtypes import COMPUTE_DTYPES, FORMATS, storage_format
from kvcalc.errors import ConfigError, InputError, UnsupportedError
from kvcalc.families import inferred
from kvcalc.families._complications import refuse_unclaimed
from kvcalc.families._mtp import Prediction, prediction
from kvcalc.layers import Layer
from kvcalc.units import shown


class Family(Protocol):
    """What a module of this package offers."""

    MODEL_TYPES: frozenset[str]
    SOURCE: str
    UNDERSTANDS: frozenset[str]

    @staticmethod
    def layers(config: ConfigFields) -> tuple[Layer, ...]:
        """One layer for each decoder layer; ConfigError or UnsupportedError when it cannot.

        A family whose models transformers lays out otherwise than the architecture requires has a
        function `transformers_layers` with the same parameter beside it.
        """


class Architecture(NamedTuple):
    """A model as far as its cache is concerned.

    `model_dtype` is what the config names for the weights, `cache_dtype` what it names for the
    cache (a declared KV quantisation, else the model dtype), each as a FieldUse whose value is a
    format of `kvcalc.dtypes`, or the error to raise if it is needed. `layers` is what the
    architecture must keep, `transformers_layers` what transformers' own models keep, or why they
    cannot run it. `max_tokens` is the model's own maximum, 0 when the config names none.
    """

    model_type: str
    family: str
    family_source: str
    layers: tuple[Layer, ...]
    transformers_layers: tuple[Layer, ...] | UnsupportedError
    model_dtype: FieldUse | ConfigError
    cache_dtype: FieldUse | ConfigError
    max_tokens: int
    fields: tuple[FieldUse, ...]
    prediction: Prediction


@cache
def family_names() -> tuple[str, ...]:
    """The families there are: the modules of this package."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(name for name in names if not name.startswith("_"))


def load_family(name: str) -> Family:
    """The family of that name."""
    return cast("Family", importlib.import_module(f"{__name__}.{name}"))


@lru_cache(maxsize=1024)
def claiming_family(model_type: str) -> tuple[str, Family] | None:
    """Name and module of the family that claims a model type; None when none does.

    Only modules in whose text the type stands are imported: there are many, and start-up counts.
    """
    for name in family_names():
        text = pkgutil.get_data(__name__, f"{name}.py") or b""
        if model_type.encode(errors="replace") in text:
            family = load_family(name)
            if model_type in family.MODEL_TYPES:
                return name, family
    return None


def describe(config: Mapping[str, Any]) -> Architecture:
    """Read a config (the parsed config.json) into an Architecture.

    Raises ConfigError when a field is malformed and UnsupportedError when no family claims the
    model type, or a field is present that its family does not understand.
    """
    level = decoder_level(config)
    fields = ConfigFields(level.config, model_type=level.model_type, prefix=level.prefix)
    found = _family(level)
    if found is None:
        raise UnsupportedError(_unknown_type("model_type", level.model_type, config))
    name, family = found
    layers = family.layers(fields)
    refuse_unclaimed(fields, config, understood=family.UNDERSTANDS | fields.read)
    if level.crossed:
        from kvcalc.layers.mixed import with_cross_attention

        layers = tuple(map(with_cross_attention, layers))
    max_tokens = fields.optional_count("max_position_embeddings") or 0
    model_dtype = _model_dtype(config, fields)
    return Architecture(
        model_type=fields.model_type,
        family=name,
        family_source=family.SOURCE,
        layers=layers,
        transformers_layers=_in_transformers(family, fields) or layers,
        model_dtype=model_dtype,
        cache_dtype=_declared_cache_dtype(config, fields) or model_dtype,
        max_tokens=max_tokens,
        fields=fields.used,
        prediction=prediction(fields, layers),
    )


def _in_transformers(
    family: Family, fields: ConfigFields
) -> tuple[Layer, ...] | UnsupportedError | None:
    """What transformers' models keep where it differs, or why they keep nothing."""
    stored = getattr(family, "transformers_layers", None)
    try:
        return stored(fields) if stored else None
    except UnsupportedError as error:
        return error


class DecoderLevel(NamedTuple):
    """The part of a config that describes the text decoder, and its path in the file.

    `crossed` says that its layers attend to an encoder's output, too.
    """

    config: Mapping[str, Any]
    model_type: str
    prefix: str
    crossed: bool = False


def _family(level: DecoderLevel) -> tuple[str, Family] | None:
    """The family of a decoder, by name and module; None when there is none."""
    found = claiming_family(level.model_type)
    if found is not None:
        return found
    known = class_defaults(level.model_type)
    if known is not None:
        return None if known.generates else ("encoder", load_family("encoder"))
    nested = any(level.config.get(key) is not None for key in _OWN_NAMES)
    if not nested and inferred.claims(level.config):
        return "inferred", cast("Family", inferred)
    return None


_OWN_NAMES = ("text_config", "llm_config", "llm_cfg", "language_config", "thinker_config")
"""Where wrappers that transformers does not know keep their decoder."""

_CROSSED = frozenset({"encoder-decoder", "vision-encoder-decoder", "speech-encoder-decoder"})
"""Wrappers that join any encoder to any decoder."""

_DEPTH = 4


def decoder_level(config: Mapping[str, Any]) -> DecoderLevel:
    """The decoder's own fields: the config itself, or what a wrapper nests, however deep."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        found = "no model_type" if model_type is None else f"model_type {shown(model_type)}"
        msg = f"config has {found}; kvcalc reads the config.json of Hugging Face transformers"
        raise ConfigError(msg)
    level = DecoderLevel(config, model_type, "")
    crossed = False
    for _ in range(_DEPTH):
        if _family(level):
            return level._replace(crossed=crossed)
        crossed = crossed or level.model_type in _CROSSED
        inner = _inner(level)
        if inner is None:
            break
        level = inner
    key = f"{level.prefix}model_type"
    raise UnsupportedError(_unknown_type(key, level.model_type, config))


def _inner(level: DecoderLevel) -> DecoderLevel | None:
    """One level further down; None when nothing is nested."""
    known = class_defaults(level.model_type)
    if known and known.decoder:
        nested = known.decoder
        value = level.config.get(nested.key)
        if value is None and "num_hidden_layers" in level.config:
            value = level.config  # an older, flat config of the same type
        elif value is None:
            value = nested.values
        keys: tuple[str, ...] = (nested.key,)
    else:
        keys = tuple(key for key in _OWN_NAMES if level.config.get(key) is not None)
        nested = None
        if not keys:
            return None
        value = level.config[keys[0]]
    path = f"{level.prefix}{keys[0]}"
    if not isinstance(value, Mapping):
        msg = f"config field {path} is {shown(value)}, not an object"
        raise ConfigError(msg)
    if len(keys) > 1:
        return None
    inner_type = nested.model_type if nested else ""
    if value is level.config:
        return DecoderLevel(value, inner_type, level.prefix)
    if not (nested and nested.fixed):
        inner_type = value.get("model_type") or inner_type
    return DecoderLevel(value, inner_type if isinstance(inner_type, str) else "", f"{path}.")


def _unknown_type(key: str, model_type: object, config: Mapping[str, Any]) -> str:
    reason = f"{key} {shown(model_type)} is of no family that kvcalc knows yet"
    remote = config.get("auto_map")
    if isinstance(remote, Mapping) and remote:
        code = shown(remote.get("AutoConfig") or next(iter(remote.values())))
        reason += f"; its code lies in the model repository (auto_map: {code}) and is never run"
    return f"{reason}; deciding field: {key}"


def _model_dtype(config: Mapping[str, Any], fields: ConfigFields) -> FieldUse | ConfigError:
    """The dtype the weights are loaded in: the whole config's before the text part's."""
    for level, prefix in ((config, ""), (fields.data, fields.prefix)):
        for key in ("dtype", "torch_dtype"):
            value = level.get(key)
            if value is not None and value != "auto":
                return _declared(prefix + key, value, choices=COMPUTE_DTYPES)
    return FieldUse("dtype", "bf16", "assumed: the config names no dtype; --kv-dtype sets it")


def _declared_cache_dtype(
    config: Mapping[str, Any], fields: ConfigFields
) -> FieldUse | ConfigError | None:
    """The KV quantisation that the checkpoint itself declares, if any.

    compressed-tensors writes `kv_cache_scheme: {num_bits, type}`, ModelOpt
    `kv_cache_quant_algo: "FP8"`; some copies have the name under the other key.
    """
    for level, prefix in ((config, ""), (fields.data, fields.prefix)):
        quantization = _object(level, "quantization_config", prefix)
        for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
            value = quantization.get(key)
            if isinstance(value, Mapping):
                value = f"{value.get('type')}{value.get('num_bits')}"
            if value is not None and value not in ("", "none", "None"):
                return _declared(f"{prefix}quantization_config.{key}", value, choices=FORMATS)
    return None


def _declared(key: str, value: object, *, choices: Iterable[str]) -> FieldUse | ConfigError:
    """The format that a config field names, or why it names none: an error only when it is used."""
    try:
        name = storage_format(value if isinstance(value, str) else shown(value)).name
    except InputError:
        name = ""
    if name not in choices:
        return ConfigError(f"config field {key} {shown(value)} is no KV dtype; give --kv-dtype")
    return FieldUse(key, name, f"config field {key}")


def _object(level: Mapping[str, Any], key: str, prefix: str) -> Mapping[str, Any]:
    """A field that must be an object; an empty one when it is absent or null."""
    value = level.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        msg = f"config field {prefix}{key} is {shown(value)}, not an object"
        raise ConfigError(msg)
    return value
