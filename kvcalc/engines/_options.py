"""Options of engines, named as the engines name them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from kvcalc.dtypes import storage_format
from kvcalc.errors import InputError
from kvcalc.units import MAX_TOKENS, check_count, parse_tokens, shown

_YES = {"true": True, "1": True, "on": True, "yes": True}
_NO = {"false": False, "0": False, "off": False, "no": False}


class Option(NamedTuple):
    """One option: `kind` is `count`, `flag`, `share` (0 to 1) or `format`; with `default` None the
    engine, or the question that is asked, decides.
    """

    kind: str
    default: Any
    about: str


def read_options(
    engine: str, known: Mapping[str, Option], given: Mapping[str, Any]
) -> dict[str, Any]:
    """All options of an engine: those given, as numbers or as text, and the defaults of the others.

    Raises InputError for a name that the engine does not have and a value that cannot be.
    """
    for name in given:
        if name not in known:
            names = ", ".join(known) or "none"
            msg = f"engine {engine} has no option {shown(name)}; its options: {names}"
            raise InputError(msg)
    return {
        name: option.default
        if given.get(name) is None
        else _read(engine, name, option, given[name])
        for name, option in known.items()
    }


def _read(engine: str, name: str, option: Option, value: Any) -> Any:  # noqa: ANN401 - any kind
    what = f"{engine} option {name}"
    if option.kind == "format":
        return storage_format(str(value)).name
    if option.kind == "flag":
        found = value if isinstance(value, bool) else (_YES | _NO).get(str(value).lower())
        if found is None:
            msg = f"{what} must be true or false, not {shown(value)}"
            raise InputError(msg)
        return found
    if option.kind == "share":
        try:
            share = float(value)
        except (TypeError, ValueError):
            share = -1.0
        if not 0 <= share <= 1:
            msg = f"{what} must be from 0 to 1, not {shown(value)}"
            raise InputError(msg)
        return share
    if isinstance(value, str):
        return 0 if value == "0" else parse_tokens(value, name=what)
    return check_count(value, name=what, least=0, most=MAX_TOKENS)
