"""Parameters of strategies: whole numbers, fractions, one of several words, and token budgets.

The default of a parameter says what kind it is.
"""

import re
from enum import StrEnum
from typing import NamedTuple

from kvcalc.errors import InputError, KvcalcError
from kvcalc.units import parse_tokens


class Budget(NamedTuple):
    """Tokens kept: a number of them (`1k`), or so many billionths of the prompt (`12.5%`)."""

    tokens: int | None
    billionths: int = 0

    def of(self, prompt_tokens: int) -> int:
        """Tokens for a prompt of this length: a part is rounded down, and is at least one."""
        if self.tokens is not None:
            return self.tokens
        return max(self.billionths * prompt_tokens // 10**9, 1)

    def __str__(self) -> str:
        """As the user writes it."""
        if self.tokens is not None:
            return str(self.tokens)
        return f"{self.billionths / 10**7:g}%"


def percent(share: float) -> Budget:
    """`percent(12.5)` is an eighth of the prompt."""
    return Budget(None, round(share * 10**7))


class Pooling(StrEnum):
    """How a score takes in its neighbours'."""

    MAX = "max"
    AVG = "avg"


Value = int | float | str | Budget
"""A StrEnum's member stands for a choice among its words."""

_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def read_value(strategy: str, key: str, default: Value, text: str) -> Value:
    """The value of a parameter whose default is `default`; InputError for what it cannot be."""
    if isinstance(default, Budget):
        return _budget(strategy, key, text)
    if isinstance(default, StrEnum):
        words = [str(word) for word in type(default)]
        if text in words:
            return type(default)(text)
        msg = f"strategy {strategy}: {key} must be {' or '.join(words)}, not {text[:40]!r}"
        raise InputError(msg)
    whole = isinstance(default, int)
    match = _NUMBER.fullmatch(text)
    if match is None or (whole and match[1]):
        kind = "whole number" if whole else "decimal number"
        msg = f"strategy {strategy}: {key} must be a {kind}, not {text[:40]!r}"
        raise InputError(msg)
    return int(text) if whole else float(text)


def _budget(strategy: str, key: str, text: str) -> Budget:
    """`1024`, `1k` or `12.5%`."""
    number = text.removesuffix("%")
    if number != text:
        budget = percent(float(number)) if _NUMBER.fullmatch(number) else Budget(None)
        if 0 < budget.billionths <= 10**9:
            return budget
    else:
        try:
            return Budget(parse_tokens(text, name=f"strategy {strategy}: {key}"))
        except KvcalcError:
            pass
    msg = (
        f"strategy {strategy}: {key} must be tokens or a part of the prompt (1024, 1k, 12.5%), "
        f"not {text[:40]!r}"
    )
    raise InputError(msg)
