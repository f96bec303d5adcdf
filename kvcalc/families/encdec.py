"""Encoder–decoders: T5 (arXiv:1910.10683), BART (arXiv:1910.13461), Whisper (arXiv:2212.04356) and
their kin.

Each decoder layer keeps K and V of every decoded token, and once those of the encoder's output,
with the same heads. Depth and heads are the decoder's own (`decoder_layers`,
`decoder_attention_heads`; `num_decoder_layers` and `d_kv` in T5's kin). A decoder built alone
(`is_encoder_decoder` false, or a …ForCausalLM class in `architectures`) keeps its own part.
"""

from kvcalc.config import MAX_LAYERS, ConfigFields
from kvcalc.families._heads import width_of_a_head
from kvcalc.layers import FullAttention, Layer
from kvcalc.layers.mixed import with_cross_attention

SOURCE = "K and V of every decoded token, and of the encoder's output (arXiv:1706.03762)"

_T5 = frozenset({"longt5", "mt5", "switch_transformers", "t5", "udop", "umt5"})

MODEL_TYPES = _T5 | frozenset(
    """
    bart bigbird_pegasus blenderbot blenderbot-small fsmt led m2m_100 marian mbart mvp nllb-moe
    pegasus pegasus_x plbart pp_formulanet_text prophetnet seamless_m4t seamless_m4t_v2 trocr
    whisper musicgen_decoder musicgen_melody_decoder pix2struct_text_model blip_text_model
    """.split()
)

UNDERSTANDS = frozenset({"is_encoder_decoder", "add_cross_attention"})

_ALONE = frozenset({"trocr", "musicgen_decoder", "musicgen_melody_decoder"})
"""Decoders whose own class is one, and which a wrapper gives an encoder."""

_ALWAYS_CROSSED = frozenset({"blip_text_model", "pix2struct_text_model", "pp_formulanet_text"})
"""Decoders of multimodal models that attend to the vision encoder's output."""


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """The decoder's layers."""
    layer: Layer = _own(config)
    if _attends_to_an_encoder(config):
        layer = with_cross_attention(layer, default_tokens=_encoder_tokens(config))
    return (layer,) * _depth(config)


def transformers_layers(config: ConfigFields) -> tuple[Layer, ...]:
    """PP-FormulaNet's model computes K and V of the encoder's output anew for each token."""
    if config.model_type == "pp_formulanet_text":
        return (_own(config),) * _depth(config)
    return layers(config)


def _own(config: ConfigFields) -> FullAttention:
    if config.model_type in _T5 or config.model_type == "pix2struct_text_model":
        heads, width = config.count("num_heads"), config.count("d_kv")
        return FullAttention(kv_heads=heads, key_dim=width, value_dim=width)
    heads = (
        config.optional_count("decoder_attention_heads")
        or config.optional_count("num_decoder_attention_heads")
        or config.count("num_attention_heads")
    )
    width = width_of_a_head(config, heads)
    return FullAttention(kv_heads=heads, key_dim=width, value_dim=width)


def _depth(config: ConfigFields) -> int:
    for key in ("decoder_layers", "num_decoder_layers", "num_layers"):
        if config.optional_count(key) is not None:
            return config.count(key, most=MAX_LAYERS)
    return config.count("num_hidden_layers", most=MAX_LAYERS)


def _attends_to_an_encoder(config: ConfigFields) -> bool:
    if config.model_type in _ALWAYS_CROSSED:
        return True
    if config.model_type in _ALONE:
        return config.flag("add_cross_attention")
    named = config.names("architectures") or ()
    alone = config.get("is_encoder_decoder") is False or any(
        name.endswith("ForCausalLM") for name in named
    )
    return not alone


def _encoder_tokens(config: ConfigFields) -> int | None:
    """Whisper's encoder always puts out `max_source_positions` frames of 30 seconds of audio."""
    return config.count("max_source_positions") if config.model_type == "whisper" else None
