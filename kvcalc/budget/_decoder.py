"""What of a decoder decides how much memory it works in."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from kvcalc.config import MAX_FIELD, ConfigFields
from kvcalc.dtypes import storage_format
from kvcalc.errors import ConfigError, KvcalcError, UnsupportedError
from kvcalc.families import decoder_level
from kvcalc.units import ceil_div, shown

ENCODERS = ("vision_config", "audio_config", "vit_config", "vision_tower_config")
"""What a config with an encoder of images or sound has."""


class Encoder(NamedTuple):
    """An encoder of images or sound: layers, width, and about how many values its weights are;
    `known` is False where only the decoder's nesting tells that there is one.
    """

    layers: int
    width: int
    num_values: int
    known: bool


class Decoder(NamedTuple):
    """Widths in values: `mlp_width` of the dense feed-forward (0 where there is none), and of a
    routed expert `expert_width`, of which each token takes `experts_per_token`.

    `value_bytes` are those of a value that it computes with; `latent` says that it attends to
    latents, `packed_experts` that experts are kept in mxfp4, whose kernels need no workspace of the
    engine's. `expert_values` are the weights of all routed experts.
    """

    width: int
    layers: int
    vocabulary: int
    mlp_width: int
    expert_width: int
    experts_per_token: int
    value_bytes: int
    tied: bool
    latent: bool
    packed_experts: bool
    expert_values: int
    encoder: Encoder | None

    def stage_layers(self, pp: int) -> int:
        """Layers of the longest pipeline stage."""
        return ceil_div(self.layers, pp)


def read_decoder(config: Mapping[str, Any]) -> Decoder:
    """Read it from a parsed config; UnsupportedError where a width is not said."""
    level = decoder_level(config)
    fields = ConfigFields(level.config, model_type=level.model_type, prefix=level.prefix)
    experts = _largest(fields, "num_experts_per_tok", "moe_topk", "moe_k")
    expert_width = _largest(fields, "moe_intermediate_size", "expert_ffn_hidden_size")
    mlp = _largest(fields, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    width = _needed(fields, "hidden_size")
    listed = fields.get("layers_block_type")
    layers = len(listed) if isinstance(listed, list) else _needed(fields, "num_hidden_layers")
    num_experts = _largest(fields, "num_local_experts", "n_routed_experts", "num_experts")
    if experts and not expert_width:
        expert_width, mlp = mlp, 0
    quantisation = config.get("quantization_config") or level.config.get("quantization_config")
    method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
    return Decoder(
        width=width,
        layers=layers,
        vocabulary=_needed(fields, "vocab_size"),
        mlp_width=mlp if mlp or expert_width else 4 * width,
        expert_width=expert_width if experts else 0,
        experts_per_token=experts,
        value_bytes=_value_bytes(config, fields),
        tied=fields.get("tie_word_embeddings") is True,
        latent=fields.get("kv_lora_rank") is not None,
        packed_experts=method == "mxfp4",
        expert_values=layers * num_experts * 3 * expert_width * width if experts else 0,
        encoder=_encoder(config, nested=fields.data is not config),
    )


def _encoder(config: Mapping[str, Any], *, nested: bool) -> Encoder | None:
    """The first there is; 24 layers of 1,024 where its config does not say (as SGLang has it)."""
    given = next((config[key] for key in ENCODERS if isinstance(config.get(key), Mapping)), None)
    if given is None and not nested:
        return None
    found: Mapping[str, Any] = given or {}

    def read(default: int, *keys: str) -> int:
        said = (found.get(key) for key in keys)
        return next((one for one in said if type(one) is int and 0 < one < MAX_FIELD), default)

    layers = read(24, "num_hidden_layers", "depth", "layers", "encoder_layers")
    width = read(1024, "hidden_size", "embed_dim", "width", "d_model")
    inner = read(4 * width, "intermediate_size", "encoder_ffn_dim")
    num_values = layers * (4 * width**2 + 2 * width * inner)
    return Encoder(layers, width, num_values, given is not None)


def _needed(fields: ConfigFields, key: str) -> int:
    try:
        return fields.count(key)
    except ConfigError:
        msg = (
            f"what {shown(fields.model_type)} works in is not estimated without {fields.prefix}"
            f"{key}; give --reserve, as the engine's log has it"
        )
        raise UnsupportedError(msg) from None


def _largest(fields: ConfigFields, *keys: str) -> int:
    """Of the first field that is there, the largest where it is a list; 0 where none is."""
    for key in keys:
        value = fields.get(key)
        values = value if isinstance(value, list | tuple) else [value]
        whole = [int(one) for one in values if type(one) is int and 0 < one < MAX_FIELD]
        if whole:
            return max(whole)
    return 0


def _value_bytes(config: Mapping[str, Any], fields: ConfigFields) -> int:
    for level in (fields.data, config):
        said = level.get("dtype") or level.get("torch_dtype")
        if isinstance(said, str):
            try:
                return 4 if storage_format(said.removeprefix("torch.")).name == "fp32" else 2
            except KvcalcError:
                continue
    return 2
