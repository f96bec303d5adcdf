"""Encoders that may be built as decoders: BERT (arXiv:1810.04805) and its kin.

As a decoder (`is_decoder`, or a class that generates named in `architectures`) such a model keeps
K and V of every token and head; otherwise it is an encoder and keeps nothing. Types that have no
model which generates keep nothing either: `kvcalc.config.class_defaults` knows them.
"""

from kvcalc.config import ConfigFields
from kvcalc.families._heads import multi_head, repeat
from kvcalc.layers import Layer
from kvcalc.layers.mixed import NoCache, with_cross_attention

SOURCE = "K and V of every token and head of a decoder (arXiv:1706.03762); nothing of an encoder"

MODEL_TYPES = frozenset(
    """
    bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert
    roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod
    """.split()
)

UNDERSTANDS = frozenset({"add_cross_attention"})

_GENERATES = ("ForCausalLM", "LMHeadModel", "GenerationDecoder")

ENCODER = NoCache(reason="an encoder keeps no cache")


def layers(config: ConfigFields) -> tuple[Layer, ...]:
    """K and V in each layer of a decoder, with those of an encoder when it attends to one."""
    named = config.names("architectures") or ()
    if not config.flag("is_decoder") and not any(name.endswith(_GENERATES) for name in named):
        return repeat(config, ENCODER)
    layer: Layer = multi_head(config)
    if config.flag("add_cross_attention"):
        layer = with_cross_attention(layer)
    return repeat(config, layer)
