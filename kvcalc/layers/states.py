"""States of constant size: what recurrent and convolution layers keep instead of tokens."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple, Self

from kvcalc.dtypes import FORMATS, StorageFormat
from kvcalc.layers import PlainLayer, Setting, per_rank


class State(NamedTuple):
    """One tensor of a sequence. Its first axis, which `splits` names, is what tensor parallelism
    divides (or replicates, where it is shorter than the ranks are many).

    `dtype` is a format of `kvcalc.dtypes`, or "" for the dtype that the model computes in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = ""
    splits: str = "channels"

    def text(self) -> str:
        """`conv 8,192 × 3`, with the dtype where it has one of its own."""
        own = f" {self.dtype}" if self.dtype else ""
        return f"{self.name} {' × '.join(f'{extent:,}' for extent in self.shape)}{own}"


@dataclass(frozen=True, slots=True)
class StateLayer(PlainLayer):
    """States that do not grow with the sequence, whatever `--kv-dtype` quantises."""

    states: tuple[State, ...]
    kind: str = "linear_attention"
    compute: StorageFormat | None = None

    def bind(self, setting: Setting) -> Self:
        """With the compute dtype."""
        return replace(self, compute=setting.compute)

    def num_bytes(self, *, tokens: int, batch: int, dtype: StorageFormat) -> int:
        """The states of each sequence."""
        del tokens
        return batch * sum(self._state_bytes(state, dtype) for state in self.states)

    def shard(self, tp: int) -> Self:
        """Each state's part."""
        return replace(
            self,
            states=tuple(
                state._replace(
                    shape=(per_rank(state.shape[0], tp, what=state.splits), *state.shape[1:])
                )
                for state in self.states
            ),
        )

    def keeps(self) -> str:
        """Shapes of one sequence's states."""
        return "per sequence: " + ", ".join(state.text() for state in self.states)

    def formula(self, *, tokens: int, dtype: StorageFormat) -> str:
        """A product for each state."""
        del tokens
        return " + ".join(
            f"{state.text()} × {self._format(state, dtype).block_bytes} B" for state in self.states
        )

    def _state_bytes(self, state: State, dtype: StorageFormat) -> int:
        return self._format(state, dtype).row_bytes(prod(state.shape))

    def _format(self, state: State, dtype: StorageFormat) -> StorageFormat:
        return FORMATS[state.dtype] if state.dtype else self.compute or dtype


def state_layer(states: Iterable[State], *, kind: str = "linear_attention") -> StateLayer:
    """A layer of those states that are not empty (a convolution of width 1 keeps no column)."""
    return StateLayer(states=tuple(state for state in states if prod(state.shape)), kind=kind)
