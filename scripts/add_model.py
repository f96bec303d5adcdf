"""Add a published model to the catalogue from its config.json.

    python scripts/add_model.py config.json --name org/name --source URL-or-citation

Only the fields that sizing reads are kept. Give `--partial` when the file holds only some fields of
the published one, `--quantization hf_quant_config.json` where that lies beside it and it has no
quantization_config (the source should name both), `--without KEY` for a field that the source gets
wrong, and `--set KEY=JSON` for one that the source states elsewhere than in the file (the entry's
source should say so).
"""

import argparse
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sizing_fields import keep_sizing_fields

from kvcalc.errors import KvcalcError
from kvcalc.families import describe
from kvcalc.sources import quantization
from kvcalc.weights import weights_of
from kvcalc.weights._groups import condensed

MODELS = Path(__file__).parent.parent / "profiles" / "models"


def kept(config: Mapping[str, Any]) -> object:
    """The layers that a config gives, or None when it is refused."""
    try:
        return describe(config).layers
    except KvcalcError:
        return None


def weighed(config: Mapping[str, Any]) -> int:
    """The bytes of its weights, or 0 when they are refused."""
    try:
        return weights_of(config).num_bytes
    except KvcalcError:
        return 0


def with_layers(config: dict[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept, with a `quantized_layers` that has an entry for each expert in fewer lines."""
    declared = config.get("quantization_config")
    if not declared or "config_groups" in declared:
        return config
    layers = condensed(whole["quantization_config"].get("quantized_layers"))
    if layers is None:
        return config
    fewer = {name: entry for name, (entry, _) in layers.items()}
    return config | {"quantization_config": declared | {"quantized_layers": fewer}}


def main(arguments: list[str] | None = None) -> None:
    """Write one entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--name", required=True, help="the published name, org/name")
    parser.add_argument("--source", required=True, help="where the file was read")
    parser.add_argument("--date", default=datetime.datetime.now(datetime.UTC).date().isoformat())
    parser.add_argument("--partial", action="store_true")
    parser.add_argument("--quantization", type=Path, metavar="HF_QUANT_CONFIG")
    parser.add_argument("--without", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], dest="settings")
    options = parser.parse_args(arguments)

    whole = json.loads(options.config.read_text("utf-8"))
    if options.quantization:
        if quantization.is_declared(whole):
            parser.error("config.json has a quantisation of its own, which goes before the file's")
        said = json.loads(options.quantization.read_text("utf-8"))
        whole = quantization.merged(whole, said, name=str(options.quantization))
    config = with_layers(keep_sizing_fields(dict(whole)), whole)
    if kept(config) != kept(whole) or weighed(config) != weighed(whole):
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
