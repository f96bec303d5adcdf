"""The running StreamingLLM cache.

RoPE lets attention depend on distances alone. So the last tokens, and the new ones, can stay where
they are, if the first ones come nearer by as many places as were dropped: of [0 1 7 8] with 2 sinks
token 9 sees the sinks at [5 6], as far as token 4 sees them in [0 1 2 3]. Stored keys stay as they
came; each step attends to a copy of the few sinks that is rotated anew, so that no error adds up.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcalc.strategies._evicting_cache import Attended, StepEviction, attending, evicting_cache
from kvcalc.strategies._scores import with_ends
from kvcalc.strategies.sink_window import Positions, refuse_moving

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = ["attending", "build"]

ROTARY = {
    "gemma3_text": "gemma3.modeling_gemma3.Gemma3RotaryEmbedding",
    "llama": "llama.modeling_llama.LlamaRotaryEmbedding",
    "mistral": "mistral.modeling_mistral.MistralRotaryEmbedding",
    "phi3": "phi3.modeling_phi3.Phi3RotaryEmbedding",
    "qwen2": "qwen2.modeling_qwen2.Qwen2RotaryEmbedding",
    "qwen3": "qwen3.modeling_qwen3.Qwen3RotaryEmbedding",
}
"""Model types whose rotation is tested here, and its class in transformers: of what is rotated, the
first half of the channels goes with the second, in every layer that sees all.
"""

CONSTANT = ("default", "linear", "llama3", "yarn")
"""Kinds of RoPE whose frequencies do not depend on the number of tokens."""


def frequencies_of(config: "PreTrainedConfig") -> Tensor:
    """Radians per token of each pair of channels, in float64, for layers that see all.

    Raises UnsupportedError for a model whose rotation is not known, or not constant.
    """
    text = config.get_text_config(decoder=True)
    if text.model_type not in ROTARY:
        refuse_moving(f"model_type {text.model_type!r}")
    kinds = text.rope_parameters
    kind = kinds.get("full_attention", kinds)["rope_type"]
    if kind not in CONSTANT:
        refuse_moving(f"rope_type {kind!r}")
    module, _, name = ROTARY[text.model_type].rpartition(".")
    rotary = getattr(import_module(f"transformers.models.{module}"), name)(text)
    buffers = dict(rotary.named_buffers())
    name = "full_attention_inv_freq" if "full_attention" in kinds else "inv_freq"
    return buffers[name].double()


def rotated(keys: Tensor, angles: Tensor) -> Tensor:
    """Keys [batch, heads, tokens, width] turned by the angle of each pair of channels; channels
    beyond these pairs are not rotated.
    """
    pairs = len(angles)
    cos, sin = angles.cos().float(), angles.sin().float()
    left, right, still = keys.tensor_split([pairs, 2 * pairs], dim=-1)
    turned = [(left * cos - right * sin).to(keys), (right * cos + left * sin).to(keys), still]
    return torch.cat(turned, dim=-1)


class SinkWindowStorage(StepEviction):
    """Rows stand in the order of their tokens, the sinks first."""

    sinks: int
    _frequencies: Tensor | None

    @property
    def num_sinks(self) -> int:
        """The last token is always kept."""
        return min(self.sinks, self.budget - 1)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All rows that are there, and the new ones; sinks where they are to be seen."""
        keys, values = super().append(keys, values)
        dropped = self.num_tokens - keys.shape[2]
        if not dropped or self._frequencies is None:
            return keys, values
        self._frequencies = self._frequencies.to(keys.device)
        sinks, others = keys.tensor_split([self.num_sinks], dim=2)
        return torch.cat([rotated(sinks, dropped * self._frequencies), others], dim=2), values

    def choose(self, seen: Attended) -> Tensor:
        """The first and the last."""
        batch, _, rows, _ = seen.key.shape
        nothing = torch.empty(batch, seen.kv_heads, 0, dtype=torch.long, device=seen.key.device)
        first = self.num_sinks
        return with_ends(nothing, first=first, last=self.budget - first, rows=rows)


def build(
    config: "PreTrainedConfig", *, capacity_tokens: int, parameters: Mapping[str, Any]
) -> "Cache":
    """An empty cache for a model of this config; it needs no capacity."""
    del capacity_tokens
    moved = parameters["positions"] == Positions.CACHE
    settings = {**parameters, "_frequencies": frequencies_of(config) if moved else None}
    return evicting_cache(config, SinkWindowStorage, settings)
