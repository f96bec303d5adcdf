"""The bundled catalogue: facts about published models, one small JSON file each.

An entry is `profiles/models/<org>/<name>.json`, so looking one up opens one file however many
there are. Names are matched without regard to case; `profiles/models/aliases.json` maps other
common names to published ones.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvcalc.data import load_profile, profiles_folder


class CatalogueEntry(NamedTuple):
    """A published model: the config fields that sizing needs, and who says so.

    `completeness` is `verbatim` (taken from a whole config.json) or `partial` (from a source that
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
    """Names in the catalogue that a misspelt name may have meant, the likeliest first."""
    import difflib

    wanted = name.lower()
    by_lower = {entry.lower(): entry for entry in names()} | dict(aliases())
    short = {key.rpartition("/")[2]: entry for key, entry in by_lower.items()}
    close = difflib.get_close_matches(wanted, by_lower, n=most, cutoff=0.6)
    close_short = difflib.get_close_matches(wanted.rpartition("/")[2], short, n=most, cutoff=0.6)
    found = [by_lower[key] for key in close] + [short[key] for key in close_short]
    return list(dict.fromkeys(found))[:most]


def _paths() -> Iterator[Path]:
    return (profiles_folder() / "models").glob("*/*.json")


def _load(path: Path) -> CatalogueEntry:
    raw = json.loads(path.read_text(encoding="utf-8"))
    return CatalogueEntry(name=f"{path.parent.name}/{path.stem}", **raw)
