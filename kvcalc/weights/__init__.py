"""The weights of a model: how many parameters, and how many bytes in the format it declares.

`weights_of` computes them from a config's fields, `weights_of_files` reads the headers of
safetensors files, `weights_of_headers` takes headers that were read elsewhere. None guesses: what
is not known exactly raises UnsupportedError.
"""

from collections.abc import Mapping
from typing import Any

from kvcalc.config import ConfigFields
from kvcalc.errors import ConfigError, UnsupportedError
from kvcalc.families import decoder_level
from kvcalc.units import shown
from kvcalc.weights import _decoders, _formats
from kvcalc.weights._files import weights_of_files, weights_of_headers
from kvcalc.weights._parts import Parts
from kvcalc.weights._record import Weights

__all__ = ["Weights", "weights_of", "weights_of_files", "weights_of_headers"]


def weights_of(
    config: Mapping[str, Any], *, dtype: str | None = None, complete: bool = True
) -> Weights:
    """Parameters and bytes of the text decoder that a config describes.

    `config` is the parsed config.json, `dtype` a plain one (`bf16`, `fp16`, `fp32`) to count
    bytes in instead of the format that the config declares. With `complete=False` the config is
    an excerpt: what it leaves to class defaults is refused in a wrapper's decoder, too, and so
    is the tying of the output head.

    Raises ConfigError for malformed fields and UnsupportedError for what is not known exactly.
    """
    level = decoder_level(config)
    fields = ConfigFields(level.config, model_type=level.model_type, prefix=level.prefix)
    if level.crossed:
        msg = (
            "the weights of a decoder with cross-attention to any encoder are not known exactly; "
            "deciding field: model_type"
        )
        raise UnsupportedError(msg)
    tied = _tied(config, fields)
    parts = _decoders.read(fields, tied=tied)
    _refuse_defaults(fields, nested=fields.data is not config, complete=complete)
    stored = _formats.stored(config, parts, wanted=dtype)
    return Weights(
        num_parameters=parts.num_parameters,
        num_bytes=stored.num_bytes,
        format=stored.name,
        origin=_origin(fields, stored.rule),
        notes=(*_notes(parts, fields, config), *stored.notes),
        least_bytes=stored.least_bytes,
    )


def _tied(config: Mapping[str, Any], fields: ConfigFields) -> bool:
    """Whether the output head is the embedding; a wrapper may say it in either place."""
    outer, inner = config.get("tie_word_embeddings"), fields.given("tie_word_embeddings")
    if fields.data is config or outer is None:
        return fields.flag("tie_word_embeddings")
    if not isinstance(outer, bool):
        msg = f"config field tie_word_embeddings is {shown(outer)}, not true or false"
        raise ConfigError(msg)
    if inner is not None and inner != outer:
        msg = (
            f"config has tie_word_embeddings = {shown(outer)} and {fields.prefix}"
            f"tie_word_embeddings = {shown(inner)}; deciding field: tie_word_embeddings"
        )
        raise UnsupportedError(msg)
    return outer


def _refuse_defaults(fields: ConfigFields, *, nested: bool, complete: bool) -> None:
    """Refuse numbers that an excerpt of a config leaves to the class.

    A whole config.json of a plain decoder has every size in it; only what a wrapper nests is
    written without the class's own values (Gemma 3).
    """
    missing = []
    if not (nested and complete):
        missing = [
            use.key
            for use in fields.used
            if use.origin != "config" and not isinstance(use.value, bool)
        ]
    if not complete and fields.given("tie_word_embeddings") is None:
        missing.append(f"{fields.prefix}tie_word_embeddings")
    if missing:
        msg = (
            f"this config leaves out {', '.join(missing)}, as only an excerpt does; they decide "
            f"the weights of {shown(fields.model_type)}; give the whole config.json"
        )
        raise UnsupportedError(msg)


def _origin(fields: ConfigFields, rule: str) -> str:
    values = [
        f"{use.key}={use.value}"
        for use in fields.used
        if isinstance(use.value, int | float) and not isinstance(use.value, bool)
    ]
    return f"sum over the modules of {fields.model_type}, {rule}; {', '.join(values)}"


def _notes(parts: Parts, fields: ConfigFields, config: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if fields.data is not config:
        notes.append("the text decoder alone; encoders of images or sound are not counted")
    if parts.num_buffers:
        notes.append(
            f"checkpoints hold {parts.num_buffers:,} further values (buffers, no parameters)"
        )
    predicting = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
    if any(fields.given(key) for key in predicting):
        notes.append("modules of multi-token prediction are not counted")
    defaults = [use.key for use in fields.used if use.origin != "config"]
    if defaults:
        notes.append(f"from class defaults: {', '.join(defaults)}")
    return tuple(notes)
