"""Parsing and printing of token counts and byte counts; the only place where GiB appears."""

import re

from kvcalc.errors import InputError

KIB = 1024
MIB = KIB**2
GIB = KIB**3
TIB = KIB**4

MAX_TOKENS = 2**40
"""Longest sequence taken: above a trillion tokens an input is a slip, not a plan."""

_TOKEN_SUFFIXES = {"": 1, "k": 1024, "m": 1024**2}
_TOKENS = re.compile(r"([0-9][0-9_]*)(?:\.([0-9]+))?\s*([kKmM]?)")


def ceil_div(numerator: int, denominator: int) -> int:
    """Integer division rounded up: `ceil_div(5, 2) == 3`."""
    return -(-numerator // denominator)


def parse_tokens(value: str | int, *, name: str = "--seq") -> int:
    """Read a token count: `131072`, `131_072`, `128k` (131,072), `1M` (1,048,576), `1.5k` (1,536).

    Suffixes are binary in either case. Raises InputError when the text is no positive whole
    number of tokens, or exceeds MAX_TOKENS.
    """
    if not isinstance(value, str):
        return check_count(value, name=name, most=MAX_TOKENS)
    text = value.strip()
    match = _TOKENS.fullmatch(text) if len(text) <= 32 else None
    if match is None:
        msg = f"{name} {shown(text)} is no whole number; write 131072, 128k or 1M"
        raise InputError(msg)
    whole, fraction, suffix = match.groups()
    unit = _TOKEN_SUFFIXES[suffix.lower()]
    digits = whole.replace("_", "") + (fraction or "")
    tokens, rest = divmod(int(digits) * unit, 10 ** len(fraction or ""))
    if rest:
        msg = f"{name} {text!r} is not a whole number of tokens"
        raise InputError(msg)
    return check_count(tokens, name=name, most=MAX_TOKENS)


_BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
}
_BYTES = re.compile(r"([0-9][0-9_]*)(?:\.([0-9]{1,9}))?\s*([a-zA-Z]*)")


def parse_bytes(value: str | int, *, name: str) -> int:
    """Read a byte count: `6.22GiB` (2^30), `80GB` (10^9), `1_073_741_824`, or the line of a log
    that ends so (`Available KV cache memory: 12.3 GiB`); a part of a byte is dropped.

    Raises InputError for what is none, and for text without a unit that is no megabyte.
    """
    if not isinstance(value, str):
        return check_count(value, name=name, most=2**60)
    before, colon, text = value.strip().rpartition(":")
    if colon and not before.rstrip().endswith("memory"):
        text = value
    text = text.strip()
    match = _BYTES.fullmatch(text) if len(text) <= 40 else None
    unit = _BYTE_UNITS.get(match[3].lower()) if match else None
    if match is None or unit is None:
        msg = f"{name} {shown(text)} is not a number of bytes; write 20GiB, 80GB or 1073741824"
        raise InputError(msg)
    digits = match[1].replace("_", "") + (match[2] or "")
    if not match[3] and (match[2] or int(digits) < MIB):
        msg = f"{name} {shown(text)} has no unit: write {text}GiB, {text}GB or {text}B"
        raise InputError(msg)
    return check_count(int(digits) * unit // 10 ** len(match[2] or ""), name=name, most=2**60)


def check_count(value: int, *, name: str, most: int, least: int = 1) -> int:
    """Return `value` when it is an int in least..most, else raise InputError naming it."""
    if not isinstance(value, int) or isinstance(value, bool):
        msg = f"{name} must be a whole number, not {shown(value)}"
        raise InputError(msg)
    if value < least:
        msg = f"{name} must be at least {least}, not {shown(value)}"
        raise InputError(msg)
    if value > most:
        msg = f"{name} must be at most {most:,}, not {shown(value)}"
        raise InputError(msg)
    return value


def shown(value: object, *, most: int = 60) -> str:
    """A value as an error message quotes it: its repr, one line, cut to `most` characters."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length():,} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a huge integer inside, or nesting without end
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= most else text[: most - 1] + "…"


def format_bytes(num_bytes: int) -> str:
    """Print a byte count in binary units: `16.000 GiB`, `128.00 KiB`, `512 B`."""
    size = abs(num_bytes)
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            digits = 3 if unit >= GIB else 2
            return f"{num_bytes / unit:.{digits}f} {name}"
    return f"{num_bytes} B"
