"""transformers' own StaticCache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import StaticCache

from kvcalc.errors import UnsupportedError
from kvcalc.releases import static_needs, transformers_version

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

_TAKE_ROOM_FOR_TOKENS = frozenset(
    {"doge", "gpt_neo", "inkling2_text", "inkling_text", "prophetnet"}
)
"""Types whose attention takes the length of the keys for that of the sequence: with rows that are
still empty they fail or say something else than with a growing cache (run on transformers 5.23.0).
"""


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, int]
) -> "Cache":
    """An empty cache that will hold `capacity_tokens` tokens.

    Raises UnsupportedError for a model type that does not work with one.
    """
    del parameters
    model_type = config.get_text_config(decoder=True).model_type
    if model_type in _TAKE_ROOM_FOR_TOKENS:
        msg = (
            f"static: {model_type} takes rows that are still empty for tokens; use dynamic; "
            "deciding field: model_type"
        )
        raise UnsupportedError(msg)
    since = static_needs(model_type)
    if since is not None:
        msg = (
            f"static: {model_type} does not work with a static cache in transformers "
            f"{transformers_version()}; use dynamic, or run: pip install 'transformers>={since}'"
        )
        raise UnsupportedError(msg)
    return StaticCache(config=config, max_cache_len=capacity_tokens)
