"""The running caches of optimum-quanto and hqq: transformers' own quantised layers do the
quantising, on the token counts of `_library`.

A step attends to what was quantised before it dequantised, and to everything newer exactly.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    HQQQuantizedLayer,
    QuantizedLayer,
    QuantoQuantizedLayer,
)
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

from kvcalc.errors import MissingDependencyError, UnsupportedError
from kvcalc.strategies._library import PACKAGES, quantised_tokens
from kvcalc.strategies._running import Storage, stored

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

_INSTALLED: Mapping[str, Callable[[], bool]] = {
    "quanto": is_optimum_quanto_available,
    "hqq": is_hqq_available,
}


class LibraryStorage(Storage):
    """One layer's cache. `keys` and `values` are the tail, [batch, heads, tail, width].

    `quantised_keys` and `quantised_values` are what the library returns: a tensor of quanto, or a
    tensor and a dictionary of hqq; None before the first `residual` tokens.
    """

    keys: Tensor
    values: Tensor
    backend: str
    bits: int
    group: int
    residual: int
    key_axis: int
    quantised_keys: Any
    quantised_values: Any
    _library: QuantizedLayer

    def start(self, keys: Tensor, values: Tensor) -> None:
        """An empty tail, and the library's quantiser for this device and dtype."""
        quanto = self.backend == "quanto"
        self._library = (QuantoQuantizedLayer if quanto else HQQQuantizedLayer)(
            nbits=self.bits,
            axis_key=-1 if quanto and self.key_axis else self.key_axis,
            q_group_size=self.group,
            residual_length=self.residual,
        )
        self._library.lazy_initialization(keys, values)  # tells it device and dtype
        self.keys, self.values = keys[:, :, :0].clone(), values[:, :, :0].clone()
        self.quantised_keys = self.quantised_values = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take new tokens; the whole cache is quantised anew when the tail is full."""
        keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        tail = self.num_tokens - quantised_tokens(self.num_tokens, residual=self.residual)
        old = self.quantised_keys is not None
        all_keys = self._with_quantised(self.quantised_keys, keys) if old else keys
        all_values = self._with_quantised(self.quantised_values, values) if old else values
        if tail < keys.shape[2]:
            self.quantised_keys = self._quantised(all_keys, tail, self._library.axis_key)
            self.quantised_values = self._quantised(all_values, tail, self._library.axis_value)
            # Cloned, so that the storage of the tokens before is let go.
            keys = keys[:, :, keys.shape[2] - tail :].clone()
            values = values[:, :, values.shape[2] - tail :].clone()
        self.keys, self.values = keys, values
        return all_keys, all_values

    def _with_quantised(self, quantised: Any, states: Tensor) -> Tensor:  # noqa: ANN401
        return torch.cat([self._library._dequantize(quantised), states], dim=2)  # noqa: SLF001

    def _quantised(self, states: Tensor, tail: int, axis: int) -> Any:  # noqa: ANN401
        """All but the last `tail` tokens, as the library returns them."""
        states = states[:, :, : states.shape[2] - tail].contiguous()
        return self._library._quantize(states, axis=axis)  # noqa: SLF001

    def reset(self) -> None:
        """Back to empty; storage is let go at once."""
        super().reset()
        self.quantised_keys = self.quantised_values = None


def library_cache(
    config: "PreTrainedConfig", *, backend: str, bits: int, parameters: Mapping[str, int]
) -> "Cache":
    """An empty cache quantised by `backend`, quanto or hqq.

    Raises MissingDependencyError where its library is not installed, and UnsupportedError for
    a model that QuantizedCache refuses.
    """
    package = PACKAGES[backend]
    if not _INSTALLED[backend]():
        msg = (
            f"{backend}-int{bits} needs {package}, which is not installed; run: "
            "pip install 'kvcalc[quantised]' (in a checkout: pip install '.[quantised]')"
        )
        raise MissingDependencyError(msg)
    layers = DynamicCache(config=config).layers
    others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if others:
        msg = f"transformers' QuantizedCache refuses the {', '.join(others)} of this model"
        raise UnsupportedError(msg)
    return stored(config, LibraryStorage, backend=backend, bits=bits, **parameters)
