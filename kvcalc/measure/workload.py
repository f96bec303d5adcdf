"""What a measured model is put through; knows no torch, so that bad values are told at once."""

from typing import NamedTuple

from kvcalc.errors import InputError
from kvcalc.units import check_count, parse_tokens

_MOST_TOKENS = 2**20
_MOST_RUNS = 1000

FITTING = "auto"
"""The `--chunk` that is as large as fits."""


class Workload(NamedTuple):
    """What every strategy is put through. Token counts are for each of `batch` sequences; a prompt
    comes in pieces of at most `chunk` tokens, None for as many as fit. `depth` is where the needle
    of the built-in model stands.
    """

    prompt_tokens: int
    decode_tokens: int
    batch: int
    repeats: int
    warmup: int
    seed: int
    chunk: int | None = None
    depth: float = 0.5

    @property
    def piece_tokens(self) -> int:
        """Tokens of a prompt that go in at once."""
        return min(self.chunk or self.prompt_tokens, self.prompt_tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens fed by the end: prompt and decoded ones."""
        return self.prompt_tokens + self.decode_tokens


def checked_workload(
    *,
    seq: str,
    decode: int,
    batch: int,
    repeats: int,
    warmup: int,
    seed: int,
    chunk: str = FITTING,
    depth: float = 0.5,
) -> Workload:
    """A workload from what the user gave; InputError for a value out of range."""
    check_count(decode, name="--decode", most=_MOST_TOKENS)
    check_count(batch, name="--batch", most=_MOST_TOKENS)
    check_count(repeats, name="--repeats", most=_MOST_RUNS)
    check_count(warmup, name="--warmup", least=0, most=_MOST_RUNS)
    if not 0 <= depth <= 1:
        msg = f"--depth must be from 0 to 1, not {depth}"
        raise InputError(msg)
    pieces = None if chunk == FITTING else parse_tokens(chunk, name="--chunk")
    return Workload(parse_tokens(seq), decode, batch, repeats, warmup, seed, pieces, depth)
