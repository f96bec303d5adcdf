"""Add a published model to the catalogue from its config.json.

    python scripts/add_model.py config.json --name org/name --source URL-or-citation

Only the fields that sizing reads are kept. Give `--partial` when the file holds only some fields of
the published one, `--without KEY` for a field that the source gets wrong, and `--set KEY=JSON` for
one that the source states elsewhere than in the file (the entry's source should say so).
"""

import argparse
import datetime
import json
from pathlib import Path

from sizing_fields import keep_sizing_fields

from kvcalc.errors import KvcalcError
from kvcalc.families import describe

MODELS = Path(__file__).parent.parent / "profiles" / "models"


def kept(config: dict[str, object]) -> object:
    """The layers that a config gives, or None when it is refused."""
    try:
        return describe(config).layers
    except KvcalcError:
        return None


def main(arguments: list[str] | None = None) -> None:
    """Write one entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--name", required=True, help="the published name, org/name")
    parser.add_argument("--source", required=True, help="where the file was read")
    parser.add_argument("--date", default=datetime.datetime.now(datetime.UTC).date().isoformat())
    parser.add_argument("--partial", action="store_true")
    parser.add_argument("--without", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], dest="settings")
    options = parser.parse_args(arguments)

    whole = json.loads(options.config.read_text("utf-8"))
    config = keep_sizing_fields(whole)
    if kept(config) != kept(whole):
        parser.error("the fields kept give another size than the whole file: see sizing_fields.py")
    for key in options.without:
        config.pop(key, None)
    for setting in options.settings:
        key, _, value = setting.partition("=")
        config[key] = json.loads(value)
    entry = {
        "source": options.source,
        "date": options.date,
        "completeness": "partial" if options.partial else "verbatim",
        "config": dict(sorted(config.items())),
    }
    org, _, model = options.name.partition("/")
    target = MODELS / org / f"{model}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(entry, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
