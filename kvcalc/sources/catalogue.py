"""The bundled catalogue: facts about published models, one small JSON file each.

An entry is `profiles/models/<org>/<name>.json`, so looking one up opens one file however many
there are. Names are matched without regard to case; `profiles/models/aliases.json` maps other
common names to published ones.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvcalc.data import load_profile, profiles_folder


class CatalogueEntry(NamedTuple):
    """A published model: the config fields that sizing needs, and who says so.

    `completeness` is `verbatim` (taken from a whole config.json) or `partial` (from a source that
    gives only some of its fields).
    """

    name: str
    config: Mapping[str, Any]
    source: str
    date: str
    completeness: str


def find(name: str) -> CatalogueEntry | None:
    """The entry of that name or alias, in any case, or of that model under the only organisation
    that has one; None when there is none.
    """
    published = aliases().get(name.lower(), name)
    org, _, model = published.rpartition("/")
    if "/" in org or org.startswith(".") or model.startswith(".") or len(name) > 200:
        return None
    exact = profiles_folder() / "models" / org / f"{model}.json"
    if org and exact.is_file():
        return _load(exact)
    found = [
        path
        for path in _paths()
        if path.stem.lower() == model.lower() and org.lower() in ("", path.parent.name.lower())
    ]
    return _load(found[0]) if len(found) == 1 else None


def names() -> tuple[str, ...]:
    """Every entry's name, sorted without regard to case; reads no entry."""
    found = [f"{path.parent.name}/{path.stem}" for path in _paths()]
    return tuple(sorted(found, key=str.lower))


def entries() -> Iterator[CatalogueEntry]:
    """Every entry, in the order of `names`."""
    for path in sorted(_paths(), key=lambda path: f"{path.parent.name}/{path.stem}".lower()):
        yield _load(path)


def aliases() -> Mapping[str, str]:
    """Other names, in lower case, and the published names they stand for."""
    found: Mapping[str, str] = load_profile("models/aliases.json")
    return found


def suggestions(name: str, *, most: int = 3) -> list[str]:
    """Names in the catalogue that a misspelt name may have meant, the likeliest first.

    Names that contain all of its parts (`llama`, `3.1`, `70b`) come before names that look alike.
    """
    import difflib

    wanted = name.lower().rpartition("/")[2]
    parts = re.findall(r"[a-z]+|[0-9.]+b?", wanted)
    known = {entry.lower(): entry for entry in names()} | dict(aliases())
    likeness: dict[str, tuple[bool, float]] = {}
    for text, entry in known.items():
        model = text.rpartition("/")[2]
        contains = len(wanted) > 2 and all(part in model for part in parts)
        ratio = difflib.SequenceMatcher(a=wanted, b=model).ratio()
        if contains or ratio >= 0.7:
            likeness[entry] = max((contains, ratio), likeness.get(entry, (False, 0.0)))
    return sorted(likeness, key=lambda entry: likeness[entry], reverse=True)[:most]


def _paths() -> Iterator[Path]:
    return (profiles_folder() / "models").glob("*/*.json")


def _load(path: Path) -> CatalogueEntry:
    raw = json.loads(path.read_text(encoding="utf-8"))
    return CatalogueEntry(name=f"{path.parent.name}/{path.stem}", **raw)
