"""What a change did: figures beside those of an earlier run."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcalc.checking._report import FIGURES, SCHEMA, Change, Result
from kvcalc.errors import InputError

MAX_BASELINE_BYTES = 64 * 2**20


def read_baseline(path: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The deployments of an earlier `kvcalc check --json`, by file and name."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BASELINE_BYTES + 1)
        data = json.loads(raw) if len(raw) <= MAX_BASELINE_BYTES else None
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}"
        raise InputError(msg) from None
    except (ValueError, RecursionError):  # a NUL in the name, no JSON
        data = None
    if isinstance(data, dict) and data.get("schema") == SCHEMA:
        try:
            return {
                (str(one["file"]), str(one["name"])): dict(one["figures"])
                for one in data["deployments"]
            }
        except (KeyError, TypeError, ValueError):
            pass
    msg = f"{path} is not what kvcalc check --json prints ({SCHEMA})"
    raise InputError(msg)


def changes_since(
    old: Mapping[tuple[str, str], Mapping[str, Any]], results: Sequence[Result]
) -> Iterator[Change]:
    """Every figure that differs, deployments that are new, and those that are gone.

    A deployment is known by its file and name; by its name alone where that is the only one, since
    a file may be named by another path.
    """
    names = Counter(name for _, name in old)
    own = Counter(result.deployment.name for result in results)
    by_name = {name: (file, name) for file, name in old if names[name] == own[name] == 1}
    seen = set()
    for result in results:
        key = (result.deployment.place.file, result.deployment.name)
        found = key if key in old else by_name.get(key[1], key)
        seen.add(found)
        before = old.get(found)
        if before is None or not result.figures:
            if before != {} or result.figures:
                yield Change(*key, {}, "new" if before is None else f"now {result.status}")
            continue
        figures = {
            name: (before.get(name), result.figures.get(name))
            for name in FIGURES
            if before.get(name) != result.figures.get(name)
        }
        if figures:
            yield Change(*key, figures)
    for key in old:
        if key not in seen:
            yield Change(*key, {}, "gone")
